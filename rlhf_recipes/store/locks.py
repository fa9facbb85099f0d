"""Locks of the kernel: each dies with its process, so nobody ever clears one by hand."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from rlhf_recipes.errors import BusyError
from rlhf_recipes.store.files import no_link
from rlhf_recipes.store.layout import beside
from rlhf_recipes.store.provenance import now


@contextlib.contextmanager
def lock(folder: Path, what: str, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold `folder` for this process alone, by a file beside it.

    Where another process holds it: raises BusyError, which names that process; or tells `waiting`
    the same, and waits.
    """
    file = lock_file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(file, "a+", encoding="utf-8", opener=no_link) as stream:
            if not _got(stream):
                stream.seek(0)
                held = f"{what} is held by {stream.read().strip() or 'another process'}"
                if waiting is None:
                    raise BusyError(
                        held, "--wait waits for it; nothing needs to be cleared by hand"
                    )
                waiting(f"{held}: waiting for it")
                fcntl.flock(stream, fcntl.LOCK_EX)
            if not _is_still(file, stream):
                continue  # who had it removed the file, and a third may hold a new one
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {platform.node()} since {now()}\n")
            stream.flush()
            yield
            return


def _got(stream: IO[str]) -> bool:
    """Whether the lock is ours now. Asked twice: who only looks (`held`) has it for an instant."""
    for pause in (0.05, 0.0):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(pause)
    return False


def held(folder: Path) -> bool:
    """Whether a live process holds `folder`; nothing is made or written to find out."""
    with contextlib.suppress(FileNotFoundError), lock_file(folder).open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def lock_file(folder: Path) -> Path:
    return beside(folder, "lock")


def _is_still(file: Path, stream: IO[str]) -> bool:
    """Whether an open file is still the one of that name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(file.stat(), os.fstat(stream.fileno()))
    return False
