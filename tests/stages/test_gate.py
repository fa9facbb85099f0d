"""What a reward model is worth, measured on test pairs; the judge beside it; PPO's gate."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomlkit

from rlhf_recipes import stats
from rlhf_recipes.data.dataset import Data
from rlhf_recipes.data.rows import pairs
from rlhf_recipes.errors import GateError, StageError
from rlhf_recipes.models.reward_model import open_reward
from rlhf_recipes.models.sampling import score_ids
from rlhf_recipes.pipeline.export import export, write_reward_model
from rlhf_recipes.recipe.load import load_recipe
from tests.helpers.chains import Chain
from tests.helpers.counting import toy
from tests.helpers.worlds import HEAD

pytestmark = pytest.mark.train

POLICY, SCORED = {"policy": "sft"}, {"policy": "sft", "reward_model": "reward"}


@pytest.fixture
def chain(tiny_recipe: Path, tmp_path: Path, trained: SimpleNamespace) -> Chain:
    """SFT and a reward model are there; the latter's evidence may be changed."""
    recipe = load_recipe(tiny_recipe, set=["ppo.total_episodes=16"])
    reward = shutil.copytree(trained.outputs["reward"], tmp_path / "reward")
    return Chain(recipe, tmp_path / "stages", outputs=trained.outputs | {"reward": reward})


def rows_of(chain: Chain) -> Data:
    return chain.session.data(chain.recipe.dataset)


def found(chain: Chain, stage: str) -> dict[str, Any]:
    return json.loads((chain.outputs[stage] / stats.FILE).read_text())


# ---- evidence -----------------------------------------------------------------------------------


def test_the_evidence_is_of_the_test_pairs_alone(chain: Chain, trained: SimpleNamespace) -> None:
    """Recomputed by the role that later stages open, in units."""
    metrics = trained.metrics["reward"]
    told, rows = found(chain, "reward"), pairs(rows_of(chain).test)
    reward = open_reward(chain.session.base, chain.outputs["reward"])
    chosen, rejected = (
        score_ids(reward, [(e.prompt_ids, getattr(e, answer)) for e in rows], 0, 4)
        for answer in ("chosen_ids", "rejected_ids")
    )
    margins = (chosen - rejected).tolist()
    assert told["margins"] == pytest.approx(margins, abs=2e-4)
    assert metrics["test_pairs"] == told["pairs"] == len(rows) == 15
    assert metrics["accuracy"] == sum(m > 0 for m in margins) / 15
    assert metrics["margin"] == pytest.approx(sum(margins) / 15, abs=1e-4)
    shorter = [
        m for m, e in zip(margins, rows, strict=True) if len(e.chosen_ids) < len(e.rejected_ids)
    ]
    assert metrics["shorter_pairs"] == len(shorter) > 0
    assert metrics["shorter_accuracy"] == sum(m > 0 for m in shorter) / len(shorter)
    assert told["metrics"] == {key: metrics[key] for key in told["metrics"]}
    assert sum(one["pairs"] for one in told["calibration"]) == 15
    # In the head's own scale, not in units.
    raw = [m * metrics["unit_std"] for m in margins]
    error = stats.calibration_error(stats.calibration(stats.np.array(raw)))
    assert metrics["calibration_error"] == pytest.approx(error, abs=1e-3)


def backwards(source: Path, folder: Path, which: Callable[[str], bool]) -> Path:
    """The pairs, with the answers changed over where `which` says so of a prompt."""
    lines = []
    for line in source.read_text().splitlines():
        row = json.loads(line)
        if which(row["prompt"]):
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        lines.append(json.dumps(row))
    file = folder / f"{len(list(folder.iterdir()))}.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_its_worst_pairs_are_those_that_people_saw_otherwise(
    chain: Chain, tiny_pairs: Path, tmp_path: Path
) -> None:
    odd = sorted({e.prompt for e in rows_of(chain).test})[:3]
    file = backwards(tiny_pairs, tmp_path, lambda prompt: prompt in odd)
    changes = [f"dataset.path={file}", "reward.max_steps=40"]
    other = Chain(load_recipe(chain.recipe.path, set=changes), tmp_path / "other")
    other.run("reward", {})
    worst = found(other, "reward")["worst"]
    assert {pair["prompt"] for pair in worst} == set(odd)
    assert [p["margin"] for p in worst] == sorted(p["margin"] for p in worst)
    assert worst[0]["margin"] == min(found(other, "reward")["margins"]) < 0
    given = {e.prompt: e for e in rows_of(other).test}[worst[0]["prompt"]]
    decode = other.session.tokens.decode
    assert worst[0]["chosen"] == decode(given.chosen_ids) != decode(given.rejected_ids)


# ---- the independent judge ----------------------------------------------------------------------


