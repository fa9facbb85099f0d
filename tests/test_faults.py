"""Whatever fails, wherever: one line, and the same command ends with the same bytes.

Every operation on a file below the runs folder fails once, in a process of its own, with stages
that only count. `make torture` fails them all; here it is every so many.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import gc
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes import rundir, stages
from rlhf_recipes.errors import RlhfRecipesError
from rlhf_recipes.recipe import Recipe, load_recipe
from rlhf_recipes.runner import run
from tests import counting
from tests.counting import STEPS, Counting, toy
from tests.test_cli import command, environment

KILLED = 137


# ---- faults -------------------------------------------------------------------------------------


class Faults:
    """Counts the operations on files below `root`; at number `at`, `fail` is called instead."""

    def __init__(self, root: Path, at: int = 0, fail: Callable[[], None] = lambda: None) -> None:
        self.root, self.at, self.fail = os.path.realpath(root), at, fail
        self.seen: list[str] = []
        for module, names in [
            (os, "open fsync replace rename unlink rmdir mkdir listdir scandir"),
            (fcntl, "flock"),
        ]:
            for name in names.split():
                setattr(module, name, partial(self._operate, name, getattr(module, name)))
        io.open = builtins.open = partial(self._open, io.open)

    def step(self, name: str, file: Any, dir_fd: int | None = None, half: Any = None) -> None:
        """One operation on a file: a path, a descriptor or a stream. `half` is done if it fails."""
        if hasattr(file, "fileno"):
            file = file.fileno()
        if isinstance(file, int):
            file = os.readlink(f"/proc/self/fd/{file}")
        folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        path = os.path.join(folder, os.fspath(file))
        if (path + os.sep).startswith(self.root + os.sep):
            self.seen.append(f"{name} {path}")
            if len(self.seen) == self.at:
                if half is not None:
                    half()
                self.fail()

    def _operate(self, name: str, real: Callable, file: Any = ".", *rest: Any, **words: Any) -> Any:
        self.step(name, file, words.get("dir_fd"))
        return None if name == "fsync" else real(file, *rest, **words)  # the disk is not at issue

    def _open(self, real: Callable, file: Any, mode: str = "r", *rest: Any, **words: Any) -> Any:
        if isinstance(file, int):
            return real(file, mode, *rest, **words)
        self.step("open", file)
        if mode in ("r", "rb"):
            return real(file, mode, *rest, **words)
        raw = _Raw(os.fspath(file), mode.replace("b", ""))
        raw.faults = self
        stream = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return stream
        buffering = rest[0] if rest else words.pop("buffering", -1)
        encoding, errors, newline = (*rest[1:], None, None, None)[:3]
        words = {"encoding": encoding, "errors": errors, "newline": newline} | words
        return io.TextIOWrapper(stream, **words, line_buffering=buffering == 1)


class _Raw(io.FileIO):
    faults: Faults

    def write(self, data: Any) -> int:
        real = super().write
        self.faults.step("write", self, half=lambda: real(bytes(data)[: len(data) // 2]))
        return real(data)


def error(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


FAULTS = {
    "EIO": error(errno.EIO),
    "ENOSPC": error(errno.ENOSPC),
    "kill": lambda: os._exit(KILLED),
}
FAULT_WORDS = {"EIO": "Input/output error", "ENOSPC": "No space left on device"}


def start(recipe: Recipe, at: int = 0, fault: str = "EIO", **options: Any) -> int:
    """A run in a process of its own, whose id this is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork where other tests left threads
        child = os.fork()
    if child:
        return child
    code, line, faults, beside = 99, "", None, recipe.path.parent
    try:
        gc.freeze()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout = sys.stderr = (beside / "screen").open("a", buffering=1)
        os.dup2(sys.stderr.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        faults = Faults(beside / "runs", at, FAULTS[fault])
        run(recipe, **({"runs": beside / "runs"} | options))
        code = 0
    except RlhfRecipesError as error:
        code, line = error.exit_code, str(error)
    except BaseException:
        line = traceback.format_exc()
    finally:
        seen = faults.seen if faults else []
        (beside / f"said-{os.getpid()}").write_text(json.dumps([line, seen]))
        os._exit(code)


def end(recipe: Recipe, child: int) -> tuple[int, str, list[str]]:
    """Its exit code, what it said, the operations that it made."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = recipe.path.parent / f"said-{child}"
    line, seen = json.loads(said.read_text()) if code != KILLED else ("", [])
    return code, line, seen


def attempt(recipe: Recipe, at: int = 0, fault: str = "EIO", **options: Any) -> tuple:
    return end(recipe, start(recipe, at, fault, **options))


def outputs(runs: Path) -> dict[str, bytes]:
    """The bytes of all that a run promises, by their place below the runs folder."""
    made = [*runs.glob(".stages/[!.]*/output/**/*"), *runs.glob("[!.]*/model/**/*")]
    made += runs.glob("[!.]*/results.json")
    return {
        file.relative_to(runs).as_posix(): file.read_bytes()
        for file in made
        if file.is_file() and file.name not in ("source.json", "README.md")
    }


def no_part_is_taken_for_a_whole(runs: Path, whole: dict[str, bytes]) -> None:
    """Where a record stands, every file that it speaks for is there, and whole."""
    for record in [*runs.glob(".stages/*/stage.json"), *runs.glob("*/model/source.json")]:
        folder = record.parent
        named = folder.with_name(folder.name.removeprefix(".").removesuffix(".fresh"))
        place = named.relative_to(runs).as_posix() + "/"
        for name, data in whole.items():
            if name.startswith(place):
                file = folder / name.removeprefix(place)
                assert file.is_file() and file.read_bytes() == data, file


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    import rlhf_recipes.checkpoints  # noqa: F401  (torch: once, for all that are forked from here)

    Counting(monkeypatch)
    monkeypatch.setattr(stages, "load", lambda kind: counting.steady)
    rundir.versions()
    text = counting.RECIPE.replace('"reward", "ppo"]', '"reward"]\nevaluation = false')
    return load_recipe(toy(tmp_path, text=text.partition("[ppo]")[0]))


@pytest.mark.parametrize(
    "every", [pytest.param(1, id="all", marks=pytest.mark.torture), pytest.param(7, id="some")]
)
@pytest.mark.parametrize("begin", ["new", "resumed", "fresh"])
def test_every_operation_fails_once(
    recipe: Recipe, tmp_path: Path, begin: str, every: int, record_property: Callable
) -> None:
    """`new`: two stages from nothing. `resumed`, `fresh`: one from its checkpoint, or once more."""
    runs, before, steps = tmp_path / "runs", tmp_path / "before", tmp_path / "steps"
    before.mkdir()
    options = {"fresh": begin == "fresh", "until": None if begin == "new" else "sft"}
    seen = attempt(recipe, until=options["until"])[2]
    whole = outputs(runs)
    if begin == "fresh":
        shutil.copytree(runs, before, dirs_exist_ok=True)
        seen = attempt(recipe, **options)[2]
    if begin == "resumed":
        saved = next(i for i, s in enumerate(seen, 1) if re.match("re.* .*/partial$", s))
        shutil.rmtree(runs)
        assert attempt(recipe, saved + 1, "kill", until="sft")[0] == KILLED
        shutil.copytree(runs, before, dirs_exist_ok=True)
        seen = attempt(recipe, until="sft")[2]
    total = STEPS * {"new": 2, "resumed": 1, "fresh": 1}[begin]

    tried, wrong = 0, []
    for at in range(1, len(seen) + 1, every):
        for fault in FAULTS if every == 1 else [sorted(FAULTS)[at % len(FAULTS)]]:
            shutil.rmtree(runs)
            shutil.copytree(before, runs)
            steps.write_text("")
            tried += 1
            try:
                code, line, _ = attempt(recipe, at, fault, **options)
                assert code == KILLED if fault == "kill" else code in (0, 1), line
                assert code != 1 or (FAULT_WORDS[fault] in line and "\n" not in line), line
                no_part_is_taken_for_a_whole(runs, whole)
                if begin == "fresh" and tried % 2:  # what was whole is so, or another is
                    steps.write_text("")
                    assert attempt(recipe, until="sft")[:2] == (0, "")
                    assert steps.read_text() == ""
                else:
                    assert attempt(recipe, **options)[:2] == (0, "")
                    again = total if code == 0 and begin == "fresh" else 1  # of another pass
                    assert len(steps.read_text().splitlines()) <= total + again
                    assert [*runs.rglob("checkpoint-*"), *runs.rglob(".*.old")] == []
                assert outputs(runs) == whole
            except AssertionError as error:
                wrong.append(f"{fault} at {at}, {seen[at - 1]}: {error}")
    record_property("cases", f"{tried - len(wrong)} of {tried}")
    assert not wrong, "\n".join(wrong)


def waited_for(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


# ---- many processes, and signals ----------------------------------------------------------------


@pytest.mark.parametrize("times", [pytest.param(20, marks=pytest.mark.torture), 1])
@pytest.mark.parametrize("wait", [False, True], ids=["busy", "waiting"])
@pytest.mark.parametrize("same", [True, False], ids=["one-run", "one-stage"])
def test_eight_at_once(
    recipe: Recipe, tmp_path: Path, same: bool, wait: bool, times: int, record_property: Callable
) -> None:
    """Of one run, or of eight that share their stages: one works, once."""
    attempt(recipe)
    whole, runs, hold = outputs(tmp_path / "runs"), tmp_path / "runs", tmp_path / "hold"
    stages_alone = {place for place in whole if place.startswith(".stages")}
    for _ in range(times):
        shutil.rmtree(runs)
        (tmp_path / "steps").write_text("")
        (tmp_path / "screen").write_text("")
        hold.touch()
        names = [None] * 8 if same else [f"run-{number}" for number in range(8)]
        left = {start(recipe, wait=wait, name=name) for name in names}
        if wait:
            waited_for(lambda: (tmp_path / "screen").read_text().count("waiting for it") == 7)
        else:
            for _ in range(7):
                lost, status = os.wait()
                left.remove(lost)
                line = json.loads((tmp_path / f"said-{lost}").read_text())[0]
                assert os.waitstatus_to_exitcode(status) == 75, line
                winner = int(re.match(r"(?:run|stage) \S+ is held by process (\d+) on ", line)[1])
            assert left == {winner}
        hold.unlink()
        assert [end(recipe, child)[:2] for child in left] == [(0, "")] * len(left)
        assert len((tmp_path / "steps").read_text().splitlines()) == 2 * STEPS
        made = outputs(runs)
        assert {place: made[place] for place in stages_alone} == {
            place: whole[place] for place in stages_alone
        }
        for number in range(8 if wait and not same else 0):
            assert made[f"run-{number}/results.json"] in whole.values()
    record_property("cases", f"{times} of {times}")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stage_that_is_asked_to_stop_ends_its_step(
    recipe: Recipe, tmp_path: Path, signum: int, code: int
) -> None:
    """And a second signal ends it at once; no step that was saved is done again."""
    attempt(recipe)
    whole, steps, hold = outputs(tmp_path / "runs"), tmp_path / "steps", tmp_path / "hold"
    shutil.rmtree(tmp_path / "runs")
    for again in (False, True):
        steps.write_text("")
        hold.touch()
        child = start(recipe)
        waited_for(lambda: steps.read_text() != "")
        os.kill(child, signum)
        waited_for(lambda: "once more stops at once" in (tmp_path / "screen").read_text())
        (tmp_path / "screen").write_text("")
        if again:
            os.kill(child, signum)
        else:
            hold.unlink()
        assert end(recipe, child)[:2] == (
            code,
            "run toy was interrupted (the same command goes on from what is finished and saved)",
        )
    assert steps.read_text() == "sft 2\n"
    hold.unlink()
    assert attempt(recipe)[:2] == (0, "")
    assert steps.read_text().startswith("sft 2\nsft 2\nsft 3\nreward 1\n")
    assert outputs(tmp_path / "runs") == whole


@pytest.mark.torture
def test_the_second_command_leaves_within_two_seconds(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "hold").touch()
    first = start(recipe)
    waited_for(lambda: (tmp_path / "steps").exists())
    for name, held in [("toy", "run toy"), ("other", "stage sft")]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        second = command("run", "toy.toml", "--name", name, cwd=tmp_path)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Of work: how long that takes depends on who else works on this machine.
        assert used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime < 2
        assert second.returncode == 75
        assert second.stderr.splitlines()[-1].startswith(f"{held} is held by process {first} on ")
    (tmp_path / "hold").unlink()
    assert end(recipe, first)[:2] == (0, "")


# ---- places -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["with space", "ünï-字", "new\nline", "-dash", "100%s {x} [b]"])
def test_odd_places(recipe: Recipe, tmp_path: Path, name: str) -> None:
    """A folder, and where it can be one, a run, of that name."""
    runs, run_name = tmp_path / "runs" / name, name if name.isprintable() else None
    code, line, seen = attempt(recipe, runs=runs, name=run_name)
    assert (code, line) == (0, "")
    assert attempt(recipe, runs=runs, name=run_name)[:2] == (0, "")
    assert len((tmp_path / "steps").read_text().splitlines()) == 2 * STEPS
    assert rundir.find_run(run_name or "toy", runs) == runs / (run_name or "toy")
    for what in ("log.txt", "resolved.toml", "metrics.jsonl", "stage.json", "results.json"):
        at = next(i for i, s in enumerate(seen, 1) if s.startswith("write") and what in s)
        shutil.rmtree(runs)
        code, line, _ = attempt(recipe, at, "ENOSPC", runs=runs, name=run_name)
        assert code == 1 and "No space left" in line and len(line.splitlines()) == 1


def test_links_and_a_moved_folder(recipe: Recipe, tmp_path: Path) -> None:
    """runs/ is a link, and so is a stage; then all is moved. Nothing is done twice."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to("disk")
    assert attempt(recipe)[:2] == (0, "")
    whole = outputs(tmp_path / "runs")
    sft = next((tmp_path / "disk" / ".stages").glob("sft-*"))
    sft.rename(tmp_path / "far")
    sft.symlink_to(tmp_path / "far")
    assert attempt(recipe)[:2] == (0, "")
    assert len((tmp_path / "steps").read_text().splitlines()) == 2 * STEPS
    assert attempt(recipe, fresh=True)[:2] == (0, "")
    assert sft.is_symlink() and (tmp_path / "runs").is_symlink()
    assert len((tmp_path / "steps").read_text().splitlines()) == 4 * STEPS
    shutil.move(tmp_path / "disk", tmp_path / "moved")
    assert attempt(recipe, runs=tmp_path / "moved")[:2] == (0, "")
    assert len((tmp_path / "steps").read_text().splitlines()) == 4 * STEPS
    assert outputs(tmp_path / "moved") == whole
    run = rundir.find_run("toy", tmp_path / "moved")
    for entry in rundir.read_json(run / "manifest.json")["stages"]:
        assert (run.parent / entry["folder"] / "output" / "weights").is_file()
    (tmp_path / "moved" / ".stages" / "sft-x").symlink_to("nowhere")  # is nobody's stage
    assert attempt(recipe, runs=tmp_path / "moved")[:2] == (0, "")


def in_a_mount_of_its_own(script: str, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A shell script that may mount; skips where this account may not."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"]).returncode:
        pytest.skip("this account may mount nothing")
    return subprocess.run(
        ["unshare", "-rm", "sh", "-ec", script, "sh", *words],
        cwd=cwd,
        env=environment("steady") | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


@pytest.mark.torture
@pytest.mark.parametrize("done", [False, True])
def test_a_folder_that_is_read_only(recipe: Recipe, tmp_path: Path, done: bool) -> None:
    (tmp_path / "runs").mkdir()
    if done:
        attempt(recipe)
    script = """
        mount --bind runs runs
        mount -o remount,ro,bind runs
        exec "$PYTHON" -m tests.counting run toy.toml
    """
    ended = in_a_mount_of_its_own(script, cwd=tmp_path)
    assert ended.returncode == 1
    assert re.fullmatch(
        r"Read-only file system: '.*/runs/\.toy\.lock' \(see who may .*\)\n", ended.stderr
    )


@pytest.mark.torture
def test_a_small_disk_is_full_and_then_is_not(
    recipe: Recipe, tmp_path: Path, record_property: Callable
) -> None:
    attempt(recipe)
    whole, codes = outputs(tmp_path / "runs"), []
    script = """
        mount -t tmpfs -o size=$1k,mode=755 none runs
        "$PYTHON" -m tests.counting run toy.toml 2>first || echo $?
        mount -o remount,size=64m runs
        "$PYTHON" -m tests.counting run toy.toml 2>second
        cp -r runs out
    """
    for kibibytes in (4, 16, 32, 64, 96, 128, 192, 256):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        ended = in_a_mount_of_its_own(script, str(kibibytes), cwd=tmp_path)
        assert ended.returncode == 0, (tmp_path / "second").read_text()
        assert outputs(tmp_path / "out") == whole
        codes.append(ended.stdout.split()[0])
        if codes[-1] == "1":
            said = (tmp_path / "first").read_text()
            assert "No space left on device" in said.splitlines()[-1]
            assert "Traceback" not in said
    assert {"1"} < set(codes)  # some were too small, and some were not
    record_property("cases", f"{len(codes)} of {len(codes)}")
