"""Answers to be judged: a policy is asked for some to every prompt; two that differ are an item.

Prompts come from every side of the split, so that a reward model is tested on answers that were
judged in the same way. With `answers = 1` each answer is an item of its own.

`choose = "unsure"` puts those training pairs first that a reward model is least sure of. The pairs
of the other sides are never chosen by score: accuracy on close pairs alone would be too low.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rlhf_recipes.data.dataset import Data
from rlhf_recipes.data.rows import Example
from rlhf_recipes.data.turns import Messages
from rlhf_recipes.errors import StageError
from rlhf_recipes.feedback.choose import RANDOM, UNSURE, closest, in_order, part_at_random
from rlhf_recipes.feedback.items import ANSWERS, Item, item, write_items
from rlhf_recipes.feedback.store import Store
from rlhf_recipes.models.fake_model import Held, Sim, sampling
from rlhf_recipes.models.sampling import MOST, SAMPLED, held_at_once
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.tables import BASE
from rlhf_recipes.recipe.wiring import columns_of
from rlhf_recipes.stages.answers import BATCH, Setting, answers_of, scores_of, scoring
from rlhf_recipes.stages.contract import StageContext, StageResult, Trial, Work
from rlhf_recipes.stages.training import FORWARD, load_rows
from rlhf_recipes.store import layout
from rlhf_recipes.store.digests import derive_seed

__all__ = ["answer_length", "memory", "run", "trial", "work"]  # see contract.StageModule

SIDES = ("train", "test", "validation")  # people are asked in this order
AGAIN = 2  # further draws for a prompt whose answers are all the same


class Draw(NamedTuple):
    """One answer of a policy."""

    stage: str
    key: str  # of that stage
    number: int
    ids: list[int]
    text: str
    ended: bool


class Found(NamedTuple):
    """A prompt with the draws that are to be judged, and why they stand where they do."""

    side: str
    example: Example
    draws: list[Draw]
    place: dict[str, Any] = {}


def run(context: StageContext) -> StageResult:
    recipe, table = context.recipe, context.recipe.table(context.name)
    data, found = load_rows(context)
    asked = share(data, found, table.extras["prompts"], table.extras["skip"])
    length = answer_length(recipe, context.name)
    temperature = recipe.usual("temperature", table.extras["temperature"])
    setting = Setting(length, temperature, context.seed())

    # ---- draws: several of the policy, or one of each of two
    policy, against = (context.inputs.get(role) for role in ("policy", "against"))
    count = table.extras["answers"]
    plan = [(policy, table.policy, n) for n in range(count)]
    if table.against:
        plan, count = [(policy, table.policy, 0), (against, table.against, 1)], 2
    drawn: list[list[Draw]] = [[] for _ in asked]
    for done, (output, stage, number) in enumerate(plan, 1):
        _draw(context, output, stage, number, asked, drawn, setting)
        context.progress.update(done, len(plan))
    for number in range(count, count + AGAIN if count > 1 else count):
        same = [i for i, draws in enumerate(drawn) if len({draw.text for draw in draws}) == 1]
        if same and not table.against:
            few = [drawn[i] for i in same]
            _draw(context, policy, table.policy, number, [asked[i] for i in same], few, setting)

    # ---- items
    size, pools = min(count, 2), [different(draws) for draws in drawn]
    every = [
        Found(side, example, pool)
        for (side, example), pool in zip(asked, pools, strict=True)
        if len(pool) >= size
    ]
    if table.extras["choose"] == "unsure":
        every = unsure_first(context, every)
    about = {"seed": recipe.seed, "temperature": temperature, "length": length}
    chosen = some(every, table.extras["count"] or len(every))
    columns = columns_of(recipe, context.name)
    items = [made(recipe, one, size, about, columns) for one in chosen]
    if not items:
        raise StageError(
            f"{context.name}: no prompt has answers that differ", "raise temperature, or prompts"
        )
    write_items(context.folder / "output" / ANSWERS, items)
    if context.session.runs:  # a rehearsal has none
        judged = {one.item for one in Store(context.session.runs).judged(one.id for one in items)}
        if judged:
            context.progress.note(f"{len(judged)} of {len(items)} are judged already")
    metrics: dict[str, float | int | str] = {
        "prompts": len(asked),
        "items": len(items),
        "identical": len(asked) - len(every),
        "ended": fmean(draw.ended for draws in drawn for draw in draws),
    }
    for side in SIDES:
        metrics[f"{side}_items"] = sum(one.side == side for one in items)
    what = "pairs of answers" if count > 1 else "answers"
    close = sum(one.place.get("why") == UNSURE for one in items)
    why = f", {close} of them as {table.reward_model} is unsure" if close else ""
    return StageResult(metrics, f"{len(items)} {what} to be judged{why}")


def share(
    data: Data, found: Sequence[Example], most: int, skip: int = 0
) -> list[tuple[str, Example]]:
    """The first prompts of each side after `skip`, in proportion; at most `most` in all.

    Where a side has no more of them, it begins anew.
    """
    sides = {id(example): side for side in SIDES for example in getattr(data, side)}
    by_side: dict[str, list[Example]] = {side: [] for side in SIDES}
    for example in found:
        by_side[sides[id(example)]].append(example)
    part, chosen = min(1.0, most / len(found)), []
    for side, examples in by_side.items():
        first = round(skip / len(found) * len(examples))
        places = range(first, first + round(part * len(examples)))
        chosen += [(side, examples[place % len(examples)]) for place in places]
    return chosen


def _draw(
    context: StageContext,
    output: Path | None,
    stage: str | None,
    number: int,
    asked: Sequence[tuple[str, Example]],
    drawn: Sequence[list[Draw]],
    setting: Setting,
) -> None:
    """One more answer to each prompt, at the end of its list."""
    tokens, examples = context.session.tokens, [example for _, example in asked]
    seeds = [derive_seed(setting.seed, "draw", number)]
    record = layout.read_record(output.parent) if output else None
    key = record["key"][:12] if record else ""
    for answers in answers_of(context, output, examples, setting, seeds):
        for ids, draws in zip(answers, drawn, strict=True):
            ended = ids[-1] == tokens.eos_id
            draws.append(Draw(stage or BASE, key, number, ids, tokens.decode(ids), ended))


def different(draws: Sequence[Draw]) -> list[Draw]:
    """The first of each text, in order; none without a text."""
    found = {draw.text: draw for draw in reversed(draws) if draw.text.strip()}
    return [*found.values()][::-1]


def unsure_first(context: StageContext, every: Sequence[Found]) -> list[Found]:
    """Of training prompts the closest pair, by the reward model, the closest first; and others.

    The others are drawn at random, as are their pairs. The other sides stay as they are.
    """
    table = context.recipe.table(context.name)
    train = [one for one in every if one.side == "train"]
    rows = [(one.example, draw.ids) for one in train for draw in one.draws]
    name = table.reward_model or ""
    numbers = iter(scores_of(context, "reward_model", name, [rows], lambda count: None))
    scores = [[next(numbers) for _ in one.draws] for one in train]
    near = [closest(one) for one in scores]
    apart = [abs(one[a] - one[b]) for one, (a, b) in zip(scores, near, strict=True)]
    part = context.judged.get(RANDOM, part_at_random(None))
    found = []
    for at, why in in_order(apart, part, context.seed("order")):
        a, b = near[at] if why == UNSURE else (0, 1)
        place = {"why": why, "margin": round(abs(scores[at][a] - scores[at][b]), 4)}
        draws = [train[at].draws[a], train[at].draws[b]]
        found.append(train[at]._replace(draws=draws, place=place))
    rest = [one._replace(place={"why": RANDOM}) for one in every if one.side != "train"]
    return found + rest


def some(every: Sequence[Found], most: int) -> list[Found]:
    """The first of each side, in proportion; at most so many in all."""
    part = min(1.0, most / max(1, len(every)))
    sides = [[one for one in every if one.side == side] for side in SIDES]
    return [one for side in sides for one in side[: round(part * len(side))]]


def made(
    recipe: Recipe, found: Found, size: int, about: Mapping[str, Any], columns: Sequence[str]
) -> Item:
    """The item of a prompt's first `size` draws. A row may have other stages' columns, too."""
    used, example = found.draws[:size], found.example
    own = {name: [getattr(d, name) for d in used] for name in ("stage", "key", "ended")}
    own |= {**about, "side": found.side, "draw": [draw.number for draw in used]}
    texts = [draw.text for draw in used]
    row = {name: example.row[name] for name in columns if name in example.row}
    return item(spoken(example.turns, recipe.dataset.system), texts, own, found.place, row)


def spoken(turns: Messages, system: str | None) -> Messages:
    """A prompt's turns as its row has them, without what [dataset] system puts before them."""
    return turns[1:] if turns[0] == {"role": "system", "content": system} else turns


