"""The rehearsal: one step of every stage that is to run, on its longest rows, before the first.

Each stage's own `run` does it, on a recipe cut down to a step, in a folder that is gone afterwards,
from what the stages before it rehearsed. It is two optimizer
steps, for an optimizer has a state from the first one on. What breaks, breaks now; peak memory and
seconds a step are measured. No stage draws from what this draws from, nor sees its model.
"""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_recipes.data.dataset import Data
from rlhf_recipes.data.rows import Example
from rlhf_recipes.pipeline import memory
from rlhf_recipes.pipeline.flops import ASKED, batch, own_data, rows, sequences, work
from rlhf_recipes.pipeline.plan import Plan, PlannedStage
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.tables import JUDGE
from rlhf_recipes.stages.answers import SAMPLED
from rlhf_recipes.stages.ppo.stage import ROLLOUT, VALIDATION_PROMPTS
from rlhf_recipes.stages.session import Shared
from rlhf_recipes.store import files, layout
from rlhf_recipes.text import duration, size

STEPS = 2
SHORT = 5e13  # operations: a run of fewer takes minutes at most, and is its own rehearsal
SHARE = 0.25  # of a run's operations, that a rehearsal may cost


@dataclass(frozen=True)
class Rehearsed:
    """What one stage took in its rehearsal, and what it takes by that."""

    name: str
    memory: dict[str, int]  # the most, as `memory.peak` says it
    step: float  # seconds, of a step of the stage itself
    steps: int
    seconds: float  # of the stage itself

    def line(self) -> str:
        """The stage, its memory and its time, for a person."""
        most = self.memory.get("gpu_bytes") or self.memory.get("process_bytes")
        held = f"{size(most)}, " if most else ""
        pace = f"{self.step:.2g} s a step, " if self.steps > 1 else ""
        return f"{self.name:<12}{held}{pace}about {duration(self.seconds)}"


@dataclass(frozen=True)
class Ahead:
    """The stages of a plan that are to run."""

    plan: Plan
    stages: Sequence[PlannedStage]
    shared: Shared
    # of a stage, and of what was done for it: names both in what fails in it
    failing: Callable[..., contextlib.AbstractContextManager[None]]
    needs: dict[str, Counter[str]] = field(default_factory=dict)  # by stage: bytes by role

    def data(self, stage: PlannedStage) -> Data:
        return self.shared.data(own_data(self.plan.recipe, stage))


def cost(ahead: Ahead) -> tuple[float, float]:
    """Operations of these stages, and of their rehearsal."""
    recipe, whole, part = ahead.plan.recipe, 0.0, 0.0
    for stage in ahead.stages:
        with ahead.failing(stage):
            data = ahead.data(stage)
        less = cut(recipe, stage)
        whole += work(recipe, stage, data).total
        part += work(less, stage, longest(data, less, stage)).total
    count = weights(ahead.shared.model_folder)
    return whole * count, part * count


