"""A launcher that forks: groups of processes that need not import everything anew."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rlhf_recipes.pipeline import launch

GRACE = 30.0  # seconds that torchrun gives the others, once one has failed
Fault = Callable[[int], None]  # what is done in a process before its stage, by its number


class Forked:
    """As much of a `subprocess.Popen` as the runner asks of a launcher."""

    def __init__(self, spec: Path, lock: int, shown: int | None, count: int, fault: Fault) -> None:
        held = os.dup(lock)  # filelock closes its own in a child
        self.pid = os.fork()
        if not self.pid:
            try:
                _launcher(spec, held, shown, count, fault)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        os.close(held)
        self.code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 1e9)
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise subprocess.TimeoutExpired("forked", timeout or 0)
            else:
                time.sleep(0.02)
        return self.code

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def _launcher(spec: Path, lock: int, shown: int | None, count: int, fault: Fault) -> None:
    """What torchrun does: start, watch, and end the others where one fails."""
    os.setsid()
    launch.end_with_parent()
    os.dup2(lock, 0)
    if shown is not None:
        os.dup2(shown, 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [_process(spec, rank, count, port, fault) for rank in range(count)]

    def end(*_: object) -> None:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        signal.signal(signal.SIGALRM, kill)
        signal.setitimer(signal.ITIMER_REAL, GRACE)

    def kill(*_: object) -> None:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    failed = False
    while ranks:
        pid, status = os.waitpid(-1, 0)
        ranks.remove(pid)
        if status and not failed:
            failed = True
            end()
    os._exit(int(failed))


def _process(spec: Path, rank: int, count: int, port: int, fault: Fault) -> int:
    if pid := os.fork():
        return pid
    try:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        from rlhf_recipes.pipeline import worker

        os.setsid()
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in own.items()})
        fault(rank)
        os._exit(worker.main(spec))
    except BaseException:
        traceback.print_exc()
    os._exit(1)


@contextlib.contextmanager
def forking(count: int = 2, fault: Fault = lambda rank: None) -> Iterator[str]:
    """A `launch` command for `run` that starts groups of `count` by forks of this process."""

    def start(words: list[str], lock: int, shown: int | None) -> Forked:
        return Forked(Path(words[-1]), lock, shown, count, fault)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "start", start)
        yield "forked"
