"""Sampling: the batch decides the speed and the memory, and not what is drawn."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_recipes.models import sampling
from rlhf_recipes.models.role import Role
from rlhf_recipes.models.sampling import join, rows_at_once, sample
from rlhf_recipes.store.digests import derive_seed
from tests.helpers.roles import make_base, trained

pytestmark = pytest.mark.train

WORDS: dict[str, Any] = {"length": 12, "temperature": 0.7, "eos": 2, "pad": 2, "seed": 5}


@pytest.fixture
def policy(tiny_model: Path) -> Role:
    return trained(make_base(tiny_model), "policy", 1)


def test_what_is_sampled_does_not_depend_on_the_batch(policy: Role) -> None:
    """Rows beside, padding and where a batch is cut change nothing: the draws are a row's own."""
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 30) for _ in range(draw.randrange(1, 9))] for _ in range(70)]
    whole = sample(policy, prompts, batch=70, **WORDS)
    assert len({tuple(answer) for answer in whole}) > 40
    for batch in (64, 33, 9):
        assert sample(policy, prompts, batch=batch, **WORDS) == whole


def test_the_draws_are_those_of_transformers(policy: Role) -> None:
    """Of up to 64 rows together, seeded by their place: the answers that earlier versions gave."""
    prompts = [[5 + i % 9] * (1 + i // 30) for i in range(70)]  # sorted by length
    expected = []
    settings = sampling.sampling(12, 0.7, eos=2, pad=2)
    for start in (0, 64):
        part = prompts[start : start + 64]
        rows = join(part, [[]] * len(part), 2, policy.lm.device)
        with policy.active(), torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(derive_seed(5, "sample", start))
            out = policy.lm.generate(
                input_ids=rows.ids, attention_mask=rows.mask, generation_config=settings
            )
        answers = out[:, rows.ids.shape[1] :].tolist()
        expected += [ids[: ids.index(2) + 1] if 2 in ids else ids for ids in answers]
    assert sample(policy, prompts, batch=70, **WORDS) == expected


def test_on_a_cpu_rows_and_tokens_have_a_bound(policy: Role) -> None:
    assert rows_at_once(policy, 20, 12, 8) == 8
    assert rows_at_once(policy, 20, 12, 500) == 64
    assert rows_at_once(policy, 2000, 48, 500) == 16


def test_on_a_card_free_memory_and_the_cache_decide(
    policy: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token of the tiny model: 2 layers × keys and values × 2 heads × 8 × 4 bytes."""
    card = SimpleNamespace(free=0, reserved=0, allocated=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (card.free, 10**12))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: card.reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: card.allocated)
    cache = 2 * 2 * 2 * 8 * 4
    row = 1000 * sampling.LOOSE * cache + 16 * 32  # and the logits of 32 words, four times
    for rows, room in ((1, 0.1), (1, 1.9), (2, 2.1), (32, 40), (64, 64.1), (256, 1e4)):
        card.free = int(room * row / sampling.FREE)
        assert rows_at_once(policy, 100, 900, 512) == rows
    card.free, card.reserved, card.allocated = 0, int(9 * row / sampling.FREE), int(row)
    assert rows_at_once(policy, 100, 900, 512) in (4, 8)
    assert rows_at_once(policy, 100, 900, 3) <= 3
    # Long prompts and short answers: reading the prompts takes more than the cache.
    card.free = int(100 * row / sampling.FREE)
    assert rows_at_once(policy, 999, 1, 512) < rows_at_once(policy, 100, 900, 512)
