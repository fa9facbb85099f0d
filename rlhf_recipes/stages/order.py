"""Which rows a step of a stock trainer reads, and which of them each process of a group does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader
from transformers.trainer_pt_utils import get_length_grouped_indices

from rlhf_recipes import group
from rlhf_recipes.errors import StageError
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.tables import VLLM
from rlhf_recipes.store.digests import derive_seed

ROWS, MICROS = "per_device_train_batch_size", "gradient_accumulation_steps"


class Order(torch.utils.data.Sampler[int]):
    """The rows of an epoch: a function of the seed and the epoch's number.

    The last batch of an epoch is filled with the epoch's first rows. A step therefore learns from
    the same rows, however its batch is cut into micro-batches and shared out among processes.
    """

    def __init__(
        self, count: int, batch: int, seed: int, strategy: str, lengths: Sequence[int] = ()
    ) -> None:
        self.count, self.batch, self.seed = count, batch, seed
        self.strategy, self.lengths, self.epoch = strategy, lengths, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // self.batch) * self.batch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", self.epoch))
        order = list(range(self.count))
        if self.strategy == "random":
            order = torch.randperm(self.count, generator=generator).tolist()
        elif self.strategy == "group_by_length":
            order = get_length_grouped_indices(self.lengths, self.batch, generator=generator)
        return itertools.islice(itertools.cycle(order), len(self))


def share_out(recipe: Recipe, stage: str, count: int) -> dict[str, int]:
    """What each of `count` processes has of a stage's batch, which is the recipe's in any group.

    KTO pairs answers within a micro-batch: there each of them is shared out. A kind that explores
    shares out its mini-batches: its micro-batches are at most so large. Raises StageError where a
    batch cannot be shared out.
    """
    kind = recipe.kind(stage)
    options = recipe.tables[stage].options if stage in recipe.tables and kind.config else {}
    if count > 1 and kind.samples and recipe.model.sampler == VLLM:
        what = f"{stage}: a group of {count} processes samples by itself, not by vLLM"
        raise StageError(what, 'set model.sampler = "adapters", or start one process')
    if count == 1 or not options:
        return {}
    rows, micros, hint = options[ROWS], options[MICROS], f"change {recipe.written_as(stage)}.{ROWS}"
    if kind.explores:
        if (mini := rows * micros // options.get("num_mini_batches", 1)) >= count:
            return {ROWS: min(rows, -(-mini // count))}
        what = f"a mini-batch of {mini} answers"
    elif options.get("train_sampling_strategy") == "batch_rebalance":
        what, hint = "batch_rebalance", 'take train_sampling_strategy = "group_by_length"'
    elif kind.learns_from == "labels":
        if rows % count == 0 and rows > count:
            return {ROWS: rows // count}
        what = f"a micro-batch of {rows} rows"
    else:
        if micros % count == 0:
            return {MICROS: micros // count}
        if rows % count == 0:
            return {ROWS: rows // count}
        if rows * micros % count == 0:
            return {ROWS: 1, MICROS: rows * micros // count}
        what = f"a batch of {rows} × {micros} rows"
    what = f"{stage}: {what} cannot be shared out among {count} processes"
    raise StageError(what, f"{hint}, or the number of processes")


class Batches(BatchSampler):
    """Batches of an `Order`.

    transformers looks for `set_epoch` in the `batch_sampler` of a loader's batch sampler, where
    accelerate puts one: of this one, and of the one that skips the batches before a checkpoint.
    """

    sampler: Order

    @property
    def batch_sampler(self) -> Batches:
        return self

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)


def shared(
    order: Order,
    rows: int,
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    together: Callable[[list[Any]], list[Any]],
) -> DataLoader[Any]:
    """A loader of this process's share of each micro-batch, `rows` of it in each process.

    `together` is done to a whole micro-batch before it is shared out.
    """

    def part(examples: list[Any]) -> Any:
        first = group.rank() * rows
        return collate(together(examples)[first : first + rows])

    batches = Batches(order, rows * group.size(), drop_last=False)
    return DataLoader(dataset, batch_sampler=batches, collate_fn=part)
