"""How much a stage does: its rows and their tokens, its steps, and operations by arithmetic.

Two operations a weight and token in a forward, four in a backward. No model is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rlhf_recipes.data import Data, Example, unique_prompts
from rlhf_recipes.plan import PlannedStage
from rlhf_recipes.recipe import Recipe
from rlhf_recipes.stages.answers import last_ppo
from rlhf_recipes.stages.ppo import VALIDATION_PROMPTS
from rlhf_recipes.stages.reward import FEW, REREAD, UNIT_ROWS
from rlhf_recipes.tables import BEST_OF, EVALUATION, JUDGE

FORWARD, BACKWARD = 2, 4


@dataclass(frozen=True)
class Work:
    """In operations a weight of the model."""

    steps: int
    step: float
    beside: float = 0.0  # what is scored before, between and after

    @property
    def total(self) -> float:
        return self.steps * self.step + self.beside


def own_data(recipe: Recipe, stage: PlannedStage) -> Any:
    """The [dataset] table that a stage's rows come from."""
    own = recipe.tables.get(stage.name)
    return own and own.dataset or recipe.dataset


def rows(data: Data, kind: str) -> list[Example]:
    """What a stage of this kind learns from; of the evaluation, what it asks."""
    if kind in (EVALUATION, BEST_OF):
        return unique_prompts(data.test)
    if kind == "ppo":
        return unique_prompts(data.train)
    found = {"sft": data.train, JUDGE: data.judge}.get(kind, data.reward_train)
    return [example for example in found if sequences(example, kind)]


def sequences(example: Example, kind: str) -> list[int]:
    """The lengths of what a row gives to read: a prompt, with an answer, or with either of two."""
    if kind in ("ppo", EVALUATION, BEST_OF):
        return [len(example.prompt_ids)]
    answers = [example.chosen_ids] if kind == "sft" else [example.chosen_ids, example.rejected_ids]
    return [] if None in answers else [len(example.prompt_ids) + len(ids) for ids in answers]


def batch(options: Mapping[str, Any]) -> int:
    """Rows of an optimizer step; of PPO, answers of an update."""
    return options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]


def work(recipe: Recipe, stage: PlannedStage, data: Data) -> Work:
    """What the stage does on these rows; nothing where there are none."""
    kind, found = stage.kind, rows(data, stage.kind)
    if not found:
        return Work(1, 1.0)
    tokens = fmean(sum(sequences(example, kind)) for example in found)
    if kind in (EVALUATION, BEST_OF):
        return _asked(recipe, stage, tokens, len(found))
    options = recipe.table(stage.name).options
    checked = [len(getattr(data, side)) for side in ("validation", "test")]
    if kind == "ppo":
        answered = tokens + options["response_length"]
        size = batch(options)
        steps = math.ceil(options["total_episodes"] / size)
        learns = options["num_ppo_epochs"] * 2 * (FORWARD + BACKWARD)
        looks = _looks(options, steps) * min(VALIDATION_PROMPTS, checked[0])
        seen = 5 * FORWARD * answered  # the sampling, and the opinions of four roles
        return Work(steps, size * (seen + learns * answered), looks * seen)
    step = batch(options) * tokens * (FORWARD + BACKWARD + (FORWARD if kind == "dpo" else 0))
    epochs = options["num_train_epochs"]
    if kind == JUDGE:
        most = min(len(rows(data, "reward")), FEW) / len(found)
        epochs *= min(REREAD, max(1.0, most))
    steps = options["max_steps"]
    if steps < 1:
        steps = math.ceil(epochs * math.ceil(len(found) / batch(options)))
    scored = {"sft": 2 * checked[0], "dpo": 2 * checked[0]}
    beside = scored.get(kind, min(UNIT_ROWS, len(found)) / 2 + sum(checked))
    return Work(steps, step, beside * tokens * FORWARD)


def _looks(options: Mapping[str, Any], updates: int) -> int:
    """How often PPO looks at validation prompts."""
    if options["eval_strategy"] == "no":
        return 0
    every = options["eval_steps"]
    return 1 + math.ceil(updates / math.ceil(every if every >= 1 else every * updates))


def _asked(recipe: Recipe, stage: PlannedStage, tokens: float, most: int) -> Work:
    asked = recipe.evaluation
    answered = tokens + answer_length(recipe)
    policies = 1 + sum(role.startswith("policy:") for role in stage.inputs)
    answers = asked.best_of if stage.kind == BEST_OF else policies
    scorers = 1 + len(asked.judges)
    passes = 1 + scorers + (0 if stage.kind == BEST_OF else 3)
    return Work(1, min(asked.prompts, most) * answers * answered * passes * FORWARD)


def answer_length(recipe: Recipe) -> int:
    """The most tokens of an answer in the evaluation."""
    ppo = last_ppo(recipe)
    trained = recipe.table(ppo).options["response_length"] if ppo else 0
    return recipe.evaluation.response_length or trained or recipe.dataset.max_answer_tokens
