"""A stage that was interrupted goes on from its checkpoint and ends as one in one piece."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes import runner, stopping
from rlhf_recipes.errors import Interrupted
from rlhf_recipes.progress import StageProgress
from rlhf_recipes.recipe import load_recipe

# Checkpoints fall between two lines of numbers, and the fourth and fifth step into two epochs.
RECIPE = """
[dpo]
max_steps = 9
per_device_train_batch_size = 16
learning_rate = 1e-2
gradient_checkpointing = false
"""
SETS = {
    "lora.lora_dropout": 0.2,
    **{f"{kind}.max_steps": 9 for kind in ("sft", "reward")},
    **{f"{kind}.per_device_train_batch_size": 16 for kind in ("sft", "reward")},
    **{f"{kind}.logging_steps": 3 for kind in ("sft", "reward", "dpo")},
    **{f"{kind}.save_steps": 2 for kind in ("sft", "reward", "dpo", "ppo")},
    "ppo.total_episodes": 80,
    "ppo.keep": "best",
    "ppo.eval_steps": 1,
    "ppo.lr_scheduler_type": "cosine",
    "evaluation": False,
}
WALL_CLOCK = ("seconds", "eps")


@pytest.fixture
def recipe_file(tiny_recipe: Path) -> Path:
    text = tiny_recipe.read_text().replace('["sft", "reward", "ppo"]', '["sft", "reward", "ppo"]')
    tiny_recipe.write_text(text.replace('"ppo"]', '"ppo", "dpo"]') + RECIPE)
    return tiny_recipe


def recipe(file: Path, **sets: Any):
    sets = {**SETS, **{key.replace("__", "."): value for key, value in sets.items()}}
    told = [f"{key}={json.dumps(value)}" for key, value in sets.items() if value is not None]
    return load_recipe(file, set=told)


@contextlib.contextmanager
def cut(folder: str, step: int) -> Iterator[None]:
    """The stage in a folder of this name is interrupted in its `step`th step."""
    update = StageProgress.update

    def until(self: StageProgress, done: int, total: int, **numbers: float) -> None:
        if self._folder.name.startswith(folder) and done == step:
            raise KeyboardInterrupt
        update(self, done, total, **numbers)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(StageProgress, "update", until)
        yield


def results(runs: Path) -> dict[str, Any]:
    """By file: digests of all outputs; metrics; and the record's numbers."""
    found: dict[str, Any] = {}
    for stage in sorted((runs / ".stages").iterdir()):
        for file in sorted((stage / "output").rglob("*")):
            if file.is_file():
                name = str(file.relative_to(stage.parent))
                found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
        found[stage.name] = [
            {k: v for k, v in line.items() if k not in WALL_CLOCK} for line in lines
        ]
        record = json.loads((stage / "stage.json").read_text())
        found[f"{stage.name} record"] = (record["metrics"], record["summary"])
    return found


@pytest.mark.parametrize("lora", [True, False])
def test_every_kind_of_stage_ends_as_in_one_piece(
    recipe_file: Path, tmp_path: Path, lora: bool
) -> None:
    chain = recipe(recipe_file, **({} if lora else {"lora": False, "lora__lora_dropout": None}))
    runner.run(chain, runs=tmp_path / "whole")
    runs = tmp_path / "cut"
    for stage, step in [("sft", 3), ("sft", 8), ("reward", 5), ("ppo", 4), ("dpo", 7)]:
        with cut(stage, step):
            runner.run(chain, runs=runs)
        (folder,) = (runs / ".stages").glob(f"{stage}-*")
        last = (step - 1) // 2 * 2
        names = [f"checkpoint-{done:06d}" for done in (last - 2, last) if done]
        assert sorted(f.name for f in (folder / "work").iterdir()) == names
    runner.run(chain, runs=runs)
    whole = results(tmp_path / "whole")
    assert results(runs) == whole
    assert len([name for name in whole if name.endswith("safetensors")]) > 5
