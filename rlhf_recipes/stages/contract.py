"""The contract of a stage: what its module exports, and what it is given.

A stage reads its recipe and its inputs' folders, writes `output/` in its own folder, and returns
numbers. It does not know who runs it. `recipe/kinds.py` says which module serves which kind.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from rlhf_recipes.recipe.kinds import kind_of
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.store.digests import derive_seed

if TYPE_CHECKING:
    from rlhf_recipes.data.dataset import Data
    from rlhf_recipes.models.fake_model import Held, Sim
    from rlhf_recipes.stages.session import Session


class Progress(Protocol):
    """What a stage tells the person who waits."""

    def update(self, done: int, total: int, **numbers: float) -> None:
        """`done` of `total` steps; the numbers that matter most come first."""

    def resume(self, done: int) -> None:
        """The stage begins after step `done`."""

    def sample(self, prompt: str, answer: str, **numbers: float) -> None:
        """A completion worth looking at."""

    def note(self, text: str) -> None: ...


@dataclass(frozen=True)
class StageContext:
    """All that a stage may look at."""

    name: str  # the stage's name in the recipe
    kind: str
    recipe: Recipe
    folder: Path  # <kind>-<key12>/, with work/ and output/ made by the runner
    inputs: Mapping[str, Path]  # role ("policy", "reward_model", …) -> that stage's output/
    progress: Progress
    session: Session  # tokenizer, rows and the one base model, loaded once a run
    key: str = ""  # the stage's
    judged: Mapping[str, Any] = field(default_factory=dict)  # the judgements that the key knows of

    def seed(self, *place: str) -> int:
        """Of the stage's own draws, for one place of use."""
        return derive_seed(self.recipe.seed, self.name, *place)


@dataclass(frozen=True)
class StageResult:
    """What a stage hands back; its weights lie in `output/`."""

    metrics: dict[str, float | int | str]  # flat: "<stage>.<metric>" in results.json
    summary: str  # one phrase for the closing table


class Trial(NamedTuple):
    """A stage cut down to its rehearsal: a step or two that take the memory of all of it."""

    recipe: Recipe
    train: int  # rows that it learns from
    rest: int  # rows of each other side


class Work(NamedTuple):
    """How much a stage computes, in operations a weight of the model."""

    steps: int
    step: float
    beside: float = 0.0  # what is scored before, between and after
    tokens: int = 0  # passes that sample a token each, one after another, on a card

    @property
    def total(self) -> float:
        return self.steps * self.step + self.beside


class StageModule(Protocol):
    """What the module of a kind exports."""

    def run(self, context: StageContext) -> StageResult:
        """Do the stage's work."""

    def trial(self, recipe: Recipe, name: str) -> Trial:
        """The recipe with as little of the stage as still takes the memory of all of it."""

    def work(self, recipe: Recipe, name: str, data: Data) -> Work:
        """How much the stage computes on these rows; of rows there is at least one."""

    def memory(self, sim: Sim) -> Iterator[Held]:
        """The most bytes by role of each part of the stage, on a model without content."""

    def answer_length(self, recipe: Recipe, name: str) -> int:
        """The most tokens of an answer; of kinds that sample."""


def module_of(kind: str) -> StageModule:
    """Imports torch. Raises UsageError for a kind that this version does not know."""
    return cast(StageModule, importlib.import_module(kind_of(kind).module))
