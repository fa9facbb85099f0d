"""Recipes as tables, with the files around them, and the rule: which stages is a key or a file of?

The rule is what docs/design.md and `fields.json` say, said once more for `test_edits.py`.
"""

from __future__ import annotations

import copy
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from rlhf_recipes.feedback.items import ANSWERS, item, write_items
from rlhf_recipes.feedback.store import NAME, Store
from rlhf_recipes.pipeline.plan import Plan, plan_run
from rlhf_recipes.recipe.fields import Field, fields_for, fields_of
from rlhf_recipes.recipe.kinds import KINDS, LORA, Kind
from rlhf_recipes.recipe.load import Recipe, load_recipe
from rlhf_recipes.recipe.tables import EvaluationTable, ModelTable, dataset_keys, top_keys
from rlhf_recipes.store import layout
from rlhf_recipes.store.files import write_json
from tests.helpers.people import say

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
    "stages": ["warmup", "sft", "reward", "dpo", "kto", "ppo"],
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
    "ppo": {"guard": {"max_kl": 9.0}, "rewards": ["reward", {"python": "./data/short.py:f"}]},
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
RULED = {
    "title": "Ruled",
    "stages": ["sft", "sample", "label", "reward", "ppo"],
    "model": {"name": "./model"},
    "dataset": [{"path": "./pairs.jsonl"}],
    "label": {"by": "rule", "rule": "python:./data/better.py:score"},
    "reward": {"pairs": ["label"]},
    "evaluation": {"judge": "independent", "best_of": 2},
}
JUDGED = {
    "title": "Judged",
    "stages": "warmup sft sample label versus ai served reward dpo rloo grpo".split(),
    "model": {"name": "./model"},
    "dataset": [{"path": "./pairs.jsonl"}],
    "warmup": {"kind": "sft", "dataset": {"path": "./demos.jsonl"}},
    "label": {"guideline": "./guideline.md"},
    "versus": {"kind": "sample", "against": "warmup", "temperature": 0.9},
    "ai": {
        "kind": "label",
        "by": "model",
        "model": "./judging",
        "principles": "./data/principles.md",
        "answers": "sample",
    },
    "served": {"kind": "label", "by": "model", "model": "big", "url": "http://127.0.0.1:1/v1"},
    "dpo": {"pairs": ["ai", "served"]},
    "evaluation": {"judge": "independent", "best_of": 2},
}
HEAD = {"format": 1, "title": "T", "recipe": "t.toml", "outcome": "finished", "ended": ""}
MODEL = {"model/config.json": ALL, "model/model.safetensors": ALL, "model/README.md": ""}
GRAPHS = [
    (CHAIN, {**MODEL, "pairs.jsonl": ALL, "rule.py": "evaluation best_of"}),
    (
        RICH,
        {
            **MODEL,
            "data/train.jsonl": "sft reward dpo kto ppo judge evaluation best_of",
            "data/test.jsonl": ALL,  # no stage may train on its prompts
            "data/demos.jsonl": "warmup",
            "data/feedback.jsonl": "",
            "data/rule.py": "evaluation best_of",
            "data/short.py": "ppo evaluation best_of",
            "more.jsonl": "sft reward dpo kto ppo judge evaluation best_of",
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
    (RULED, {**MODEL, "pairs.jsonl": ALL, "data/better.py": "label"}),
    (
        JUDGED,
        {
            **MODEL,
            "pairs.jsonl": "sft sample label versus ai served reward dpo rloo grpo"
            " judge evaluation best_of",
            "demos.jsonl": "warmup",
            "guideline.md": "",
            "data/principles.md": "ai",
            "judging/config.json": "ai",
            "judging/model.safetensors": "ai",
        },
    ),
]
assert {kind.name for kind in KINDS.values() if kind.listed} == {
    KINDS[tables.get(stage, {}).get("kind", stage)].name
    for tables, _ in GRAPHS
    for stage in tables["stages"]
}
# What is sampled, wherever it is: people judge it.
SAMPLED = item([{"role": "user", "content": "One?"}], ["One.", "Two."])
# What one key cannot be without.
NEEDS = {
    **{(kind, "eval_strategy"): {"keep": "last"} for kind in ("ppo", "rloo", "grpo")},
    ("lora", "layers_pattern"): {"layers_to_transform": [0], "target_modules": ["q_proj"]},
    ("lora", "layers_to_transform"): {"target_modules": ["q_proj"]},
    **{
        (kind, f"dataloader_{what}"): {"dataloader_num_workers": 1}
        for kind in KINDS
        for what in ("prefetch_factor", "persistent_workers")
    },
}
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
Key = tuple[str | int, ...]


# ---- the rule -----------------------------------------------------------------------------------


def kind_of(tables: dict[str, Any], stage: str) -> Kind:
    table = tables.get(stage)
    return KINDS[table.get("kind", stage) if isinstance(table, dict) else stage]


def asked_for(tables: dict[str, Any]) -> list[Kind]:
    """The kinds of the stages that no recipe lists."""
    return [kind for kind in KINDS.values() if not kind.listed]


def explorer(tables: dict[str, Any]) -> str | None:
    """The last stage that trains a policy on its own answers."""
    stages = tables["stages"]
    return next((s for s in reversed(stages) if kind_of(tables, s).explores), None)


def inputs(tables: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What each stage takes from which, by role: as it says, else from the latest before it."""
    taken: dict[str, dict[str, str]] = {}
    made: dict[str, list[str]] = {kind.makes: [] for kind in KINDS.values()}
    policies, rewards = made["policy"], made["reward_model"]
    scorer = None
    for stage in tables["stages"]:
        kind, table = kind_of(tables, stage), tables.get(stage, {})
        latest = {"policy": policies[-1:], "reward_model": rewards[-1:]}
        latest["answers"] = made["answers"][-1:]  # the other roles are as the table says
        asked = {role for role in kind.roles if wanted(kind, table, role)}
        roles = {role: table.get(role, next(iter(latest.get(role, [])), None)) for role in asked}
        scorer = roles.get("reward_model", scorer)
        taken[stage] = {role: one for role, one in roles.items() if one}
        taken[stage] |= judged(kind, table, made["judgements"])
        made[kind.makes].append(stage)
    scorer = scorer or (rewards[0] if rewards else None)
    own = "judge" if "independent" in str(tables["evaluation"]) else ""
    last = explorer(tables)
    for kind in asked_for(tables):
        if kind.makes != "numbers":
            table = tables.get(rewards[-1] if rewards else "reward", {})
            taken[kind.name] = judged(kind, table, made["judgements"])
            continue
        start = {"policy": taken[last].get("policy", "") if last else ""}
        asked = start if kind.borrows else {policy: policy for policy in policies}
        taken[kind.name] = asked | {"scorer": scorer or "", "judge": own}
    return taken


def wanted(kind: Kind, table: dict[str, Any], role: str) -> bool:
    """Whether something is to serve a role: some have one only where a key says so."""
    key, value = kind.wants.get(role, ("", ""))
    return not key or table.get(key) == value


def judged(kind: Kind, table: dict[str, Any], before: list[str]) -> dict[str, str]:
    """The stages whose judgements one learns from, by role."""
    learns = kind.learns_from in ("pairs", "labels", "feedback", "judge_feedback")
    found = [one for one in before if learns and one in table.get("pairs", before)]
    return {f"label:{one}": one for one in found}


def below(tables: dict[str, Any], roots: set[str]) -> set[str]:
    """The stages at `roots`, and those that take anything from them, however far down."""
    for stage, roles in inputs(tables).items():  # inputs come before who takes them
        if set(roles.values()) & roots:
            roots = roots | {stage}
    return roots


def owners(tables: dict[str, Any], path: Key, field: Field) -> set[str]:
    """The stages whose result a key determines."""
    stages, head, key = tables["stages"], path[0], path[min(2, len(path) - 1)]
    kinds = {stage: kind_of(tables, stage) for stage in stages}
    kinds |= {kind.name: kind for kind in asked_for(tables)}
    everyone = {*kinds}
    counts = field.effect == "result" or key in BATCH  # of a batch its size counts
    if not counts or key in kinds.get(head, KINDS["sft"]).borrows:
        return set()  # what is borrowed: see `World.sampled`
    if head in ("seed", "model", "lora"):
        return everyone
    if head == "evaluation":
        return {stage for stage, kind in kinds.items() if path[1] in kind.reads}
    if head not in ("dataset", *kinds):
        # A stage that was dropped; the judge has what [reward] says where no stage uses it.
        left = head == "reward" and not any(kinds[s].makes == "reward_model" for s in stages)
        return {str(head), *(["judge"] if left else [])}
    if head != "dataset":
        # What [evaluation] asks for and trains has the settings of the last stage of its config.
        config = kinds[str(head)].config
        alike = [s for s in stages if config and kinds[s].config == config]
        also = {
            name
            for name, kind in kinds.items()
            if name not in stages and kind.config == config and [head] == alike[-1:]
        }
        return {str(head)} | also
    table = tables["dataset"][path[1]]
    own = {stage for stage in stages if "dataset" in tables.get(stage, {})}
    if field.learners:
        return {stage for stage, kind in kinds.items() if kind.learns_from in field.learners}
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
    said: str = ""  # what people say of SAMPLED; nothing: there is no store
    before: list[Any] = field(default_factory=list)

    @property
    def recipe(self) -> Path:
        return self.home / "a recipe.toml"

    @property
    def runs(self) -> Path:
        return self.home.parent / "runs"

    def keep(self) -> None:
        self.before.append(copy.deepcopy((self.tables, self.files, self.waiting, self.said)))

    @property
    def earlier(self) -> list[dict[str, Any]]:
        """The tables that have run."""
        return [before[0] for before in self.before]

    def asked(self) -> dict[str, Any]:
        """[evaluation], or what it was before it was left out; best_of where there is a PPO."""
        tables = [self.tables, *(before[0] for before in reversed(self.before))]
        asked = next(one["evaluation"] for one in tables if one["evaluation"] is not False)
        return {k: value for k, value in asked.items() if explorer(self.tables) or k != "best_of"}

    def sampled(self) -> dict[str, Any]:
        """By stage that samples and does not train: how it asks, and what decides that."""
        last, asked, rows = explorer(self.tables), self.asked(), self.tables["dataset"][0]
        said = effective(self.load())
        trained = said[last] if last else {}
        calls = kind_of(self.tables, last).calls if last else {}
        lent = {k: trained.get(calls.get(k, k)) for k in ("temperature", "response_length")}
        usual = {"temperature": 0.7, "response_length": rows.get("max_answer_tokens", 512)}
        words = {k: asked.get(k) or lent[k] or usual[k] for k in usual}
        best = [trained.get(key) for key in KINDS["best_of"].borrows]
        found = {"evaluation": words}
        found["best_of"] = words, inputs(self.tables)["best_of"]["policy"], best
        taken = inputs(self.tables)
        for stage in self.tables["stages"]:
            if kind_of(self.tables, stage).makes == "answers":
                judges = [one for one, roles in taken.items() if roles.get("answers") == stage]
                columns = [dig(self.tables, (one, "rule", "column")) for one in judges]
                found[stage] = {k: said[stage].get(k) or lent[k] for k in lent}, columns
        return found

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
        if not self.said:
            for file in self.runs.glob(f"{NAME}*"):
                file.unlink()
        elif [one.verdict for one in Store(self.runs).judged([SAMPLED.id])] != [self.said]:
            say(Store(self.runs), SAMPLED, "ada", self.said)
        made = plan_run(self.load(), self.runs, name="run")
        assert self.said or not (self.runs / NAME).exists()  # a plan makes no store
        return made


def finish(made: Plan) -> None:
    """What a run would leave: the records of its stages, and the manifest that names them."""
    for place in range(len(made.stages)):
        if KINDS[made.stages[place].kind].makes == "judgements":  # as a run does
            made = plan_run(made.recipe, made.runs, name="run")
        stage = made.stages[place]
        if not stage.done:
            record = {"name": stage.name, "key": stage.key, "payload": stage.payload}
            stage.folder.mkdir(parents=True, exist_ok=True)
            if KINDS[stage.kind].makes == "answers":
                write_items(stage.folder / "output" / ANSWERS, [SAMPLED])
            layout.write_record(stage.folder, record)
    entries = [{"name": s.name, "folder": f".stages/{s.folder.name}"} for s in made.stages]
    write_json(made.run_folder / "manifest.json", HEAD | {"stages": entries})


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


# ---- keys ----------------------------------------------------------------------------------------


def keys(tables: dict[str, Any]) -> dict[Key, Field]:
    """Every key of a recipe that has a value: all of fields.json that is passed on, and ours."""
    groups: dict[Key, Any] = {
        (): {key: top_keys()[key] for key in ("title", "seed")},
        ("model",): {k: f for k, f in fields_of(ModelTable).items() if k != "name"},
        ("evaluation",): fields_of(EvaluationTable),
        **{("dataset", place): dataset_keys() for place in range(len(tables["dataset"]))},
    }
    if tables.get("lora") is not False:
        groups[("lora",)] = fields_for(LORA)
    for stage in tables["stages"]:
        kind = kind_of(tables, stage)
        groups[(stage,)] = {**fields_for(kind.config), **kind.extras}
        if "dataset" in tables.get(stage, {}):
            groups[(stage, "dataset")] = dataset_keys()
    found = {}
    for at, fields in groups.items():
        for name, one in fields.items():
            inner = one.items() if not isinstance(one, Field) else ()
            found |= {(*at, name, deeper): last for deeper, last in inner}
            # What names something is not drawn, nor a file that does not count, nor what makes a
            # server's name of a folder's.
            named = not inner and (one.effect == "source" or name in ("guideline", "url"))
            if not inner and one.standing == "passed" and not named:
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
