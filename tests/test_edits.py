"""Random edits of recipes, data and models: exactly the stages at and below an edit run again.

What is expected comes from the edit alone: which stages a key or a file is of, as the README and
`fields.json` have it, and which stages take their input from those. Nothing here trains.
"""

from __future__ import annotations

import copy
import json
import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest

from rlhf_recipes import rundir
from rlhf_recipes.errors import RecipeError
from rlhf_recipes.fields import Field, fields_of, trl_fields
from rlhf_recipes.plan import Plan, make_plan
from rlhf_recipes.recipe import Recipe, load_recipe
from rlhf_recipes.tables import EXTRAS, EvaluationTable, ModelTable, dataset_keys

CASES, SHORT = 200, 25
ALL = "every stage"

# Recipes as tables, the bytes of the files around them, and whose each file is.
CHAIN = {
    "title": "Chain",
    "stages": ["sft", "reward", "ppo"],
    "model": {"name": "./model"},
    "dataset": [{"path": "./pairs.jsonl"}],
    "ppo": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    "evaluation": {"judge": ["independent", "python:./rule.py:score"], "best_of": 4},
}
RICH = {
    "title": "Rich",
    "stages": ["warmup", "sft", "reward", "dpo", "ppo"],
    "model": {"name": "./model"},
    "dataset": [
        {
            "path": "./data",
            "data_files": {"train": "train.jsonl", "test": "test.jsonl"},
            "test_split": "test",
        },
        {"path": "./more.jsonl", "weight": 0.5},
    ],
    "warmup": {"kind": "sft", "dataset": {"path": "./data/demos.jsonl"}},
    "dpo": {"policy": "sft", "reference": "warmup"},
    "ppo": {"guard": {"max_kl": 9.0}},
    "evaluation": {"judge": ["python:./data/rule.py:score", "independent"], "best_of": 2},
}
FOREIGN = {
    "title": "Foreign",
    "stages": ["sft", "ppo"],
    "model": {"name": "./model"},
    "dataset": [{"path": "./pairs"}],
    "sft": {"dataset": {"path": "./demos.jsonl"}},
    "ppo": {"reward_model": "./scorer"},
    "evaluation": {"judge": "./judge", "best_of": 2},
}
WHOLE = {
    "title": "Whole",
    "stages": ["sft", "dpo"],
    "lora": False,
    "model": {"name": "./model"},
    "dataset": [{"path": "./pairs.jsonl"}],
    "evaluation": {},
}
MODEL = {"model/config.json": ALL, "model/model.safetensors": ALL, "model/README.md": ""}
GRAPHS = [
    (CHAIN, {**MODEL, "pairs.jsonl": ALL, "rule.py": "evaluation best_of"}),
    (
        RICH,
        {
            **MODEL,
            "data/train.jsonl": "sft reward dpo ppo judge evaluation best_of",
            "data/test.jsonl": ALL,  # no stage may train on its prompts
            "data/demos.jsonl": "warmup",
            "data/feedback.jsonl": "",
            "data/rule.py": "evaluation best_of",
            "more.jsonl": "sft reward dpo ppo judge evaluation best_of",
        },
    ),
    (
        FOREIGN,
        {
            **MODEL,
            "pairs/a.jsonl": "ppo evaluation best_of",
            "pairs/b.jsonl": "ppo evaluation best_of",
            "pairs/make.py": "",
            "demos.jsonl": "sft",
            "scorer/config.json": "ppo evaluation best_of",
            "scorer/model.safetensors": "ppo evaluation best_of",
            "judge/config.json": "evaluation best_of",
            "judge/model.safetensors": "evaluation best_of",
        },
    ),
    (WHOLE, {**MODEL, "pairs.jsonl": ALL}),
]
# What one key cannot be without.
NEEDS = {
    ("ppo", "eval_strategy"): {"keep": "last"},
    ("lora", "layers_pattern"): {"layers_to_transform": [0], "target_modules": ["q_proj"]},
    ("lora", "layers_to_transform"): {"target_modules": ["q_proj"]},
}
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
Key = tuple[str | int, ...]


# ---- the rule -----------------------------------------------------------------------------------


def kind_of(tables: dict[str, Any], stage: str) -> str:
    table = tables.get(stage)
    return table.get("kind", stage) if isinstance(table, dict) else stage


