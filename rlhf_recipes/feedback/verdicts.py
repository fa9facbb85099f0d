"""What a judge said of pairs, and what that is worth: its likings, its bill, its agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from rlhf_recipes.feedback.agreement import alpha
from rlhf_recipes.feedback.calls import Bill
from rlhf_recipes.feedback.items import Item
from rlhf_recipes.feedback.reading import Reply
from rlhf_recipes.feedback.store import Judged
from rlhf_recipes.stats import share_of

DIFFERENT = 0.1  # of the longer answer's length: closer ones say nothing of a liking for length
BINS = 5
ENDS = ("", "_low", "_high", "_pairs")
Said = Mapping[str, tuple[list[Reply], list[Reply]]]  # by item, by where its first answer is shown


@dataclass(frozen=True)
class Verdicts:
    """What a judge said of items."""

    better: Mapping[str, float | None]  # by item: p that its first answer is better, or none
    tie: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    bins: Sequence[Mapping[str, Any]] = ()  # p against people
    spent: bool = False  # the budget ended before all was asked

    def verdict(self, item: str) -> str | None:
        """ "first", "second", "tie", or None where there is none."""
        chance = self.better.get(item)
        if chance is None:
            return None
        if abs(chance - 0.5) <= self.tie:
            return "tie"
        return "first" if chance > 0.5 else "second"


def counts(found: Verdicts, bill: Bill, price: tuple[float, float] | None) -> dict[str, float]:
    """Of pairs, and of calls: every one that was made, the failed ones too."""
    verdicts = [found.verdict(key) for key in found.better]
    numbers: dict[str, float] = {
        "pairs": len(verdicts),
        "kept": sum(one in ("first", "second") for one in verdicts),
        "ties": verdicts.count("tie"),
        "no_verdict": verdicts.count(None),
        "calls": bill.calls,
        "failed_calls": bill.failed,
        "tokens_in": bill.tokens_in,
        "tokens_out": bill.tokens_out,
        "uncounted_calls": bill.uncounted,
        "call_seconds": bill.seconds,
    }
    return numbers | ({"dollars": bill.dollars(price)} if price else {})


def likings(
    pairs: Sequence[Item],
    said: Said,
    found: Verdicts,
    people: Mapping[str, str],
) -> dict[str, float]:
    """For a place, and for length: what a judge looks at beside the answers."""
    replies = [one for both in said.values() for order in both for one in order]
    named = [one.named for one in replies if one.named != "tie"]
    numbers: dict[str, float] = {}
    if named:
        numbers["first_share"] = named.count("1") / len(named)
    if logits := [one.logit for one in replies if one.logit is not None]:
        numbers["place_logit"] = fmean(logits)
    both = [(s[0].named, o[0].named) for s, o in said.values() if s and o]
    if both:
        swap = {"1": "2", "2": "1", "tie": "tie"}
        alike = [one == swap[other or "tie"] for one, other in both]
        numbers["consistency"] = fmean(alike)
    apart = {}
    for one in pairs:
        first, second = map(len, one.answers)
        if abs(first - second) > DIFFERENT * max(first, second):
            apart[one.id] = "first" if first > second else "second"
    told = {key: found.verdict(key) for key in apart}
    told = {key: verdict for key, verdict in told.items() if verdict in ("first", "second")}
    if told:
        numbers["longer_share"] = fmean(told[key] == apart[key] for key in told)
    if shared := [key for key in told if people.get(key) in ("first", "second")]:
        numbers["longer_share_people"] = fmean(people[key] == apart[key] for key in shared)
    return numbers


def with_people(
    found: Verdicts, people: Mapping[str, str]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """How often judge and people name the same answer, where both name one; α over all."""
    shared = {key: found.verdict(key) for key in people if found.verdict(key)}
    named = [k for k, v in shared.items() if "tie" not in (v, people[k])]
    if not named:
        return {}, []
    share = share_of([float(shared[key] == people[key]) for key in named])
    numbers = {f"agreement{end}": n for end, n in zip(ENDS, share, strict=True)}
    both = [
        Judged(key, who, said, False)
        for key, verdict in shared.items()
        for who, said in (("judge", verdict), ("people", people[key]))
        if said
    ]
    if (found_alpha := alpha(both)) is not None:
        numbers["agreement_alpha"] = found_alpha
    bins = []
    for number in range(BINS):
        there = [k for k in named if min(int((found.better[k] or 0) * BINS), BINS - 1) == number]
        means = (
            [fmean(people[k] == "first" for k in there), fmean(found.better[k] or 0 for k in there)]
            if there
            else [None, None]
        )
        bins.append({"pairs": len(there), "people": means[0], "judge": means[1]})
    return numbers, bins
