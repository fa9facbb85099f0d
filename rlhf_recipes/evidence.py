"""What the numbers are worth: intervals, and what the best of n answers would be. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

import numpy as np

RESAMPLES = 5_000


def bootstrap(values: Sequence[float], seed: int) -> tuple[float, float]:
    """The 95 % interval of the mean of `values`, one a prompt, over prompts drawn again.

    It is paired where a value is the difference between two policies' answers to one prompt.
    """
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.asarray(values, float)[drawn].mean(1), (2.5, 97.5)).tolist()
    return low, high


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
