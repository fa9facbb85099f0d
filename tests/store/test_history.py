"""What was run, what differs, and what would run: on runs whose stages only count."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.errors import UsageError
from rlhf_recipes.pipeline.plan import plan_run
from rlhf_recipes.pipeline.runner import run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.report import compare
from rlhf_recipes.store import history, locks, provenance
from tests.helpers.counting import RECIPE, toy
from tests.helpers.runs import call, stages_of, two_runs

pytestmark = pytest.mark.train


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return two_runs(tmp_path, monkeypatch)


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

    edit_json(runs / "toy" / "manifest.json", ended="soon")  # one run's damage hides no other
    _, *lines = call(monkeypatch, capfd, "runs", "--runs", str(runs))[0]
    assert [line.split()[0] for line in lines[:2]] == ["other", "toy"]


def test_a_run_that_is_going_on_or_was_killed_says_how_far_it_came(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    edit_json(runs / "toy" / "manifest.json", outcome="unfinished")
    (stages_of(runs / "toy")["ppo"] / "stage.json").unlink()
    told = {one["name"]: one for one in history.list_runs(runs)["runs"]}
    assert (told["toy"]["outcome"], told["toy"]["stages_done"]) == ("interrupted", 3)
    with locks.lock(runs / "toy", "run toy"):
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
    assert ["torch", provenance.versions()["torch"], "2.99.0+cu130"] in versions
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
    parts = compare.compare([runs / "toy", runs / "third"])
    assert parts == {"recipe": {}, "results": {}, "versions": {}, "hardware": {}}

    (moved / "pairs.jsonl").write_text("{}\n")
    run(load_recipe(recipe, set=["sft.logging_steps=3"]), runs=runs, name="fourth")
    found = compare.compare([runs / "toy", runs / "third", runs / "fourth"])["recipe"]
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
        compare.compare([runs / "toy", runs / "other"])


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
    lines += ["", f"✗ model      {runs.parent / 'model'} has no tokenizer"]
    found, noise = call(monkeypatch, capfd, *words, code=1)
    assert (found[: len(lines)], noise) == (lines, [])
    said = json.loads("\n".join(call(monkeypatch, capfd, *words, "--json")[0]))
    assert said["run"] == str(runs / "toy")
    ppo = said["stages"][2]
    assert (ppo["done"], len(ppo["reasons"])) == (False, 4)
    for name in ("checkpoint-000012", "checkpoint-000009", "damaged-000015", "partial"):
        (Path(ppo["folder"]) / "work" / name).mkdir(parents=True)
    out, _ = call(monkeypatch, capfd, *words, code=1)
    assert out[3] == ("ppo         runs    was not finished, has a checkpoint of step 12")


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
        planned = plan_run(again, elsewhere / "runs").stages
        assert [stage.key for stage in planned] == [one["key"] for one in manifest["stages"]]
        assert json.loads(json.dumps([stage.payload for stage in planned])) == [
            one["payload"] for one in manifest["stages"]
        ]
    assert manifest["overrides"] == ["ppo.total_episodes=128"]
    assert manifest["stages"][0]["versions"] == manifest["versions"] == provenance.versions()
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


DEEP = "[" * 100_000 + "]" * 100_000
ODD = ['{"format": 1, "stages": []}', '{"format": 1, "stages": 5, "model": 3}', DEEP]


@pytest.mark.parametrize("text", ODD, ids=["few keys", "other types", "deep"])
def test_a_manifest_of_another_shape_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], text: str
) -> None:
    runs = two_runs(tmp_path, monkeypatch)
    (runs / "other" / "manifest.json").write_text(text)
    out, _ = call(monkeypatch, capfd, "runs", "--runs", str(runs))
    assert out[-1] == f"{runs / 'other'} has no manifest.json that can be read"
    call(monkeypatch, capfd, "report", str(runs / "other"))
    line = f"{runs / 'other'} has no manifest.json that can be read (run it again)"
    words = ["compare", str(runs / "other"), str(runs / "toy")]
    assert call(monkeypatch, capfd, *words, code=2)[1] == [line]


def test_a_recipe_of_another_shape_is_compared_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = two_runs(tmp_path, monkeypatch)
    file, words = runs / "other" / "resolved.toml", [str(runs / "toy"), str(runs / "other")]
    file.write_text(f'"" = 1\n{file.read_text()}')
    call(monkeypatch, capfd, "compare", *words)
    file.write_text(f"a = {DEEP}")
    line = f"{runs / 'other'} has no resolved.toml that can be read (run it again)"
    assert call(monkeypatch, capfd, "compare", *words, code=2)[1] == [line]
