"""What a person sees of a run: headings, a bar or plain lines, samples; the noise goes to a log.

All of it goes to stderr. Libraries print, log and warn where they like, some of them from C, so
while a stage runs the process's stdout and stderr themselves lead into the log, and the screen
keeps a way of its own to the person.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from rlhf_recipes.store.files import FORMAT, no_link, to_json, write_text
from rlhf_recipes.store.layout import PROGRESS
from rlhf_recipes.store.provenance import now
from rlhf_recipes.text import cut, duration, masked, plain, writable

LINE_SHARE = 0.1  # without a terminal: a line at least every so much of the work …
LINE_SECONDS = 15  # … or after so long, and later, when a stage takes hours, less often
SHOWN_NUMBERS = 3
BEAT_SECONDS = 1.0  # between two writings of progress.json, at least
SPEED_SECONDS = 3600  # a PPO update can take minutes: rich's 30 s would never see two


class Screen:
    """The person's side of one run, and the run's log file."""

    def __init__(self, log: Path) -> None:
        self.log_path = log
        self._log = open(
            log, "a", buffering=1, encoding="utf-8", errors="backslashreplace", opener=no_link
        )
        self._log.write(masked(f"==== {now()} {' '.join(sys.argv)}\n"))
        self._stream = _own_way_to(sys.stderr)
        self.out = _own_way_to(sys.stdout)  # for results that come while all is quiet
        self.console = Console(file=self._stream, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a full disk is told of by what it stopped
            self._log.close()
            self._mask()
        for own, stream in ((self._stream, sys.stderr), (self.out, sys.stdout)):
            if own is not stream:
                own.close()

    def _mask(self) -> None:
        """Take secrets out of the log: libraries print what they like, and a killed run's stays."""
        with self.log_path.open("rb+") as stream:
            text = stream.read().decode(errors="backslashreplace")
            if (clean := masked(text)) != text:
                stream.seek(0)
                stream.write(clean.encode())
                stream.truncate()

    @property
    def descriptor(self) -> int | None:
        """Of the way to the person; None where there is none, as in a notebook."""
        try:
            return self._stream.fileno()
        except (OSError, io.UnsupportedOperation):
            return None

    def line(self, text: str, style: str = "") -> None:
        text = masked(text)
        self.console.print(Text(text, style))
        self._log.write(text + "\n")

    def log_traceback(self) -> None:
        self._log.write(masked(traceback.format_exc()))

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Everything that anything in this process prints, logs or warns goes to the log."""
        handler, ours = logging.StreamHandler(self._log), logging.getLogger("rlhf_recipes")
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        _flush()
        saved = {descriptor: os.dup(descriptor) for descriptor in _outputs()}
        for descriptor in saved:
            os.dup2(self._log.fileno(), descriptor)
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        try:
            yield
        finally:
            ours.removeHandler(handler)
            gc.collect()  # an abandoned tqdm bar prints its last line when it is collected
            try:
                _flush()
            except OSError:  # the log's disk is full: what is left of the noise goes nowhere
                with open(os.devnull, "wb") as nowhere:
                    for descriptor in saved:
                        os.dup2(nowhere.fileno(), descriptor)
                    _flush()
            for descriptor, copy in saved.items():
                os.dup2(copy, descriptor)
                os.close(copy)


def _own_way_to(stream: TextIO) -> IO[str]:
    """A stream to where `stream` leads, which redirecting the latter leaves alone."""
    try:
        copy = os.dup(stream.fileno())
    except (OSError, io.UnsupportedOperation):
        return stream  # a notebook's or a test's: no descriptor, nothing to redirect
    return open(copy, "w", encoding=stream.encoding, errors="replace", buffering=1)


def _outputs() -> set[int]:
    """The descriptors that output leaves by: the process's own, and Python's where they differ."""
    found = {1, 2}
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, io.UnsupportedOperation):
            found.add(stream.fileno())
    return found


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


class StageProgress:
    """What a stage tells: shows it, and appends it to metrics.jsonl and samples.jsonl."""

    def __init__(
        self, screen: Screen, folder: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._screen = screen
        self._folder = folder
        self._clock = clock
        self._started = clock()
        self._last = (self._started, 0.0)  # at the last plain line
        self._numbers: dict[str, float] = {}
        self._done = 0
        self._first: dict[str, float] | None = None  # what was told first, in this process
        self._beat_at = -math.inf
        self._bar = Progress(
            TextColumn("  "),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            console=screen.console,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            speed_estimate_period=SPEED_SECONDS,
            get_time=clock,
            disable=not screen.console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, numbers="starting")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, total: int, **numbers: float) -> None:
        """`done` of `total` steps; the numbers that matter most come first."""
        self._done = done
        self._numbers |= numbers
        seconds = round(self._clock() - self._started, 3)
        if numbers:
            row = {"step": done, **numbers, "of": total, "seconds": seconds}
            self._append("metrics.jsonl", row)
        self._beat(done, total, seconds)
        shown = _shown(self._numbers)
        self._bar.update(self._task, completed=done, total=total, numbers=shown)
        if self._bar.disable:
            self._plain_line(done, total, shown)

    def sample(self, prompt: str, answer: str, **numbers: float) -> None:
        """A completion worth looking at, as the stage goes."""
        entry = {"step": self._done, "prompt": prompt, "answer": answer, **numbers}
        self._append("samples.jsonl", entry)
        text = f"    {cut(plain(prompt), 60)} → {cut(plain(answer), 120)}"
        self._screen.line(f"{text}   {_shown(numbers)}".rstrip(), "dim")

    def resume(self, done: int) -> None:
        """The stage begins after step `done`: what was written of later ones is dropped."""
        for name in ("metrics.jsonl", "samples.jsonl"):
            file = self._folder / name
            # A kill may have cut the last line; and a text may hold what `splitlines` splits at.
            text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
            kept = [line for line in text.split("\n")[:-1] if _step(line) <= done]
            write_text(file, "".join(line + "\n" for line in kept))
        if done:
            self.note(f"goes on from its checkpoint after step {done}")

    def note(self, text: str) -> None:
        self._screen.line(f"  {plain(text)}", "dim")

    def _beat(self, done: int, total: int, seconds: float) -> None:
        """Say on disk how far it is and when that was, for who looks from elsewhere.

        It is not synced, and no run fails for it.
        """
        self._first = self._first or {"step": done, "seconds": seconds}
        if seconds - self._beat_at < BEAT_SECONDS and done < total:
            return
        self._beat_at = seconds
        beat = {"format": FORMAT, "step": done, "of": total, "seconds": seconds, "at": now()}
        new = self._folder / f".{PROGRESS}"
        with contextlib.suppress(OSError):
            new.write_text(to_json({**beat, "first": self._first}))
            new.replace(self._folder / PROGRESS)

    def _plain_line(self, done: int, total: int, shown: str) -> None:
        now, share = self._clock(), done / max(total, 1)
        waited = max(LINE_SECONDS, (now - self._started) / 20)
        due = share - self._last[1] > LINE_SHARE - 1e-9 or now - self._last[0] >= waited
        if share == self._last[1] or not (due or done >= total):
            return
        self._last = (now, share)
        seconds = self._bar.tasks[0].time_remaining if share < 1 else None
        left = "" if seconds is None else f"{duration(seconds)} left"
        self._screen.line(f"  {done}/{total}  {left:<12}  {shown}".rstrip())

    def _append(self, name: str, entry: dict[str, Any]) -> None:
        with (self._folder / name).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(to_json(entry) + "\n")


def _step(line: str) -> float:
    """What step a line is of; none that was reached where a power cut left something else."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


def _shown(numbers: dict[str, float]) -> str:
    first = list(numbers.items())[:SHOWN_NUMBERS]
    return "  ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in first)


def begin(what: str) -> None:
    """At a terminal, name a step before it keeps a person waiting for over two seconds."""
    with beginning() as tell:
        tell(what)


@contextlib.contextmanager
def beginning() -> Iterator[Callable[[str], None]]:
    """`begin` for steps inside of what is quiet."""
    theirs = sys.stderr
    if not theirs.isatty():  # whatever FORCE_COLOR says: a script may read it
        yield lambda what: None
        return
    stream = _own_way_to(theirs)
    console = Console(file=stream, highlight=False, soft_wrap=True)
    try:
        yield lambda what: console.print(Text(writable(f"{what} …", console.encoding), "dim"))
    finally:
        if stream is not theirs:
            stream.close()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What libraries say meanwhile is not for a person."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
