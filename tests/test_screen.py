from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest

from rlhf_recipes.screen import Screen, StageProgress, begin, beginning, quietly
from rlhf_recipes.text import duration, plain


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(
    folder: Path, steps: Callable[[StageProgress, Clock], None], capfd: pytest.CaptureFixture[str]
) -> list[str]:
    """The lines that a person without a terminal reads."""
    clock = Clock()
    with Screen(folder / "log.txt") as screen, StageProgress(screen, folder, clock) as progress:
        steps(progress, clock)
    return capfd.readouterr().err.splitlines()


def jsonl(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_line_every_tenth(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def steps(progress: StageProgress, clock: Clock) -> None:
        for done in range(1, 101):
            clock.now += 1.0
            progress.update(done, 100, loss=2 / done, kl_per_token=0.5, score=12.345, length=7)

    lines = shown(tmp_path, steps, capfd)
    assert [line.split()[0] for line in lines] == [f"{n}/100" for n in range(10, 101, 10)]
    assert lines[0] == "  10/100  1 min 30 s left  loss 0.2  kl per token 0.5  score 12.3"
    assert lines[-1] == "  100/100                loss 0.02  kl per token 0.5  score 12.3"
    metrics = jsonl(tmp_path / "metrics.jsonl")
    assert len(metrics) == 100
    assert metrics[3] == {
        "step": 4, "loss": 0.5, "kl_per_token": 0.5, "score": 12.345, "length": 7, "of": 100,
        "seconds": 4.0,
    }  # fmt: skip


def test_slow_steps_still_show_and_then_less_often(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def steps(progress: StageProgress, clock: Clock) -> None:
        for done in range(1, 1001):
            clock.now += 8.0
            progress.update(done, 10000, loss=1.0)

    lines = shown(tmp_path, steps, capfd)
    at = [8 * int(line.split("/")[0]) for line in lines]  # seconds
    waits = [after - before for before, after in zip(at, at[1:], strict=False)]
    assert at[0] == 16
    assert waits[0] == 16  # 15 s, rounded up to a step
    assert waits[-1] == 392  # a twentieth of the 7,800 s so far
    assert len(lines) < 80


def test_an_update_without_numbers_keeps_the_last(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def steps(progress: StageProgress, clock: Clock) -> None:
        progress.update(0, 4)
        progress.update(1, 4, loss=float("nan"))
        clock.now += 5.0
        progress.update(2, 4)
        progress.update(2, 4)
        progress.note("half\x1b[2J way")

    assert shown(tmp_path, steps, capfd) == [
        "  1/4                loss nan",
        "  2/4  10 s left     loss nan",
        "  half way",
    ]
    assert jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": None, "of": 4, "seconds": 0.0}]


def test_how_far_it_is_is_on_disk_at_most_once_a_second(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, written = tmp_path / "progress.json", []
    replace = Path.replace

    def counted(path: Path, target: Path) -> Path:
        written.append(json.loads(path.read_text())["step"])
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", counted)

    def steps(progress: StageProgress, clock: Clock) -> None:
        for done in range(101, 131):
            clock.now += 0.4
            progress.update(done, 200)
            progress.update(done, 200, loss=1.0)
        clock.now += 0.1
        progress.update(200, 200)

    shown(tmp_path, steps, capfd)
    assert written == [*range(101, 131, 3), 200]
    beat = json.loads(file.read_text())
    age = datetime.now(UTC) - datetime.fromisoformat(beat.pop("at"))
    assert 0 <= age.total_seconds() < 60
    first = {"step": 101, "seconds": 0.4}
    assert beat == {"format": 1, "step": 200, "of": 200, "seconds": 12.1, "first": first}

    def no_room(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", no_room)
    shown(tmp_path, lambda progress, clock: progress.update(1, 2), capfd)  # no run fails for it


def test_samples_are_one_harmless_line_and_kept_whole(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompt = "Where is\n\x1b]0;owned\x07 Paris?\x1b[31m [bold]x[/bold]"
    answer = "In \u202eFrance.\x9b2J " + "word " * 100

    def steps(progress: StageProgress, clock: Clock) -> None:
        progress.update(1, 2)
        progress.sample(prompt, answer, score=1.25)

    line = shown(tmp_path, steps, capfd)[-1]
    assert line.startswith("    Where is Paris? [bold]x[/bold] → In France.2J word word")
    assert line.endswith(" w…   score 1.25")
    assert len(line) < 200
    assert jsonl(tmp_path / "samples.jsonl") == [
        {"step": 1, "prompt": prompt, "answer": answer, "score": 1.25}
    ]


def test_a_terminal_has_a_bar_that_leaves_nothing_behind(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    stderr = sys.stderr
    try:
        sys.stderr = open(theirs, "w", closefd=False)
        with Screen(tmp_path / "log.txt") as screen, screen.quiet():
            with StageProgress(screen, tmp_path) as progress:
                progress.update(3, 10, loss=0.5)
                progress.sample("Why?", "Because.")
    finally:
        sys.stderr.close()
        sys.stderr = stderr
    seen = os.read(ours, 100_000).decode()
    os.close(ours)
    os.close(theirs)
    assert " 3/10" in seen
    assert "loss 0.5" in seen
    assert "    Why? → Because." in seen
    assert seen.endswith("\x1b[1A\x1b[2K")  # the bar's own line is taken back
    assert "3/10" not in (tmp_path / "log.txt").read_text()


def test_everything_printed_goes_to_the_log(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Screen(tmp_path / "log.txt") as screen:
        with screen.quiet():
            print("from python")
            os.write(2, b"from C\n")
            screen.line("for the person")
        print("after")
    out, err = capfd.readouterr()
    assert (out, err) == ("after\n", "for the person\n")
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert log[0].startswith("==== 20")
    assert sorted(log[1:]) == ["for the person", "from C", "from python"]


def test_words() -> None:
    assert [duration(s) for s in (0.4, 59.4, 125, 3725)] == [
        "0 s", "59 s", "2 min 05 s", "1 h 02 min"
    ]  # fmt: skip
    assert plain("  a\tb\r\nc\x00\x1b[1;31md\x1b]8;;http://x\x1b\\e  ") == "a b cde"


def test_a_resumed_stage_keeps_what_led_to_its_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def first(progress: StageProgress, clock: Clock) -> None:
        for done in (1, 2, 3):
            progress.update(done, 4, loss=float(done))
            progress.sample("a\u2028prompt\u0085", "answer")

    def again(progress: StageProgress, clock: Clock) -> None:
        progress.resume(2)
        progress.update(3, 4, loss=30.0)

    shown(tmp_path, first, capfd)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    assert "goes on" in shown(tmp_path, again, capfd)[0]
    assert [line["loss"] for line in jsonl(tmp_path / "metrics.jsonl")] == [1.0, 2.0, 30.0]
    assert (tmp_path / "samples.jsonl").read_text().count("\n") == 2


def test_a_step_is_named_before_it_keeps_a_person_waiting(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # Jupyter sets it
    begin("Encoding the rows")
    assert capsys.readouterr().err == ""
    monkeypatch.delenv("FORCE_COLOR")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    begin("Encoding the rows")
    assert capsys.readouterr().err == "\x1b[2mEncoding the rows …\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    with beginning() as tell, quietly():
        tell("  sft")
    assert "  sft …" in capsys.readouterr().err
