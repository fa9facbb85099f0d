"""What all stages that train share."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from trl import RewardConfig

from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages.contract import StageContext
from rlhf_recipes.stages.training import trainer_config

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
