"""The stage contract: `run(context) -> result`, and which function serves which kind.

A stage reads its recipe and its inputs' folders, writes `output/` in its own folder, and returns
numbers. It does not know the runner. A new kind is a new file beside these, a line in `KINDS`, and
its words in the language: `tables.py` (KINDS, POLICY_KINDS or ROLES, EXTRAS) and its TRL config in
`tools/make_fields.py` (CONFIGS), its fields in `tools/fields.toml`. `dpo.py` is the shortest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# kind -> (module with a `run`, version). A version goes up when the same settings on the same
# inputs would give another result: it is part of every key.
KINDS: dict[str, tuple[str, int]] = {
    "sft": ("rlhf_recipes.stages.sft", 2),
    "reward": ("rlhf_recipes.stages.reward", 3),
    "ppo": ("rlhf_recipes.stages.ppo.stage", 3),
    "dpo": ("rlhf_recipes.stages.dpo", 2),
    "judge": ("rlhf_recipes.stages.reward", 4),
    "evaluation": ("rlhf_recipes.stages.evaluate", 5),
    "best_of": ("rlhf_recipes.stages.best_of", 2),
}


@dataclass(frozen=True)
class StageContext:
    """All that a stage may look at."""

    name: str  # the stage's name in the recipe
    kind: str
    recipe: Any  # recipe.Recipe
    folder: Path  # <kind>-<key12>/, with work/ and output/ made by the runner
    inputs: Mapping[str, Path]  # role ("policy", "reward_model", …) -> that stage's output/
    progress: Any  # progress.StageProgress: what it tells the person who waits
    shared: Any  # shared.Shared: tokenizer, rows and the one base model, loaded once a run
    key: str = ""  # the stage's


@dataclass(frozen=True)
class StageResult:
    """What a stage hands back; its weights lie in `output/`."""

    metrics: dict[str, float | int | str]  # flat: "<stage>.<metric>" in results.json
    summary: str  # one phrase for the closing table


def load(kind: str) -> Callable[[StageContext], StageResult]:
    """The function that runs a stage of this kind; imports torch."""
    return importlib.import_module(KINDS[kind][0]).run
