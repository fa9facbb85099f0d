"""The learning curve: linear heads on states that are made up, so that what they learn is known."""

import numpy as np
import pytest

from rlhf_recipes.feedback import curve


def pairs(count: int, seed: int, signal: float) -> np.ndarray:
    """Differences of states in 60 dimensions, of which one tells the better answer."""
    draw = np.random.default_rng(seed)
    found = draw.normal(size=(count, 60))
    found[:, 0] += signal
    return found


def test_a_head_is_the_one_that_does_best():
    rows = pairs(60, 0, 1.0)
    head = curve.head(rows)
    wrong = 1 / (1 + np.exp(rows @ head))
    assert np.abs(curve.RIDGE * head - rows.T @ wrong).max() < 1e-6
    assert curve.head(rows[::-1]) == pytest.approx(head)
    assert curve.head(-rows) == pytest.approx(-head)


def test_the_last_half_gives_much_of_few_pairs_little_of_many_and_nothing_of_noise():
    test = pairs(1000, 99, 1.5)
    few, many = (curve.curve(pairs(count, 0, 1.5), test, 0) for count in (40, 1200))
    assert [point["pairs"] for point in few["points"]] == [10, 20, 30, 40]
    assert few["gain"] > 0.03 and few["gain_low"] > 0.01
    assert abs(many["gain"]) < 0.01
    for point in many["points"]:
        assert 0.85 < point["low"] < point["accuracy"] < point["high"] < 0.97
    assert many["test_pairs"] == 1000
    noise = curve.curve(pairs(200, 3, 0.0), pairs(400, 4, 0.0), 0)
    assert noise["gain_low"] < 0 < noise["gain_high"]
    assert noise["points"][-1]["low"] < 0.5 < noise["points"][-1]["high"]
    assert curve.curve(pairs(40, 0, 1.5), test, 0) == few


def test_states_of_more_parts_than_pairs_are_read_too():
    draw = np.random.default_rng(0)
    found = curve.curve(draw.normal(size=(40, 500)), draw.normal(size=(9, 500)), 0)
    assert [len(found["points"]), found["test_pairs"]] == [4, 9]
