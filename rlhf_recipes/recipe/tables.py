"""The recipe's own tables, and the map of every key that a recipe may hold."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rlhf_recipes.recipe.fields import Field, Keys, fields_for, fields_of
from rlhf_recipes.recipe.kinds import BITSANDBYTES, JUDGE, LORA, ROLES, Kind, kind_of, listed
from rlhf_recipes.recipe.rewards import Term, python_judge, term, terms

INDEPENDENT = "independent"  # the judge that the stage `judge` trains
VLLM = "vllm"  # a server samples every policy; $RLHF_RECIPES_VLLM names it, no recipe does
BASE = "base"  # what the evaluation calls the model that nothing was trained on
DATA_FILE = re.compile(r"\.(jsonl|ndjson|json|csv|tsv|parquet)(\.(gz|zst|bz2))?$", re.IGNORECASE)
FORMS = {"jsonl": "json", "ndjson": "json", "tsv": "csv"}
# What is read of a row, and may be called otherwise in a file.
COLUMNS = (
    "prompt chosen rejected completion messages conversations response_a response_b winner"
    " responses scores ranks system label margin score_chosen score_rejected"
)


def form_of(path: str | Path) -> str:
    """What a file of rows is by its name: json, csv or parquet; empty for another name."""
    found = DATA_FILE.search(str(path))
    return FORMS.get(found[1].lower(), found[1].lower()) if found else ""


def is_path(text: str) -> bool:
    """Whether a name is a local path rather than a hub id."""
    return text in (".", "..") or text.startswith(("./", "../", "/", "~"))


def located(name: str, base: Path) -> Path:
    """The file or folder that a local path names, where relative ones start from `base`."""
    # Path's own raises for an unknown ~user, and for links that go in a circle.
    return Path(os.path.realpath(base / os.path.expanduser(name)))


def move_terms(held: Any, key: str | int, moved: Callable[[str], str]) -> None:
    """Move the local paths of the rewards or judges in `held[key]`, one or a list of them."""
    found = held[key]
    if isinstance(found, list):
        for place in range(len(found)):
            move_terms(found, place, moved)
    elif isinstance(found, dict):
        if "python" in found:
            found["python"] = move_function(found["python"], moved)
        if is_path(found.get("model", "")):
            found["model"] = moved(found["model"])
    elif python_judge(found):
        held[key] = f"python:{move_function(found.removeprefix('python:'), moved)}"
    elif is_path(found):
        held[key] = moved(found)


def move_function(text: str, moved: Callable[[str], str]) -> str:
    """FILE.py:FUNCTION with its file moved."""
    file, _, function = text.rpartition(":")
    return f"{moved(file)}:{function}"


def _base() -> Any:
    """The recipe's folder, which relative paths start from; it is not a key of the recipe."""
    return field(default=Path("."), repr=False, compare=False, metadata={"key": False})


def _key(
    default: Any = MISSING, *, effect: str = "result", hash: bool | None = None, **about: Any
) -> Any:
    """A key of a table; `about` is its range, its choices, or whose result it determines."""
    return field(default=default, hash=hash, metadata={"effect": effect, **about})


@dataclass(frozen=True)
class MirrorTable:
    """A model outside the hub: a file in GGUF, inside a wheel on PyPI."""

    wheel: str = _key(effect="source")  # with its version: "name==1.2"
    file: str = _key(effect="source")  # its place in the wheel
    sha256: str = _key(effect="source")  # the file's


@dataclass(frozen=True)
class ModelTable:
    name: str = _key(effect="source")
    revision: str | None = _key(None, effect="source")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _key("auto")
    quantization: Literal["none", "8bit", "4bit"] = _key("none")
    # A base model may bring a template whose end of turn it was never trained to write.
    chat_template: Literal["own", "plain"] = _key("own")
    # Of a policy that learns; auto: merged on a card where the memory rule has room for the copy.
    # VLLM, of every policy, is in the fingerprints of the stages that sample.
    sampler: Literal["auto", "adapters", "merged", "vllm"] = _key("auto", effect="layout")
    # Runs code that comes with the model; with a revision of 40 hex digits alone.
    trust_remote_code: bool = _key(False)
    mirror: MirrorTable | None = field(default=None, metadata={"key": False})
    base: Path = _base()

    @property
    def is_local(self) -> bool:
        return is_path(self.name)

    @property
    def folder(self) -> Path:
        return located(self.name, self.base)


