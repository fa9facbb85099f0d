"""The settings of a policy that learns on its own answers, under the names that TRL 1.12 gave them.

TRL removed PPO in 1.13. Names and defaults are those of its last PPOConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import TrainingArguments


@dataclass
class PPOConfig(TrainingArguments):
    """`per_device_train_batch_size × gradient_accumulation_steps` answers are an update's."""

    learning_rate: float = 3e-6
    logging_steps: float = 10
    gradient_checkpointing: bool = True
    bf16: bool | None = None  # None: unless fp16
    lr_scheduler_kwargs: dict[str, Any] | str | None = None
    # ---- rollouts
    total_episodes: int | None = None  # answers in all; None: num_train_epochs over the prompts
    response_length: int = 53  # the most tokens of an answer
    temperature: float = 0.7
    local_rollout_forward_batch_size: int = 64  # answers scored together
    num_sample_generations: int = 10  # times that two answers are shown
    missing_eos_penalty: float | None = None  # units of the reward, of an answer that is cut off
    # ---- updates
    num_mini_batches: int = 1
    num_ppo_epochs: int = 4
    kl_coef: float = 0.05  # units of the reward for a nat
    kl_estimator: Literal["k1", "k3"] = "k1"
    cliprange: float = 0.2
    # ---- the critic
    whiten_rewards: bool = False
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()


def episodes(options: Mapping[str, Any], answers: int) -> int:
    """The answers in all; an epoch has `answers`."""
    asked = options["total_episodes"]
    return int(options["num_train_epochs"] * answers) if asked is None else asked
