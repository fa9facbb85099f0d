"""The settings of a policy that learns on its own answers, under the names that TRL 1.12 gave them.

TRL removed PPO in 1.13. Names and defaults are those of its last PPOConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments


def _key(default: Any, said: str) -> Any:
    return field(default=default, metadata={"help": said})


@dataclass
class PPOConfig(TrainingArguments):
    """`per_device_train_batch_size × gradient_accumulation_steps` answers are an update's."""

    learning_rate: float = _key(3e-6, "The policy's learning rate at the start.")
    logging_steps: float = 10
    gradient_checkpointing: bool = True
    bf16: bool | None = None  # None: unless fp16
    lr_scheduler_kwargs: dict[str, Any] | str | None = None
    # ---- rollouts
    total_episodes: int | None = _key(
        None, "Answers in all. Left out: num_train_epochs over the prompts."
    )
    response_length: int = _key(53, "The most tokens of an answer.")
    temperature: float = _key(0.7, "Of the samples, and of the policy that is trained.")
    local_rollout_forward_batch_size: int = _key(64, "Answers scored at a time.")
    num_sample_generations: int = _key(10, "How often two answers are shown.")
    missing_eos_penalty: float | None = _key(
        None, "Units below its floor that an answer without an end scores."
    )
    # ---- updates
    num_mini_batches: int = _key(1, "Optimizer steps of a pass over an update's answers.")
    num_ppo_epochs: int = _key(4, "Passes over an update's answers.")
    kl_coef: float = _key(0.05, "Units of the reward for a nat of KL to the reference.")
    kl_estimator: Literal["k1", "k3"] = _key("k1", "The log-ratio, or k3, which is never negative.")
    cliprange: float = _key(0.2, "How far the ratio to the policy that sampled may go.")
    # ---- the critic
    whiten_rewards: bool = _key(False, "Whether rewards are scaled to a variance of 1.")
    vf_coef: float = _key(0.1, "Weight of the value loss. Under Adam it changes nothing.")
    cliprange_value: float = _key(0.2, "How far a value may go from that of the rollout.")
    gamma: float = _key(1.0, "Discount of a token.")
    lam: float = _key(0.95, "λ of generalised advantage estimation.")

    def __post_init__(self) -> None:
        self.bf16 = not self.fp16 if self.bf16 is None else self.bf16
        super().__post_init__()


def episodes(options: Mapping[str, Any], answers: int) -> int:
    """The answers in all; an epoch has `answers`."""
    asked = options["total_episodes"]
    return int(options["num_train_epochs"] * answers) if asked is None else asked