def test_the_judge_learns_from_its_share_and_from_nothing_else(
    chain: Chain, tiny_pairs: Path, tmp_path: Path
) -> None:
    """Its bytes are the same, whatever the other pairs say and whatever was trained before."""
    share = {e.prompt for e in rows_of(chain).judge}
    trained = {e.prompt for e in rows_of(chain).train}
    assert 5 < len(share) < len(trained) / 2

    def judge(name: str, which: Callable[[str], bool], before: bool = False) -> dict[str, bytes]:
        file = backwards(tiny_pairs, tmp_path, which)
        words = ["evaluation.judge=independent", f"dataset.path={file}"]
        other = Chain(load_recipe(chain.recipe.path, set=words), tmp_path / name)
        if before:
            other.run("sft", {})
            other.run("reward", POLICY)
        metrics = other.run("judge", {}).metrics
        assert metrics["pairs"] == len(pairs(rows_of(other).judge)) < 20
        assert metrics["test_pairs"] == 15 and found(other, "judge")["pairs"] == 15
        return {f.name: f.read_bytes() for f in other.outputs["judge"].glob("*.safetensors")}

    first = judge("first", lambda prompt: False)
    assert judge("others", lambda prompt: prompt in trained - share) == first
    assert judge("after", lambda prompt: False, before=True) == first
    assert judge("own", lambda prompt: prompt in share) != first


@pytest.mark.parametrize(
    ("fraction", "most", "few"), [(0.35, 3.0, 1000), (0.1, 4.0, 1000), (0.35, 1.0, 10)]
)
def test_a_judge_of_few_pairs_reads_them_again(
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fraction: float,
    most: float,
    few: int,
) -> None:
    monkeypatch.setattr("rlhf_recipes.stages.reward.FEW_PAIRS", few)
    words = [f"dataset.judge_fraction={fraction}", "evaluation.judge=independent"]
    words += ["reward.max_steps=-1", "reward.num_train_epochs=2"]
    words += ["reward.per_device_train_batch_size=1"]  # a step a pair
    other = Chain(load_recipe(tiny_recipe, set=words), tmp_path / "stages")
    reward, judge = other.run("reward", {}).metrics, other.run("judge", {}).metrics
    assert reward["steps"] == 2 * reward["pairs"] > 2 * judge["pairs"]
    assert judge["steps"] == pytest.approx(min(reward["steps"], 2 * most * judge["pairs"]), abs=1)


def test_the_judge_is_exported_as_the_reward_model_that_it_is(chain: Chain, tmp_path: Path) -> None:
    recipe = load_recipe(chain.recipe.path, set=["evaluation.judge=independent"])
    other, run = Chain(recipe, tmp_path / "runs" / ".stages"), tmp_path / "runs" / "tiny"
    other.run("judge", {})
    run.mkdir()
    (run / "resolved.toml").write_text(tomlkit.dumps(recipe.resolved()))
    entry = {"name": "judge", "kind": "judge", "outcome": "ran", "folder": ".stages/judge"}
    manifest = HEAD | {"model": {}, "stages": [entry]}
    (run / "manifest.json").write_text(json.dumps(manifest))
    export(run_folder=run, folder=tmp_path / "out", stage="judge", form="adapter")
    heads = [f / "head.safetensors" for f in (tmp_path / "out", other.outputs["judge"])]
    assert heads[0].read_bytes() == heads[1].read_bytes()


def test_a_share_without_pairs_is_told(chain: Chain, tmp_path: Path) -> None:
    words = ["evaluation.judge=independent", "dataset.judge_fraction=0.0001"]
    other = Chain(load_recipe(chain.recipe.path, set=words), tmp_path / "none")
    said = "judge: no pairs, and no .* in the judge's share.*fractions in"
    with pytest.raises(StageError, match=said):
        other.run("judge", {})


# ---- the gate -----------------------------------------------------------------------------------


def test_ppo_does_not_train_against_what_learned_the_opposite(
    chain: Chain, tiny_pairs: Path, tmp_path: Path
) -> None:
    trained = {e.prompt for e in rows_of(chain).train}
    file = backwards(tiny_pairs, tmp_path, lambda prompt: prompt in trained)
    words = [f"dataset.path={file}", "reward.max_steps=20", "ppo.total_episodes=16"]
    other = Chain(load_recipe(chain.recipe.path, set=words), tmp_path / "other")
    other.run("sft", {})
    assert other.run("reward", POLICY).metrics["accuracy_high"] < 0.5
    told = len(other.progress.updates)
    with pytest.raises(GateError, match=r"[01]?\d\.\d% of 15 test pairs right .*worse than chance"):
        other.run("ppo", SCORED)
    assert len(other.progress.updates) == told  # not one update
    other.recipe = load_recipe(chain.recipe.path, set=[*words, "reward.minimum_accuracy=0"])
    metrics = other.run("ppo", SCORED).metrics
    assert (metrics["updates"], metrics["minimum_accuracy"]) == (1, 0.0)


