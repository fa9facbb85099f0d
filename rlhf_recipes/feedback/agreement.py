"""How far people agree: with each other, with the rest, and with themselves.

"both bad" is a tie here: neither answer is the better one. Who skips says nothing. Where more than
two people judged an item, the item counts once, with the share of its pairs of people that agree.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from rlhf_recipes.feedback.store import PAUSE, QUESTION, Judged, Store
from rlhf_recipes.findings import said
from rlhf_recipes.stats import Share, share_of

SCALE = {"first": 0, "tie": 1, "both_bad": 1, "second": 2}
VALUE = {**SCALE, "good": 0, "bad": 2}


@dataclass(frozen=True)
class Person:
    """What is known of one person; a share is None where it has no cases."""

    name: str
    judged: int  # items, without those skipped
    seconds: float | None  # the median of an item, without pauses
    left: Share | None  # of the answers called better; near a half without a habit
    rest: Share | None  # agreement with the other people
    itself: Share | None  # with their own earlier verdict, when asked again with sides swapped


@dataclass(frozen=True)
class Agreement:
    """What is known of all people."""

    items: int  # with a verdict
    alpha: float | None  # Krippendorff's, ordinal: 1 is perfect, 0 is chance
    raw: Share | None  # of the items that several people judged
    itself: Share | None  # of everybody: the ceiling of a reward model
    people: tuple[Person, ...]


def agreement(
    store: Store, ids: Iterable[str], question: str = QUESTION, without: Sequence[str] = ()
) -> Agreement:
    """Of these items, less the verdicts of the people in `without`."""
    first, again = _twice(store, ids, question, without)
    same = _with_themselves(first, again)
    rest = _with_the_rest(first)
    people = []
    for name in sorted({one.person for one in first}):
        own = [one for one in first if one.person == name]
        pace = [one.seconds for one in own if 0 < one.seconds <= PAUSE]
        sides = [
            float((one.verdict == "first") != one.flipped)
            for one in (*own, *again)
            if one.person == name and one.verdict in ("first", "second")
        ]
        about = [_share(sides), _share(rest[name]), _share(same[name])]
        people.append(Person(name, len(own), median(pace) if pace else None, *about))
    by_item = _by_item(first)
    agreeing = [_agreeing([*values.values()]) for values in by_item.values() if len(values) > 1]
    every = _share([one for values in same.values() for one in values])
    return Agreement(len(by_item), alpha(first), _share(agreeing), every, tuple(people))


def itself(store: Store, ids: Iterable[str], question: str = QUESTION) -> Share | None:
    """How often everybody agrees with themselves on these items: `agreement`'s, alone."""
    same = _with_themselves(*_twice(store, ids, question))
    return _share([one for values in same.values() for one in values])


def _twice(
    store: Store, ids: Iterable[str], question: str, without: Sequence[str] = ()
) -> tuple[list[Judged], list[Judged]]:
    """What people said, and what they said as they were asked again."""
    ids = list(ids)
    first, again = (
        [one for one in found if one.person not in without and one.verdict in VALUE]
        for found in (store.judged(ids, question), store.judged(ids, question, again=True))
    )
    return first, again


def alpha(judged: Iterable[Judged]) -> float | None:
    """Krippendorff's α over first < tie < second; over good and bad where there are no pairs.

    None where it is not to be had: no item was judged by two people, or all said the same.
    """
    import krippendorff
    import numpy as np

    held = [one for one in judged if one.verdict in VALUE]
    by_item = _by_item([one for one in held if one.verdict in SCALE] or held)
    both = [values for values in by_item.values() if len(values) > 1]
    if len({value for values in both for value in values.values()}) < 2:
        return None  # the package raises ValueError, or gives NaN where other items have others
    names = sorted({name for values in both for name in values})
    table = [[values.get(name, np.nan) for values in both] for name in names]
    return float(krippendorff.alpha(np.array(table), level_of_measurement="ordinal"))


def lines(
    store: Store, ids: Iterable[str], question: str = QUESTION, without: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """What to show of it: a name and a value each."""
    found = agreement(store, ids, question, without)
    if not found.items:
        return [("judged", "nothing yet")]
    count = len(found.people)
    who = "1 person" if count == 1 else f"{count} people"
    rows = [("judged", f"{found.items} {'item' if found.items == 1 else 'items'}, by {who}")]
    if count > 1:
        value = "not to be had: no two people judged the same, or all said the same"
        value = value if found.alpha is None else f"{found.alpha:.2f}".replace("-", "−")
        rows.append(("Krippendorff's α", value))
    if found.raw:
        rows.append(("people agree on", said(found.raw, "items")))
    for one in found.people:
        pace = "" if one.seconds is None else f", {one.seconds:.0f} s each"
        rows.append((one.name, f"{one.judged} judged{pace}"))
        if one.rest:
            rows.append((f"{one.name} with the others", said(one.rest, "items")))
        if one.itself:
            rows.append((f"{one.name} with themselves", said(one.itself, "asked again")))
        if one.left:
            rows.append((f"{one.name} says left in", said(one.left, "verdicts")))
    return rows


def _share(values: Sequence[float]) -> Share | None:
    return share_of(values) if values else None


def _by_item(judged: Iterable[Judged]) -> dict[str, dict[str, int]]:
    """By item, then by person: a place on the scale."""
    found: dict[str, dict[str, int]] = defaultdict(dict)
    for one in judged:
        found[one.item][one.person] = VALUE[one.verdict]
    return found


def _agreeing(values: Sequence[int]) -> float:
    return fmean(a == b for a, b in itertools.combinations(values, 2))


def _with_the_rest(judged: Iterable[Judged]) -> Mapping[str, list[float]]:
    """By person: of each item that others judged, the share of them that say the same."""
    found: dict[str, list[float]] = defaultdict(list)
    for values in _by_item(judged).values():
        for name, value in values.items() if len(values) > 1 else ():
            others = [other for who, other in values.items() if who != name]
            found[name].append(fmean(value == other for other in others))
    return found


def _with_themselves(
    judged: Iterable[Judged], again: Iterable[Judged]
) -> Mapping[str, list[float]]:
    """By person: of each item that they were asked again, whether they said the same."""
    before = {(one.item, one.person): VALUE[one.verdict] for one in judged}
    found: dict[str, list[float]] = defaultdict(list)
    for one in again:
        if (key := (one.item, one.person)) in before:
            found[one.person].append(float(before[key] == VALUE[one.verdict]))
    return found
