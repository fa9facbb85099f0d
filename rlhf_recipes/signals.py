"""Ctrl-C and SIGTERM: they raise where the program is, but a training loop first ends its step.

Only the main thread hears signals; elsewhere all of this does nothing.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from rlhf_recipes import group

# An exception that is raised inside a destructor is lost: the raising is repeated so often.
AGAIN_SECONDS = 5.0

_heard: list[int] = []  # what the block under way was sent
tell: Callable[[str], Any] = lambda text: None  # noqa: E731  (how the person is told; the runner's)


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the program was, so that it ends in order as on Ctrl-C."""


def at_once() -> contextlib.AbstractContextManager[bool]:
    """SIGTERM raises Terminated, as SIGINT raises KeyboardInterrupt by itself."""
    return _handled(_raise, signal.SIGTERM)


@contextlib.contextmanager
def deferred(patience: float = 20.0) -> Iterator[None]:
    """Around a training loop that asks `requested()` after each step, and then saves and ends.

    With a request, leaving the block raises KeyboardInterrupt (Terminated, for SIGTERM). The block
    itself does, in place, at a second signal, or where it has not ended after `patience` seconds.
    """

    def hear(signum: int, frame: FrameType | None) -> None:
        if _heard:
            _raise(_heard[0])
        elif signum != signal.SIGALRM:
            _heard.append(signum)
            signal.setitimer(signal.ITIMER_REAL, patience, AGAIN_SECONDS)
            with contextlib.suppress(Exception):
                tell("stopping after this step, or within half a minute; once more stops at once")

    try:
        with _handled(hear, signal.SIGINT, signal.SIGTERM, signal.SIGALRM) as hearing:
            try:
                yield
            finally:
                if hearing:
                    signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        if hearing and _heard:
            _raise(_heard.pop())


def requested() -> bool:
    """Whether the `deferred` block that the program is in was asked to end.

    One process of a group that was asked is enough: all of them end after the same step.
    """
    if group.any_of(bool(_heard)) and not _heard:
        _heard.append(signal.SIGTERM)
    return bool(_heard)


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *signals: int) -> Iterator[bool]:
    """Whether `handler` gets them: it does on the main thread, and none that this process ignores
    (as a job in a script's background ignores SIGINT)."""
    if threading.current_thread() is not threading.main_thread():
        yield False
        return
    before = {s: signal.getsignal(s) for s in signals if signal.getsignal(s) != signal.SIG_IGN}
    try:
        for signum in before:
            signal.signal(signum, handler)
        yield True
    finally:
        for signum, former in before.items():
            signal.signal(signum, former)


def _raise(signum: int, frame: FrameType | None = None) -> NoReturn:
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt
