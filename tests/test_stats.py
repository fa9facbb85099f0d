"""Intervals against published and exact ones; calibration of what is known; the gate's answers."""

from __future__ import annotations

import contextlib
import math
import random

import numpy as np
import pytest

from rlhf_recipes.errors import GateError
from rlhf_recipes.report.policy_rules import MORE_PROMPTS
from rlhf_recipes.stats import (
    bootstrap,
    calibration,
    calibration_error,
    gate,
    of_pairs,
    over_seeds,
    wilson,
)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [  # Newcombe (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_gives_published_intervals(hits: int, count: int, low: float, high: float) -> None:
    assert wilson(hits / count, count) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("share", [0.5, 0.7, 0.97])
def test_wilson_holds_the_truth_95_times_in_100(share: float) -> None:
    count, held = 81, 0.0
    for hits in range(count + 1):
        low, high = wilson(hits / count, count)
        chance = math.comb(count, hits) * share**hits * (1 - share) ** (count - hits)
        held += chance * (low <= share <= high)
    assert 0.925 < held < 0.985


def test_the_interval_over_seeds_is_student_s() -> None:
    for count, t in {2: 12.706205, 3: 4.302653, 4: 3.182446, 6: 2.570582, 31: 2.042272}.items():
        values = [0.0] * (count - 1) + [1.0]
        low, high = over_seeds(values) or (0.0, 0.0)
        half = t * float(np.std(values, ddof=1)) / math.sqrt(count)
        assert (high - low) / 2 == pytest.approx(half, rel=1e-6)
        assert (high + low) / 2 == pytest.approx(1 / count)
    assert over_seeds([0.7]) is None
    drawn, held = np.random.default_rng(0).normal(0.7, 0.03, (400, 3)), 0
    for seeds in drawn:
        low, high = over_seeds([*seeds]) or (0.0, 0.0)
        held += low <= 0.7 <= high
    assert 0.92 < held / 400 < 0.98


def test_of_no_pairs_anything_may_be_true() -> None:
    assert wilson(0.0, 0) == (0.0, 1.0)


def said(count: int, factor: float) -> np.ndarray:
    """Margins of a reward model that is right as often as `sigmoid(margin / factor)` says."""
    draw = random.Random(0)
    chances = [draw.uniform(0.5, 0.999) for _ in range(count)]
    signs = [1 if draw.random() < chance else -1 for chance in chances]
    return np.array([sign * factor * math.log(p / (1 - p)) for sign, p in zip(signs, chances)])  # noqa: B905


def test_calibration_tells_the_sure_from_the_oversure() -> None:
    assert calibration_error(calibration(said(20_000, 1.0))) < 0.02
    assert calibration_error(calibration(said(20_000, 4.0))) > 0.1
    assert calibration_error(calibration(said(20_000, 0.2))) > 0.1
    # Always sure and always wrong, always sure and always right, never sure.
    for margin, error in [(-99.0, 1.0), (99.0, 0.0), (0.0, 0.0)]:
        assert calibration_error(calibration(np.full(5, margin))) == pytest.approx(error)


def test_the_bins_of_a_calibration() -> None:
    bins = calibration(np.array([0.1, -0.1, 0.0, 2.0, 50.0]))
    assert [one["pairs"] for one in bins] == [3, 0, 0, 0, 0, 0, 0, 1, 0, 1]
    assert bins[0]["right"] == 0.5 and bins[7]["said"] == pytest.approx(1 / (1 + math.exp(-2)))
    assert bins[1] == {"pairs": 0, "said": None, "right": None}


def test_the_numbers_of_a_few_pairs() -> None:
    lengths = [(3, 5), (3, 4), (6, 2), (4, 4)]
    numbers, found = of_pairs([1.0, -3.0, 2.0, 0.0], 2.0, lengths)
    low, high = wilson(0.625, 4)
    assert numbers == {
        "accuracy": 0.625,
        "accuracy_low": low,
        "accuracy_high": high,
        "test_pairs": 4,
        "margin": 0.0,
        "calibration_error": pytest.approx(numbers["calibration_error"]),
        "length_accuracy": 0.625,  # of "the shorter is better": two, and half of the tie
        "shorter_pairs": 2,
        "shorter_accuracy": 0.5,
    }
    # The error is that of the raw margins, the margins that are kept are in units.
    assert found["calibration"] == calibration(np.array([1.0, -3.0, 2.0, 0.0]))
    assert (found["pairs"], found["margins"]) == (4, [0.5, -1.5, 1.0, 0.0])
    numbers, _ = of_pairs([1.0], 1.0, [(5, 3)])
    assert numbers["shorter_pairs"] == 0 and "shorter_accuracy" not in numbers


def numbers(accuracy: float, count: int) -> dict[str, float]:
    low, high = wilson(accuracy, count)
    ends = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
    return {**ends, "test_pairs": count, "length_accuracy": 0.61}


@pytest.mark.parametrize(
    ("accuracy", "count", "minimum", "answer"),
    [
        (0.975, 81, 0.55, "well"),
        (0.56, 4000, 0.55, "well"),
        (0.54, 4000, 0.55, "under"),
        (0.52, 81, 0.55, "under"),
        (0.52, 81, 0.5, "well"),
        (0.4, 4000, 0.3, "chance"),
        (0.1, 20, 0.55, "chance"),
        (0.4, 4000, 0.0, "well"),
        (0.5, 12, 0.55, "unsure"),
        (0.6, 20, 0.55, "unsure"),
        (1.0, 12, 0.55, "well"),
        (0.5, 57, 0.55, "unsure"),
        (0.5, 58, 0.55, "under"),
        (0.58, 81, 0.55, "coin"),
        (0.62, 81, 0.55, "well"),
        (0.56, 200, 0.55, "coin"),
        (0.6, 57, 0.55, "coin"),
    ],
)
def test_the_gate(accuracy: float, count: int, minimum: float, answer: str) -> None:
    words = {"under": "under reward.minimum_accuracy = ", "chance": ": worse than chance"}
    words["coin"] = r": this may be chance, as the interval begins at \d\d%"
    found = numbers(accuracy, count)
    if answer in words:
        with pytest.raises(GateError, match=words[answer]) as caught:
            gate(found, minimum, "reward.minimum_accuracy")
        assert caught.value.exit_code == 3
        for part in (f"{accuracy:.1%} of {count} test pairs", "length alone 61%", "\n"):
            assert (part in str(caught.value)) == (part != "\n")
        assert "--set reward.minimum_accuracy=0 " in caught.value.hint
        return
    note = gate(found, minimum, "reward.minimum_accuracy")
    assert ("too few pairs to tell" in note) == (answer == "unsure")
    assert bool(note) == (answer == "unsure")


def test_a_coin_seldom_passes_the_gate() -> None:
    """It did in 19 of 100 cases at 81 pairs, and in 14 at 100."""
    for count in (81, 100, 200):
        passed = 0.0
        for hits in range(count + 1):
            with contextlib.suppress(GateError):
                passed += not gate(numbers(hits / count, count), 0.55, "key") and (
                    math.comb(count, hits) / 2**count
                )
        assert 0 < passed < 0.035


@pytest.mark.parametrize(("share", "prompts"), [(0.6, 200), (0.55, 780)])
def test_as_many_prompts_as_are_named_tell_a_gain_four_times_in_five(
    share: float, prompts: int
) -> None:
    named = MORE_PROMPTS.replace("prompts ", "")
    assert f"{prompts} tell {100 * share:.0f} %" in named
    draws = np.random.default_rng(0).random((200, prompts)) < share
    lows = [bootstrap(wins, seed)[0] for seed, wins in enumerate(draws.astype(float))]
    assert 0.74 < np.mean(np.array(lows) > 0.5) < 0.88


def test_without_test_pairs_the_gate_says_so() -> None:
    assert gate({}, 0.55, "ppo.minimum_accuracy").startswith("no test pairs")
