"""What a reward model is worth on rows that it never saw: its numbers, and what people look at.

Of pairs, its accuracy is the share whose better answer it scores higher. Of labelled answers, it is
that of good answers against bad ones, the area under the curve: a prompt with both kinds is pairs
already, so these are of different prompts. The labels count where they tell more: where the rarer
kind has more answers than the side has pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rlhf_recipes import stats
from rlhf_recipes.data.dataset import Data
from rlhf_recipes.data.rows import Example, judged
from rlhf_recipes.models.role import Role
from rlhf_recipes.models.sampling import score_ids
from rlhf_recipes.recipe.wiring import judged_before
from rlhf_recipes.stages.contract import StageContext
from rlhf_recipes.store.files import write_json

MOST = 100_000  # comparisons of good and bad answers


class Compared(NamedTuple):
    """Comparisons of a better and a worse answer, each a place in `better` and one in `worse`."""

    better: list[Example]
    worse: list[Example]
    places: list[tuple[int, int]]
    margins: np.ndarray  # score of the better less that of the worse, in the head's scale

    @property
    def by_label(self) -> bool:
        return self.better is not self.worse

    @property
    def cases(self) -> int:
        """How many independent comparisons they are worth: of labels, as many as the rarer has.

        The variance of the area is at most that of so many coins (van Dantzig, 1951).
        """
        return min(len(self.better), len(self.worse))

    @property
    def told(self) -> str:
        if not self.by_label:
            return f"{self.cases} pairs"
        return f"{len(self.better)} good and {len(self.worse)} bad answers"


def compared(reward: Role, examples: list[Example], pad: int, batch: int) -> Compared | None:
    """What a reward model says of a side's rows; None where nothing is to be compared."""
    better, alone = judged(examples)
    worse, good = better, [one for one in alone if one.chosen_ids is not None]
    bad = [one for one in alone if one.chosen_ids is None]
    if min(len(good), len(bad)) > len(better):
        better, worse = good, bad
    if not better:
        return None
    high = score_ids(reward, [(e.prompt_ids, e.chosen_ids or []) for e in better], pad, batch)
    low = score_ids(reward, [(e.prompt_ids, e.rejected_ids or []) for e in worse], pad, batch)
    places = [(place, place) for place in range(len(better))]
    if worse is not better:  # round by round, so that the first of them are of many answers
        rounds = range(min(len(bad), max(1, MOST // len(good))))
        places = [(i, (i + shift) % len(bad)) for shift in rounds for i in range(len(good))]
    first, second = map(list, zip(*places, strict=True))
    return Compared(better, worse, places, (high[first] - low[second]).double().numpy())


def measure(
    context: StageContext, reward: Role, data: Data, std: float, batch: int
) -> dict[str, float]:
    """A reward model's numbers on test rows, whose evidence goes to the stage's output.

    `std` is its unit in the scale of its head. A test split's rows serve, also where the stage's
    `data` are its own.
    """
    session, whole = context.session, context.recipe.dataset
    split = any(table.test_split for table in (whole, *whole.more))
    own = split and not judged_before(context.recipe, context.name)
    rows = (session.data(whole) if own else data).judged("test")
    numbers, evidence = {}, {"pairs": 0, "margins": [], "calibration": [], "worst": []}
    if found := compared(reward, rows, session.tokens.pad_id, batch):
        better, worse, places, apart = found
        lengths = [(len(better[i].chosen_ids), len(worse[j].rejected_ids)) for i, j in places]
        numbers, evidence = stats.of_pairs(apart, std, lengths, found.cases)
        if found.by_label:
            numbers |= {"test_good": len(better), "test_bad": len(worse)}
        evidence["worst"] = _worst(found, std, session.tokens.decode)
    file = context.folder / "output" / stats.FILE
    write_json(file, {**evidence, "metrics": numbers})
    return numbers


def _worst(found: Compared, std: float, decode: Callable[[list[int]], str]) -> list[dict[str, Any]]:
    """The comparisons that it is most wrong about, no answer in two of them."""
    told: list[dict[str, Any]] = []
    seen: set[tuple[str, int]] = set()
    for number in found.margins.argsort(kind="stable"):
        (i, j), margin = found.places[number], found.margins[number]
        if margin > 0 or len(told) == stats.WORST:
            break
        if {("better", i), ("worse", j)} & seen:
            continue
        seen |= {("better", i), ("worse", j)}
        good, bad = found.better[i], found.worse[j]
        asked = [good.prompt, *([bad.prompt] if found.by_label else [])]
        told.append(
            {
                "prompt": " / ".join(asked),
                "chosen": decode(good.chosen_ids),
                "rejected": decode(bad.rejected_ids),
                "margin": round(margin / std, 4),
            }
        )
    return told
