"""Random edits of recipes, data and models: exactly the stages at and below an edit run again.

What is expected comes from the edit alone: which stages a key or a file is of, as docs/design.md
and `fields.json` have it, and which stages take their input from those. Nothing here trains.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rlhf_recipes.errors import RecipeError
from rlhf_recipes.recipe.fields import Field, fields_for
from rlhf_recipes.recipe.kinds import KINDS
from tests.helpers.worlds import (
    ALL,
    BATCH,
    GRAPHS,
    NEEDS,
    Key,
    World,
    below,
    dig,
    effective,
    finish,
    inputs,
    keys,
    kind_of,
    owners,
    put,
)

pytestmark = pytest.mark.train

CASES, SHORT = 200, 12

# ---- edits: each changes the world, and gives the stages whose own result that changes -----------

VALUES = {
    "bool": [True, False],
    "int": [0, 1, 2, 3, 5, 16, 64, 100],
    "float": [0.0, 0.05, 0.1, 0.25, 0.5, 0.9, 1.5, 2.0, 7],
    "str": ["q_proj", "train[:50%]", "default", "one=1"],
    "dict": [{"one": 1}, {"one": 1, "two": 0.5}, {"use_reentrant": False}],
    "list[str]": [["q_proj"], ["v_proj", "k_proj"]],
    "list[int]": [[0], [0, 1]],
    "list[float]": [[1.0], [0.5, 0.5]],
}


def set_key(world: World, key: Key, one: Field) -> set[str] | None:
    """Give a key another value that is allowed; None where there is none."""
    if world.tables.get(key[0]) is False:
        return set()  # the evaluation, left out
    now, before = dig(effective(world.load()), key), copy.deepcopy(world.tables)
    values = [one for kind in one.types for one in VALUES[kind]]
    if one.choices:
        values = [[c] if one.types == ["list[str]"] else c for c in one.choices]
    kind = str(key[0])
    if kind in before["stages"]:
        kind = kind_of(before, kind).name
    for value in world.draw.sample(values, len(values)):
        if one.check(value)[1] or value == now:
            continue
        put(world.tables, key, value)
        for other, needed in NEEDS.get((kind, key[-1]), {}).items():
            put(world.tables, (*key[:-1], other), needed)
        try:
            world.load()
        except RecipeError:
            world.tables = copy.deepcopy(before)
            continue
        return owners(before, key, one)
    return None


def write_out(world: World) -> set[str]:
    """What a key is anyway."""
    values, drawn = effective(world.load()), list(keys(world.tables))
    key = world.draw.choice([key for key in drawn if dig(values, key) is not None])
    put(world.tables, key, dig(values, key))
    return set()


def shift_the_batch(world: World) -> set[str]:
    trained = [one for one in world.tables["stages"] if kind_of(world.tables, one).config]
    stage = world.draw.choice(trained)
    options = effective(world.load())[stage]
    size = options[BATCH[0]] * options[BATCH[1]]
    rows = world.draw.choice([n for n in range(1, size + 1) if size % n == 0])
    world.tables.setdefault(stage, {}).update(zip(BATCH, (rows, size // rows), strict=True))
    micro = fields_for(kind_of(world.tables, stage).config)[BATCH[0]]  # what KTO's KL is made of
    return {stage} if micro.effect == "result" and rows != options[BATCH[0]] else set()


def only_the_layout_of_the_text(world: World) -> set[str]:
    return set()


def move(world: World) -> set[str]:
    world.home = world.home.rename(world.home.with_name(f"moved {world.draw.random()}"))
    return set()


def move_what_it_reads(world: World) -> set[str]:
    """All that the recipe names lies elsewhere, and the recipe says so."""
    to = f"at {world.draw.random()}/"
    world.files = {to + name: content for name, content in world.files.items()}
    written = re.sub(r'"(python:)?\./', rf'"\1./{to}', json.dumps(world.tables))
    world.tables = json.loads(written)
    return set()


def touch(world: World) -> set[str]:
    for name in world.files:
        os.utime(world.home / name, (world.draw.randrange(2**30),) * 2)
    return set()


def change_bytes(world: World) -> set[str]:
    rows = world.tables["dataset"][0]  # those in the folder's top count for some, or for none
    elsewhere = "data_dir" in rows or isinstance(rows.get("data_files"), str)
    elsewhere |= rows.get("test_split", "test") != "test"
    names = [name for name in world.files if not (elsewhere and re.search(r"/t\w+\.jsonl", name))]
    name = world.draw.choice(names)
    content = world.files[name] + world.draw.randbytes(4).hex().encode()
    world.files[name] = content
    whose = next(whose for file, whose in world.whose.items() if name.endswith(file))
    return {*inputs(world.tables)} if whose == ALL else set(whose.split())


def add_an_unused_table(world: World) -> set[str]:
    put(world.tables, ("spare",), {"kind": "dpo", "beta": world.draw.random()})
    return set()


def say_the_roles(world: World) -> set[str]:
    """What a stage takes anyway, said."""
    stage = world.draw.choice(world.tables["stages"])
    listed = "rewards" in world.tables.get(stage, {})  # then it names the reward model
    for role, source in inputs(world.tables)[stage].items():
        if role in kind_of(world.tables, stage).roles and (role != "reward_model" or not listed):
            put(world.tables, (stage, role), source)
    return set()


def say_whose_judgements(world: World) -> set[str]:
    """Which a stage learns from anyway, said."""
    able = [s for s in world.tables["stages"] if "pairs" in kind_of(world.tables, s).extras]
    stage = world.draw.choice(able or [""])
    if stage and "pairs" not in world.tables.get(stage, {}):
        judges = [one for role, one in inputs(world.tables)[stage].items() if "label:" in role]
        put(world.tables, (stage, "pairs"), ["dataset", *judges])
    return set()


def learn_from_others(world: World) -> set[str]:
    """Judgements that a stage learned from, or the dataset's rows, are left out, or others."""
    stages = world.tables["stages"]
    able = [s for s in stages if "pairs" in kind_of(world.tables, s).extras]
    if not able:
        return set()
    stage = world.draw.choice(able)
    before = stages[: stages.index(stage)]
    labels = [one for one in before if kind_of(world.tables, one).makes == "judgements"]
    every = ["dataset", *labels]
    had = [dig(tables, (stage, "pairs")) or every for tables in world.earlier]
    now = world.draw.sample(every, world.draw.randint(1, len(every)))
    if {*now} in map(set, had):
        return set()
    put(world.tables, (stage, "pairs"), now)
    rewards = [s for s in stages if kind_of(world.tables, s).makes == "reward_model"]
    return {stage, *(["judge"] if [stage] == rewards[-1:] else [])}


