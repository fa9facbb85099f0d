"""Judgements of sampled answers, as rows that a reward model, DPO and KTO learn from.

People judge on the page (`rlhf-recipes label`), outside of the stage: it takes what they said from
the store, or ends with exit code 4 where that is too little. A rule judges here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from rlhf_recipes.data.dataset import Data
from rlhf_recipes.errors import GateError, PeopleNeeded, StageError
from rlhf_recipes.feedback.agreement import itself
from rlhf_recipes.feedback.items import ANSWERS, ROWS, Item, read_items
from rlhf_recipes.feedback.judging import JudgeSettings, judge_items
from rlhf_recipes.feedback.prompt import QUESTION
from rlhf_recipes.feedback.store import Judged, Store, majority, snapshot, strengths
from rlhf_recipes.models.fake_model import Held, Sim
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.tables import located
from rlhf_recipes.sources import resolve as sources
from rlhf_recipes.stages.contract import StageContext, StageResult, Trial, Work
from rlhf_recipes.stages.rewards.rule import Said, load_rule
from rlhf_recipes.store.files import to_json, whole, write_json

__all__ = ["memory", "run", "trial", "work"]  # see contract.StageModule

JUDGED = "judge.json"  # in the output: what is known of a model as a judge
Verdicts = dict[str, str]  # by item: first, second, tie, both_bad, good, bad
Row = dict[str, Any]


def run(context: StageContext) -> StageResult:
    table = context.recipe.table(context.name)
    items = list(read_items(context.inputs["answers"] / ANSWERS))
    margins: dict[str, float] = {}
    told: dict[str, float | int | str] = {}
    if table.extras["by"] == "rule":
        verdicts = by_rule(context, items)
    elif table.extras["by"] == "model":
        verdicts, told = by_model(context, items)
    else:
        said = _of_people(context, items)
        verdicts, margins = majority(said), strengths(said)
        told |= steadiness(context, items)
    rows = [row for one in items for row in rows_of(one, verdicts.get(one.id), margins)]
    if not rows:
        raise StageError(
            f"{context.name}: of {len(verdicts)} judgements none says which answer is better",
            "sample other answers: raise temperature, or answers",
        )
    with whole(context.folder / "output" / ROWS) as stream:
        for row in rows:
            stream.write((to_json(row) + "\n").encode())
    counts = Counter(verdicts.values())
    pairs = counts["first"] + counts["second"]
    metrics: dict[str, float | int | str] = {
        "by": table.extras["by"],
        "items": len(items),
        "judged": len(verdicts),
        "pairs": pairs,
        "labels": counts["good"] + counts["bad"],
        "ties": counts["tie"],
        "both_bad": counts["both_bad"],
    }
    longer = [_longer(one, verdicts.get(one.id)) for one in items]
    if apart := [value for value in longer if value is not None]:
        metrics["longer_preferred"] = fmean(apart)
    return StageResult(metrics | told, f"{len(rows)} rows from {len(verdicts)} judgements")


def rows_of(one: Item, verdict: str | None, margins: dict[str, float]) -> Iterable[Row]:
    """What an item teaches: a pair, or a labelled answer; nothing of ties."""
    prompt = [dict(turn) for turn in one.prompt]
    if verdict in ("good", "bad"):
        yield {"prompt": prompt, "completion": one.answers[0], "label": verdict == "good"}
    elif verdict in ("first", "second"):
        better, worse = one.answers if verdict == "first" else one.answers[::-1]
        margin = {"margin": margins[one.id]} if one.id in margins else {}
        yield {"prompt": prompt, "chosen": better, "rejected": worse, **margin, **one.row}


def _longer(one: Item, verdict: str | None) -> float | None:
    """Whether the longer of two answers won, where they differ by a tenth."""
    if verdict not in ("first", "second"):
        return None
    first, second = map(len, one.answers)
    if 10 * abs(first - second) <= max(first, second):
        return None
    return float((first > second) == (verdict == "first"))


def steadiness(context: StageContext, items: Sequence[Item]) -> dict[str, float]:
    """How often people said the same when asked again: the ceiling of a reward model."""
    runs = context.session.runs
    found = itself(Store(runs), [one.id for one in items]) if runs else None
    if found is None:
        return {}
    key = "self_agreement"
    ends = {f"{key}_low": found.low, f"{key}_high": found.high}
    return {key: found.value, **ends, "asked_again": found.count}


# ---- who judges


def lacking(
    items: Sequence[Item], said: Sequence[Judged], votes: int, least: dict[str, int]
) -> int:
    """How many judgements are missing for a stage to go on.

    Of a side, all items are enough, but for those that people skipped.
    """
    counts = Counter(one.item for one in said if one.verdict != "skip")
    skipped = {one.item for one in said} - counts.keys()
    missing, left = 0, [one for one in items if one.id not in skipped]
    for tests, wanted in ((False, least["minimum"]), (True, least["minimum_test"])):
        side = [one for one in left if (one.side == "test") == tests]
        done = sum(min(votes, counts[one.id]) for one in side)
        missing += max(0, votes * min(wanted, len(side)) - done)
    return missing


def for_people(extras: Mapping[str, Any], items: Sequence[Item]) -> tuple[list[Item], int]:
    """What people are asked, and how many votes each; before a model judges, test items first."""
    if extras["by"] != "model":
        return list(items), extras["votes"]
    return sorted(items, key=lambda one: one.side != "test")[: extras["people"]], extras["votes"]


def missing(extras: Mapping[str, Any], items: Sequence[Item], said: Sequence[Judged]) -> int:
    """How many judgements of people a stage waits for."""
    asked, votes = for_people(extras, items)
    every = {"minimum": len(asked), "minimum_test": len(asked)}
    return lacking(asked, said, votes, every if extras["by"] == "model" else extras)


def _enough(context: StageContext, items: Sequence[Item]) -> list[Judged]:
    """What people said. Raises PeopleNeeded where it is too little."""
    extras, runs = context.recipe.table(context.name).extras, context.session.runs
    asked = for_people(extras, items)[0]
    said = Store(runs).judged(one.id for one in asked) if runs else []
    if wanted := missing(extras, items, said):
        done = f"{len({one.item for one in said})} of {len(asked)} are judged"
        raise PeopleNeeded(f"people have to judge first: {done}, {wanted} more are needed")
    return said


def _of_people(context: StageContext, items: Sequence[Item]) -> list[Judged]:
    """What people said, if it is enough and what the stage's key knows of."""
    said = _enough(context, items)
    if snapshot(said) != context.judged:
        what = "judgements came in as the run was planned"
        raise StageError(f"{context.name}: {what}", "the same command goes on")
    return said


