"""What the numbers are worth: intervals, and what the best of n answers would be. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 5_000


def bootstrap(values: Sequence[float], seed: int) -> tuple[float, float]:
    """The 95 % interval of the mean of `values`, one a prompt, over prompts drawn again.

    It is paired where a value is the difference between two policies' answers to one prompt.
    """
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.asarray(values, float)[drawn].mean(1), (2.5, 97.5)).tolist()
    return low, high


def best_of_weights(drawn: int, n: int) -> list[float]:
    """Of `drawn` answers, the worst first: how often each is the best of n chosen among them."""
    return [math.comb(rank, n - 1) / math.comb(drawn, n) for rank in range(drawn)]


def best_of_gain(rewards: Sequence[float], values: Sequence[float], n: int) -> float:
    """What choosing the best of n by `rewards` adds to the mean of `values`, unbiased.

    Both are of the same answers, drawn alike to one prompt. Equal rewards stay in their order,
    which says nothing about the values.
    """
    order = sorted(range(len(rewards)), key=rewards.__getitem__)
    weights = best_of_weights(len(rewards), n)
    best = math.fsum(weight * values[i] for weight, i in zip(weights, order, strict=True))
    return best - math.fsum(values) / len(values)


def best_of_kl(n: int) -> float:
    """Nats an answer, at most, from a policy to its best of n (arXiv 2401.01879)."""
    return math.log(n) - (n - 1) / n
