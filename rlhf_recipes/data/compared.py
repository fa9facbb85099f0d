"""Several answers to one prompt as pairs of a better and a worse one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

# The most pairs of a prompt: those of nine answers, the most that InstructGPT had ranked.
PAIRS = 36


class Pair(NamedTuple):
    better: int  # places in the list of answers
    worse: int
    margin: float  # how many ranks are between the two
    weight: float  # in the loss


def compare(points: Sequence[float]) -> list[Pair]:
    """Every pair of n answers that `points` tell apart, the widest apart first; ties give none.

    Each weighs 2/(n(n−1)): without weights, long rankings would dominate (InstructGPT). Of more
    than PAIRS, as many are taken at even distances, and they carry the weight of all.
    """
    ranks = {point: rank for rank, point in enumerate(sorted(set(points)))}
    places, count = range(len(points)), len(points)
    both = (sorted(two, key=lambda place: -points[place]) for two in combinations(places, 2))
    apart = [(a, b, ranks[points[a]] - ranks[points[b]]) for a, b in both if points[a] != points[b]]
    apart.sort(key=lambda pair: (-pair[2], pair[0], pair[1]))
    kept = apart[:: -(-len(apart) // PAIRS)] if apart else []
    each = 2 / (count * (count - 1)) * len(apart) / len(kept) if kept else 0.0
    return [Pair(better, worse, float(margin), each) for better, worse, margin in kept]
