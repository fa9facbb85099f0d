"""How sure a number is: intervals, calibration, and whether a reward model may be trained against.

NumPy alone. Every interval is one of 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean, stdev
from typing import Any, NamedTuple

import numpy as np

from rlhf_recipes.errors import GateError

FILE = "evidence.json"  # in the output of a stage that measured a reward model
DRAWS = 2000  # of a bootstrap; its ends are right to some 3 % of the interval
STEPS = 100_000  # of an angle: Student's t is right to six digits
BINS = 10
MARGINS, WORST = 2048, 8  # kept of all, for people to look at
UNSURE = 0.25  # an interval wider than this, of some 58 pairs or fewer, tells little


def bootstrap(values: Sequence[float], seed: int) -> tuple[float, float]:
    """The interval of the mean of `values`, one a prompt, when prompts are drawn anew.

    Of paired answers, `values` are the differences, or the wins.
    """
    numbers = np.asarray(values, dtype=float)
    drawn = np.random.default_rng(seed).integers(len(numbers), size=(DRAWS, len(numbers)))
    low, high = np.quantile(numbers[drawn].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


def over_seeds(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's interval of the mean of one value a seed; None of one seed."""
    if len(values) < 2:
        return None
    half = _student(len(values)) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - half, fmean(values) + half


@cache
def _student(count: int) -> float:
    """Standard errors around the mean of `count` normal values.

    At t = √ν tan θ, the density of t is that of cos(θ)^(ν-1).
    """
    angle = np.linspace(0, math.pi / 2, STEPS + 1)
    mass = np.cumsum(np.cos((angle[1:] + angle[:-1]) / 2) ** (count - 2))
    return math.sqrt(count - 1) * math.tan(np.interp(0.95 * mass[-1], mass, angle[1:]))


def measured(key: str, values: Sequence[float], seed: int) -> dict[str, float]:
    """The mean of `values` under `key`, and its interval beside it."""
    low, high = bootstrap(values, seed)
    return {key: fmean(values), f"{key}_low": low, f"{key}_high": high}


def right(margins: np.ndarray) -> np.ndarray:
    """Of each margin, whether it is right: 1, 0, and ½ for a tie."""
    return (margins > 0) + 0.5 * (margins == 0)


def calibration(margins: np.ndarray) -> list[dict[str, Any]]:
    """How often the more likely answer was preferred, by how likely `sigmoid(margin)` says it is.

    The bins are of equal width from ½, where a reward model does not know, to 1.
    """
    said = 1 / (1 + np.exp(-np.abs(margins)))
    place = np.minimum((said - 0.5) * 2 * BINS, BINS - 1).astype(int)
    bins = []
    for number in range(BINS):
        there = place == number
        count = int(there.sum())
        means = [x[there].mean() if count else None for x in (said, right(margins))]
        bins.append({"pairs": count, "said": means[0], "right": means[1]})
    return bins


def calibration_error(bins: list[dict[str, Any]]) -> float:
    """The mean gap between what is said and what is so (ECE, arXiv 1706.04599)."""
    full = [one for one in bins if one["pairs"]]
    gaps = sum(one["pairs"] * abs(one["right"] - one["said"]) for one in full)
    return gaps / sum(one["pairs"] for one in full)


def of_pairs(
    margins: Sequence[float],
    std: float,
    lengths: Sequence[tuple[int, int]],
    count: int | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """A reward model's numbers on test pairs, and what its evidence.json holds of them.

    `margins` are chosen less rejected in its own scale, of which `std` is a unit; `lengths` are
    those of the chosen and the rejected answers. `count` is how many independent pairs they are
    worth, where that is not their number.
    """
    raw = np.asarray(margins, dtype=float)
    wins, bins = right(raw), calibration(raw)
    longer = np.array([chosen - rejected for chosen, rejected in lengths])
    by_length = float(right(longer).mean())
    accuracy = float(wins.mean())
    count = len(raw) if count is None else count
    low, high = wilson(accuracy, count)
    numbers = {
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "test_pairs": count,
        "margin": float(raw.mean()) / std,
        "calibration_error": calibration_error(bins),
        "length_accuracy": max(by_length, 1 - by_length),
        "shorter_pairs": round(int((longer < 0).sum()) * count / len(raw)),
    }
    if numbers["shorter_pairs"]:
        numbers["shorter_accuracy"] = float(wins[longer < 0].mean())
    kept = [round(float(margin) / std, 4) for margin in raw[:MARGINS]]
    return numbers, {"pairs": len(raw), "margins": kept, "calibration": bins}


def cases(found: Mapping[str, float]) -> str:
    """What a reward model was measured on: pairs, or good against bad answers."""
    if "test_good" in found:
        return f"{found['test_good']} good and {found['test_bad']} bad test answers"
    return f"{found['test_pairs']} test pairs"


def best_of_gain(rewards: Sequence[float], values: Sequence[float], n: int) -> float:
    """What the best of n by `rewards` adds to the mean of `values`: unbiased, ties in equal parts.

    Both are of the same answers, drawn alike to one prompt; every choice of n of them counts once.
    """
    best, choices = 0.0, math.comb(len(rewards), n)
    for reward in sorted(set(rewards)):
        tied = [value for r, value in zip(rewards, values, strict=True) if r == reward]
        upto = sum(r <= reward for r in rewards)
        best += (math.comb(upto, n) - math.comb(upto - len(tied), n)) / choices * fmean(tied)
    return best - fmean(values)


def best_of_kl(n: int) -> float:
    """Nats an answer, at most, from a policy to its best of n (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n


# ---- the gate -----------------------------------------------------------------------------------


def gate(found: Mapping[str, float], minimum: float, key: str) -> str:
    """What to say of a reward model before PPO trains against it; nothing where all is well.

    `found` are its numbers on test pairs, `minimum` the accuracy that the recipe's `key` asks for,
    0 for none. Raises GateError where it ranks too few right, where it is surely worse than chance,
    and, with a minimum over a half, where it may be chance: of 81 pairs a coin ranks 55 % right or
    more in one case of five.
    """
    if not minimum:
        return ""
    if not found:
        return "no test pairs to say whether the reward model learned anything"
    accuracy, low, high = (found[f"accuracy{end}"] for end in ("", "_low", "_high"))
    said = f"the reward model ranks {accuracy:.1%} of {cases(found)} right "
    said += f"(95 %: {low:.0%} to {high:.0%}), and length alone {found['length_accuracy']:.0%}"
    if high - low > UNSURE and low < minimum and high >= max(minimum, 0.5):
        return f"{said}: too few pairs to tell whether it is over {key} = {minimum:g}"
    chance = minimum > 0.5 and low <= 0.5
    if accuracy >= minimum and high >= 0.5 and not chance:
        return ""
    what = "worse than chance" if high < 0.5 else f"under {key} = {minimum:g}"
    hint = "try more or cleaner pairs, more epochs or another learning_rate"
    if accuracy >= minimum and chance:
        what = f"this may be chance, as the interval begins at {low:.0%}"
        hint = f"raise dataset.test_fraction for more test pairs; else {hint}"
    raise GateError(f"{said}: {what}", f"{hint}; --set {key}=0 trains against it all the same")


Z = 1.959964  # of the normal distribution: 95 % lie within


def wilson(share: float, count: int) -> tuple[float, float]:
    """The interval of a share of `count` (Wilson, 1927): sane near 0 and 1, and for few."""
    if not count:
        return 0.0, 1.0
    middle = share + Z * Z / (2 * count)
    half = Z * math.sqrt((share * (1 - share) + Z * Z / (4 * count)) / count)
    whole = 1 + Z * Z / count
    return max(0.0, (middle - half) / whole), min(1.0, (middle + half) / whole)


class Share(NamedTuple):
    """A share of `count` cases, and the interval that holds it in 95 of 100 repetitions."""

    value: float
    low: float
    high: float
    count: int  # type: ignore[assignment]  # of cases; tuple's own method is not used


def share_of(values: Sequence[float]) -> Share:
    """The mean of at least one value between 0 and 1, one a case, with Wilson's interval."""
    value = fmean(values)
    return Share(value, *wilson(value, len(values)), len(values))