def people_judge(world: World) -> set[str]:
    """What people say of the answers is other than it was, or the first that they say."""
    had = [state[-1] for state in world.before]
    fresh = [one for one in ("first", "second", "tie", "both_bad", "skip") if one not in had]
    if not fresh:
        return set()
    world.said, stages = world.draw.choice(fresh), world.tables["stages"]
    labels = [one for one in stages if kind_of(world.tables, one).makes == "judgements"]
    return {s for s in labels if world.tables.get(s, {}).get("by", "people") == "people"}


def judge_by_another_rule(world: World) -> set[str]:
    stages = world.tables["stages"]
    found = [s for s in stages if world.tables.get(s, {}).get("by") == "rule"]
    if not found:
        return set()
    stage, file = found[0], next(name for name in world.files if name.endswith("better.py"))
    had = [dig(tables, (stage, "rule")) for tables in world.earlier]
    fresh = [rule for rule in [f"python:./{file}:other", *RULES] if rule not in had]
    if not fresh:
        return set()
    put(world.tables, (stage, "rule"), copy.deepcopy(world.draw.choice(fresh)))
    return {stage}  # and the answers, where it reads other columns: see `World.sampled`


def leave_out_the_evaluation(world: World) -> set[str]:
    """Or put it back, as it last was."""
    there = world.tables["evaluation"] is not False
    world.tables["evaluation"] = False if there else world.asked()
    return set()


def take_another_policy(world: World) -> set[str]:
    stages = world.tables["stages"]
    able = {stage for stage in stages if kind_of(world.tables, stage).makes == "policy"}
    last = [stage for stage in stages if "policy" in kind_of(world.tables, stage).roles][-1]
    now = inputs(world.tables)[last].get("policy")
    before = stages[: stages.index(last)]
    others = [stage for stage in before if stage in able and stage != now]
    if not others:
        return set()
    put(world.tables, (last, "policy"), world.draw.choice(others))
    return {last}


