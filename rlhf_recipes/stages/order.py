"""The order in which a stock trainer reads its rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from rlhf_recipes.store.digests import derive_seed


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