def inputs(tables: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What each stage takes from which, by role: as it says, else from the latest before it."""
    taken: dict[str, dict[str, str]] = {}
    policies, rewards, scorer = [], [], None
    for stage in tables["stages"]:
        kind, table = kind_of(tables, stage), tables.get(stage, {})
        roles = {"policy": table.get("policy", policies[-1] if policies else None)}
        roles["reference"] = table.get("reference")
        if kind == "ppo":
            scorer = table.get("reward_model", rewards[-1] if rewards else None)
            roles["reward_model"] = scorer
        taken[stage] = {role: one for role, one in roles.items() if one}
        (rewards if kind == "reward" else policies).append(stage)
    scorer = scorer or (rewards[0] if rewards else None)
    asked = str(tables["evaluation"])
    judges = {"scorer": scorer or "", "judge": "judge" if "independent" in asked else ""}
    taken["judge"] = {}
    taken["evaluation"] = {policy: policy for policy in policies} | judges
    ppo = [stage for stage in tables["stages"] if kind_of(tables, stage) == "ppo"]
    taken["best_of"] = judges | {"policy": taken[ppo[-1]].get("policy", "") if ppo else ""}
    return taken


def below(tables: dict[str, Any], roots: set[str]) -> set[str]:
    """The stages at `roots`, and those that take anything from them, however far down."""
    for stage, roles in inputs(tables).items():  # inputs come before who takes them
        if set(roles.values()) & roots:
            roots = roots | {stage}
    return roots


def owners(tables: dict[str, Any], path: Key, effect: str) -> set[str]:
    """The stages whose result a key determines."""
    stages, head, key = tables["stages"], path[0], path[min(2, len(path) - 1)]
    everyone = {*stages, "judge", "evaluation", "best_of"}
    kinds = {stage: kind_of(tables, stage) for stage in stages} | {"judge": "reward"}
    if head == "title":
        return set()
    if head in ("seed", "model", "lora"):
        return everyone
    if path == ("evaluation", "best_of"):
        return {"best_of"}
    if path == ("evaluation", "prompts"):
        return {"evaluation", "best_of"}
    if head != "dataset":
        alone = effect == "identity" or key in BATCH  # of a batch its size counts
        also = {"judge"} if kinds.get(str(head)) == "reward" else set()
        return {str(head)} | also if alone else set()
    table = tables["dataset"][path[1]]
    own = {stage for stage in stages if "dataset" in tables.get(stage, {})}
    if key == "judge_fraction":
        return {stage for stage, kind in kinds.items() if kind in ("reward", "dpo")}
    if key in ("validation_fraction", "test_fraction"):
        return everyone
    found = everyone - own
    if path[1] == 0 and key in ("max_prompt_tokens", "max_answer_tokens", "system"):
        found |= {stage for stage in own if key not in tables[stage]["dataset"]}
    tested = "test_split" in table and key not in ("max_rows", "split")
    return found | own if tested or key == "test_split" else found


# ---- a recipe and what lies around it ------------------------------------------------------------


@dataclass
class World:
    """Tables and files as they are meant to be: edits change them, and `plan` writes them down."""

    home: Path
    tables: dict[str, Any]
    whose: dict[str, str]  # of a file: ALL, or the stages that it determines
    draw: Random
    files: dict[str, bytes] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)  # changed while they were not in the recipe
    before: list[Any] = field(default_factory=list)

    @property
    def recipe(self) -> Path:
        return self.home / "a recipe.toml"

    @property
    def runs(self) -> Path:
        return self.home.parent / "runs"

    def keep(self) -> None:
        self.before.append(copy.deepcopy((self.tables, self.files, self.waiting)))

    def asked(self) -> dict[str, Any]:
        """[evaluation], or what it was before it was left out; best_of where there is a PPO."""
        tables = [self.tables, *(before[0] for before in reversed(self.before))]
        asked = next(one["evaluation"] for one in tables if one["evaluation"] is not False)
        ppo = any(kind_of(self.tables, stage) == "ppo" for stage in self.tables["stages"])
        return {key: value for key, value in asked.items() if ppo or key != "best_of"}

    def sampled(self) -> tuple[Any, ...]:
        """From what, how long and at which temperature the best of several is sampled."""
        ppo = [s for s in self.tables["stages"] if kind_of(self.tables, s) == "ppo"][-1:]
        trained = effective(self.load())[ppo[0]] if ppo else {}
        words = {key: trained.get(key) for key in ("response_length", "temperature")} | self.asked()
        policy = inputs(self.tables)["best_of"]["policy"]
        return policy, words["response_length"], words["temperature"]

    def load(self) -> Recipe:
        text = written(self.tables, self.draw)
        read = tomllib.loads(text)
        read["dataset"] = (
            read["dataset"] if isinstance(read["dataset"], list) else [read["dataset"]]
        )
        assert read == self.tables
        for name, content in self.files.items():
            file = self.home / name
            if not file.exists() or file.read_bytes() != content:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
        self.recipe.write_text(text)
        return load_recipe(self.recipe)

    def plan(self) -> Plan:
        return make_plan(self.load(), self.runs, name="run")


def finish(made: Plan) -> None:
    """What a run would leave: the records of its stages, and the manifest that names them."""
    for stage in made.stages:
        if not stage.done:
            record = {"name": stage.name, "key": stage.key, "payload": stage.payload}
            stage.folder.mkdir(parents=True, exist_ok=True)
            rundir.write_record(stage.folder, record)
    entries = [{"name": s.name, "folder": f".stages/{s.folder.name}"} for s in made.stages]
    rundir.write_json(made.run_folder / "manifest.json", {"stages": entries})


def written(tables: dict[str, Any], draw: Random) -> str:
    """A recipe's text in any order and layout, with comments anywhere."""

    def shuffled(table: dict[str, Any]) -> list[tuple[str, Any]]:
        return draw.sample(list(table.items()), len(table))

    def remark() -> str:
        return draw.choice(["", "", "", "# seed = 7", "\n\n", "  # [ppo]\n"])

    def line(key: str, value: Any) -> str:
        if isinstance(value, dict) and value and draw.random() < 0.3:
            return "".join(line(f"{key}.{inner}", one) for inner, one in shuffled(value))
        equals = draw.choice(["=", " = ", "   =  "])
        return f"{draw.choice(['', '  '])}{key}{equals}{toml(value)} {remark()}\n"

    def toml(value: Any) -> str:
        if isinstance(value, dict):
            return f"{{ {', '.join(f'{key} = {toml(one)}' for key, one in shuffled(value))} }}"
        if isinstance(value, list):
            return f"[{draw.choice(['', ' '])}{', '.join(map(toml, value))}]"
        return json.dumps(value)

    top, blocks = [], []
    for key, value in shuffled(tables):
        many = key == "dataset" and (len(value) > 1 or draw.random() < 0.3)
        tablelike = isinstance(value, dict) or key == "dataset"
        if not tablelike:
            top.append(line(key, value))
            continue
        block = ""
        for table in value if key == "dataset" else [value]:
            block += f"{remark()}\n{f'[[{key}]]' if many else f'[{key}]'}\n"
            last = ""  # a table of its own inside this one ends it
            for inner, one in shuffled(table):
                if isinstance(one, dict) and not last and not many and draw.random() < 0.3:
                    last = f"[{key}.{inner}]\n" + "".join(line(k, v) for k, v in shuffled(one))
                else:
                    block += line(inner, one)
            block += last
        blocks.append(block)
    return "".join([*top, *blocks])


# ---- edits: each changes the world, and gives the stages whose own result that changes -----------

PLACES = {"path", "revision", "judge", "kind", "policy", "reward_model", "reference"}
VALUES = {
    "bool": [True, False],
    "int": [0, 1, 2, 3, 5, 16, 64, 100],
    "float": [0.0, 0.05, 0.1, 0.25, 0.5, 0.9, 1.5, 2.0, 7],
    "str": ["q_proj", "train[:50%]", "default"],
    "dict": [{"one": 1}, {"one": 1, "two": 0.5}],
    "list[str]": [["q_proj"], ["v_proj", "k_proj"]],
    "list[int]": [[0], [0, 1]],
    "list[float]": [[1.0], [0.5, 0.5]],
}


def keys(tables: dict[str, Any]) -> dict[Key, Field]:
    """Every key of a recipe that has a value: all of fields.json that is passed on, and ours."""
    groups: dict[Key, Any] = {
        (): {"title": Field(("str",)), "seed": Field(("int",), range="at least 0")},
        ("model",): {k: f for k, f in fields_of(ModelTable).items() if k != "name"},
        ("evaluation",): fields_of(EvaluationTable),
        **{("dataset", place): dataset_keys() for place in range(len(tables["dataset"]))},
    }
    if tables.get("lora") is not False:
        groups[("lora",)] = trl_fields()["lora"]
    for stage in tables["stages"]:
        kind = kind_of(tables, stage)
        groups[(stage,)] = {**trl_fields()[kind], **EXTRAS[kind]}
        if "dataset" in tables.get(stage, {}):
            groups[(stage, "dataset")] = dataset_keys()
    found = {}
    for at, fields in groups.items():
        for name, one in fields.items():
            inner = one.items() if not isinstance(one, Field) else ()
            found |= {(*at, name, deeper): last for deeper, last in inner}
            if not inner and one.standing == "passed" and name not in PLACES:
                found[(*at, name)] = one
    return found


def dig(tables: Any, key: Key) -> Any:
    """The value at a key; None where there is none."""
    for part in key:
        there = part < len(tables) if isinstance(tables, list) else part in (tables or ())
        tables = tables[part] if there else None
    return tables


def put(tables: Any, key: Key, value: Any) -> None:
    for part in key[:-1]:
        tables = tables[part] if isinstance(part, int) else tables.setdefault(part, {})
    tables[key[-1]] = value


def effective(recipe: Recipe) -> dict[str, Any]:
    """Every key with its value, written or not."""
    resolved = recipe.resolved()
    many = isinstance(resolved["dataset"], list)
    return resolved | {"dataset": resolved["dataset"] if many else [resolved["dataset"]]}


def set_key(world: World, key: Key, one: Field) -> set[str] | None:
    """Give a key another value that is allowed; None where there is none."""
    if world.tables.get(key[0]) is False:
        return set()  # the evaluation, left out
    now, before = dig(effective(world.load()), key), copy.deepcopy(world.tables)
    values = [one for kind in one.types for one in VALUES[kind]]
    if one.choices:
        values = [[c] if one.types == ["list[str]"] else c for c in one.choices]
    kind = "lora" if key[0] == "lora" else kind_of(before, str(key[0]))
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
        return owners(before, key, one.effect)
    return None


def write_out(world: World) -> set[str]:
    """What a key is anyway."""
    values, drawn = effective(world.load()), list(keys(world.tables))
    key = world.draw.choice([key for key in drawn if dig(values, key) is not None])
    put(world.tables, key, dig(values, key))
    return set()


def shift_the_batch(world: World) -> set[str]:
    stage = world.draw.choice(world.tables["stages"])
    options = effective(world.load())[stage]
    size = options[BATCH[0]] * options[BATCH[1]]
    rows = world.draw.choice([n for n in range(1, size + 1) if size % n == 0])
    world.tables.setdefault(stage, {}).update(zip(BATCH, (rows, size // rows), strict=True))
    return set()


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
    name = world.draw.choice(list(world.files))
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
    for role, source in inputs(world.tables)[stage].items():
        put(world.tables, (stage, role), source)
    return set()


def leave_out_the_evaluation(world: World) -> set[str]:
    there = world.tables["evaluation"]
    world.tables["evaluation"] = False if there is not False else world.asked()
    return set()


def take_another_policy(world: World) -> set[str]:
    stages = world.tables["stages"]
    able = {stage for stage in stages if kind_of(world.tables, stage) != "reward"}
    *_, last = stages
    now = inputs(world.tables)[last].get("policy")
    others = [stage for stage in stages[:-1] if stage in able and stage != now]
    if not others:
        return set()
    put(world.tables, (last, "policy"), world.draw.choice(others))
    return {last}


def drop_the_last_stage(world: World) -> set[str]:
    stages = world.tables["stages"]
    if len(stages) < 3:
        return set()
    dropped = stages[-1]
    before = inputs(world.tables)["evaluation"]
    world.tables["stages"] = stages[:-1]
    if kind_of(world.tables, dropped) == "ppo" and world.tables["evaluation"]:
        world.tables["evaluation"].pop("best_of", None)
    world.tables.setdefault(dropped, {})["kind"] = kind_of(world.tables, dropped)
    return {"evaluation"} if inputs(world.tables)["evaluation"] != before else set()


def go_back(world: World) -> set[str]:
    """To how it was at any time before: all of that has run."""
    then = copy.deepcopy(world.draw.choice(world.before))
    world.tables, world.files, world.waiting = then
    return set()


EDITS = [
    write_out, shift_the_batch, only_the_layout_of_the_text, move, move_what_it_reads, touch,
    change_bytes, change_bytes, add_an_unused_table, say_the_roles, leave_out_the_evaluation,
    take_another_policy, drop_the_last_stage, go_back,
]  # fmt: skip


# Keys that may have no other value: of a file, of a stage's own dataset, beside others' values.
ONE_VALUE = set("name data_dir data_files test_split test_fraction validation_fraction".split())
ONE_VALUE |= {"judge_fraction", "quantization", "best_of"}

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
        if world.sampled() != sampled and step is not go_back:
            roots = roots | {"best_of"}
        made = world.plan()
        changed = below(world.tables, roots | world.waiting)
        there = {stage.name for stage in made.stages}
        again = {stage.name: stage.reasons for stage in made.stages if not stage.done}
        assert again.keys() == changed & there, f"after {name}: {again}"
        for stage, reasons in again.items():
            own = [why for why in reasons if not why.startswith("input ")]
            assert not own or stage in roots | world.waiting, f"{stage}, after {name}: {reasons}"
            if stage in roots - world.waiting and not callable(step):
                words = {*map(str, step[0]), "batch_size"}
                said = {word for why in own for word in re.split(r"[ .]", why)}
                assert words & said, f"{stage}, after {name}: {reasons}"
        world.waiting = changed - there
        finish(made)
        world.keep()
