"""How much a stage does: its rows and their tokens, its steps, and operations by arithmetic.

Two operations a weight and token in a forward, four in a backward. No model is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any, NamedTuple

from rlhf_recipes.data.dataset import Data
from rlhf_recipes.data.rows import Example, unique_prompts
from rlhf_recipes.pipeline.plan import PlannedStage
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.tables import BEST_OF, EVALUATION, JUDGE
from rlhf_recipes.stages.answers import asked_with
from rlhf_recipes.stages.ppo.stage import VALIDATION_PROMPTS
from rlhf_recipes.stages.reward import FEW, REREAD, UNIT_ROWS

FORWARD, BACKWARD = 2, 4
ASKED = (EVALUATION, BEST_OF)  # stages that only sample
SAMPLING = ("ppo", *ASKED)


class Work(NamedTuple):
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
    if kind in SAMPLING:
        return unique_prompts(data.train if kind == "ppo" else data.test)
    found = {"sft": data.train, JUDGE: data.judge}.get(kind, data.reward_train)
    return [example for example in found if sequences(example, kind)]


def sequences(example: Example, kind: str) -> list[int]:
    """The lengths of what a row gives to read: a prompt, with an answer, or with either of two."""
    if kind in SAMPLING:
        return [len(example.prompt_ids)]
    answers = [example.chosen_ids] if kind == "sft" else [example.chosen_ids, example.rejected_ids]
    return [] if None in answers else [len(example.prompt_ids) + len(ids) for ids in answers]


def batch(options: Mapping[str, Any]) -> int:
    """Rows of an optimizer step; of PPO, answers of an update."""
    return options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]


def answer_length(recipe: Recipe, stage: PlannedStage) -> int:
    """The most tokens of an answer that a stage samples."""
    if stage.kind == "ppo":
        return recipe.table(stage.name).options["response_length"]
    return asked_with(recipe, "response_length") or recipe.dataset.max_answer_tokens


def work(recipe: Recipe, stage: PlannedStage, data: Data) -> Work:
    """What the stage does on these rows; nothing where there are none."""
    kind, found = stage.kind, rows(data, stage.kind)
    if not found:
        return Work(1, 1.0)
    tokens = fmean(sum(sequences(example, kind)) for example in found)
    if kind in SAMPLING:
        answered = tokens + answer_length(recipe, stage)
    if kind in ASKED:
        asked = recipe.evaluation
        policies = 1 + sum(role.startswith("policy:") for role in stage.inputs)
        answers, measured = (asked.best_of, 0) if kind == BEST_OF else (policies, 3)
        passes = 2 + len(asked.judges) + measured
        prompts = min(asked.prompts, len(found))
        return Work(1, prompts * answers * answered * passes * FORWARD)
    options = recipe.table(stage.name).options
    size, checked, tested = batch(options), len(data.validation), len(data.test)
    if kind == "ppo":
        steps = math.ceil(options["total_episodes"] / size)
        learns = options["num_ppo_epochs"] * 2 * (FORWARD + BACKWARD)
        looks = _looks(options, steps) * min(VALIDATION_PROMPTS, checked)
        seen = 5 * FORWARD * answered  # the sampling, and the opinions of four roles
        return Work(steps, size * (seen + learns * answered), looks * seen)
    step = size * tokens * (FORWARD + BACKWARD + (FORWARD if kind == "dpo" else 0))
    epochs = options["num_train_epochs"]
    if kind == JUDGE:
        most = min(len(rows(data, "reward")), FEW) / len(found)
        epochs *= min(REREAD, max(1.0, most))
    steps = options["max_steps"]
    if steps < 1:
        steps = math.ceil(epochs * math.ceil(len(found) / size))
    scored = 2 * checked
    if kind not in ("sft", "dpo"):
        scored = min(UNIT_ROWS, len(found)) / 2 + checked + tested
    return Work(steps, step, scored * tokens * FORWARD)


def _looks(options: Mapping[str, Any], updates: int) -> int:
    """How often PPO looks at validation prompts."""
    if options["eval_strategy"] == "no":
        return 0
    every = options["eval_steps"]
    return 1 + math.ceil(updates / math.ceil(every if every >= 1 else every * updates))
