"""What RLOO and GRPO share: several answers to a prompt, and the group in place of a critic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch

from rlhf_recipes.recipe.tables import StageTable
from rlhf_recipes.stages import training
from rlhf_recipes.stages.ppo import stage
from rlhf_recipes.stages.ppo.config import PPOConfig
from rlhf_recipes.stages.ppo.loop import OnPolicyTrainer
from rlhf_recipes.stages.ppo.losses import Loss, Rollout, Rows

KNOWN = {field.name for field in fields(PPOConfig)}
EPSILON = 1e-4  # TRL's, below a deviation


def method(trainer: type[GroupTrainer]) -> stage.Method:
    return stage.Method(trainer, _options, _words, _one_update)


def _words(table: StageTable) -> dict[str, Any]:
    return {"own": table.options, "copies": table.options["num_generations"]}


def _options(table: StageTable) -> dict[str, Any]:
    """The fields of PPOConfig. An update is what stock calls a generation batch."""
    own, step = table.options, training.batch(table.options)
    update = own["generation_batch_size"] or step
    minis = update // step
    asked = {name: table.said(name) for name in KNOWN}
    asked = {name: value for name, value in asked.items() if value is not None}
    if own["max_steps"] > 0:  # of the optimizer
        asked["total_episodes"] = -(-own["max_steps"] // (minis * own["num_iterations"])) * update
    return asked | {
        "total_episodes": asked.get("total_episodes"),
        "gradient_accumulation_steps": update // own["per_device_train_batch_size"],
        "num_mini_batches": minis,
        "whiten_rewards": False,
        "max_steps": -1,
    }


def _one_update(table: StageTable) -> dict[str, Any]:
    """What a rehearsal runs. A group is never cut."""
    rows, less = table.options["per_device_train_batch_size"], stage.cut(_options(table))
    if rows * less["gradient_accumulation_steps"] % table.options["num_generations"]:
        less = _options(table)
    micros, minis = less["gradient_accumulation_steps"], less["num_mini_batches"]
    steps = minis * table.options["num_iterations"]
    updates = 1 if steps > 1 else training.STEPS
    sizes = {"gradient_accumulation_steps": micros // minis, "generation_batch_size": rows * micros}
    return sizes | {"max_steps": steps * updates, "eval_steps": updates, "save_steps": updates}


class GroupTrainer(OnPolicyTrainer):
    """`own` are the settings by the names of the kind's config in TRL."""

    def __init__(self, *args: Any, own: Mapping[str, Any], **words: Any):
        self.own = own
        high = own["epsilon_high"]
        self.low, self.high = own["epsilon"], own["epsilon"] if high is None else high
        super().__init__(*args, **words)

    def kl(self, rollout: Rollout) -> torch.Tensor:
        """An estimate of the KL to the reference [batch, R], a token: the log-ratio."""
        return (rollout.logprobs - rollout.ref_logprobs) * rollout.mask

    def grouped(self, numbers: torch.Tensor) -> torch.Tensor:
        """[batch] as [prompts, answers to a prompt]."""
        return numbers.view(-1, self.copies)

    def clipped(
        self, ratio: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted sum of what is lost, and of what the clip holds back."""
        plain, held = -gain * ratio, -gain * ratio.clamp(1 - self.low, 1 + self.high)
        return (torch.max(plain, held) * weight).sum(), ((held > plain) * weight).sum()


def told(
    loss: torch.Tensor,
    held: torch.Tensor,
    moved: torch.Tensor,
    entropy: torch.Tensor,
    rows: Rows,
) -> Loss:
    """A loss with PPO's metrics, each the micro-batch's share. `moved`: log-ratios to the old."""
    rollout = rows.rollout
    (mask,) = rows.columns(rollout.mask)
    share = 1.0 / rollout.mask[rows.mini].sum()
    return loss, {
        "loss/policy_avg": loss.detach(),
        "policy/approxkl_avg": 0.5 * (moved.detach() * mask).square().sum() * share,
        "policy/clipfrac_avg": held,
        "policy/entropy_avg": (entropy * mask).sum() * share,
        "val/ratio": (moved.detach().exp() * mask).sum() * share,
    }
