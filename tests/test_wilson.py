"""Intervals and the best of n, against sums over every case."""

from __future__ import annotations

import math
from itertools import combinations
from statistics import fmean, stdev

import pytest

from rlhf_recipes.stats import best_of_gain, best_of_kl, bootstrap


@pytest.mark.parametrize(("count", "won"), [(400, 284), (120, 108), (40, 20)])
def test_the_interval_of_wins_is_the_binomials(count: int, won: int) -> None:
    """Wins drawn again are binomial: where its sum, term by term, passes 2.5 and 97.5 %."""
    low, high = bootstrap([1.0] * won + [0.0] * (count - won), seed=3)
    share, passed = won / count, []
    for wanted in (0.025, 0.975):
        total, wins = 0.0, -1
        while total < wanted:
            wins += 1
            total += math.comb(count, wins) * share**wins * (1 - share) ** (count - wins)
        passed.append(wins / count)
    assert [low, high] == pytest.approx(passed, abs=2 / count)


def test_the_interval_of_gains_is_that_of_a_mean() -> None:
    gains = [math.sin(37 * i) + 0.3 * math.cos(11 * i) ** 3 for i in range(600)]
    half = 1.96 * stdev(gains) / math.sqrt(len(gains))
    low, high = bootstrap(gains, seed=1)
    assert [low, high] == pytest.approx([fmean(gains) - half, fmean(gains) + half], abs=half / 10)
    assert bootstrap(gains, seed=1) == (low, high) != bootstrap(gains, seed=2)
    assert bootstrap([0.25] * 30, seed=1) == (0.25, 0.25)


@pytest.mark.parametrize("rewards", [[0.3, -1.2, 2.0, 0.9, 0.1, 1.1], [1.0, 0.5, 1.0, 0.5, 0.5, 2]])
def test_the_best_of_n_is_the_mean_over_every_choice_of_n(rewards: list[float]) -> None:
    values = [5.0, 1.0, -2.0, 4.0, 0.5, 3.0]
    for n in (1, 2, 4, 6):
        best = []
        for chosen in combinations(range(6), n):
            top = max(rewards[i] for i in chosen)
            best.append(fmean(values[i] for i in chosen if rewards[i] == top))
        by_hand = fmean(best) - fmean(values)
        assert best_of_gain(rewards, values, n) == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 16])
def test_the_nats_of_the_best_of_n_are_an_integral(n: int) -> None:
    """Of the density n·uⁿ⁻¹ of the best of n, u the rank of an answer among all, from 0 to 1."""
    steps = 20_000
    density = [n * ((i + 0.5) / steps) ** (n - 1) for i in range(steps)]
    by_hand = sum(d * math.log(d) for d in density if d > 0) / steps
    assert best_of_kl(n) == pytest.approx(by_hand, abs=1e-4)
