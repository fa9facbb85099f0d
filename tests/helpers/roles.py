"""Roles on a tiny base."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_recipes.models.base import Base
from rlhf_recipes.models.load import load_causal_lm
from rlhf_recipes.models.role import Role

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def make_base(model: Path, dtype: torch.dtype = torch.float32, **lora: object) -> Base:
    return Base(lambda _: load_causal_lm(model, dtype=dtype), {**LORA, **lora}, dtype)


def trained(base: Base, name: str, seed: int = 1) -> Role:
    """A role whose adapter is no longer the base: B of LoRA starts at zero."""
    role = base.open(name, None, seed=seed, trainable=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.trainable():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return role


@torch.no_grad()
def logp(role: Role, prompt: list[int], answer: list[int]) -> float:
    ids = torch.tensor([prompt + answer])
    with role.active():
        log_p = torch.log_softmax(role.lm(input_ids=ids).logits[0, :-1], -1)
    return log_p.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum().item()
