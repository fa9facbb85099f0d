"""What the stages share: TRL's config from a stage table, and a trainer's numbers as progress."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback

from rlhf_recipes import models
from rlhf_recipes.data import Data
from rlhf_recipes.errors import StageError
from rlhf_recipes.identity import derive_seed
from rlhf_recipes.stages import Progress, StageContext

Config = TypeVar("Config")

# TRL's trainers report every construction to the hub; this project reports nothing to anyone.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def trainer_config(kind: type[Config], context: StageContext, **ours: Any) -> Config:
    """TRL's config: what the recipe says, and the fields that the recipe's other keys own."""
    recipe = context.recipe
    dtype = models.compute_dtype(recipe.model.dtype)
    owned = {
        "output_dir": str(context.folder / "work"),
        "seed": derive_seed(recipe.seed, context.name),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": models.device().type == "cpu",
        "disable_tqdm": True,
    }
    if context.kind != "ppo":  # the one loop here that can go on from what it saves
        owned["save_strategy"] = "no"
    return kind(**{**recipe.table(context.name).given, **owned, **ours})


def float32(*parameters: torch.nn.Parameter) -> None:
    """Trainable weights back to float32: stock trainers cast them to bfloat16 on a 4-bit base.

    Under autocast they take part in bfloat16 all the same, and a small step is not rounded away.
    """
    for parameter in parameters:
        parameter.data = parameter.data.float()


def load_rows(context: StageContext) -> Data:
    """The stage's rows; says and keeps in data.json what became of them."""
    own = context.recipe.table(context.name).dataset if context.kind != "evaluation" else None
    data = context.shared.data(own or context.recipe.dataset)
    sides = {side: len(getattr(data, side)) for side in ("train", "validation", "test", "judge")}
    dropped = dict(data.dropped.most_common())
    found = {"format": 1, "rows": data.rows, **sides, "dropped": dropped}
    write_json(context.folder / "data.json", found)
    shown = ", ".join(f"{count} {side}" for side, count in sides.items() if side != "judge")
    why = "; ".join(f"{count} dropped: {reason}" for reason, count in dropped.items())
    context.progress.note(f"{data.rows} rows: {shown}{'; ' + why if why else ''}")
    return data


def need(rows: list, what: str, context: StageContext) -> list:
    """`rows`, or a StageError where there are none."""
    if not rows:
        raise StageError(
            f"{context.name}: no {what}",
            "see the dropped rows in the log, the fractions in [dataset], and its columns = { … }",
        )
    return rows


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True))


class Report(TrainerCallback):
    """Hands a stock trainer's steps and logged numbers to the progress display.

    `shown` maps a logged name to the name that a person reads.
    """

    def __init__(self, progress: Progress, shown: dict[str, str]):
        self.progress = progress
        self.shown = shown

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.update(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        numbers = {name: logs[key] for key, name in self.shown.items() if key in logs}
        if numbers and state.global_step:
            self.progress.update(state.global_step, state.max_steps, **numbers)
