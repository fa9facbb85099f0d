"""The rehearsal: one step of every stage that is to run, on its longest rows, before the first.

Each stage's own `run` does it, on a recipe cut down to two optimizer steps (an optimizer has a
state after the first), in a folder that is gone afterwards, from what the stages before it
rehearsed. What breaks, breaks now. Peak memory and seconds a step are measured. No stage draws from
what this draws from, nor sees its model.

What it measured is kept in the runs folder, by all that decides it (`_about`).
"""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_recipes.data.dataset import Data, Sides
from rlhf_recipes.data.rows import Example, sequences
from rlhf_recipes.models import load as models
from rlhf_recipes.pipeline import memory
from rlhf_recipes.pipeline.plan import Plan, PlannedStage
from rlhf_recipes.recipe.fields import fields_for
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.stages.contract import Trial, Work, module_of
from rlhf_recipes.stages.session import Session
from rlhf_recipes.stages.training import STEPS
from rlhf_recipes.store import files, layout, provenance
from rlhf_recipes.store.kept import keep, recall
from rlhf_recipes.text import duration, size

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
    session: Session
    # of a stage, and of what was done for it: names both in what fails in it
    failing: Callable[..., contextlib.AbstractContextManager[None]]
    needs: dict[str, Counter[str]] = field(default_factory=dict)  # by stage: bytes by role

    @property
    def recipe(self) -> Recipe:
        """As settled by the memory there is."""
        return self.session.recipe

    def folder(self, stage: PlannedStage) -> Path:
        """Of the base model that the stage is on."""
        return self.session.of(stage.name).model_folder

    def data(self, stage: PlannedStage) -> Data:
        return self.session.data_of(stage.name)


def cost(ahead: Ahead) -> tuple[float, float]:
    """Operations of these stages, and of their rehearsal."""
    recipe, whole, part = ahead.plan.recipe, 0.0, 0.0
    for stage in ahead.stages:
        with ahead.failing(stage):
            data = ahead.data(stage)
        trial, count = trial_of(recipe, stage), weights(ahead.folder(stage))
        whole += count * work_of(recipe, stage, data).total
        part += count * work_of(trial.recipe, stage, longest(data, stage, trial)).total
    return whole, part


def weights(folder: Path) -> float:
    """How many a model has, or twice as many where they are stored in 32 bit."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 2


def remembered(ahead: Ahead) -> list[Rehearsed] | None:
    """What an earlier rehearsal measured; None where one of these stages has none."""
    found = [recall(_kept(ahead), _about(ahead, stage)) for stage in ahead.stages]
    return None if None in found else [Rehearsed(**took) for took in found]


def _kept(ahead: Ahead) -> Path:
    return ahead.plan.runs / ".stages" / "rehearsed"


def _about(ahead: Ahead, stage: PlannedStage) -> dict[str, Any]:
    """All that decides a stage's memory and time, and whether it runs.

    That is its fingerprint with all of its settings, but of a rate or a coefficient only whether it
    is set, and whether it is 0. Inputs count by their roles.
    """
    recipe, own = ahead.recipe, stage.payload | {"inputs": sorted(stage.inputs)}
    if config := recipe.kind(stage.name).config:
        table, fields = recipe.table(stage.name), fields_for(config)
        options = {k: v for k, v in table.options.items() if fields[k].effect != "neutral"}
        own |= {"settings": options | table.extras}
    return {
        "stage": _without_floats(own),
        "sampler": recipe.model.sampler,
        "work": list(work_of(recipe, stage, ahead.data(stage))),
        "versions": provenance.versions(),
        "machine": models.machine(),
    }


def _without_floats(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_floats(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_without_floats(one) for one in value]
    return value != 0 if isinstance(value, float) else value


def rehearse(ahead: Ahead) -> Iterator[Rehearsed]:
    """Rehearse these stages; what fails does so in `ahead.failing(stage)`."""
    plan, outputs = ahead.plan, ahead.plan.outputs
    place = layout.beside(plan.run_folder, "rehearsal")
    own = Session(ahead.recipe, plan.model)
    files.remove(place)  # what a kill left
    own.tokens = ahead.session.tokens
    try:
        for stage in ahead.stages:
            folder = place / stage.name
            with ahead.failing(stage, "the rehearsal of "), _same_draws():
                took = _stage(ahead, stage, own, folder, outputs)
            outputs[stage.name] = folder / "output"
            keep(_kept(ahead), _about(ahead, stage), asdict(took))
            yield took
    finally:
        own.release()
        files.remove(place)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def _stage(
    ahead: Ahead, stage: PlannedStage, own: Session, folder: Path, outputs: Mapping[str, Path]
) -> Rehearsed:
    whole = ahead.recipe
    trial = trial_of(whole, stage)
    recipe = own.recipe = trial.recipe
    few, on = longest(ahead.data(stage), stage, trial), own.of(stage.name)
    on.put_data(
        whole.dataset, longest(ahead.session.of(stage.name).data(whole.dataset), stage, trial)
    )
    on.put_data(whole.dataset_of(stage.name), few)
    layout.clear_stage(folder)
    clock = Clock()
    memory.begin()
    stage.run(own, folder, outputs, clock)
    seconds, peak = time.monotonic() - clock.began, memory.peak()
    real, part = work_of(whole, stage, ahead.data(stage)), work_of(recipe, stage, few)
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
    """`contract.Progress` that tells nobody: how long the last step took."""

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


# ---- a step of a stage


def trial_of(recipe: Recipe, stage: PlannedStage) -> Trial:
    """As little of one stage as still takes the memory of all of it."""
    return module_of(stage.kind).trial(recipe, stage.name)


def longest(data: Data, stage: PlannedStage, trial: Trial) -> Data:
    """As many of the longest rows as a trial takes; every other is the longest of all."""
    kind = trial.recipe.kind(stage.name)
    learns_from = kind.learns_from

    def first(found: Sequence[Example]) -> list[Example]:
        usable = [example for example in found if sequences(example, learns_from)]
        return sorted(usable, key=lambda e: max(sequences(e, learns_from)), reverse=True)

    learned = data.learned(learns_from)  # every pair stands by itself there
    few = first([replace(one, others=()) if one.others else one for one in learned])
    # The longest in every batch, and others: the unit of a reward is the spread of what differs.
    if not kind.samples and few:
        few = [few[0] if place % 2 else few[place // 2 % len(few)] for place in range(trial.train)]
    train = few[: trial.train]
    judge = train if learns_from == "judge_feedback" else []
    validation, test = first(data.validation)[: trial.rest], first(data.test)[: trial.rest]
    sides = {"train": train, "judge": judge, "validation": validation, "test": test}
    return replace(
        data, bad=Sides(), **sides
    )  # bad answers are in `train` if they are learned from


def work_of(recipe: Recipe, stage: PlannedStage, data: Data) -> Work:
    """What the stage computes on these rows; next to nothing where there are none."""
    if not data.learned(recipe.kind(stage.name).learns_from):
        return Work(1, 1.0)
    return module_of(stage.kind).work(recipe, stage.name, data)