def weights(folder: Path) -> float:
    """How many a model has, or twice as many where they are stored in 32 bit."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2


def rehearse(ahead: Ahead) -> Iterator[Rehearsed]:
    """Rehearse these stages; what fails does so in `ahead.failing(stage)`."""
    plan, outputs = ahead.plan, ahead.plan.outputs
    place = layout.beside(plan.run_folder, "rehearsal")
    own = Shared(plan.recipe, plan.model)
    files.remove(place)  # what a kill left
    own.tokens = ahead.shared.tokens
    try:
        for stage in ahead.stages:
            folder = place / stage.name
            with ahead.failing(stage, "the rehearsal of "), _same_draws():
                took = _stage(ahead, stage, own, folder, outputs)
            outputs[stage.name] = folder / "output"
            yield took
    finally:
        own.release()
        files.remove(place)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _stage(
    ahead: Ahead, stage: PlannedStage, own: Shared, folder: Path, outputs: Mapping[str, Path]
) -> Rehearsed:
    whole = ahead.plan.recipe
    recipe = own.recipe = cut(whole, stage)
    for table in (whole.dataset, own_data(whole, stage)):
        few = own._data[repr(table)] = longest(ahead.shared.data(table), recipe, stage)
    layout.clear_stage(folder)
    clock = Clock()
    memory.begin()
    stage.run(own, folder, outputs, clock)
    seconds, peak = time.monotonic() - clock.began, memory.peak()
    real, part = work(whole, stage, ahead.data(stage)), work(recipe, stage, few)
    if clock.step is None:
        total = seconds * real.total / part.total
        return Rehearsed(stage.name, peak, total / real.steps, real.steps, total)
    step = clock.step * real.step / part.step
    total = step * (real.steps + real.beside / real.step) + seconds - STEPS * clock.step
    return Rehearsed(stage.name, peak, step, real.steps, max(total, seconds))


@contextlib.contextmanager
def _same_draws() -> Iterator[None]:
    """Whatever is drawn within, what is drawn afterwards is the same."""
    ours, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numbers)


class Clock:
    """`stages.Progress` that tells nobody: how long the last step took."""

    def __init__(self) -> None:
        self.began = self.at = time.monotonic()
        self.done, self.before, self.step = -1, 0.0, None

    def update(self, done: int, total: int, **numbers: float) -> None:
        now = time.monotonic()
        if done == 0:
            self.before = now - self.at  # PPO's first look at validation prompts: its last does too
        elif done > self.done >= 0:
            self.step = max(now - self.at - (self.before if done == total else 0.0), 1e-3)
        if done > self.done:
            self.at, self.done = now, done

    def resume(self, done: int) -> None:
        self.at = time.monotonic()

    def sample(self, prompt: str, answer: str, **numbers: float) -> None: ...

    def note(self, text: str) -> None: ...


# ---- a step of a stage --------------------------------------------------------------------------


def cut(recipe: Recipe, stage: PlannedStage) -> Recipe:
    """The recipe with as little of one stage as still takes the memory of all of it."""
    if stage.kind in ASKED:
        asked = recipe.evaluation
        prompts = min(asked.prompts, SAMPLED)
        less = replace(asked, prompts=prompts, best_of=asked.best_of and 2)
        return replace(recipe, evaluation=less)
    table = recipe.table(stage.name)
    given, extras = table.options, table.extras
    options = {"report_to": "none", "save_steps": STEPS}
    options["save_strategy"] = "no" if given["save_strategy"] == "no" else "steps"
    if stage.kind == "ppo":
        options |= _update(given)
        extras = extras | {"minimum_accuracy": 0.0}
    else:
        options |= {"max_steps": STEPS, "eval_strategy": "no", "eval_on_start": False}
        options["gradient_accumulation_steps"] = min(STEPS, given["gradient_accumulation_steps"])
    known = {key: value for key, value in options.items() if key in given}
    less = replace(table, options=given | known, given=table.given | known, extras=extras)
    return replace(recipe, tables=recipe.tables | {stage.name: less})


def _update(given: Mapping[str, Any]) -> dict[str, Any]:
    """An update of PPO on no more answers than it samples at a time, in two steps or more."""
    rows, micros = given["per_device_train_batch_size"], given["gradient_accumulation_steps"]
    minis = given["num_mini_batches"]
    if micros >= minis and not given["whiten_rewards"]:  # else a mini-batch is as small as it goes
        sampled = min(given[ROLLOUT], rows * micros)
        each, minis = micros // minis, min(minis, STEPS)
        each = min(each, max(min(each, STEPS), -(-sampled // (rows * minis))))
        micros = each * minis
    updates = 1 if minis * given["num_ppo_epochs"] > 1 else STEPS
    return {
        "gradient_accumulation_steps": micros,
        "num_mini_batches": minis,
        "total_episodes": rows * micros * updates,
        "eval_steps": updates,
        "save_steps": updates,
    }


def longest(data: Data, recipe: Recipe, stage: PlannedStage) -> Data:
    """As many of the longest rows as a cut recipe takes; every other is the longest of all."""
    kind, table, train = stage.kind, recipe.tables.get(stage.name), 0
    if kind in ASKED:
        rest = recipe.evaluation.prompts
    elif kind == "ppo":
        train = table.options["total_episodes"]
        rest = min(table.options[ROLLOUT], VALIDATION_PROMPTS)
    else:
        rest = table.options["per_device_eval_batch_size"]
        train = max(rest, STEPS * batch(table.options))

    def first(found: Sequence[Example]) -> list[Example]:
        usable = [example for example in found if sequences(example, kind)]
        return sorted(usable, key=lambda e: max(sequences(e, kind)), reverse=True)

    few = first(rows(data, kind))
    if kind != "ppo" and few:  # the longest in every batch, and others: a unit is of what differs
        few = [few[0] if place % 2 else few[place // 2 % len(few)] for place in range(train)]
    sides = {"train": few[:train], "judge": few[:train] if kind == JUDGE else []}
    validation, test = first(data.validation)[:rest], first(data.test)[:rest]
    return replace(data, **sides, validation=validation, test=test)
