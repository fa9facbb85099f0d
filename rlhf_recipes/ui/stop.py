"""Stops a run as Ctrl-C does: the process that holds its lock gets the signal, and no other."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
from datetime import datetime
from pathlib import Path

from rlhf_recipes.store import locks

AGAIN_SECONDS = 30.0  # a second request stops at once, as a second Ctrl-C: no double click is one


class Stops:
    """What was asked of which process."""

    def __init__(self) -> None:
        self._asked: dict[tuple[Path, int], datetime] = {}

    def said(self, folder: Path) -> str:
        """What was asked of the process that runs it now; "" where nothing was."""
        found = locks.holder(folder)
        at = self._asked.get((folder, found[0])) if found else None
        if found is None or at is None:
            return ""
        told = f"Asked to stop at {at:%H:%M:%S}: process {found[0]} got what Ctrl-C sends. "
        return f"{told}It ends after this step, or within half a minute. What is done stays."

    def stop(self, folder: Path) -> str:
        """Ask, and say "", or why it cannot be asked."""
        found = locks.holder(folder)
        if found is None:
            return "It is not running: there is nothing to stop."
        pid, machine = found
        if machine != platform.node():
            return f"It runs on {machine}: stop it there."
        at, now = self._asked.get((folder, pid)), datetime.now()
        if at is None or (now - at).total_seconds() > AGAIN_SECONDS:
            try:
                os.kill(pid, _signal(pid))
            except OSError as error:
                return f"Process {pid} cannot be asked: {error.strerror}."
            self._asked[folder, pid] = now
        return ""


def _signal(pid: int) -> signal.Signals:
    """Ctrl-C's; or, to a process that ignores it, as a script's background job does, SIGTERM."""
    with contextlib.suppress(OSError):
        ignored = re.search(r"SigIgn:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
        if ignored and int(ignored[1], 16) >> (signal.SIGINT - 1) & 1:
            return signal.SIGTERM
    return signal.SIGINT
