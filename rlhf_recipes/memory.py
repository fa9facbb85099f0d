"""The most memory that a stage took: of this process, and of the accelerator."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

PROCESS = Path("/proc/self")  # Linux; elsewhere a process's peak cannot be measured anew


def begin() -> None:
    """What was taken before no longer counts."""
    with contextlib.suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")
    if torch := _accelerated():
        torch.cuda.reset_peak_memory_stats()


def peak() -> dict[str, int]:
    """Bytes since `begin`, as far as they can be told."""
    found = {}
    with contextlib.suppress(OSError):
        most = re.search(r"^VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text(), re.MULTILINE)
        found = {"process_bytes": 1024 * int(most[1])} if most else {}
    if torch := _accelerated():
        found["gpu_bytes"] = torch.cuda.max_memory_allocated()
    return found


def _accelerated() -> Any:
    """torch, where a stage has loaded it and uses a card."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None