def test_whose_minimum_holds(chain: Chain, tmp_path: Path) -> None:
    """The stage's that reads, else the reward stage's, else 0.55."""
    file = chain.outputs["reward"] / stats.FILE
    told = found(chain, "reward")
    low, high = stats.wilson(0.5, 4000)
    told["metrics"] |= {"accuracy": 0.5, "accuracy_low": low, "accuracy_high": high}
    file.write_text(json.dumps(told))
    for words, under in [
        ([], r"reward\.minimum_accuracy = 0\.55"),
        (["reward.minimum_accuracy=0.6"], r"reward\.minimum_accuracy = 0\.6"),
        (["reward.minimum_accuracy=0.2", "ppo.minimum_accuracy=0.7"], r"ppo\.minimum.* = 0\.7"),
        (["reward.minimum_accuracy=0.2"], None),
        (["reward.minimum_accuracy=0.9", "ppo.minimum_accuracy=0.5"], None),
    ]:
        chain.recipe = load_recipe(chain.recipe.path, set=["ppo.total_episodes=16", *words])
        if under:
            with pytest.raises(GateError, match=f"under {under}"):
                chain.run("ppo", SCORED)
        else:
            shutil.rmtree(chain.folder / "ppo")
            assert chain.run("ppo", SCORED).metrics["updates"] == 1


def test_a_foreign_reward_model_is_measured_before_ppo(
    chain: Chain, tiny_pairs: Path, tmp_path: Path, trained: SimpleNamespace
) -> None:
    own = trained.metrics["reward"]
    write_reward_model(chain.session, chain.outputs["reward"], tmp_path / "scorer", form="merged")
    words = [f"ppo.reward_model={tmp_path / 'scorer'}", 'stages=["sft", "ppo"]']
    words += ["ppo.total_episodes=16"]
    outputs = {"sft": chain.outputs["sft"]}
    other = Chain(load_recipe(chain.recipe.path, set=words), tmp_path / "other", outputs=outputs)
    metrics = other.run("ppo", POLICY).metrics
    for name in ("accuracy", "test_pairs", "calibration_error", "shorter_accuracy"):
        assert metrics[f"reward.{name}"] == pytest.approx(own[name], abs=1e-3)
    assert metrics["reward.margin"] == pytest.approx(own["margin"] * own["unit_std"], rel=1e-3)
    assert found(other, "ppo")["pairs"] == 15 and metrics["minimum_accuracy"] == 0.55

    tested = {e.prompt for e in rows_of(chain).test}
    file = backwards(tiny_pairs, tmp_path, lambda prompt: prompt in tested)
    other.recipe = load_recipe(chain.recipe.path, set=[*words, f"dataset.path={file}"])
    other.session.recipe = other.recipe
    with pytest.raises(GateError, match=r"worse than chance .*--set ppo\.minimum_accuracy=0"):
        other.run("ppo", POLICY)


def test_a_gate_ends_the_command_with_3_and_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.counting", "run", toy(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "COUNTING": "gate:ppo", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 3
    last = done.stderr.splitlines()[-1]
    assert last.startswith("stage ppo: it ranks 50.0% right (try more pairs; log: ")
    assert "Traceback" not in done.stderr and "evaluation" not in done.stderr
    manifest = json.loads((tmp_path / "runs" / "toy" / "manifest.json").read_text())
    assert [entry["outcome"] for entry in manifest["stages"]] == [
        "ran",
        "ran",
        "not run",
        "not run",
    ]


def test_a_reward_stage_of_its_own_rows_is_tested_on_the_recipe_s_split(
    chain: Chain, tiny_pairs: Path, tmp_path: Path
) -> None:
    lines = tiny_pairs.read_text().splitlines()
    (tmp_path / "data").mkdir()
    for name, some in {"train": lines[:40], "test": lines[40:60], "own": lines[50:]}.items():
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(some) + "\n")
    files = 'data_files = { train = "train.jsonl", test = "test.jsonl" }\ntest_split = "test"'
    text = chain.recipe.text.replace(f'path = "{tiny_pairs}"', f'path = "./data"\n{files}')
    text = text.replace("test_fraction = 0.2\n", "").replace(
        "[reward]", '[reward]\ndataset.path = "./data/own.jsonl"'
    )
    (tmp_path / "own.toml").write_text(text)
    other = Chain(load_recipe(tmp_path / "own.toml"), tmp_path / "own")
    assert other.run("reward", {}).metrics["test_pairs"] == 20
