"""Many processes at once, signals, odd places, full and read-only disks: stages only count."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.store import files, layout
from tests.helpers.commands import command, environment
from tests.helpers.counting import STEPS
from tests.helpers.faults import attempt, end, outputs, start, steady_recipe

pytestmark = pytest.mark.train


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    return steady_recipe(tmp_path, monkeypatch)


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
    assert layout.find_run(run_name or "toy", runs) == runs / (run_name or "toy")
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
    run = layout.find_run("toy", tmp_path / "moved")
    for entry in files.read_json(run / "manifest.json")["stages"]:
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
        exec "$PYTHON" -m tests.helpers.counting run toy.toml
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
        "$PYTHON" -m tests.helpers.counting run toy.toml 2>first || echo $?
        mount -o remount,size=64m runs
        "$PYTHON" -m tests.helpers.counting run toy.toml 2>second
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