def by_model(
    context: StageContext, items: Sequence[Item]
) -> tuple[Verdicts, dict[str, float | int | str]]:
    """A model's verdicts on pairs; on the first `people` items, those of people count as well.

    Raises GateError where the judge agrees with people too seldom.
    """
    extras, runs = context.recipe.table(context.name).extras, context.session.runs
    if runs is None or len(items[0].answers) < 2:
        raise StageError(f"{context.name}: a model judges pairs", "say answers = 2 in [sample]")
    if extras["people"]:
        _enough(context, items)
    note, update = context.progress.note, context.progress.update
    context.session.release()
    found = judge_items(items, judge_of(context), Store(runs), note, update=update)
    if found.spent:
        what = f"{context.name}: the budget of {extras['budget']:g} is spent"
        raise StageError(what, "the same command with a larger budget goes on from here")
    write_json(context.folder / "output" / JUDGED, {"bins": found.bins, **found.metrics})
    agreed, least = found.metrics.get("agreement"), extras["minimum_agreement"]
    if agreed is not None and least is not None and agreed < least:
        what = f"the judge agrees with people on {agreed:.0%}, and {least:.0%} is asked for"
        raise GateError(f"{context.name}: {what}", "change principles or the model")
    verdicts = {one.id: said for one in items if (said := found.verdict(one.id))}
    return verdicts, {"judge_model": extras["model"], **found.metrics}


def judge_of(context: StageContext) -> JudgeSettings:
    """The judge of a stage, as its table has it."""
    runs = context.session.runs
    assert runs
    recipe, extras = context.recipe, context.recipe.table(context.name).extras
    base, name = recipe.model.base, extras["model"]
    local, content = None, ""
    if not extras["url"]:
        local = sources.model_folder(name, recipe)
        known = sources.identify_model(name, recipe, runs)
        content = known.get("content") or known["revision"]
    principles = located(extras["principles"], base) if extras["principles"] else None
    price = extras["price"]
    return JudgeSettings(
        model=name,
        url=extras["url"] or "",
        folder=local,
        content=content,
        quantization=recipe.model.quantization,
        dtype=recipe.model.dtype,
        principles=principles.read_text(encoding="utf-8") if principles else "",
        question=extras["question"] or QUESTION,
        **{key: extras[key] for key in ("reasons", "samples", "tie", "people", "budget")},
        price=(price[0], price[1]) if price else None,
        concurrency=extras["concurrency"],
    )


def by_rule(context: StageContext, items: Sequence[Item]) -> Verdicts:
    """The answer with the higher number is better; of a single answer, from ½ on it is good."""
    tokens, table = context.session.tokens, context.recipe.table(context.name)
    assert table.rule
    rule = load_rule(table.rule, context.recipe.model.base)
    assert rule
    found: Verdicts = {}
    for done, one in enumerate(items, 1):
        numbers = []
        for place, text in enumerate(one.answers):
            ended = one.made.get("ended", [True, True])[place]
            ids = tokens.tokenizer(text, add_special_tokens=False)["input_ids"]
            numbers.append(rule(Said(one.prompt[-1]["content"], one.row, text, ids, ended)))
        if None in numbers:
            continue  # the rule does not speak of the row
        if len(numbers) == 1:
            found[one.id] = "good" if numbers[0] >= 0.5 else "bad"
        else:
            first, second = numbers
            found[one.id] = "tie" if first == second else "first" if first > second else "second"
        context.progress.update(done, len(items))
    return found


# ---- it is not rehearsed; it has no model


def trial(recipe: Recipe, name: str) -> Trial:
    return Trial(recipe, 0, 0)


def work(recipe: Recipe, name: str, data: Data) -> Work:
    return Work(1, 1.0)


def memory(sim: Sim) -> Iterator[Held]:
    yield Counter()
