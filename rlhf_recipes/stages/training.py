"""What the stages share: TRL's config from a stage table, and a trainer's numbers as progress."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import TrainOutput

from rlhf_recipes import signals
from rlhf_recipes.data.dataset import Data
from rlhf_recipes.errors import StageError, lost
from rlhf_recipes.models import load as models
from rlhf_recipes.models.role import Role
from rlhf_recipes.stages.checkpoints import Resumable
from rlhf_recipes.stages.contract import StageContext
from rlhf_recipes.store.fingerprint import derive_seed

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
    if wandb := sys.modules.get("wandb"):
        wandb.finish()  # it would write on in the run of the stage before
    named = {"run_name": f"{recipe.path.stem}-{context.name}"}
    return kind(**{**named, **recipe.table(context.name).given, **owned, **ours})


def float32(*parameters: torch.nn.Parameter) -> None:
    """Trainable weights back to float32: stock trainers cast them to bfloat16 on a 4-bit base.

    Under autocast they take part in bfloat16 all the same, and a small step is not rounded away.
    """
    for parameter in parameters:
        parameter.data = parameter.data.float()


def load_rows(context: StageContext) -> Data:
    """The stage's rows; says and keeps in data.json what became of them."""
    table = context.recipe.tables.get(context.name)
    data = context.shared.data(table and table.dataset or context.recipe.dataset)
    sides = {side: len(getattr(data, side)) for side in ("train", "validation", "test", "judge")}
    dropped = dict(data.dropped.most_common())
    found = {"rows": data.rows, **sides, "dropped": dropped}
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
    file.write_text(json.dumps({"format": 1, **value}, indent=2))


class Stock(Resumable):
    """Mixed in before a stock trainer: it shows what it does, and goes on from its checkpoints.

    `role` is what it trains; `shown` maps a logged name to the name that a person reads.
    """

    # What the loop, or TRL, counts beside transformers' state, and starts anew in each `train()`.
    COUNTS = ("_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")

    def __init__(self, context: StageContext, role: Role, shown: dict[str, str], **words: Any):
        self.key, self.progress, self.role = context.key, context.progress, role
        self.first: Any = None  # what was measured before the first step
        self.rng = torch.zeros_like(torch.get_rng_state())  # as the epoch began: it orders the rows
        super().__init__(callbacks=[Report(self, shown)], **words)

    def train(self, first: Callable[[], Any] = lambda: None) -> TrainOutput:
        """`first` is measured where the training begins, and kept where it goes on."""
        folder = self.newest()
        if folder is None:
            self.first = first()
        else:
            self.args.eval_on_start = False  # it was
        with signals.deferred():
            return super().train(resume_from_checkpoint=folder and str(folder))

    def training_step(self, *inputs: Any) -> torch.Tensor:
        loss = super().training_step(*inputs)
        if not loss.isfinite():  # transformers would leave it out of what it logs
            raise lost("losses")
        return loss

    def tensors(self) -> dict[str, torch.Tensor]:
        return {**{str(i): p for i, p in enumerate(self.role.trainable())}, "rng": self.rng}

    def carried(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in self.COUNTS}
        window = {"loss": self._tr_loss.item(), "metrics": dict(self._metrics["train"])}
        return {"first": self.first, "counts": counts, **window}

    def carry(self, kept: dict[str, Any]) -> None:
        self.first = kept["first"]
        vars(self).update(kept["counts"], _initial_global_step=0)
        self._tr_loss += kept["loss"]
        self._metrics["train"].update(kept["metrics"])
        self.state.compute_steps(self.args, self.state.max_steps)
        torch.set_rng_state(self.rng)

    def _save_checkpoint(self, *_: Any) -> None:
        if self.state.epoch % 1 == 0:
            self.rng = torch.get_rng_state()
        super()._save_checkpoint()

    def _init_training_state(self, max_steps: int, *rest: Any) -> tuple[int, int]:
        epochs, steps = super()._init_training_state(max_steps, *rest)
        # Stock would take one step more where a checkpoint is of the last.
        return (sys.maxsize if self.state.global_step >= max_steps else epochs), steps


class Report(TrainerCallback):
    """Hands a stock trainer's steps and logged numbers to the progress display, and stops it."""

    def __init__(self, trainer: Stock, shown: dict[str, str]):
        self.trainer = trainer
        self.shown = shown

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            self.trainer.carry(state.stateful_callbacks["carried"])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.rng = torch.get_rng_state()
        self.ends = self.due = False

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.progress.update(state.global_step, state.max_steps)
        if signals.requested():
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"
        # The checkpoint of an epoch's last step comes after what is logged and evaluated there.
        self.ends = state.epoch % 1 == 0 or state.global_step >= state.max_steps
        self.due = control.should_save and self.ends
        control.should_save &= not self.ends

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save |= self.due
        if not self.ends:  # the epoch was left on request, and its checkpoint is written
            control.should_log = control.should_evaluate = control.should_save = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            numbers = {name: logs[key] for key, name in self.shown.items() if key in logs}
            self.trainer.progress.update(state.global_step, state.max_steps, **numbers)
