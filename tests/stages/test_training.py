"""What all stages that train share."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import RewardConfig

from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages.contract import StageContext
from rlhf_recipes.stages.order import Order
from rlhf_recipes.stages.training import Stock, trainer_config

pytestmark = pytest.mark.train


class Notes:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_one_card_is_used_where_a_machine_has_several(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else transformers wraps a reward model for all of them, and a batch is n times as large."""

    def two_cards(self: Any) -> torch.device:
        self._n_gpu = 2
        return torch.device("cpu")

    setup = cached_property(two_cards)
    setup.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", setup)
    notes = Notes()
    context = StageContext("reward", "reward", load_recipe(tiny_recipe), tmp_path, {}, notes, None)
    config = trainer_config(RewardConfig, context)
    assert (config.n_gpu, config.train_batch_size) == (1, config.per_device_train_batch_size)
    assert notes.notes == ["cpu is used; the other cards stay idle"]


@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_an_epoch_has_each_row_once_and_its_first_again_up_to_a_whole_batch(strategy: str) -> None:
    order = Order(11, 4, 7, strategy, [5, 1, 9, 2, 8, 3, 7, 4, 6, 11, 10])
    first = list(order)
    assert len(order) == len(first) == 12
    assert sorted(first[:11]) == list(range(11)) and first[11:] == first[:1]
    assert list(order) == first  # it is a function: nothing is drawn on
    order.set_epoch(1)
    assert (list(order) == first) == (strategy == "sequential")


def test_a_batch_over_all_rows_has_each_as_often_as_it_can() -> None:
    order = list(Order(3, 8, 7, "random"))
    assert order == (order[:3] * 3)[:8] and sorted(order[:3]) == [0, 1, 2]


class Reads(Trainer):
    batch = 4
    _get_train_sampler, strategy = Stock._get_train_sampler, Stock.strategy


def test_a_step_reads_the_same_rows_however_its_batch_is_cut(tmp_path: Path) -> None:
    """By the loader that the trainer has from accelerate, which hands on the epoch's number."""

    def read(rows: int, micros: int) -> list[list[list[int]]]:
        words = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": micros}
        args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", **words)
        args.remove_unused_columns = False
        data = Dataset.from_dict({"row": range(11)})
        collate = lambda some: {"row": [one["row"] for one in some]}  # noqa: E731
        model = torch.nn.Linear(1, 1)
        loader = Reads(model, args, collate, train_dataset=data).get_train_dataloader()
        epochs = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            flat = [row for micro in loader for row in micro["row"]]
            epochs.append([sorted(flat[at : at + 4]) for at in range(0, len(flat), 4)])
        return epochs

    whole = read(4, 1)
    assert [*map(len, whole)] == [3, 3] and whole[0] != whole[1]
    assert read(1, 4) == read(2, 2) == whole
