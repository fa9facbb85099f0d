"""PPO's arithmetic on one rollout: advantages and returns, and the two clipped losses.

As in TRL 1.12 (arXiv 1707.06347, 2403.17031), but that a loss is a sum over tokens divided by those
of the whole mini-batch, so that how it is cut into micro-batches changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from rlhf_recipes.models.sampling import Sequences
from rlhf_recipes.stages.ppo.config import PPOConfig

MOST = 2.0  # of the weight of a token that another sampler drew


@dataclass(frozen=True)
class Rollout:
    """What one update's policy did. [batch, R] but for those said to be [batch]."""

    sequences: Sequences
    mask: torch.Tensor  # tokens of the answers
    value_mask: torch.Tensor  # and the state after an early EOS, where the score lands
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    scores: torch.Tensor  # [batch], in units of the reward, `fined` where cut off
    ended: torch.Tensor  # [batch], whether the answer ends in EOS
    entropy: torch.Tensor
    apart: float = 0.0  # mean distance of the sampler's log-probabilities from `logprobs`
    sampled: torch.Tensor | None = None  # the sampler's own, where that is vLLM
    values: torch.Tensor | None = None  # where there is a critic
    # By reward, where there are several: its mean over the answers that it speaks of.
    rewards: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Learned:
    """What a rollout teaches, each [batch, R]."""

    advantage: torch.Tensor
    kl: torch.Tensor  # to the reference, a token
    returns: torch.Tensor | None = None  # where there is a critic
    told: dict[str, float] = field(default_factory=dict)  # metrics


def corrected(
    learned: Learned,
    rollout: Rollout,
    sampled: torch.Tensor,
    beyond: float,
    whole_answers: bool,
) -> Learned:
    """What is learned from answers whose log-probabilities were `sampled` [batch, R] where they
    were drawn, if these are farther apart than `beyond`.

    The advantage of a token is weighted by min(p of the policy / p of the sampler, MOST), that of
    an answer where the ratio is a whole answer's: truncated importance sampling.
    """
    gap = (rollout.logprobs - sampled) * rollout.mask * (rollout.apart > beyond)
    if whole_answers:
        gap = gap.sum(1, keepdim=True).expand_as(gap)
    weight = gap.exp()
    told = learned.told | {
        "val/importance": float(masked_mean(weight.clamp(max=MOST), rollout.mask)),
        "val/importance_cut": float(masked_mean((weight > MOST).float(), rollout.mask)),
    }
    return replace(learned, advantage=learned.advantage * weight.clamp(max=MOST), told=told)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (values * mask).sum() / mask.sum()


def whitened(values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
    """`values` with the mean 0, or their own, and the variance 1 where `mask` is set."""
    mean, count = masked_mean(values, mask), mask.sum()
    variance = masked_mean((values - mean) ** 2, mask) * (count / (count - 1))
    scaled = (values - mean) * torch.rsqrt(variance + 1e-8)
    return scaled if shift_mean else scaled + mean


def advantages(rollout: Rollout, args: PPOConfig) -> Learned:
    """Whitened advantages and returns (GAE, arXiv 1506.02438)."""
    assert rollout.values is not None
    log_ratio = (rollout.ref_logprobs - rollout.logprobs) * rollout.mask
    kl = -log_ratio if args.kl_estimator == "k1" else log_ratio.exp() - 1 - log_ratio
    rewards = -args.kl_coef * kl
    value = rollout.values * rollout.value_mask
    rows = torch.arange(len(rewards), device=rewards.device)
    end = rollout.sequences.lengths.clamp(max=rewards.shape[1] - 1)
    rewards[rows, end] += rollout.scores
    if args.whiten_rewards:
        rewards = whitened(rewards, rollout.value_mask, shift_mean=False)
        rewards = rewards * rollout.value_mask
    advantage = torch.zeros_like(rewards)
    last = torch.zeros_like(rollout.scores)
    for t in reversed(range(rewards.shape[1])):
        following = value[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        delta = rewards[:, t] + args.gamma * following - value[:, t]
        last = delta + args.gamma * args.lam * last
        advantage[:, t] = last
    returns = advantage + value
    advantage = whitened(advantage, rollout.mask) * rollout.mask
    told = {"val/explained_variance": explained_variance(rollout, returns)}
    return Learned(advantage, kl, returns, told)


@dataclass(frozen=True)
class Rows:
    """One micro-batch of a mini-batch, both as row numbers, and what it learns from."""

    rollout: Rollout
    learned: Learned
    mini: torch.Tensor
    micro: torch.Tensor

    @cached_property
    def tokens(self) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Ids, mask and number of answer columns, without the columns that are all padding."""
        part = self.rollout.sequences[self.micro].trimmed()
        return part.ids, part.mask, part.answer

    def columns(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The answer columns of the micro-batch in each of `tensors` [batch, R]."""
        return tuple(tensor[self.micro, : self.tokens[2]] for tensor in tensors)


Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]  # and TRL's metrics, each the same share


def policy_loss(new: torch.Tensor, entropy: torch.Tensor, rows: Rows, args: PPOConfig) -> Loss:
    """The clipped objective, as the micro-batch's share of the mini-batch's.

    `new` and `entropy` are the policy's log-probabilities and entropies now.
    """
    rollout = rows.rollout
    mask, gain, old = rows.columns(rollout.mask, rows.learned.advantage, rollout.logprobs)
    share = 1.0 / rollout.mask[rows.mini].sum()
    difference = (new - old) * mask
    ratio = difference.exp()
    plain = -gain * ratio
    clipped = -gain * ratio.clamp(1 - args.cliprange, 1 + args.cliprange)
    loss = (torch.max(plain, clipped) * mask).sum() * share
    return loss, {
        "loss/policy_avg": loss.detach(),
        "policy/approxkl_avg": 0.5 * difference.detach().square().sum() * share,
        "policy/clipfrac_avg": ((clipped > plain) & mask).sum() * share,
        "policy/entropy_avg": (entropy * mask).sum() * share,
        "val/ratio": (ratio.detach() * mask).sum() * share,
    }


def explained_variance(rollout: Rollout, returns: torch.Tensor) -> float:
    """How much of the returns' variance the rollout's values foresaw: 1 all, 0 as their mean does.

    Below 0 a critic is worse than a constant, and its advantages are noisier than the returns.
    """
    goal, value = returns[rollout.value_mask], rollout.values[rollout.value_mask]
    left = (goal - value).var(correction=0) / goal.var(correction=0).clamp(min=1e-12)
    return 1 - left.item()


def value_loss(new: torch.Tensor, rows: Rows, args: PPOConfig, clip: bool = True) -> Loss:
    """The value loss, as the micro-batch's share, clipped to be near the rollout's values.

    `new` are the values now.
    """
    rollout = rows.rollout
    mask, goal, old = rows.columns(rollout.value_mask, rows.learned.returns, rollout.values)
    share, old, new = 1.0 / rollout.value_mask[rows.mini].sum(), old * mask, new * mask
    near = new.clamp(old - args.cliprange_value, old + args.cliprange_value) if clip else new
    plain, clipped = (new - goal).square(), (near - goal).square()
    loss = 0.5 * (torch.max(plain, clipped) * mask).sum() * share
    return loss, {
        "loss/value_avg": loss.detach(),
        "val/clipfrac_avg": ((clipped > plain) & mask).sum() * share,
    }
