"""GRPO (arXiv 2402.03300): PPO's loop without a critic, each answer against its group.

An answer's advantage is its score less the mean of its group, over the group's deviation. The KL
to the reference is a term of the loss (k3), not of the reward. How tokens are averaged is
`loss_type`: over all of an update (dapo, arXiv 2503.14476), in each answer first (grpo), or over
the most tokens that there could be (dr_grpo, arXiv 2503.20783). `importance_sampling_level =
"sequence"` has one ratio an answer (GSPO, arXiv 2507.18071).
"""

from __future__ import annotations

import torch

from rlhf_recipes.stages import groups
from rlhf_recipes.stages.ppo.losses import Learned, Loss, Rollout, Rows

__all__ = ["answer_length", "memory", "run", "trial", "work"]  # see contract.StageModule


class GRPOTrainer(groups.GroupTrainer):
    def learned(self, rollout: Rollout) -> Learned:
        scores = self.grouped(rollout.scores)
        advantage = scores - scores.mean(1, keepdim=True)
        spread, scale = scores.std(1, keepdim=True), self.own["scale_rewards"]
        if scale != "none":
            unit = spread if scale == "group" else scores.std()
            advantage = advantage / (unit + groups.EPSILON)
        kl = self.kl(rollout)
        same = {"val/groups_alike": float((spread < groups.EPSILON).float().mean())}
        return Learned(advantage.flatten()[:, None].expand_as(kl), kl, told=same)

    def loss(self, new: torch.Tensor, entropy: torch.Tensor, rows: Rows) -> Loss:
        rollout = rows.rollout
        mask, gain, old, reference = rows.columns(
            rollout.mask, rows.learned.advantage, rollout.logprobs, rollout.ref_logprobs
        )
        moved = (new - old) * mask
        ratio = moved.exp()
        if self.own["importance_sampling_level"] == "sequence":
            ratio = (moved.sum(1) / mask.sum(1)).exp()[:, None].expand_as(moved)
        weight = self._weight(rows, mask)
        loss, held = self.clipped(ratio, gain, weight)
        if self.args.kl_coef:
            apart = (reference - new) * mask
            kl = apart.exp() - apart - 1
            if self.own["use_bias_correction_kl"]:
                kl = kl * ratio
            loss = loss + self.args.kl_coef * (kl * weight).sum()
        return groups.told(loss, held, moved, entropy, rows)

    def _weight(self, rows: Rows, mask: torch.Tensor) -> torch.Tensor:
        """How much of the mini-batch's loss each token of a micro-batch is."""
        answers, loss_type = len(rows.mini), self.own["loss_type"]
        if loss_type == "grpo":
            return mask / (mask.sum(1, keepdim=True) * answers)
        if loss_type == "dr_grpo":
            return mask / float(answers * self.args.response_length)
        return mask / (rows.rollout.mask.sum() * answers / len(rows.rollout.mask))


run, trial, work, memory, answer_length = groups.method(GRPOTrainer).exports()
