"""Locks of the kernel: each dies with its process, so nobody ever clears one by hand."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from rlhf_recipes.errors import BusyError
from rlhf_recipes.store.layout import beside
from rlhf_recipes.store.provenance import now

MOMENT = 0.05  # seconds: a process that only looks (`held`) has the lock for an instant


@contextlib.contextmanager
def lock(folder: Path, what: str, waiting: Callable[[str], None] | None = None) -> Iterator[int]:
    """Hold `folder` for this process alone, by a file beside it; yields the file's descriptor.

    A process that inherits the descriptor holds the lock too, if this one is killed.

    If another process holds it: raises BusyError, which names that process; or tells `waiting` the
    same, and waits.
    """
    from filelock import FileLock, Timeout  # 50 ms, and most commands only look

    file = lock_file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    # FileLock follows no symbolic link, and a lock on a file that was removed is not one. With
    # `on_acquired` it never falls back to a lock that would outlive its process.
    held_by: list[int] = []

    def sign(descriptor: int) -> None:
        _sign(descriptor)
        held_by.append(descriptor)

    ours = FileLock(file, on_acquired=sign)
    try:
        got = ours.acquire(timeout=MOMENT)
    except Timeout:
        held = f"{what} is held by {_holder(file) or 'another process'}"
        if waiting is None:
            hint = "--wait waits for it; nothing needs to be cleared by hand"
            raise BusyError(held, hint) from None
        waiting(f"{held}: waiting for it")
        got = ours.acquire()
    with got:
        yield held_by[-1]


def _sign(descriptor: int) -> None:
    """Write into the lock's file who holds it."""
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {platform.node()} since {now()}\n".encode())


def _holder(file: Path) -> str:
    with contextlib.suppress(FileNotFoundError):  # it is done, and the file is gone
        return file.read_text(encoding="utf-8").strip()
    return ""


def holder(folder: Path) -> tuple[int, str] | None:
    """The process that holds `folder`, and its machine; None where none does."""
    found = re.match(r"process (\d+) on (.+) since ", _holder(lock_file(folder)))
    return (int(found[1]), found[2]) if found and held(folder) else None


def held(folder: Path) -> bool:
    """Whether a live process holds `folder`.

    FileLock would make the file and open it for writing; this reads alone.
    """
    with contextlib.suppress(FileNotFoundError), lock_file(folder).open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def lock_file(folder: Path) -> Path:
    return beside(folder, "lock")