def drop_the_last_stage(world: World) -> set[str]:
    stages = world.tables["stages"]
    dropped = stages[-1]
    if len(stages) < 3 or kind_of(world.tables, dropped).makes == "judgements":
        return set()  # [reward] may name it
    before = inputs(world.tables)
    world.tables["stages"] = stages[:-1]
    if kind_of(world.tables, dropped).explores and world.tables["evaluation"]:
        world.tables["evaluation"].pop("best_of", None)
    world.tables.setdefault(dropped, {})["kind"] = kind_of(world.tables, dropped).name
    now = inputs(world.tables)
    return {name for name in ("evaluation", "judge") if now[name] != before[name]}


def go_back(world: World) -> set[str]:
    """To how it was at any time before: all of that has run."""
    then = copy.deepcopy(world.draw.choice(world.before))
    world.tables, world.files, world.waiting, world.said = then
    return set()


EDITS = [
    write_out, shift_the_batch, only_the_layout_of_the_text, move, move_what_it_reads, touch,
    change_bytes, change_bytes, add_an_unused_table, say_the_roles, leave_out_the_evaluation,
    take_another_policy, drop_the_last_stage, go_back, say_whose_judgements, learn_from_others,
    people_judge, judge_by_another_rule,
]  # fmt: skip


# What may judge instead of a function.
RULES: list[Any] = [
    {"rule": "words", "at_most": 20},
    {"rule": "number", "column": "answer"},
    {"rule": "equals", "column": "solution"},
]

# Keys that may have no other value: of a file, of a stage's own dataset, beside others' values.
ONE_VALUE = set("name data_dir data_files test_split test_fraction validation_fraction".split())
ONE_VALUE |= {"judge_fraction", "quantization", "best_of", "trust_remote_code", "choose"}
ONE_VALUE |= {"by"}  # others need or refuse `rule` and `model`
ONE_VALUE |= {"num_generations"}  # others do not divide a batch of 2

# ---- the cases ----------------------------------------------------------------------------------


def dealt(case: int) -> tuple[dict[str, Any], dict[str, str], list[tuple[Key, Field]]]:
    """A graph, and this case's share of its keys: every key is in one of the cases."""
    tables, whose = copy.deepcopy(GRAPHS[case % len(GRAPHS)])
    mine = Random(0).sample(list(keys(tables).items()), len(keys(tables)))
    return tables, whose, mine[case // len(GRAPHS) :: CASES // len(GRAPHS)]


@pytest.mark.parametrize("count", [SHORT, pytest.param(CASES, marks=pytest.mark.torture)])
def test_exactly_the_stages_at_and_below_an_edit_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, record_property: Callable
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    wrong = []
    for case in range(count):
        try:
            try_edits(case, tmp_path / str(case))
        except AssertionError as error:
            wrong.append(f"case {case}: {error}")
    record_property("cases", f"{count - len(wrong)} of {count}")
    assert not wrong, "\n\n".join(wrong)


def try_edits(case: int, folder: Path) -> None:
    """Edits in a row, each on what the one before it left; all that has to run again does."""
    draw, (tables, whose, mine) = Random(case), dealt(case)
    world = World(folder / "home", tables, whose, draw, dict.fromkeys(whose, b"{}\n"))
    finish(world.plan())
    world.keep()
    steps: list[Any] = [*mine, *draw.choices(EDITS, k=4)]
    for step in draw.sample(steps, len(steps)):
        name = step.__name__ if callable(step) else ".".join(map(str, step[0]))
        sampled = world.sampled()
        roots = step(world) if callable(step) else set_key(world, *step)
        if roots is None:
            assert step[0][-1] in ONE_VALUE, f"{name}: no other value is allowed"
            continue
        if step is not go_back:
            now = world.sampled()
            roots = roots | {name for name in now if now[name] != sampled.get(name, now[name])}
        made = world.plan()
        changed = below(world.tables, roots | world.waiting)
        there = {stage.name for stage in made.stages}
        again = {stage.name: stage.reasons for stage in made.stages if not stage.done}
        assert again.keys() == changed & there, f"after {name}: {again}"
        for stage, reasons in again.items():
            own = [why for why in reasons if not why.startswith("input ")]
            assert not own or stage in roots | world.waiting, f"{stage}, after {name}: {reasons}"
            if stage in roots - world.waiting and not callable(step):
                calls = KINDS.get(str(step[0][0]), KINDS["ppo"]).calls
                words = {*map(str, step[0]), "batch_size", *calls}
                said = {word for why in own for word in re.split(r"[ .]", why)}
                assert words & said, f"{stage}, after {name}: {reasons}"
        world.waiting = changed - there
        finish(made)
        world.keep()
