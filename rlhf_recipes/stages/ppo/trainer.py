"""PPO (arXiv 1707.06347): the loop with a critic, which learns beside the policy on the same base.

Advantages are generalised advantage estimates, and both losses are clipped. Policy and value have
learning rates of their own (21 of the TRL-facts list in LOG.md). Default λ is 1: over answers of
tens of tokens with one score at the end, bootstrapping from a young value model costs more in bias
than it saves in variance.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from rlhf_recipes.models.role import Role, logprobs_and_values, values
from rlhf_recipes.models.sampling import Sequences
from rlhf_recipes.recipe.tables import StageTable
from rlhf_recipes.stages import training
from rlhf_recipes.stages.ppo import stage
from rlhf_recipes.stages.ppo.loop import OnPolicyTrainer, numbered
from rlhf_recipes.stages.ppo.losses import (
    Learned,
    Loss,
    Rollout,
    Rows,
    advantages,
    policy_loss,
    value_loss,
)
from rlhf_recipes.stages.training import two_rates

__all__ = ["PPOTrainer", "answer_length", "memory", "run", "trial", "work"]  # see contract


class PPOTrainer(OnPolicyTrainer):
    """`value_model` is a `Role` with a head."""

    def __init__(
        self,
        *args: Any,
        value_model: Role,
        value_learning_rate: float | None = None,
        value_warmup_epochs: int = 0,
        **words: Any,
    ):
        self.value_model = value_model
        self.value_learning_rate = value_learning_rate
        self.value_warmup_epochs = value_warmup_epochs
        super().__init__(*args, **words)
        paired = self.policy_model.pairs_with(value_model)
        self.together = paired and self._device.type == "cpu"

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        rate = self.value_learning_rate or self.args.learning_rate
        weights = self.policy_model.trainable(), self.value_model.trainable()
        self.optimizer = two_rates(self.args, *weights, rate)
        return self.optimizer

    def tensors(self) -> dict[str, torch.Tensor]:
        return super().tensors() | numbered(value=self.value_model.trainable())

    @property
    def learners(self) -> tuple[Role, ...]:
        return self.policy_model, self.value_model

    def learned(self, rollout: Rollout) -> Learned:
        return advantages(rollout, self.args)

    def loss(self, new: torch.Tensor, entropy: torch.Tensor, rows: Rows) -> Loss:
        return policy_loss(new, entropy, rows, self.args)

    def passes(self, update: int) -> Iterator[tuple[int, Callable[[Rows], dict]]]:
        # Clipped, a warm-up would end within 0.2 of where it began, however long it is.
        warm_up = partial(self._learn_value, clip=False)
        for epoch in range(-self.value_warmup_epochs if update == 1 else 0, 0):
            yield epoch, warm_up
        yield from super().passes(update)

    def _opinions(self, chunk: Sequences) -> dict[str, torch.Tensor]:
        seen = super()._opinions(chunk)
        with self.value_model.active():
            seen["values"] = values(self.value_model, chunk.ids, chunk.mask, chunk.answer)
        return seen

    def _learn(self, rows: Rows) -> dict[str, torch.Tensor]:
        """The gradients of both losses, and their metrics; forward and backward in one `active`.

        On a CPU in one pass over both adapters' rows: a product with 1600 rows takes 0.65 of the
        time of two with 800. Elsewhere apart, so that one graph at a time is held.
        """
        if not self.together:
            return super()._learn(rows) | self._learn_value(rows)
        policy, value, args = self.policy_model, self.value_model, self.args
        with policy.active(beside=value):
            new, entropy, guess = logprobs_and_values(policy, value, *rows.tokens, args.temperature)
            loss, seen = self.loss(new, entropy, rows)
            other, more = value_loss(guess, rows, args)
            ((loss + args.vf_coef * other) * self.loss_scale).backward()
        return seen | more

    def _learn_value(self, rows: Rows, clip: bool = True) -> dict[str, torch.Tensor]:
        with self.value_model.active():
            guess = values(self.value_model, *rows.tokens)
            loss, seen = value_loss(guess, rows, self.args, clip)
            (self.args.vf_coef * loss * self.loss_scale).backward()
        return seen


# ---- its rehearsal, and what its module exports


def one_update(table: StageTable) -> dict[str, Any]:
    """What PPO's rehearsal runs."""
    given = table.options
    less = stage.cut(given)
    updates = 1 if less["num_mini_batches"] * given["num_ppo_epochs"] > 1 else training.STEPS
    size = given["per_device_train_batch_size"] * less["gradient_accumulation_steps"]
    every = {"eval_steps": updates, "save_steps": updates}
    return less | {"total_episodes": size * updates} | every


_OWN = ("value_learning_rate", "value_warmup_epochs")
_PPO = stage.Method(
    trainer=PPOTrainer,
    options=lambda table: table.options,
    words=lambda table: {key: table.extras[key] for key in _OWN},
    one_update=one_update,
    critic=True,
)
run, trial, work, memory, answer_length = _PPO.exports()
