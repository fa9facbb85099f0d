"""`choose = "unsure"` against random pairs: accuracy by labels, for people who are steady or not.

The pairs are the smoke recipe's, the order of them is the product's. All begin with the same START
random labels. The first model's scores choose what is asked next. People who agree with the dataset
in 75 % err where the answers are close, by a head of all pairs: the closest pairs are coin flips.
How often they agree with themselves is read from ASKS simulated asks, and sets the part at random.

`heads` fits linear heads on the smoke model's states: seconds, so many seeds. `trained` trains the
product's own reward stage. Accuracy is on the whole test side. `unsure_test` is the first model's
on a third of the test side that `unsure` would choose: so the test side must not be chosen.

    python -m benchmarks.unsure heads --seeds 100
    python -m benchmarks.unsure trained --seeds 3
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Protocol

import numpy as np

from benchmarks.common import ROOT
from rlhf_recipes.feedback import curve
from rlhf_recipes.feedback.choose import in_order, part_at_random
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stats import right, share_of
from rlhf_recipes.store.digests import derive_seed

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
START, ASKS = 48, 40
AGREE = (1.0, 0.75)
WAYS = [("random", 96), ("random", 144), ("unsure", 96), ("unsure", 144)]
RECIPE = ['stages=["reward"]', "dataset.judge_fraction=0", "dataset.validation_fraction=0"]
RECIPE += ["evaluation=false", "reward.eval_strategy=no", "reward.save_strategy=no"]
RECIPE += ["reward.minimum_accuracy=0"]


class Learner(Protocol):
    pool: np.ndarray  # [pairs, size]: states of the better answer less those of the worse

    def learn(self, places: Sequence[int], said: Sequence[bool], seed: int) -> Any:
        """The margins of the pool and of the test side, by a model of these pairs of the pool.

        `said` is whether people said of a pair of the pool what the dataset says.
        """


class Heads:
    def __init__(self, pool: np.ndarray, test: np.ndarray) -> None:
        self.pool, self.test = curve.together(pool, test)

    def learn(self, places: Sequence[int], said: Sequence[bool], seed: int) -> Any:
        signs = np.where([said[place] for place in places], 1.0, -1.0)
        head = curve.head(self.pool[list(places)] * signs[:, None])
        return self.pool @ head, self.test @ head


class Trained:
    def __init__(self, steps: int) -> None:
        self.session, self.whole = smoke(steps)
        self.pool, _ = states(self.session, self.whole, test=0)

    def learn(self, places: Sequence[int], said: Sequence[bool], seed: int) -> Any:
        from rlhf_recipes.models.reward_model import open_reward
        from rlhf_recipes.stages.contract import StageContext
        from rlhf_recipes.stages.evidence import compared
        from rlhf_recipes.stages.reward import run

        session, rows = self.session, [self.whole.train[place] for place in places]
        told = [
            row if said[place] else swapped(row) for place, row in zip(places, rows, strict=True)
        ]
        recipe = replace(session.recipe, seed=seed)
        session.put_data(recipe.dataset, replace(self.whole, train=told, test=[]))
        with tempfile.TemporaryDirectory() as folder:
            for part in ("work", "output"):
                (Path(folder) / part).mkdir()
            about: Any = ("reward", "reward", recipe, Path(folder), {}, Silent(), session)
            run(StageContext(*about))
            model = open_reward(session.base, Path(folder) / "output")
            asked = self.whole.train if len(places) == START else []
            found = [
                compared(model, some, session.tokens.pad_id, 64)
                for some in (asked, self.whole.test)
            ]
            session.base.close(model)
        return tuple(one and one.margins for one in found)


class Silent:
    """A Progress."""

    def __getattr__(self, name: str) -> Any:
        return lambda *words, **more: None


def swapped(row: Any) -> Any:
    return replace(row, chosen_ids=row.rejected_ids, rejected_ids=row.chosen_ids)


def smoke(steps: int = 60) -> tuple[Any, Any]:
    """The session of the smoke recipe, and its rows."""
    from rlhf_recipes.stages.session import Session

    words = [*RECIPE, f"reward.max_steps={steps}"]
    session = Session(load_recipe(ROOT / "recipes/smoke.toml", set=words), {})
    return session, session.data(session.recipe.dataset)


def states(session: Any, whole: Any, train: int = 2000, test: int = 2000) -> list[np.ndarray]:
    """By the untrained model: of the first so many pairs of each side."""
    from rlhf_recipes.stages.label_curve import apart

    role = session.base.open("reward", None, seed=0, trainable=True)
    pad, sides = session.tokens.pad_id, (whole.train[:train], whole.test[:test])
    found = [apart(role, rows, pad, 64) for rows in sides]
    session.base.close(role)
    return found


def people(margins: Sequence[float], agree: float) -> list[float]:
    """By pair: how often people say what the dataset says, `agree` in the mean."""
    if agree == 1:
        return [1.0] * len(margins)
    low, high = 1e-3, 1e3
    for _ in range(60):
        middle = math.sqrt(low * high)
        sure = [1 / (1 + math.exp(-max(-30.0, min(30.0, one / middle)))) for one in margins]
        low, high = (middle, high) if fmean(sure) > agree else (low, middle)
    return sure


def once(lab: Learner, sure: Sequence[float], seed: int) -> dict[str, float]:
    """The accuracy of each way."""
    draw = random.Random(seed)
    said = [draw.random() < one for one in sure]  # what people say when they are asked
    every = draw.sample(range(len(said)), len(said))
    begun, rest = every[:START], every[START:]
    again = [float(draw.random() < one**2 + (1 - one) ** 2) for one in draw.sample(sure, ASKS)]
    part = part_at_random(share_of(again))
    pool, test = lab.learn(begun, said, derive_seed(seed, "start"))
    order = in_order([abs(pool[place]) for place in rest], part, derive_seed(seed, "order"))
    ways = {"random": rest, "unsure": [rest[place] for place, _ in order]}
    near = sorted(test, key=abs)[: len(test) // 3]
    found = {"self_agreement": fmean(again), "part_at_random": part}
    found |= {"start": right(test).mean(), "unsure_test": right(np.array(near)).mean()}
    for way, count in WAYS:
        places = [*begun, *ways[way][: count - START]]
        _, test = lab.learn(places, said, derive_seed(seed, "next"))
        found[f"{way}_{count}"] = right(test).mean()
    return {key: float(value) for key, value in found.items()}


def compare(lab: Learner, seeds: int, tell: Any = print) -> dict[float, dict[str, list[float]]]:
    """By how often people agree with the dataset: every number of `once`, by seed."""
    gold = curve.head(lab.pool)
    sure = {agree: people((lab.pool @ gold).tolist(), agree) for agree in AGREE}
    found: dict[float, dict[str, list[float]]] = {agree: {} for agree in AGREE}
    for seed in range(seeds):
        for agree in AGREE:
            one = once(lab, sure[agree], seed)
            tell(agree, seed, json.dumps(one))
            for key, value in one.items():
                found[agree].setdefault(key, []).append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("by", choices=("heads", "trained"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="of each reward model [60]")
    asked = parser.parse_args()
    lab: Learner = Trained(asked.steps) if asked.by == "trained" else Heads(*states(*smoke()))
    quiet = {"tell": lambda *_: None} if asked.by == "heads" else {}
    for agree, rows in compare(lab, asked.seeds, **quiet).items():
        print(f"people agree with the dataset in {agree:.0%}; mean and standard error, points")
        rows["unsure_144 − random_144"] = [
            a - b for a, b in zip(rows["unsure_144"], rows["random_144"], strict=True)
        ]
        for key, values in rows.items():
            error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
            print(f"  {key:<24} {100 * fmean(values):6.1f} ± {100 * error:.1f}")


if __name__ == "__main__":
    main()
