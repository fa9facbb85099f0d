"""PPO trainers on a tiny base."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_recipes.data.tokens import settle
from rlhf_recipes.models.base import Base
from rlhf_recipes.models.load import load_tokenizer, new_head
from rlhf_recipes.stages.ppo.config import PPOConfig
from rlhf_recipes.stages.ppo.trainer import PPOTrainer
from tests.helpers.chains import Silent
from tests.helpers.roles import trained

PROMPTS = [{"input_ids": [1, 4, *words, 5]} for words in ([7], [8, 9], [10], [11, 12, 13], [14])]


class TableReward(nn.Module):
    """A reward that is a table over the answer's last token; quacks like a Role."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        yield

    def scored(self, ids: torch.Tensor, mask: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        return self.table[ids[torch.arange(len(ids)), last]]


def make_trainer(
    base: Base,
    folder: Path,
    *,
    model: Path,
    prompts: list[dict] = PROMPTS,
    same_reference: bool = True,
    words: dict[str, Any] | None = None,
    **config: Any,
) -> PPOTrainer:
    """Four roles on `base`: policy and reference equal, a reward model, a value from it."""
    policy = trained(base, "policy", 1)
    reference = trained(base, "reference", 1 if same_reference else 5).requires_grad_(True)
    reward, value = trained(base, "reward", 3), trained(base, "value", 3)
    for frozen in (reference, reward):
        for parameter in frozen.trainable():
            parameter.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reward.add_head(new_head(reward.lm)).score.requires_grad_(False)
    value.add_head(new_head(value.lm)).score.load_state_dict(reward.score.state_dict())
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_mini_batches": 2,
        "num_ppo_epochs": 2,
        "total_episodes": 8,
        "response_length": 5,
        "temperature": 1.0,
        "learning_rate": 1e-3,
        "lam": 1.0,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "seed": 3,
    }
    return PPOTrainer(
        args=PPOConfig(**{**settings, **config}),
        processing_class=settle(load_tokenizer(model), 32).tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=prompts,
        **{"key": "the stage's", "progress": Silent(), **(words or {})},
    )
