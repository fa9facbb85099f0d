"""Answers and scores that are kept: a fork that changes PPO alone asks PPO's policy alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.pipeline.runner import run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages import answers
from rlhf_recipes.store import kept

pytestmark = pytest.mark.train

SHORT = ["sft.max_steps=2", "reward.max_steps=2", "ppo.total_episodes=16"]
SHORT += ['evaluation.judge="independent"', "ppo.per_device_train_batch_size=4"]
FORK = [*SHORT, "ppo.learning_rate=2e-2"]


@pytest.fixture(autouse=True)
def quick(stages_alone: None) -> None: ...


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """How many prompts were sampled, and how many answers scored, call by call."""
    seen: dict[str, list[int]] = {"sample": [], "score_ids": []}
    real = answers.score_ids

    class Counted(answers.Sampler):
        def sample(self, prompts: Any, **words: Any) -> Any:
            seen["sample"].append(len(prompts))
            return super().sample(prompts, **words)

    def count(role: Any, rows: Any, *given: Any) -> Any:
        seen["score_ids"].append(len(rows))
        return real(role, rows, *given)

    monkeypatch.setattr(answers, "Sampler", Counted)
    monkeypatch.setattr(answers, "score_ids", count)
    return seen


def results(file: Path, runs: Path, changes: list[str], name: str = "fork") -> tuple[bytes, bytes]:
    outcome = run(load_recipe(file, set=changes), runs=runs, name=name, rehearse=False)
    last = next(done.stage for done in outcome.stages if done.stage.name == "evaluation")
    said = (last.folder / "output" / "answers.jsonl").read_bytes()
    return (outcome.run_folder / "results.json").read_bytes(), said


def test_a_fork_that_changes_ppo_asks_ppo_alone_and_ends_the_same(
    tiny_recipe: Path, tmp_path: Path, asked: dict[str, list[int]]
) -> None:
    results(tiny_recipe, tmp_path / "with", SHORT, "first")
    assert asked["sample"] == [12, 12, 12]  # the base, SFT, PPO
    files = sorted((tmp_path / "with").glob(".stages/*/kept/*.json"))
    owners = [file.parent.parent.name.partition("-")[0] for file in files]
    assert owners == ["judge"] * 3 + ["ppo"] + ["reward"] * 3 + ["sft"] * 2

    asked["sample"].clear(), asked["score_ids"].clear()
    with_it = results(tiny_recipe, tmp_path / "with", FORK)
    assert asked["sample"] == [12] and len(asked["score_ids"]) == 2
    without = results(tiny_recipe, tmp_path / "without", FORK)
    assert with_it == without and len(asked["sample"]) == 1 + 3
    assert json.loads(with_it[0])["ppo.judge_win_rate"] >= 0

    # What decides an answer is in its key; what is damaged is made anew.
    asked["sample"].clear()
    results(tiny_recipe, tmp_path / "with", [*FORK, "evaluation.temperature=0.6"], "other")
    assert asked["sample"] == [12, 12, 12]
    asked["sample"].clear()
    damaged = [b"", b'{"format": 1}', b"[]", b"\xff"]
    for place, file in enumerate(sorted((tmp_path / "with").glob(".stages/*/kept/*.json"))):
        text = file.read_bytes()
        file.write_bytes(
            [*damaged, text[:-9], text.replace(b"\n      ", b"\n      1", 1)][place % 6]
        )
    for record in (tmp_path / "with").glob(".stages/evaluation-*/stage.json"):
        record.unlink()
    assert results(tiny_recipe, tmp_path / "with", FORK) == without
    assert asked["sample"] == [12, 12, 12]


def test_a_value_is_recalled_for_exactly_what_it_was_kept_for(tmp_path: Path) -> None:
    kept.keep(tmp_path, {"seed": 1, "t": 0.7}, [[1, 2], [3]])
    assert kept.recall(tmp_path, {"t": 0.7, "seed": 1}) == [[1, 2], [3]]
    assert kept.recall(tmp_path, {"t": 0.7, "seed": 2}) is None
    [file] = tmp_path.iterdir()
    file.write_text(file.read_text().replace("3", "4"))
    assert kept.recall(tmp_path, {"t": 0.7, "seed": 1}) is None
