"""What no run refers to, and what killed processes left, can go: where stages only count."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.pipeline.plan import plan_run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.store import clean, locks
from rlhf_recipes.store.digests import digest
from tests.helpers.counting import Counting
from tests.helpers.runs import call, go, stages_of, two_runs


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return two_runs(tmp_path, monkeypatch)


def cleaned(
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    *words: str,
    code: int = 0,
) -> tuple[list[str], list[str]]:
    return call(monkeypatch, capfd, "clean", "--runs", str(runs), *words, code=code)


def spares(runs: Path) -> set[str]:
    return {str(path.relative_to(runs)) for path, _, _ in clean.unused(runs)[0]}


def everything(runs: Path) -> set[Path]:
    return {path for path in runs.rglob("*") if "lock" not in path.name}


def test_what_people_said_stays_whatever_else_goes(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = {runs / name for name in ("feedback.db", "feedback.db-wal", "feedback.key")}
    for file in kept:
        file.write_text("")
    for run in ("toy", "other"):
        shutil.rmtree(runs / run)
    cleaned(runs, monkeypatch, capfd, "--yes")
    assert not [path for path in (runs / ".stages").iterdir() if path.is_dir()]
    assert kept <= everything(runs)


def test_stages_that_no_run_refers_to_go_once_that_is_agreed_to(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ppo, evaluation = (stages_of(runs / "other")[name] for name in ("ppo", "evaluation"))
    assert cleaned(runs, monkeypatch, capfd)[0] == [f"nothing to remove in {runs}"]
    shutil.rmtree(runs / "other")
    (ppo / "stage.json").unlink()
    before, kept = everything(runs), {p for p in everything(runs) if ppo not in (p, *p.parents)}
    kept = {path for path in kept if evaluation not in (path, *path.parents)}
    out, _ = cleaned(runs, monkeypatch, capfd)
    rows = [line.split(maxsplit=3) for line in out[1:4]]
    assert [row[2:] for row in rows[:2]] == [
        [str(evaluation), "no run refers to it"],
        [str(ppo), "no run refers to it, unfinished"],
    ]
    assert rows[2][2:] == ["in", "all"]
    assert out[4:] == ["nothing was removed: there is no terminal to ask at; --yes removes"]

    for answer in ("\n", "n\n", "what\nn\n", "y\n"):
        assert everything(runs) == before
        monkeypatch.setattr(sys, "stdin", io.StringIO(answer))
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        out, _ = cleaned(runs, monkeypatch, capfd)
        assert out[4].startswith("Remove all of it? [y/N]: ")
        assert out[-1].endswith("nothing was removed") == (answer != "y\n")
    assert out[4].endswith(f"removed {evaluation}")
    assert out[5] == f"removed {ppo}"
    assert everything(runs) == kept
    assert cleaned(runs, monkeypatch, capfd, "--yes")[0] == [f"nothing to remove in {runs}"]
    plan = plan_run(load_recipe(runs.parent / "toy.toml"), runs)
    assert all(stage.done for stage in plan.stages)


def test_what_killed_processes_left_goes_and_what_they_go_on_from_stays(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ppo, sft = (stages_of(runs / "toy")[name] for name in ("ppo", "sft"))
    (ppo / "stage.json").unlink()
    beside = runs / ".stages"
    left = [
        beside / "rows/0a.arrow", beside / "rows/0a.json", beside / "rows/.0b.arrow.77",
        runs / "toy/.model/x", runs / "toy/.results.json.123", ppo / "work/partial/x",
        ppo / "work/damaged-000004/x", ppo / "work/damaged-000004-1/x", ppo / ".stage.json.0a1b",
        sft / "work/checkpoint-000002/x", beside / f".{sft.name}.old/stage.json",
        beside / f".{sft.name}.gone/x", beside / f".{sft.name}.fresh/x",
    ]  # fmt: skip
    kept = [
        ppo / "work/checkpoint-000006/x", runs / "toy/.fresh.txt", beside / "digests.json",
        beside / f".{ppo.name}.fresh/stage.json", runs / "toy/partial/x", beside / "a folder/x",
        runs / "notes/.model/x", runs / "notes/.results.json.123", beside / "rows/0c.arrow",
    ]  # fmt: skip
    for file in (*left, *kept):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"format": 1}')
    used = json.loads((runs / "toy" / "manifest.json").read_text())["dataset"]["content"]
    value = {"sources": [{"content": used}]}
    kept.append(beside / "rows/0c.json")
    kept[-1].write_text(json.dumps({"format": 1, "value": value, "digest": digest(value)}))
    names = {path.parent if path.name in ("x", "stage.json") else path for path in left}
    assert spares(runs) == {str(path.relative_to(runs)) for path in names}
    (runs / "other" / ".fresh").write_text("")  # its pass of --fresh is not over
    assert spares(runs) == {str(p.relative_to(runs)) for p in names - {left[-1].parent}}
    (runs / "other" / ".fresh").unlink()
    cleaned(runs, monkeypatch, capfd, "--yes")
    assert not any(path.exists() for path in names)
    assert all(path.exists() for path in kept)
    assert sft.is_dir() and (sft / "stage.json").exists()


def test_a_run_that_cannot_be_read_may_need_any_stage(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (runs / "other" / "manifest.json").write_text("{")
    (runs / "toy" / ".model").mkdir()
    out, err = cleaned(runs, monkeypatch, capfd, "--yes", code=1)
    why = "has no manifest that can be read: any stage may be its own"
    assert err == [f"no stage is removed: {runs}/other {why}"]
    assert out[-1] == f"removed {runs}/toy/.model"
    assert len(list((runs / ".stages").glob("[!.]*-*"))) == 6
    (runs / "other" / "manifest.json").unlink()  # killed before it wrote one
    assert cleaned(runs, monkeypatch, capfd, "--yes", code=1)[1] == err
    for name in ("recipe.toml", "resolved.toml"):
        (runs / "other" / name).unlink()
    assert cleaned(runs, monkeypatch, capfd, "--yes")[0][-1].startswith("removed ")
    assert len(list((runs / ".stages").glob("[!.]*-*"))) == 4


def test_what_a_live_process_holds_stays(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ppo, evaluation = (stages_of(runs / "other")[name] for name in ("ppo", "evaluation"))
    shutil.rmtree(runs / "other")
    with locks.lock(ppo, "stage ppo"):
        assert spares(runs) == {f".stages/{evaluation.name}"}
        spare = (ppo, "no run refers to it", ppo)
        assert not clean.remove(spare, runs)  # taken up after it was listed
    assert clean.remove(spare, runs)
    assert not ppo.exists()

    with locks.lock(runs / "toy", "run toy"):  # it began, and has not said yet what it needs
        found, (doubt,) = clean.unused(runs)
        assert found == []
        assert doubt == f"{runs / 'toy'} is only just beginning: any stage may be its own"
        os.utime(runs / "toy" / "manifest.json")
        assert spares(runs) == {f".stages/{evaluation.name}"}
    with locks.lock(runs / "new", "run new"):
        (runs / "new").mkdir(exist_ok=True)
        assert clean.unused(runs)[0] == []


def test_what_a_run_came_to_refer_to_since_it_was_listed_stays(runs: Path, tmp_path: Path) -> None:
    shutil.rmtree(runs / "other")
    found, _ = clean.unused(runs)
    go(tmp_path, "ppo.total_episodes=128", name="again")
    assert [clean.remove(spare, runs) for spare in found] == [False, False]
    assert len(list((runs / ".stages").glob("[!.]*-*"))) == 6


def test_a_removal_that_is_cut_off_leaves_nothing_that_looks_whole(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(runs / "other")
    (_, spare), _ = clean.unused(runs)

    def cut_off(path: Path, **_: Any) -> None:
        if path.exists():
            (path / "output" / "weights").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", cut_off)
        clean.remove(spare, runs)
    recipe = load_recipe(tmp_path / "toy.toml", set=["ppo.total_episodes=128"])
    assert [stage.name for stage in plan_run(recipe, runs).stages if not stage.done] == ["ppo"]
    assert f".stages/.{spare[0].name}.gone" in spares(runs)


def test_a_run_on_a_disk_that_is_not_here_may_need_any_stage(runs: Path, tmp_path: Path) -> None:
    shutil.move(runs / "other", tmp_path / "disk")
    (runs / "other").symlink_to(tmp_path / "disk")
    assert clean.unused(runs) == ([], [])
    (tmp_path / "disk").rename(tmp_path / "unplugged")
    found, (doubt,) = clean.unused(runs)
    assert found == [] and doubt.startswith(f"{runs / 'other'} leads to nothing")


def test_links_are_not_followed(runs: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    for name in ("sft-0123456789ab", ".model"):
        (outside / name).mkdir(parents=True)
    (runs / ".stages" / "sft-0123456789ab").symlink_to(outside / "sft-0123456789ab")
    (runs / "toy" / ".model").symlink_to(outside / ".model")
    shutil.move(runs / "other", outside / "other")
    (outside / "other" / ".model").mkdir()
    (runs / "other").symlink_to(outside / "other")
    assert clean.unused(runs) == ([], [])  # and what it refers to is referred to
    shutil.move(runs / ".stages", outside / "stages")
    (runs / ".stages").symlink_to(outside / "stages")
    (runs / "other").unlink()
    found, (doubt,) = clean.unused(runs)
    assert found == []
    assert doubt.endswith(".stages is a link: what it leads to is left alone")


def test_a_run_refers_to_its_stages_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, seen = Counting(monkeypatch), []
    runs = tmp_path / "runs"
    count.fault["sft"] = lambda _: seen.append((clean.unused(runs), stages_of(runs / "toy")))
    go(tmp_path)
    ((nothing, named),) = seen
    assert nothing == ([], [])
    assert list(named) == ["sft", "reward", "ppo", "evaluation"]


def test_names_in_a_runs_folder_command_no_terminal(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    evil = (runs / "other").rename(runs / "a\x1b[2J\u202eb")
    (runs / "c\x1b[2J" / ".model").mkdir(parents=True)
    (runs / "c\x1b[2J" / "recipe.toml").write_text("")
    (runs / "d\x1b[2J").symlink_to("nowhere\x1b[2J")
    said = [
        *cleaned(runs, monkeypatch, capfd, "--yes", code=1),
        *call(monkeypatch, capfd, "report", str(evil)),
        *call(monkeypatch, capfd, "runs", "--runs", str(runs)),
    ]
    told = "\n".join(line for lines in said for line in lines)
    assert "removed" in told and "report  " in told and "leads to nothing" in told
    assert not set("\x1b\u202e") & set(told)
