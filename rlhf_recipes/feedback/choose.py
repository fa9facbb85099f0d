"""Which pairs are to be judged first: those that a reward model is least sure of, and some others.

Pairs of the training side alone are chosen so. The closest pairs are where the reward model errs:
accuracy on such pairs would say too little of it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a plan does without NumPy
    from rlhf_recipes.stats import Share

UNSURE, RANDOM = "unsure", "random"  # why an item stands where it does
FEWEST = 20  # asks for self-agreement: fewer say nothing
# Self-agreement from which on a quarter, or a half, of the pairs is drawn at random.
STEADY, WAVERING = 0.75, 0.65


def part_at_random(itself: Share | None) -> float:
    """The part of the pairs that is drawn at random, by how often people agree with themselves.

    To people who waver the closest pairs are coin flips: there random pairs teach more.
    """
    if itself is None or itself.count < FEWEST:
        return 0.5
    return 0.25 if itself.value >= STEADY else 0.5 if itself.value >= WAVERING else 1.0


def closest(scores: Sequence[float]) -> tuple[int, int]:
    """The places of the two scores that differ least; of equal pairs the first."""
    pairs = itertools.combinations(range(len(scores)), 2)
    return min(pairs, key=lambda pair: abs(scores[pair[0]] - scores[pair[1]]))


def in_order(margins: Sequence[float], part: float, seed: int) -> list[tuple[int, str]]:
    """Each place of `margins`, first the smallest, and why it is there.

    In any first so many, `part` of them are drawn at random.
    """
    near = sorted(range(len(margins)), key=lambda place: margins[place])
    drawn = random.Random(seed).sample(near, len(near))
    left = {UNSURE: iter(near), RANDOM: iter(drawn)}
    found: dict[int, str] = {}
    for at in range(len(margins)):
        why = RANDOM if int((at + 1) * part) > int(at * part) else UNSURE
        found[next(place for place in left[why] if place not in found)] = why
    return [*found.items()]