@dataclass(frozen=True)
class DatasetTable:
    """Lengths are in tokens, fractions of prompts (`judge_fraction`: of training pairs).

    Of several [[dataset]] tables, the first holds the others, and the rows of all are put together.
    `weight` is the share of its prompts, by digest, that a dataset gives of each side; None: all.
    """

    path: str = _key(effect="source")
    name: str | None = _key(None)
    data_dir: str | None = _key(None)
    data_files: str | list[str] | dict[str, Any] | None = _key(None, hash=False)
    split: str | None = _key(None)
    revision: str | None = _key(None, effect="source")
    max_prompt_tokens: int = _key(512, range="at least 1")
    max_answer_tokens: int = _key(512, range="at least 1")
    max_rows: int | None = _key(None, range="at least 1")
    dedup: bool = _key(False)  # of rows with the same prompt and answers, the first alone
    validation_fraction: float = _key(0.05, range="at least 0 and below 1")
    test_fraction: float = _key(0.1, range="at least 0 and below 1")
    test_split: str | None = _key(None)
    judge_fraction: float = _key(
        0.25,
        range="at least 0 and below 1",
        learners=("answers", "pairs", "labels", "feedback", "judge_feedback"),
    )
    system: str | None = _key(None)
    weight: float | None = _key(None, range="above 0, at most 1")
    # What the file calls COLUMNS otherwise: ours = theirs.
    columns: dict[str, str] | None = field(default=None, hash=False, metadata={"key": False})
    judged: bool = field(default=False, metadata={"key": False})  # rows of a `label` stage
    more: tuple[DatasetTable, ...] = field(default=(), metadata={"key": False})
    base: Path = _base()

    @property
    def is_local(self) -> bool:
        return is_path(self.path) or bool(form_of(self.path))

    @property
    def file(self) -> Path:
        """The file, or the folder."""
        return located(self.path, self.base)

    @property
    def test_part(self) -> DatasetTable:
        """What determines the prompts of the table's test split, and nothing else."""
        files = self.data_files
        if isinstance(files, dict) and self.test_split in files:
            files = {self.test_split: files[self.test_split]}
        idle: dict[str, Any] = dict.fromkeys(SHARED_DATA_KEYS, 0.0)
        return replace(self, data_files=files, split=None, max_rows=None, more=(), **idle)


@dataclass(frozen=True)
class EvaluationTable:
    """None: as the last PPO stage has it."""

    prompts: int = _key(128, range="at least 1")
    response_length: int | None = _key(None, range="at least 1")
    temperature: float | None = _key(None, range="above 0")
    # "independent", a reward model's folder or hub id, "python:FILE.py:FUNCTION", a table with a
    # rule; or two of them
    judge: str | dict[str, Any] | list[str | dict] = _key("none", effect="source", hash=False)
    judge_model: str | None = _key(None, effect="source")  # None: the recipe's own base
    best_of: int | None = _key(None, choices=(2, 4, 8, 16, 32, 64))

    @property
    def judges(self) -> dict[str, Term]:
        """By role, "judge" and "judge2": what judges."""
        listed = self.judge if isinstance(self.judge, list) else [self.judge]
        if listed == ["none"]:
            return {}
        return dict(zip((JUDGE, "judge2"), map(term, listed), strict=False))


@dataclass(frozen=True)
class RoundsTable:
    """Expanded before all else: see `rounds.py`. So what it says is in keys by its effects."""

    count: int = _key(1, effect="neutral", range="at least 1")
    from_: str | None = field(default=None, metadata={"key": False})  # `from` in the recipe
    policy: str = _key("last", effect="neutral", choices=("last", "first"))
    reference: str = _key("first", effect="neutral", choices=("first", "last"))
    pairs: str = _key("all", effect="neutral", choices=("all", "last"))
    prompts: str = _key("new", effect="neutral", choices=("new", "same"))


def written(table: ModelTable | DatasetTable | EvaluationTable) -> dict[str, Any]:
    """A table's keys with their values, as a recipe has them; None: left out."""
    return asdict(table) | {"base": None, "more": None, "judged": None}


@dataclass(frozen=True)
class StageTable:
    """One stage, resolved. `policy` and `reward_model` are what the stage takes, named or not."""

    name: str
    kind: str
    policy: str | None  # a stage; None: the bare base
    reward_model: str | None  # a stage, a folder or a hub id; None: no model, or rules alone
    reference: str | None  # a stage; None: the policy that the stage starts from
    against: str | None  # a stage, whose answers are set against the policy's
    answers: str | None  # a stage, whose answers are judged
    dataset: DatasetTable | None  # its own; None: the recipe's
    extras: dict[str, Any]  # our own keys of the kind
    options: dict[str, Any]  # every passed field of TRL's config
    given: dict[str, Any]  # those that differ from TRL's defaults by our choice or the recipe's

    @property
    def of(self) -> Kind:
        return kind_of(self.kind)

    @property
    def rewards(self) -> list[Term]:
        """What the stage trains on, where the recipe lists it: its reward model, and rules."""
        return terms(self.extras.get("rewards"))

    @property
    def rule(self) -> Term | None:
        """What judges by a rule."""
        return term(self.extras["rule"]) if self.extras.get("rule") else None

    def called(self, key: str) -> str:
        """What the kind's config calls a setting that PPO has as `key`."""
        return self.of.calls.get(key, key)

    def said(self, key: str) -> Any:
        """A setting by PPO's name for it."""
        return {**self.extras, **self.options}.get(self.called(key))

    def written(self) -> dict[str, Any]:
        roles = {role: getattr(self, role) for role in ROLES}
        roles |= {"reward_model": None} if self.rewards else {}
        own = self.dataset and written(self.dataset) | dict.fromkeys(SHARED_DATA_KEYS)
        ours = copy.deepcopy(self.extras)
        return {"kind": self.kind, **roles, **self.options, **ours, "dataset": own}


