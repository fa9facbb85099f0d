"""Trainings that are killed at a step."""

from __future__ import annotations

from pathlib import Path

from rlhf_recipes.recipe.kinds import Limits
from rlhf_recipes.stages.ppo.trainer import PPOTrainer
from tests.helpers.roles import make_base
from tests.helpers.trainers import make_trainer

CLOCK = {"eps"}


class Killed(Exception):
    pass


def build(model: Path, folder: Path, *, killed_after: int = 0, **config) -> PPOTrainer:
    seen: list[dict] = []

    def on_update(trainer: PPOTrainer, _, metrics: dict[str, float]) -> None:
        seen.append({k: v for k, v in metrics.items() if k not in CLOCK})
        if killed_after and len(seen) > killed_after:
            raise Killed

    words = {
        "keep": "best",
        "validation_prompts": [[1, 4, 15, 5]],
        "value_warmup_epochs": 1,
        "limits": Limits(max_score_drop=1e9),
        "on_update": on_update,
    }
    settings = {
        "total_episodes": 40,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "lr_scheduler_type": "cosine",
        **config,
    }
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(make_base(model), folder, model=model, words=words, **settings)
    trainer.seen = seen
    return trainer
