"""Crude first version: the interface stands, the checks are coming."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tomlkit

from rlhf_recipes.errors import Problem, RecipeError, UsageError

FIELDS = json.loads((Path(__file__).parent / "fields.json").read_text())
OURS = {
    "sft": {},
    "reward": {"center_rewards_coefficient": 0.01},
    "ppo": {"lam": 1.0, "missing_eos_penalty": 1.0},
}
LORA_LR = {"sft": 2e-4, "reward": 1e-4, "ppo": 1e-4}
KINDS = ("sft", "reward", "ppo")
POLICY_KINDS = ("sft", "ppo")


def is_path(text: str) -> bool:
    return text in (".", "..") or text.startswith(("./", "../", "/", "~"))


@dataclass(frozen=True)
class ModelTable:
    name: str
    revision: str | None = None
    dtype: str = "auto"
    quantization: str = "none"
    base: Path = field(default=Path("."), repr=False, compare=False)

    @property
    def is_local(self) -> bool:
        return is_path(self.name)

    @property
    def folder(self) -> Path:
        return (self.base / Path(self.name).expanduser()).resolve()


@dataclass(frozen=True)
class DatasetTable:
    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: Any = None
    split: str | None = None
    revision: str | None = None
    columns: dict[str, str] | None = None
    max_prompt_tokens: int = 512
    max_answer_tokens: int = 512
    max_rows: int | None = None
    validation_fraction: float = 0.05
    test_fraction: float = 0.1
    test_split: str | None = None
    judge_fraction: float = 0.25
    system: str | None = None
    base: Path = field(default=Path("."), repr=False, compare=False)

    @property
    def is_local(self) -> bool:
        return is_path(self.path) or self.path.endswith((".jsonl", ".json", ".csv", ".parquet"))

    @property
    def file(self) -> Path:
        return (self.base / Path(self.path).expanduser()).resolve()


@dataclass(frozen=True)
class EvaluationTable:
    prompts: int = 128
    response_length: int | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class StageTable:
    name: str
    kind: str
    policy: str | None
    reward_model: str | None
    reference: str | None
    dataset: DatasetTable | None
    extras: dict[str, Any]
    options: dict[str, Any]
    given: dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    path: Path
    text: str
    overrides: tuple[str, ...]
    title: str
    stages: tuple[str, ...]
    seed: int
    model: ModelTable
    lora: dict[str, Any] | None
    dataset: DatasetTable
    evaluation: EvaluationTable | None
    tables: dict[str, StageTable]
    notes: tuple[str, ...] = ()

    def table(self, stage: str) -> StageTable:
        return self.tables[stage]

    def resolved(self) -> dict[str, Any]:
        out: dict[str, Any] = {"title": self.title, "stages": list(self.stages), "seed": self.seed}
        out["model"] = asdict(replace(self.model, base=None))
        out["lora"] = self.lora or False
        out["dataset"] = asdict(replace(self.dataset, base=None))
        for t in self.tables.values():
            out[t.name] = {"kind": t.kind, **t.extras, **t.options}
        out["evaluation"] = asdict(self.evaluation) if self.evaluation else False
        return _no_none(out)


def _no_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _no_none(v) for k, v in value.items() if v is not None}
    return value


def load_recipe(path: str | Path, *, set: Sequence[str] = (), unset: Sequence[str] = ()) -> Recipe:
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such recipe")
    text = path.read_text(encoding="utf-8")
    try:
        doc = tomlkit.parse(text)
    except ValueError as error:
        raise RecipeError([Problem(str(path), None, "", str(error))]) from None
    for word in set:
        key, _, raw = word.partition("=")
        *tables, last = key.split(".")
        node: Any = doc
        for t in tables:
            node = node.setdefault(t, tomlkit.table())
        try:
            node[last] = tomllib.loads(f"v = {raw}")["v"]
        except tomllib.TOMLDecodeError:
            node[last] = raw
    for key in unset:
        *tables, last = key.split(".")
        node = doc
        for t in tables:
            node = node[t]
        del node[last]
    text = doc.as_string()
    data = tomllib.loads(text)
    base = path.parent.resolve()
    lora = data.get("lora", {})
    lora = (
        None
        if lora is False
        else {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"} | lora
    )
    dataset = DatasetTable(**data["dataset"], base=base)
    tables_: dict[str, StageTable] = {}
    policy = reward = None
    for name in data["stages"]:
        given = dict(data.get(name, {}))
        kind = given.pop("kind", name)
        own = given.pop("dataset", None)
        wiring = [given.pop(k, None) for k in ("policy", "reward_model", "reference")]
        defaults = OURS[kind] | ({"learning_rate": LORA_LR[kind]} if lora is not None else {})
        extras: dict[str, Any] = {}
        if kind == "reward":
            extras = {"head_learning_rate": given.pop("head_learning_rate", None)}
        if kind == "ppo":
            guard = {"max_kl": None} | given.pop("guard", {})
            extras = {"value_learning_rate": given.pop("value_learning_rate", None), "guard": guard}
        given = defaults | given
        options = {k: f["default"] for k, f in FIELDS[kind].items()} | given
        tables_[name] = StageTable(
            name,
            kind,
            wiring[0] or policy,
            (wiring[1] or reward) if kind == "ppo" else None,
            wiring[2],
            DatasetTable(
                **{
                    "max_prompt_tokens": dataset.max_prompt_tokens,
                    "max_answer_tokens": dataset.max_answer_tokens,
                }
                | own,
                base=base,
            )
            if own
            else None,
            extras,
            options,
            given,
        )
        policy = name if kind in POLICY_KINDS else policy
        reward = name if kind == "reward" else reward
    evaluation = data.get("evaluation", {})
    return Recipe(
        path=path,
        text=text,
        overrides=(*set, *(f"unset {u}" for u in unset)),
        title=data.get("title", path.stem),
        stages=tuple(data["stages"]),
        seed=data.get("seed", 42),
        model=ModelTable(**data["model"], base=base),
        lora=lora,
        dataset=dataset,
        evaluation=None if evaluation is False else EvaluationTable(**evaluation),
        tables=tables_,
    )


def identity_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    t = recipe.table(stage)
    out = {k: v for k, v in t.options.items() if FIELDS[t.kind][k]["effect"] == "identity"}
    size = t.options["per_device_train_batch_size"] * t.options["gradient_accumulation_steps"]
    return {
        **out,
        **t.extras,
        "batch_size": size,
        "lora": recipe.lora,
        "dtype": recipe.model.dtype,
        "quantization": recipe.model.quantization,
    }


def layout_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    t = recipe.table(stage)
    return {k: v for k, v in t.options.items() if FIELDS[t.kind][k]["effect"] == "layout"}


def shipped_recipes() -> list[Path]:
    inside = Path(__file__).parent / "recipes"
    folder = inside if inside.is_dir() else Path(__file__).parent.parent / "recipes"
    return sorted(folder.rglob("*.toml"))


def find_recipe(name: str) -> Path:
    if Path(name).is_file():
        return Path(name)
    shipped = {p.stem: p for p in shipped_recipes()}
    if name in shipped:
        return shipped[name]
    raise UsageError(f"no recipe {name!r}", f"the shipped ones: {', '.join(shipped)}")


def fork_recipe(
    source: Path, new: Path, *, set: Sequence[str] = (), unset: Sequence[str] = ()
) -> Path:
    recipe = load_recipe(source, set=set, unset=unset)
    new.write_text(f"# Forked from {source}\n" + recipe.text)
    return new