# What a stage's own `dataset` shares with [dataset]: a prompt is on one side in every stage.
SHARED_DATA_KEYS = ("validation_fraction", "test_fraction", "judge_fraction")
INHERITED_DATA_KEYS = (*SHARED_DATA_KEYS, "max_prompt_tokens", "max_answer_tokens", "system")


def inherited(first: dict[str, Any]) -> dict[str, Any]:
    """What a dataset has from the recipe's `first`, as far as that is written."""
    return {key: first[key] for key in INHERITED_DATA_KEYS if key in first}


def dataset_keys() -> dict[str, Field | Keys]:
    return {**fields_of(DatasetTable), "columns": dict.fromkeys(COLUMNS.split(), Field(("str",)))}


@cache
def stage_keys(name: str) -> Keys:
    """Every key of a stage's table, by its kind: TRL's fields first."""
    kind, own = kind_of(name), dataset_keys()
    del own["test_split"]
    why = "a prompt is on the same side of the split in every stage"
    for key in SHARED_DATA_KEYS:
        own[key] = Field(standing="owned", owner=f"dataset.{key}", reason=why)
    wiring = {"kind": Field(("str",), choices=tuple(listed()), effect="source")}
    wiring |= dict.fromkeys(kind.roles, Field(("str",), effect="source"))
    return {**fields_for(kind.config), **kind.extras, **wiring, "dataset": own}


@cache
def top_keys() -> dict[str, Field | Keys]:
    """Every key of a recipe but the stages' tables."""
    mirror = fields_of(MirrorTable)
    return {
        "title": Field(("str",), effect="neutral"),
        "stages": Field(("list[str]",), effect="source"),
        "seed": Field(("int",), 42, range="at least 0"),
        "model": {**fields_of(ModelTable), "mirror": mirror, **fields_for(BITSANDBYTES)},
        "lora": fields_for(LORA),
        "dataset": dataset_keys(),
        "evaluation": fields_of(EvaluationTable),
        "rounds": {"from": Field(("str",), effect="neutral"), **fields_of(RoundsTable)},
    }


def all_keys(kinds: dict[str, str]) -> dict[str, Field | Keys]:
    """Every key of a recipe whose stages are of these kinds."""
    return top_keys() | {name: stage_keys(kind) for name, kind in kinds.items()}


def keys_of(table: str) -> Keys:
    """Every key of [model], [lora], [dataset] or [evaluation]."""
    keys = top_keys()[table]
    assert isinstance(keys, Mapping)
    return keys


def kinds_in(data: dict[str, Any]) -> dict[str, str]:
    """The kind of each stage that `stages` or a table names, where it can be told."""
    stages = data.get("stages")
    names = [*(stages if isinstance(stages, list) else []), *data]
    known, kinds = listed(), dict[str, str]()
    for name in dict.fromkeys(name for name in names if isinstance(name, str)):
        table = data.get(name)
        kind = table.get("kind") if isinstance(table, dict) else None
        if name in known or (kind in known and name not in top_keys()):
            kinds[name] = name if name in known else str(kind)
    return kinds


def field_at(path: tuple[str, ...], kinds: dict[str, str]) -> Field | None:
    """The field that a dotted key names, if there is one."""
    keys: Any = all_keys(kinds)
    for part in path:
        keys = keys.get(part) if isinstance(keys, dict) else None
    return keys if isinstance(keys, Field) else None


def move_paths(recipe: dict[str, Any], moved: Callable[[str], str]) -> None:
    """Move every local path that a recipe names; `recipe` is a plain dict or tomlkit's document."""
    data, model = recipe["dataset"], recipe["model"]
    stages = [recipe[name] for name in kinds_in(recipe) if name in recipe]
    own = [stage["dataset"] for stage in stages if stage.get("dataset")]
    for table in (data if isinstance(data, list) else [data]) + own:
        if DatasetTable(table["path"]).is_local:
            table["path"] = moved(table["path"])
    asked = recipe.get("evaluation") or {}
    named = [(stage, "reward_model") for stage in stages]
    named += [(stage, "model") for stage in stages if not stage.get("url")]  # else it is a server's
    for table, key in [(model, "name"), (asked, "judge_model"), *named]:
        if is_path(table.get(key) or ""):
            table[key] = moved(table[key])
    for table, key in [(stage, key) for stage in stages for key in ("guideline", "principles")]:
        if table.get(key):  # a file, however it is written
            table[key] = moved(table[key])
    of_stages = [(stage, key) for stage in stages for key in ("rewards", "rule")]
    for table, key in [(asked, "judge"), *of_stages]:
        if table.get(key):
            move_terms(table, key, moved)
