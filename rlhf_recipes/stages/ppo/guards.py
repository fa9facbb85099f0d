"""What ends PPO in order before its last update: each guard says why, in a phrase."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from rlhf_recipes.recipe.kinds import Limits

SCORES = 3  # updates that a score is averaged over: one batch's mean is noise


@dataclass
class Guard:
    """Looks at each update's metrics in turn."""

    limits: Limits
    first: Mapping[str, float] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)
    broken: bool = False  # a number was not finite: the weights may be lost

    def why_stop(self, metrics: Mapping[str, float]) -> str | None:
        """The first guard that this update trips, as a phrase; None where none does."""
        self.first = self.first or metrics
        self.scores.append(metrics["objective/scores"])
        kl, entropy = metrics["objective/kl"], metrics["val/entropy_per_token"]
        length, limits = metrics["val/length"], self.limits
        for name in ("objective/scores", "loss/policy_avg", "loss/value_avg"):
            if not math.isfinite(metrics.get(name, 0.0)):
                self.broken = True
                return f"{name} is {metrics[name]}"
        if kl > limits.max_kl:
            return f"KL {kl:.2f} is over max_kl = {limits.max_kl:g}"
        if entropy < limits.min_entropy * self.first["val/entropy_per_token"]:
            before = self.first["val/entropy_per_token"]
            return f"entropy fell from {before:.2f} to {entropy:.2f} nats a token"
        if length < limits.min_length * self.first["val/length"]:
            return f"length fell from {self.first['val/length']:.1f} to {length:.1f} tokens"
        starts = range(len(self.scores) - SCORES + 1)
        means = [sum(self.scores[start : start + SCORES]) / SCORES for start in starts]
        if means and means[-1] < max(means) - limits.max_score_drop:
            return f"score fell from {max(means):.2f} to {means[-1]:.2f}"
        return None
