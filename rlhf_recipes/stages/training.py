"""What the stages that train share.

TRL's config from a stage's table, stock trainers that resume, and how such a stage is rehearsed and
its work counted.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from statistics import fmean
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import TrainOutput

from rlhf_recipes import group, signals
from rlhf_recipes.data.dataset import Data, lacking
from rlhf_recipes.data.rows import Example, sequences
from rlhf_recipes.errors import StageError, lost
from rlhf_recipes.models import load as models
from rlhf_recipes.models.role import Role
from rlhf_recipes.recipe.kinds import kind_of
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.wiring import columns_of
from rlhf_recipes.stages.checkpoints import Resumable
from rlhf_recipes.stages.contract import StageContext, Trial, Work
from rlhf_recipes.stages.order import Order, share_out, shared
from rlhf_recipes.store.files import write_json

Config = TypeVar("Config")
Weights = list[torch.nn.Parameter]

# TRL's trainers report every construction to the hub; this project reports nothing to anyone.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

WANTED = {  # by what a kind learns from
    "answers": "answers on the train side",
    "pairs": "pairs on the train side",
    "labels": "answers with a label, and no pairs, on the train side",
    "feedback": "pairs, and no labels of both kinds, on the train side",
    "judge_feedback": "pairs, and no labels of both kinds, in the judge's share of the train side",
    "prompts": "prompts on the train side",
    "every_prompt": "prompts",
    "test_prompts": "prompts on the test side",
}


def trainer_config(
    kind: type[Config], context: StageContext, said: Mapping[str, Any] | None = None, **ours: Any
) -> Config:
    """A config: what the recipe says, or `said`, and the fields that its other keys own."""
    recipe = context.recipe
    dtype = models.compute_dtype(recipe.model.dtype)
    owned = {
        "output_dir": str(context.folder / "work"),
        "seed": context.seed(),
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": models.device().type == "cpu",
        "disable_tqdm": True,
    }
    if wandb := sys.modules.get("wandb"):
        wandb.finish()  # it would write on in the run of the stage before
    named = {"run_name": f"{recipe.path.stem}-{context.name}"}
    config = kind(**{**named, **(said or recipe.table(context.name).given), **owned, **ours})
    if (
        config.n_gpu > 1
    ):  # one process uses one card: transformers would wrap a role for all of them
        config._n_gpu = 1
        context.progress.note(f"{config.device} is used; the other cards stay idle")
    return config


def float32(*parameters: torch.nn.Parameter) -> None:
    """Trainable weights back to float32: stock trainers cast them to bfloat16 on a 4-bit base.

    Under autocast they take part in bfloat16 all the same, and a small step is not rounded away.
    """
    for parameter in parameters:
        parameter.data = parameter.data.float()


def two_rates(
    args: TrainingArguments, first: Weights, second: Weights | None = None, rate: float = 0.0
) -> torch.optim.Optimizer:
    """The optimizer that `optim` names, with a learning rate of its own for `second`."""
    kind, words = Trainer.get_optimizer_cls_and_kwargs(args)
    groups = [{"params": first}, {"params": second, "lr": rate}][: 2 if second else 1]
    return kind(groups, weight_decay=args.weight_decay, **words)


def load_rows(context: StageContext) -> tuple[Data, list[Example]]:
    """The stage's data, and of it the rows that the stage learns from or asks about.

    Says, and keeps in data.json, what became of the rows. Raises StageError where none are left.
    """
    data = context.session.data_of(context.name)
    sides = {side: len(getattr(data, side)) for side in ("train", "validation", "test", "judge")}
    dropped = dict(data.dropped.most_common())
    found = {"rows": data.rows, **sides, "dropped": dropped}
    write_json(context.folder / "data.json", found)
    shown = ", ".join(f"{count} {side}" for side, count in sides.items() if side != "judge")
    why = "; ".join(f"{count} dropped: {reason}" for reason, count in dropped.items())
    context.progress.note(f"{data.rows} rows: {shown}{'; ' + why if why else ''}")
    for words in data.spoken():
        context.progress.note(f"rows: {words}")
    learns_from = kind_of(context.kind).learns_from
    columns = columns_of(context.recipe, context.name)
    if what := lacking(data.named, columns):
        raise StageError(f"{context.name}: {what}", "name a column that the rows have")
    if not (rows := data.learned(learns_from, columns)):
        raise StageError(
            f"{context.name}: no {WANTED[learns_from]}",
            "see the dropped rows in the log, the fractions in [dataset], and its columns = { … }",
        )
    return data, rows


# ---- the rehearsal and the work of a stock trainer's stage

STEPS = 2  # of a rehearsal: an optimizer has a state from the first one on
FORWARD, BACKWARD = 2, 4  # operations a weight and token


def batch(options: Mapping[str, Any]) -> int:
    """Rows of an optimizer step; where a policy samples, answers of an update."""
    return options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]


def shortened(recipe: Recipe, name: str, options: Mapping[str, Any], **extras: Any) -> Recipe:
    """The recipe with other settings of one stage, of those that the stage has."""
    table = recipe.table(name)
    given = table.options
    ours = {"report_to": "none", "save_steps": STEPS}
    ours["save_strategy"] = "no" if given["save_strategy"] == "no" else "steps"
    known = {key: value for key, value in (ours | dict(options)).items() if key in given}
    settings = {"options": given | known, "given": table.given | known}
    less = replace(table, **settings, extras=table.extras | extras)
    return replace(recipe, tables=recipe.tables | {name: less})


def trial(recipe: Recipe, name: str) -> Trial:
    """Two steps of the optimizer."""
    given = recipe.table(name).options
    options = {"max_steps": STEPS, "eval_strategy": "no", "eval_on_start": False}
    options["gradient_accumulation_steps"] = min(STEPS, given["gradient_accumulation_steps"])
    less = shortened(recipe, name, options)
    rest = less.table(name).options["per_device_eval_batch_size"]
    return Trial(less, max(rest, STEPS * batch(less.table(name).options)), rest)


def work(
    recipe: Recipe, name: str, data: Data, rereads: float = 1.0, scored: float | None = None
) -> Work:
    """The work of a stock trainer, and of a reference that reads each row without learning.

    Rows are read `rereads` times as often as the recipe says. `scored` are rows that are read
    beside the training: without it, the validation rows before and after.
    """
    kind, options = recipe.kind(name), recipe.table(name).options
    found = data.learned(kind.learns_from)
    tokens = fmean(sum(sequences(example, kind.learns_from)) for example in found)
    size, steps = batch(options), options["max_steps"]
    if steps < 1:
        steps = math.ceil(options["num_train_epochs"] * rereads * math.ceil(len(found) / size))
    beside = 2 * len(data.validation) if scored is None else scored
    step = size * tokens * (FORWARD + BACKWARD + ("reference" in kind.roles) * FORWARD)
    return Work(steps, step, beside * tokens * FORWARD)


# ---- the trainer


class Stock(Resumable):
    """Mixed in before a stock trainer: it shows what it does, and goes on from its checkpoints.

    `role` is what it trains on `train`, each row in the form that `row` gives it; `shown` maps a
    logged name to the name that a person reads.
    """

    # What the loop, or TRL, counts beside transformers' state, and starts anew in each `train()`.
    COUNTS = ("_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")

    def __init__(
        self,
        context: StageContext,
        role: Role,
        shown: dict[str, str],
        train: list[Example],
        validation: list[Example],
        **words: Any,
    ):
        self.key, self.progress, self.role = context.key, context.progress, role
        self.first: Any = None  # what was measured before the first step
        args = words["args"]
        self.batch = batch(vars(args))
        vars(args).update(share_out(context.recipe, context.name, group.size()))
        args.average_tokens_across_devices = True  # of one process it changes nothing
        super().__init__(
            callbacks=[Report(self, shown)],
            train_dataset=self._rows(train),
            eval_dataset=self._rows(validation) if validation else None,
            processing_class=context.session.tokens.tokenizer,
            **words,
        )

    def _rows(self, examples: list[Example]) -> Dataset:
        return Dataset.from_list([self.row(example) for example in examples])

    def train(self, first: Callable[[], Any] = lambda: None) -> TrainOutput:
        """`first` is measured where the training begins, and kept where it goes on."""
        folder = self.newest()
        if folder is None:
            self.first = first()
        else:
            self.args.eval_on_start = False  # it was
        with signals.deferred():
            done = super().train(resume_from_checkpoint=folder and str(folder))
        group.check_same(self.role.trainable(), "at the end")
        self.role.lm.eval()  # what is measured next is measured without dropout
        # Of the steps since the last logged one, each process has its own rows' loss.
        return done._replace(training_loss=fmean(group.everyone(done.training_loss)))

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler[Any]:
        rows, strategy = self.train_dataset if dataset is None else dataset, self.strategy
        if strategy == "batch_rebalance":  # stock's, a function of the epoch too
            return super()._get_train_sampler(rows)
        lengths = [*map(len, rows["input_ids"])] if strategy == "group_by_length" else ()
        return Order(len(rows), self.batch, self.args.seed, strategy, lengths)

    def _get_dataloader(
        self, dataset: Any, description: str, batch_size: int, *rest: Any, **words: Any
    ) -> Any:
        """In a group, a loader that accelerate has no hand in.

        Accelerate would fill up a side's last batch, whose loss then is another. So every process
        reads the whole validation side. transformers counts a batch's loss once a row.
        """
        if group.size() == 1:
            return super()._get_dataloader(dataset, description, batch_size, *rest, **words)
        rows = self._remove_unused_columns(dataset, description)
        if not words.get("is_training"):
            held = 0

            def collate(examples: list[Any]) -> Any:
                nonlocal held
                held = len(examples)
                return self.data_collator(examples)

            self.gather_function = lambda losses: losses[:held]
            return DataLoader(rows, batch_size, collate_fn=collate)
        order = self._get_train_sampler(rows)
        return shared(order, batch_size, rows, self.data_collator, self.together)

    def together(self, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What is done to a whole micro-batch before each process has its share."""
        return examples

    def _prepare_for_training(self, *args: Any) -> Any:
        """In a group, without the wrapper of DistributedDataParallel, which would be left out all
        the same where a model was evaluated first: `training_step` adds the gradients."""
        if group.size() > 1:
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
        return super()._prepare_for_training(*args)

    @property
    def strategy(self) -> str:
        return self.args.train_sampling_strategy

    def training_step(self, *inputs: Any) -> torch.Tensor:
        loss = super().training_step(*inputs)
        if not loss.isfinite():  # transformers would leave it out of what it logs
            raise lost("losses")
        if self.accelerator.sync_gradients:
            group.add_gradients(self.role.trainable(), 1 / group.size())
        return loss

    def tensors(self) -> dict[str, torch.Tensor]:
        return {str(i): parameter for i, parameter in enumerate(self.role.trainable())}

    def carried(self) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in self.COUNTS}
        losses = group.everyone(self._tr_loss.item())  # each process has its own rows'
        window = {"loss": losses, "metrics": dict(self._metrics["train"])}
        return {"first": self.first, "counts": counts, **window}

    def carry(self, kept: dict[str, Any]) -> None:
        self.first = kept["first"]
        vars(self).update(kept["counts"], _initial_global_step=0)
        losses = kept["loss"]
        alike = len(losses) == group.size()
        self._tr_loss += losses[group.rank()] if alike else fmean(losses)
        self._metrics["train"].update(kept["metrics"])
        self.state.compute_steps(self.args, self.state.max_steps)

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