def answer_length(recipe: Recipe, name: str) -> int:
    """The most tokens of an answer."""
    most = recipe.most_tokens(name)
    assert most
    return most


# ---- the rehearsal, and what its memory and its work are counted from


def trial(recipe: Recipe, name: str) -> Trial:
    return Trial(recipe, SAMPLED, 0)


def work(recipe: Recipe, name: str, data: Data) -> Work:
    table, found = recipe.table(name), data.learned("every_prompt")
    prompts, length = min(table.extras["prompts"], len(found)), answer_length(recipe, name)
    read = fmean(len(e.prompt_ids) for e in found) + length
    answers = 2 if table.against else table.extras["answers"]
    passes = answers * -(-prompts // MOST) * length
    reads = 2 if table.extras["choose"] == "unsure" else 1
    return Work(1, prompts * answers * read * reads * FORWARD, tokens=passes)


def memory(sim: Sim) -> Iterator[Held]:
    """A policy as it is exported, and as many answers as are sampled at a time; their scores."""
    extras = sim.recipe.table(sim.name).extras
    rows = held_at_once(extras["prompts"], sim.lengths.row)
    with sim.model("policy", quantized=False, lora=False) as (tracker, [policy]):
        yield from sampling(tracker, policy, rows, sim.lengths)
    if extras["choose"] == "unsure":
        yield from scoring(sim, min(BATCH, extras["prompts"]))
