"""A merged copy draws what its policy draws, follows it, and is let go of where it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_recipes.models.base import Base
from rlhf_recipes.models.load import load_causal_lm
from rlhf_recipes.models.role import Role
from rlhf_recipes.models.sampler import Sampler
from rlhf_recipes.models.sampling import sample
from tests.helpers.roles import LORA, make_base

pytestmark = pytest.mark.train

PROMPTS = [[7 + i % 9] * (2 + i % 5) for i in range(24)]
WORDS = {"length": 8, "temperature": 1.0, "eos": 2, "pad": 0, "batch": 16, "seed": 3}


def moved(policy: Role, seed: int) -> Role:
    torch.manual_seed(seed)
    for weight in policy.trainable():
        weight.data = torch.randn_like(weight) * 0.3
    return policy


@pytest.fixture
def policy(tiny_model: Path) -> Role:
    return moved(make_base(tiny_model).open("policy", None, seed=0, trainable=True), 1)


def test_a_copy_draws_what_its_policy_draws_and_follows_it(policy: Role) -> None:
    sampler = Sampler(policy, merge=True)
    assert sampler.told == "from a merged copy" and sampler.copy is not None
    for seed in (1, 2):
        moved(policy, seed)
        mine: list[list[float]] = []
        its: list[list[float]] = []
        answers = sampler.sample(PROMPTS, picked=mine, **WORDS)
        assert answers == sample(policy, PROMPTS, picked=its, **WORDS)
        assert [len(row) for row in mine] == [len(ids) for ids in answers]
        for a, b in zip(mine, its, strict=True):
            assert a == pytest.approx(b, abs=1e-4)
    shared = {id(weight) for weight in policy.lm.parameters()}
    own = [weight for weight in sampler.copy.lm.parameters() if id(weight) not in shared]
    assert len(own) == len(policy.adapted())  # one for each layer with an adapter, and no other


def test_log_probabilities_are_those_of_the_tokens(policy: Role) -> None:
    picked: list[list[float]] = []
    [ids] = sample(policy, PROMPTS[:1], picked=picked, **WORDS | {"temperature": 0.7})
    with policy.active(), torch.no_grad():
        out = policy.lm(input_ids=torch.tensor([PROMPTS[0] + ids])).logits[0]
    said = torch.log_softmax(out[len(PROMPTS[0]) - 1 : -1] / 0.7, -1)
    assert picked[0] == pytest.approx(said[range(len(ids)), ids].tolist(), abs=1e-5)


def test_a_cache_of_one_size_changes_no_draw(policy: Role) -> None:
    """As on a card, where the steps are compiled: fixed columns, and a last batch that is full."""
    lm = Sampler(policy, merge=True).role
    picked: list[list[float]] = []
    fixed = sample(lm, PROMPTS, width=9, picked=picked, **WORDS)
    assert fixed == sample(lm, PROMPTS, **WORDS)
    assert [len(row) for row in picked] == [len(ids) for ids in fixed]


def test_what_fails_is_told_and_done_without(policy: Role, monkeypatch: Any) -> None:
    told: list[str] = []
    sampler = Sampler(policy, merge=True, tell=told.append)
    sampler.static = True

    def broken(**words: Any) -> Any:
        if words["generation_config"].cache_implementation == "static":
            raise RuntimeError("no compiler\nand more")
        raise ValueError("nor this")

    monkeypatch.setattr(sampler.copy.lm, "generate", broken)
    sampler.width = 9
    picked: list[list[float]] = []
    answers = sampler.sample(PROMPTS, picked=picked, **WORDS)
    assert answers == sample(policy, PROMPTS, **WORDS) and len(picked) == len(answers)
    assert told == [
        "sampling without compiled steps: RuntimeError: no compiler",
        "sampling without a merged copy: ValueError: nor this",
    ]
    assert sampler.told == "by the adapters"


def test_a_copy_that_is_far_from_the_trainer_is_let_go_of(policy: Role) -> None:
    told: list[str] = []
    sampler = Sampler(policy, merge=True, tell=told.append)
    assert not sampler.far(1e-3)
    assert sampler.far(float("nan")) and not sampler.far(1.0)
    assert told == [
        "sampling without a merged copy: its log-probabilities are nan from the trainer's"
    ]


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_packed_weights(tiny_model: Path, bits: str) -> None:
    """Of 4 bit a copy is unpacked, in the dtype that the policy computes in; of 8 bit is none."""
    words = {"dtype": torch.bfloat16, "quantization": bits}
    base = Base(lambda _: load_causal_lm(tiny_model, **words), dict(LORA), torch.bfloat16)
    policy = moved(base.open("policy", None, seed=0, trainable=True), 1)
    sampler = Sampler(policy, merge=True)
    assert (sampler.copy is None) == (bits == "8bit")
    if sampler.copy is not None:
        ids = torch.tensor([PROMPTS[4] * 3])
        with torch.no_grad(), policy.active():
            its = policy.lm(input_ids=ids).logits.float().log_softmax(-1)
        with torch.no_grad():
            mine = sampler.copy.lm(input_ids=ids).logits.float().log_softmax(-1)
        chances = its.exp()
        assert (chances * (its - mine).abs()).sum(-1).mean() < sampler.limit()
