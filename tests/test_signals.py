from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from rlhf_recipes import signals

KINDS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, signals.Terminated)]


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


@pytest.fixture(autouse=True)
def handlers_are_given_back():
    def now() -> list:
        return [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]

    before = now()
    yield
    assert now() == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    assert not signals.requested()


@pytest.mark.parametrize(("signum", "kind"), KINDS)
def test_a_step_is_ended_first(signum: int, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, told = [], []
    monkeypatch.setattr(signals, "tell", told.append)
    with pytest.raises(KeyboardInterrupt) as caught, signals.deferred():
        for step in range(9):
            if step == 3:
                send(signum)
            steps.append(step)
            if signals.requested():
                break
    assert caught.type is kind
    assert steps == [0, 1, 2, 3]
    assert told == ["stopping after this step, or within half a minute; once more stops at once"]


@pytest.mark.parametrize(("signum", "kind"), KINDS)
def test_a_second_signal_raises_in_place(signum: int, kind: type) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, signals.deferred():
        send(signum)
        send(signum)
        pytest.fail("went on")
    assert caught.type is kind


def test_patience_has_an_end_even_where_the_raising_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signals, "AGAIN_SECONDS", 0.05)
    lost = []
    with pytest.raises(signals.Terminated), signals.deferred(patience=0.05):
        send(signal.SIGTERM)
        try:
            time.sleep(5)
        except KeyboardInterrupt:
            lost.append(True)
        time.sleep(5)
        pytest.fail("went on")
    assert lost == [True]


def test_an_error_that_the_signal_led_to_is_an_interruption() -> None:
    with pytest.raises(KeyboardInterrupt), signals.deferred():
        send(signal.SIGINT)
        raise RuntimeError("DataLoader worker exited")  # Ctrl-C reaches the workers, too


def test_an_error_of_its_own_passes() -> None:
    with pytest.raises(RuntimeError), signals.deferred():
        raise RuntimeError


def test_outside_a_block_it_raises_at_once() -> None:
    for signum, kind in KINDS:
        with pytest.raises(kind), signals.at_once():
            send(signum)
            pytest.fail("went on")


def test_what_the_process_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.deferred():
            send(signal.SIGINT)
            assert not signals.requested()
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_hears_nothing_and_takes_nothing_away() -> None:
    def elsewhere(use: Callable) -> list:
        seen = []

        def work() -> None:
            with use():
                seen.append(signals.requested())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return seen

    assert elsewhere(signals.at_once) == elsewhere(signals.deferred) == [False]
    with pytest.raises(KeyboardInterrupt), signals.deferred():
        send(signal.SIGINT)
        assert elsewhere(signals.deferred) == [True]
        assert signals.requested()
