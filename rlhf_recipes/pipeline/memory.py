"""The most memory that a stage took: of this process, and of the accelerator."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
from pathlib import Path
from typing import Any

import psutil

from rlhf_recipes.errors import UsageError

UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "mib": 2**20, "gib": 2**30}
PROCESS = Path("/proc/self")  # Linux; elsewhere a process's peak cannot be measured anew


def begin() -> None:
    """What was taken before no longer counts, and what is free of it goes back to the machine."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc's; others give back by themselves
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")
    if torch := _accelerated():
        torch.cuda.empty_cache()  # else the next model gets what lies between the last one's pieces
        torch.cuda.reset_peak_memory_stats()


def peak() -> dict[str, int]:
    """Bytes since `begin`, as far as they can be told. A card runs out of what is reserved."""
    found = {}
    with contextlib.suppress(OSError):
        if most := re.search(r"^VmHWM:\s+(\d+) kB", (PROCESS / "status").read_text(), re.MULTILINE):
            found["process_bytes"] = 1024 * int(most[1])
    if torch := _accelerated():
        found["gpu_bytes"] = torch.cuda.max_memory_allocated()
        found["gpu_reserved_bytes"] = torch.cuda.max_memory_reserved()
    return found


def now() -> int:
    """Bytes that this process holds."""
    return psutil.Process().memory_info().rss


def _accelerated() -> Any:
    """torch, where a stage has loaded it and uses a card."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None


def read_size(text: str) -> float:
    """Bytes of "24GB". Raises UsageError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt]i?b)", text.strip().lower())
    if not found or found[2] not in UNITS:
        raise UsageError(f"{text!r} is no size of memory", "as in --device 24GB")
    return float(found[1]) * UNITS[found[2]]


def read_cards(text: str) -> tuple[int, float]:
    """How many cards, and the bytes of each, of "4x24GB" or "24GB". Raises UsageError."""
    found = re.fullmatch(r"\s*([1-9]\d{0,3})\s*[x×]\s*(.+)", text, re.IGNORECASE)
    return (int(found[1]), read_size(found[2])) if found else (1, read_size(text))


def free() -> float:
    """Bytes that this machine, or the container that this process is in, has left."""
    most = float(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{what}").read_text()) for what in ("max", "current"))
        return min(most, limit - used)
    return most
