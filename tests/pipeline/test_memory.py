"""What is given back between stages, and what is measured on a card."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from rlhf_recipes.models import load
from rlhf_recipes.pipeline import memory

pytestmark = pytest.mark.train


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of a card that is not here."""
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name, given in {
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 7,
        "max_memory_reserved": 9,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda n=name, g=given: asked.append(n) or g)
    return asked


def test_a_card_s_memory_is_given_back_before_it_is_measured(card: list[str]) -> None:
    memory.begin()
    assert card == ["empty_cache", "reset_peak_memory_stats"]
    found = memory.peak()
    assert (found["gpu_bytes"], found["gpu_reserved_bytes"]) == (7, 9)


def test_a_model_that_is_let_go_gives_its_memory_back(card: list[str]) -> None:
    lm = torch.nn.Linear(3, 3)
    load.empty(lm)
    assert lm.weight.numel() == 0 and card == ["empty_cache"]


def test_without_a_card_nothing_is_asked_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: 1 / 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    memory.begin()
    load.empty(torch.nn.Linear(3, 3))
    assert "gpu_bytes" not in memory.peak()


@pytest.mark.parametrize("given", [None, "backend:native"])
def test_a_card_s_memory_can_grow_in_place_unless_a_person_says_otherwise(
    given: str | None,
) -> None:
    name = "PYTORCH_CUDA_ALLOC_CONF"
    own = {key: value for key, value in os.environ.items() if key != name}
    code = f"import os, sys, rlhf_recipes; print(os.environ['{name}'], 'torch' in sys.modules)"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=own | ({name: given} if given else {}), capture_output=True)
    assert done.stdout.decode().split() == [given or "expandable_segments:True", "False"]


@pytest.mark.parametrize("there", [True, False])
def test_float32_products_are_in_tf32_on_a_card_alone(
    monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    before = torch.get_float32_matmul_precision()
    load.use_tf32()
    assert torch.backends.cuda.matmul.allow_tf32 is there
    torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.get_float32_matmul_precision() == before
