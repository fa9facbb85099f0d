"""RLOO (arXiv 2402.14740): PPO's loop without a critic, each answer against its siblings.

An answer is one action. Its reward is the score less the KL of the whole answer, its baseline the
mean reward of the other answers to the same prompt. As in TRL, the ratio of whole answers is
clipped; after several passes over a batch many answers are beyond the clip and teach nothing.
"""

from __future__ import annotations

import torch

from rlhf_recipes.stages import groups
from rlhf_recipes.stages.ppo.losses import Learned, Loss, Rollout, Rows

__all__ = ["answer_length", "memory", "run", "trial", "work"]  # see contract.StageModule


class RLOOTrainer(groups.GroupTrainer):
    whole_answers = True

    def learned(self, rollout: Rollout) -> Learned:
        kl = self.kl(rollout)
        rewards = self.grouped(rollout.scores - self.args.kl_coef * kl.sum(1))
        others = (rewards.sum(1, keepdim=True) - rewards) / (self.copies - 1)
        advantage = (rewards - others).flatten()
        if self.own["normalize_advantages"]:
            advantage = (advantage - advantage.mean()) / (advantage.std() + groups.EPSILON)
        same = {"val/groups_alike": float((rewards.std(1) < groups.EPSILON).float().mean())}
        return Learned(advantage[:, None].expand_as(kl), kl, told=same)

    def loss(self, new: torch.Tensor, entropy: torch.Tensor, rows: Rows) -> Loss:
        """The clipped objective of whole answers, a mean over the mini-batch's."""
        mask, gain, old = rows.columns(
            rows.rollout.mask, rows.learned.advantage, rows.rollout.logprobs
        )
        moved = (new - old) * mask
        weight = torch.full_like(gain[:, 0], 1.0 / len(rows.mini))
        loss, held = self.clipped(moved.sum(1).exp(), gain[:, 0], weight)
        return groups.told(loss, held, moved, entropy, rows)


run, trial, work, memory, answer_length = groups.method(RLOOTrainer).exports()
