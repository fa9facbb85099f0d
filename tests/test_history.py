"""What was run, what differs, and what no run refers to: on runs whose stages only count."""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes import history, rundir
from rlhf_recipes.cli import main
from rlhf_recipes.errors import UsageError
from rlhf_recipes.plan import make_plan
from rlhf_recipes.recipe import load_recipe
from rlhf_recipes.runner import run
from tests.counting import RECIPE, Counting, toy


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two runs: `toy`, and `other` whose PPO differs. They share SFT and reward."""
    Counting(monkeypatch)
    go(tmp_path)
    go(tmp_path, "ppo.total_episodes=128", name="other")
    return tmp_path / "runs"


def go(folder: Path, *changes: str, **options: Any) -> None:
    run(load_recipe(toy(folder), set=changes), runs=folder / "runs", **options)


def call(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: str, code: int = 0
) -> tuple[list[str], list[str]]:
    """The lines that `rlhf-recipes WORDS` says to stdout and to stderr."""
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["rlhf-recipes", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capfd.readouterr()
    assert ended.value.code == code, err
    return out.splitlines(), err.splitlines()


def stages_of(folder: Path) -> dict[str, Path]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {stage["name"]: folder.parent / stage["folder"] for stage in manifest["stages"]}


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- runs ---------------------------------------------------------------------------------------


def test_runs_are_listed_newest_last_and_shared_stages_count_once(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    edit_json(runs / "toy" / "manifest.json", ended="2030-01-02T03:04:05+00:00")
    numbers = {"reward.accuracy": 0.975, "reward.length_accuracy": 0.5, "ppo.kl": 6.186}
    edit_json(runs / "toy" / "results.json", **numbers)
    out, err = call(monkeypatch, capfd, "runs", "--runs", str(runs))
    head, first, second, _, total = out
    assert err == []
    assert head.split() == "run ended outcome stages accuracy win rate KL size + stages".split()
    assert first.split()[0] == "other"
    assert second.split()[:2] == ["toy", "2030-01-02"]
    assert second.split()[3:10] == ["finished", "4", "of", "4", "97.5%", "75%", "6.19"]

    said = json.loads("\n".join(call(monkeypatch, capfd, "runs", "--runs", str(runs), "--json")[0]))
    once = sum(history.size(path) for path in (runs / ".stages").glob("[!.]*-*"))
    assert said["stages_bytes"] == once
    assert sum(one["stages_bytes"] for one in said["runs"]) > once
    assert [one["bytes"] for one in said["runs"]] == [
        sum(f.stat().st_size for f in (runs / name).rglob("*") if f.is_file())
        for name in ("other", "toy")
    ]
    assert said["runs"][1]["numbers"] == {
        "reward.accuracy": 0.975, "ppo.win_rate": 0.75, "ppo.kl": 6.186
    }  # fmt: skip
    assert total.startswith(f"runs in {runs}: 2, ")


def test_a_run_that_is_going_on_or_was_killed_says_how_far_it_came(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    edit_json(runs / "toy" / "manifest.json", outcome="unfinished")
    (stages_of(runs / "toy")["ppo"] / "stage.json").unlink()
    told = {one["name"]: one for one in history.list_runs(runs)["runs"]}
    assert (told["toy"]["outcome"], told["toy"]["stages_done"]) == ("unfinished", 3)
    with rundir.lock(runs / "toy", "run toy"):
        told = {one["name"]: one for one in history.list_runs(runs)["runs"]}
    assert (told["toy"]["outcome"], told["other"]["outcome"]) == ("running", "finished")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 2, "stages": []}', '{"format": 1}', '{"format": 1, "stages": 3}',
     '{"format": 1, "stages": [3]}', '{"format": 1, "stages": [{"name": 1, "folder": "x"}]}'],
)  # fmt: skip
def test_what_is_no_run_is_named(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], text: str
) -> None:
    (runs / "toy" / "manifest.json").write_text(text)
    (runs / "notes").mkdir()
    (runs / "a file").write_text("")
    out, _ = call(monkeypatch, capfd, "runs", "--runs", str(runs))
    assert out[-2:] == [
        f"{runs}/notes has no manifest.json that can be read",
        f"{runs}/toy has no manifest.json that can be read",
    ]
    assert len(out) == 6
    _, (error,) = call(monkeypatch, capfd, "compare", "toy", "other", "--runs", str(runs), code=2)
    assert error == f"{runs}/toy has no manifest.json that can be read (run it again)"


def test_where_nothing_was_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    gone = str(tmp_path / "gone")
    out, _ = call(monkeypatch, capfd, "runs", "--runs", gone)
    assert out == [f"runs in {gone}: 0, 0 B; their stages, each once: 0 B"]
    assert call(monkeypatch, capfd, "clean", "--runs", gone)[0] == [f"nothing to remove in {gone}"]
    assert not Path(gone).exists()


# ---- compare ------------------------------------------------------------------------------------


def test_what_differs_stands_side_by_side(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    edit_json(runs / "other" / "results.json", **{"ppo.win_rate": 0.8, "ppo.stopped": "KL " * 20})
    edit_json(runs / "other" / "manifest.json", versions={"torch": "2.99.0+cu130"})
    out, _ = call(monkeypatch, capfd, "compare", "toy", "other", "--runs", str(runs))
    assert out[:6] == [
        "recipe              toy  other",
        "ppo.total_episodes  64   128",
        "",
        "results       toy   other",
        "ppo.win_rate  0.75  0.8 (+0.05)",
        "ppo.stopped   —     KL KL KL KL KL KL KL KL KL KL KL KL KL …",
    ]
    versions = [line.split() for line in out[7:-2]]
    assert versions[:2] == [
        ["versions", "toy", "other"],
        ["python", platform.python_version(), "—"],
    ]
    assert ["torch", rundir.versions()["torch"], "2.99.0+cu130"] in versions
    assert out[-1] == "hardware: the same"
    (same, *_) = call(monkeypatch, capfd, "compare", "toy", "toy", "--runs", str(runs))
    assert [line for line in same if line] == [
        f"{part}: the same" for part in ("recipe", "results", "versions", "hardware")
    ]


def test_comments_order_and_places_are_no_difference_and_bytes_are(
    runs: Path, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    recipe = toy(moved, "third", "# told anew\n" + RECIPE.replace("learning_rate = 1e-3", "# none"))
    recipe.write_text(recipe.read_text().replace("[sft]", "[sft]\nlearning_rate = 0.001"))
    run(load_recipe(recipe), runs=runs)
    parts = history.compare([runs / "toy", runs / "third"])
    assert parts == {"recipe": {}, "results": {}, "versions": {}, "hardware": {}}

    (moved / "pairs.jsonl").write_text("{}\n")
    run(load_recipe(recipe, set=["sft.logging_steps=3"]), runs=runs, name="fourth")
    found = history.compare([runs / "toy", runs / "third", runs / "fourth"])["recipe"]
    assert list(found) == ["sft.logging_steps", "dataset.content"]
    assert found["sft.logging_steps"] == [10.0, 10.0, 3.0]
    first, second, third = found["dataset.content"]
    assert first == second != third


def test_one_run_differs_from_nothing(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _, error = call(monkeypatch, capfd, "compare", "toy", "--runs", str(runs), code=2)
    assert error == ["one run differs from nothing (name another)"]
    (runs / "toy" / "resolved.toml").unlink()
    with pytest.raises(UsageError, match=r"toy has no resolved\.toml that can be read"):
        history.compare([runs / "toy", runs / "other"])


# ---- clean --------------------------------------------------------------------------------------


def clean(
    runs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    *words: str,
    code: int = 0,
) -> tuple[list[str], list[str]]:
    return call(monkeypatch, capfd, "clean", "--runs", str(runs), *words, code=code)


def spares(runs: Path) -> set[str]:
    return {str(path.relative_to(runs)) for path, _, _ in history.unused(runs)[0]}


def everything(runs: Path) -> set[Path]:
    return {path for path in runs.rglob("*") if "lock" not in path.name}


def test_stages_that_no_run_refers_to_go_once_that_is_agreed_to(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ppo, evaluation = (stages_of(runs / "other")[name] for name in ("ppo", "evaluation"))
    assert clean(runs, monkeypatch, capfd)[0] == [f"nothing to remove in {runs}"]
    shutil.rmtree(runs / "other")
    (ppo / "stage.json").unlink()
    before, kept = everything(runs), {p for p in everything(runs) if ppo not in (p, *p.parents)}
    kept = {path for path in kept if evaluation not in (path, *path.parents)}
    out, _ = clean(runs, monkeypatch, capfd)
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
        out, _ = clean(runs, monkeypatch, capfd)
        assert out[4].startswith("Remove all of it? [y/N]: ")
        assert out[-1].endswith("nothing was removed") == (answer != "y\n")
    assert out[4].endswith(f"removed {evaluation}")
    assert out[5] == f"removed {ppo}"
    assert everything(runs) == kept
    assert clean(runs, monkeypatch, capfd, "--yes")[0] == [f"nothing to remove in {runs}"]
    plan = make_plan(load_recipe(runs.parent / "toy.toml"), runs)
    assert all(stage.done for stage in plan.stages)


def test_what_killed_processes_left_goes_and_what_they_go_on_from_stays(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ppo, sft = (stages_of(runs / "toy")[name] for name in ("ppo", "sft"))
    (ppo / "stage.json").unlink()
    beside = runs / ".stages"
    left = [
        runs / "toy/.model/x", runs / "toy/.results.json.123", ppo / "work/partial/x",
        ppo / "work/damaged-000004/x", ppo / "work/damaged-000004-1/x", ppo / ".stage.json.77",
        sft / "work/checkpoint-000002/x", beside / f".{sft.name}.old/stage.json",
        beside / f".{sft.name}.gone/x", beside / f".{sft.name}.fresh/x",
    ]  # fmt: skip
    kept = [
        ppo / "work/checkpoint-000006/x", runs / "toy/.fresh.txt", beside / "digests.json",
        beside / f".{ppo.name}.fresh/stage.json", runs / "toy/partial/x", beside / "a folder/x",
        runs / "notes/.model/x", runs / "notes/.results.json.123",
    ]  # fmt: skip
    for file in (*left, *kept):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('{"format": 1}')
    names = {path.parent if path.name in ("x", "stage.json") else path for path in left}
    assert spares(runs) == {str(path.relative_to(runs)) for path in names}
    (runs / "other" / ".fresh").write_text("")  # its pass of --fresh is not over
    assert spares(runs) == {str(p.relative_to(runs)) for p in names - {left[-1].parent}}
    (runs / "other" / ".fresh").unlink()
    clean(runs, monkeypatch, capfd, "--yes")
    assert not any(path.exists() for path in names)
    assert all(path.exists() for path in kept)
    assert sft.is_dir() and (sft / "stage.json").exists()


def test_a_run_that_cannot_be_read_may_need_any_stage(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (runs / "other" / "manifest.json").write_text("{")
    (runs / "toy" / ".model").mkdir()
    out, err = clean(runs, monkeypatch, capfd, "--yes", code=1)
    why = "has no manifest that can be read: any stage may be its own"
    assert err == [f"no stage is removed: {runs}/other {why}"]
    assert out[-1] == f"removed {runs}/toy/.model"
    assert len(list((runs / ".stages").glob("[!.]*-*"))) == 6
    (runs / "other" / "manifest.json").unlink()  # killed before it wrote one
    assert clean(runs, monkeypatch, capfd, "--yes", code=1)[1] == err
    for name in ("recipe.toml", "resolved.toml"):
        (runs / "other" / name).unlink()
    assert clean(runs, monkeypatch, capfd, "--yes")[0][-1].startswith("removed ")
    assert len(list((runs / ".stages").glob("[!.]*-*"))) == 4


def test_what_a_live_process_holds_stays(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ppo, evaluation = (stages_of(runs / "other")[name] for name in ("ppo", "evaluation"))
    shutil.rmtree(runs / "other")
    with rundir.lock(ppo, "stage ppo"):
        assert spares(runs) == {f".stages/{evaluation.name}"}
        spare = (ppo, "no run refers to it", ppo)
        assert not history.remove(spare, runs)  # taken up after it was listed
    assert history.remove(spare, runs)
    assert not ppo.exists()

    with rundir.lock(runs / "toy", "run toy"):  # it began, and has not said yet what it needs
        found, (doubt,) = history.unused(runs)
        assert found == []
        assert doubt == f"{runs / 'toy'} is only just beginning: any stage may be its own"
        os.utime(runs / "toy" / "manifest.json")
        assert spares(runs) == {f".stages/{evaluation.name}"}
    with rundir.lock(runs / "new", "run new"):
        (runs / "new").mkdir(exist_ok=True)
        assert history.unused(runs)[0] == []


def test_what_a_run_came_to_refer_to_since_it_was_listed_stays(runs: Path, tmp_path: Path) -> None:
    shutil.rmtree(runs / "other")
    found, _ = history.unused(runs)
    go(tmp_path, "ppo.total_episodes=128", name="again")
    assert [history.remove(spare, runs) for spare in found] == [False, False]
    assert len(list((runs / ".stages").glob("[!.]*-*"))) == 6


def test_a_removal_that_is_cut_off_leaves_nothing_that_looks_whole(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(runs / "other")
    (_, spare), _ = history.unused(runs)

    def cut_off(path: Path, **_: Any) -> None:
        if path.exists():
            (path / "output" / "weights").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", cut_off)
        history.remove(spare, runs)
    recipe = load_recipe(tmp_path / "toy.toml", set=["ppo.total_episodes=128"])
    assert [stage.name for stage in make_plan(recipe, runs).stages if not stage.done] == ["ppo"]
    assert f".stages/.{spare[0].name}.gone" in spares(runs)


def test_links_are_not_followed(runs: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    for name in ("sft-0123456789ab", ".model"):
        (outside / name).mkdir(parents=True)
    (runs / ".stages" / "sft-0123456789ab").symlink_to(outside / "sft-0123456789ab")
    (runs / "toy" / ".model").symlink_to(outside / ".model")
    shutil.move(runs / "other", outside / "other")
    (outside / "other" / ".model").mkdir()
    (runs / "other").symlink_to(outside / "other")
    assert history.unused(runs) == ([], [])  # and what it refers to is referred to
    shutil.move(runs / ".stages", outside / "stages")
    (runs / ".stages").symlink_to(outside / "stages")
    (runs / "other").unlink()
    found, (doubt,) = history.unused(runs)
    assert found == []
    assert doubt.endswith(".stages is a link: what it leads to is left alone")


# ---- plan, and doing it again elsewhere ---------------------------------------------------------


def test_plan_says_all_reasons_and_where_a_stage_goes_on(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = [f"ppo.{key}" for key in ("gamma=0.9", "lam=0.9", "kl_coef=1", "vf_coef=1")]
    words = ["plan", str(runs.parent / "toy.toml"), "--runs", str(runs), "--name", "toy"]
    words += [word for change in changes for word in ("--set", change)]
    lines = [
        "stage",
        "sft         cached",
        "reward      cached",
        "ppo         runs    kl_coef 0.05 → 1.0",
        "                    vf_coef 0.1 → 1.0",
        "                    gamma 1.0 → 0.9",
        "                    lam 1.0 → 0.9",
        "evaluation  runs    input ppo changed",
    ]
    lines[0] += " " * 15 + "why"
    assert call(monkeypatch, capfd, *words) == (lines, [])
    said = json.loads("\n".join(call(monkeypatch, capfd, *words, "--json")[0]))
    assert said["run"] == str(runs / "toy")
    ppo = said["stages"][2]
    assert (ppo["done"], len(ppo["reasons"])) == (False, 4)
    for name in ("checkpoint-000012", "checkpoint-000009", "damaged-000015", "partial"):
        (Path(ppo["folder"]) / "work" / name).mkdir(parents=True)
    out, _ = call(monkeypatch, capfd, *words)
    assert out[3] == ("ppo         runs    was not finished, has a checkpoint of step 12")


def test_a_run_refers_to_its_stages_from_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, seen = Counting(monkeypatch), []
    runs = tmp_path / "runs"
    count.fault["sft"] = lambda _: seen.append((history.unused(runs), stages_of(runs / "toy")))
    go(tmp_path)
    ((nothing, named),) = seen
    assert nothing == ([], [])
    assert list(named) == ["sft", "reward", "ppo", "evaluation"]


def test_the_run_s_folder_is_enough_to_do_it_again_elsewhere(runs: Path, tmp_path: Path) -> None:
    """The recipe, with what was set; where its files lie now is all there is to say."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(runs / "other", elsewhere / "kept", ignore=shutil.ignore_patterns("model"))
    shutil.move(tmp_path / "model", elsewhere / "weights")
    shutil.move(tmp_path / "pairs.jsonl", elsewhere / "rows.jsonl")
    places = [f"model.name={elsewhere}/weights", f"dataset.path={elsewhere}/rows.jsonl"]
    manifest = json.loads((elsewhere / "kept" / "manifest.json").read_text())
    for name in ("recipe.toml", "resolved.toml"):
        again = load_recipe(elsewhere / "kept" / name, set=places)
        planned = make_plan(again, elsewhere / "runs").stages
        assert [stage.key for stage in planned] == [one["key"] for one in manifest["stages"]]
        assert json.loads(json.dumps([stage.payload for stage in planned])) == [
            one["payload"] for one in manifest["stages"]
        ]
    assert manifest["overrides"] == ["ppo.total_episodes=128"]
    assert manifest["stages"][0]["versions"] == manifest["versions"] == rundir.versions()
    assert manifest["hardware"]["threads"] == os.environ["OMP_NUM_THREADS"]


def test_the_commands_load_no_torch(runs: Path) -> None:
    code = """
import sys
from rlhf_recipes.cli import app
for words in (["runs"], ["compare", "toy", "other"], ["clean"], ["plan", sys.argv[2]]):
    app([*words, "--runs", sys.argv[1]], standalone_mode=False)
print(sorted({"torch", "transformers", "datasets", "peft"} & set(sys.modules)))
"""
    words = [sys.executable, "-c", code, str(runs), str(runs.parent / "toy.toml")]
    done = subprocess.run(words, capture_output=True, text=True, check=True, input="")
    assert done.stdout.splitlines()[-1] == "[]"
