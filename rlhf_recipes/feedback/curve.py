"""A learning curve from the pairs that are there: what did the last half of them add?

A linear head is fitted anew on parts of the training pairs, and held against the test pairs. It
reads the states of a model that learned from none of them: in states of one that did, a few pairs
would do as well as all.
"""

from __future__ import annotations

from statistics import fmean
from typing import Any

import numpy as np

from rlhf_recipes.stats import measured, right, wilson

FILE = "curve.json"  # in the output of a reward stage
SHARES, DRAWS = (0.25, 0.5, 0.75, 1.0), 10
LEAST, LEAST_TEST = 40, 10  # pairs: a curve of fewer says nothing
MOST = 2000  # training pairs that are looked at
PARTS = 64  # principal components of the states that a head reads
RIDGE = 0.1  # a head's prior: margins of about 3 between two answers
STEPS = 30  # of Newton's method, at most; it takes 5 to 10


def curve(train: np.ndarray, test: np.ndarray, seed: int) -> dict[str, Any]:
    """Accuracy by pairs, in ten draws of each part, and what the last half of the pairs gave.

    `train` and `test` are [pairs, size], the state of the better answer less that of the worse.
    """
    train, test = together(train, test)
    draw, points, said = np.random.default_rng(seed), list[dict[str, Any]](), {}
    for share in SHARES:
        count = round(share * len(train))
        orders = [draw.permutation(len(train)) for _ in range(DRAWS if share < 1 else 1)]
        found = [right(test @ head(train[order[:count]])) for order in orders]
        said[share] = np.mean(found, axis=0)
        value = float(said[share].mean())
        low, high = wilson(value, len(test))
        points.append({"pairs": count, "accuracy": value, "low": low, "high": high})
    gain = measured("gain", said[1.0] - said[0.5], seed)
    return {"points": points, "test_pairs": len(test), **gain}


def together(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in the principal components of `train`, whose rows have a mean square of 1."""
    _, _, axes = np.linalg.svd(train, full_matrices=False)
    train, test = train @ axes[:PARTS].T, test @ axes[:PARTS].T
    scale = np.sqrt(fmean((train**2).sum(1))) or 1.0
    return train / scale, test / scale


def head(apart: np.ndarray) -> np.ndarray:
    """The head that gives the better answer the higher score: logistic, with a ridge.

    There is one head alone that does best, so neither order nor seed matters.
    """
    weight = np.zeros(apart.shape[1])
    for _ in range(STEPS):
        wrong = 1 / (1 + np.exp(np.clip(apart @ weight, -500, 500)))
        slope = RIDGE * weight - apart.T @ wrong
        bend = (apart * (wrong * (1 - wrong))[:, None]).T @ apart
        step = np.linalg.solve(bend + RIDGE * np.eye(len(weight)), slope)
        weight -= step
        if np.abs(step).max() < 1e-6:
            break
    return weight
