# ruff: noqa: E501 (tables of messages: a case a line)
from __future__ import annotations

import enum
import json
import re
import tomllib
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest

from rlhf_recipes.recipe.check_stages import check
from rlhf_recipes.recipe.fields import Field, fields_of
from rlhf_recipes.recipe.kinds import KINDS, listed
from rlhf_recipes.recipe.load import load_recipe, shipped_recipes
from tools.make_docs import field_tables

pytestmark = pytest.mark.train

GUARD = {"max_kl": 25.0, "min_entropy": 0.1, "min_length": 0.2, "max_score_drop": 1.5}
ROOT = Path(__file__).parents[2]
TRAINED = [kind for kind in listed() if KINDS[kind].config]
SCHEMA = ROOT / "docs" / "recipe.schema.json"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    with warnings.catch_warnings(action="ignore"):  # what importing TRL and PEFT brings up
        from tools import make_fields
    return make_fields


# ---- the generated files


def test_generated_files_are_those_of_the_installed_versions(generator: ModuleType) -> None:
    made = {
        ROOT / "rlhf_recipes" / "recipe" / "fields.json": generator.fields_json(),
        SCHEMA: generator.schema_json(),
        ROOT / "docs" / "keys.md": generator.keys_md(),
    }
    for file, text in made.items():
        assert file.read_text(encoding="utf-8") == text, "run python -m tools.make_fields"


def test_every_field_is_classified(generator: ModuleType) -> None:
    assert {table: len(fields) for table, fields in field_tables().items()} == {
        "sft": 135,
        "reward": 125,
        "ppo": 130,
        "dpo": 139,
        "kto": 131,
        "rloo": 165,
        "grpo": 191,
        "lora": 42,
        "bitsandbytes": 10,
    }
    for table, fields in field_tables().items():
        assert list(fields) == list(generator.upstream(table))
        for name, field_ in fields.items():
            said = (bool(field_.types), bool(field_.owner), bool(field_.reason))
            wanted = {"owned": (False, True, True), "refused": (False, False, True)}
            passed = (True, False, field_.ours is not None)
            assert said == wanted.get(field_.standing, passed), f"{table}.{name}"


def test_a_field_that_no_row_names_stops_the_generator(generator: ModuleType) -> None:
    with pytest.raises(SystemExit, match="sft.brand_new: no row of fields.toml names it"):
        generator.verdict("sft", "brand_new")


def test_a_row_that_names_no_field_stops_the_generator(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(generator.TABLE, "row", [{"in": "ppo", "fields": "gone_*"}])
    with pytest.raises(SystemExit, match="gone_\\*: a row of fields.toml names it"):
        generator.check_rows()


def test_what_fields_toml_says_of_a_field_is_of_a_field_that_is_passed() -> None:
    said = tomllib.loads((ROOT / "tools" / "fields.toml").read_text(encoding="utf-8"))
    for part in ("ours", "choices", "never"):
        for entry in said[part]:
            for table in entry["in"].split():
                assert field_tables()[table][entry["field"]].standing == "passed", entry
    tables = field_tables().items()
    passed = {n for _, t in tables for n, f in t.items() if f.standing == "passed"}
    passed |= {f"{table}.{n}" for table, t in tables for n in t if n in passed}
    assert {name for names in said["ranges"].values() for name in names.split()} <= passed


# ---- the validator, the schema and the documentation say the same


def sets(table: str, name: str, value: Any) -> dict[str, Any]:
    """A recipe, parsed, that sets one key."""
    place = "model" if table == "bitsandbytes" else table
    stages = [place] if place in listed() else ["sft"]
    data = {"stages": stages, "model": {"name": "a/b"}, "dataset": {"path": "a/b"}}
    if table in ("ppo", "rloo", "grpo"):
        data[table] = {"reward_model": "a/b"}
    data.setdefault(place, {})[name] = value
    return data


@pytest.mark.parametrize("table", field_tables())
def test_the_validator_takes_what_is_passed_and_says_why_of_the_rest(
    tmp_path: Path, table: str
) -> None:
    for name, field_ in field_tables()[table].items():
        default = field_.default if field_.ours is None else field_.ours
        if field_.standing == "passed" and default is None:
            continue
        place = "model" if table == "bitsandbytes" else table
        _, checker = check(sets(table, name, default or 0), tmp_path / "my.toml")
        said = {key: what for key, what in checker.problems}.get((place, name), "")
        wanted = {
            "owned": f"belongs to {field_.owner}: {field_.reason}",
            "refused": f"is refused: {field_.reason}",
        }
        if field_.standing == "passed" and default in ({}, 0, False):
            said = field_.check(default)[1]
        assert said == wanted.get(field_.standing, ""), f"{table}.{name}"


VALUES: list[Any] = [
    *(True, False, -1, 0, 1, 2, 3.0, 0.25, 1.5, -0.5, "no", "text", {}, {"one": 1}),
    *([], ["text"], [1], [0.5], ["sigmoid", "ipo"]),
]


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a JSON Schema, of the words that ours uses, allows a value."""
    kinds = {"boolean": bool, "integer": int, "number": (int, float), "string": str}
    kinds |= {"object": dict, "array": list}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    rules = {
        "type": lambda kind: (
            isinstance(value, kinds[kind]) and (kind == "boolean" or not isinstance(value, bool))
        ),
        "enum": lambda allowed: any(value == one and type(value) is type(one) for one in allowed),
        "const": lambda one: value == one and type(value) is type(one),
        "minimum": lambda least: not number or value >= least,
        "maximum": lambda most: not number or value <= most,
        "exclusiveMinimum": lambda least: not number or value > least,
        "exclusiveMaximum": lambda most: not number or value < most,
        "multipleOf": lambda step: not number or value % step == 0,
        "not": lambda inner: not valid(value, inner),
        "anyOf": lambda inner: any(valid(value, one) for one in inner),
        "items": lambda inner: (
            not isinstance(value, list) or all(valid(one, inner) for one in value)
        ),
    }
    return all(rules[word](said) for word, said in schema.items() if word in rules)


@pytest.mark.parametrize("table", [*TRAINED, "lora"])
def test_the_schema_allows_what_the_validator_allows(table: str) -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    found = schema["$defs"].get(table) or schema["properties"]["lora"]["anyOf"][1]
    for name, field_ in field_tables()[table].items():
        assert (name in found["properties"]) == (field_.standing == "passed"), name
        for value in (*VALUES, *field_.choices) if field_.standing == "passed" else ():
            wrong = field_.check(value)[1]
            assert valid(value, found["properties"][name]) == (not wrong), (name, value, wrong)


def test_the_documentation_has_every_field() -> None:
    text = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
    parts = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    named = {part: set(re.findall(r"`(\w+)`", body)) for part, body in parts.items()}
    for table, fields in field_tables().items():
        passed = "`[lora]`" if table == "lora" else "Stages"
        for name, field_ in fields.items():
            part = {"passed": passed, "refused": "Refused"}.get(
                field_.standing, "Set by another key, or by the program"
            )
            assert name in named[part], f"{table}.{name}"


@pytest.mark.parametrize(
    ("tables", "names", "standing"),
    [
        ("sft reward ppo", "output_dir seed bf16 fp16 use_cpu hub_token", "closed"),
        ("sft reward ppo dpo", "save_strategy save_steps save_total_limit", "neutral"),
        ("sft reward ppo", "learning_rate weight_decay optim max_grad_norm", "result"),
        ("sft reward ppo", "gradient_checkpointing per_device_train_batch_size", "layout"),
        ("sft reward ppo", "logging_steps report_to run_name", "neutral"),
        ("sft reward", "per_device_eval_batch_size dataloader_num_workers", "layout"),
        ("sft reward", "max_steps num_train_epochs", "result"),
        ("sft reward ppo", "eval_strategy eval_steps", "result"),
        ("sft", "packing padding_free completion_only_loss assistant_only_loss", "closed"),
        ("sft", "loss_type neftune_noise_alpha", "result"),
        ("reward", "label_smoothing_factor neftune_noise_alpha", "closed"),
        ("ppo", "kl_coef lam gamma missing_eos_penalty num_mini_batches", "result"),
        ("ppo", "local_rollout_forward_batch_size", "layout"),
        ("ppo", "num_sample_generations", "neutral"),
        ("ppo", "max_steps per_device_eval_batch_size", "closed"),
        ("ppo", "dataloader_num_workers torch_compile eval_delay fsdp deepspeed", "closed"),
        ("dpo", "beta loss_type loss_weights label_smoothing eval_steps max_steps", "result"),
        ("dpo", "per_device_eval_batch_size gradient_checkpointing", "layout"),
        ("dpo", "sync_ref_model precompute_ref_log_probs disable_dropout max_length", "closed"),
        ("kto", "beta desirable_weight per_device_train_batch_size", "result"),
        ("kto", "gradient_accumulation_steps gradient_checkpointing", "layout"),
        ("kto", "train_sampling_strategy sync_ref_model max_length", "closed"),
        ("rloo grpo", "num_generations generation_batch_size beta max_steps", "result"),
        ("rloo grpo", "per_device_eval_batch_size", "layout"),
        ("rloo grpo", "top_p use_vllm steps_per_generation reward_weights", "closed"),
        ("grpo", "loss_type scale_rewards importance_sampling_level", "result"),
        ("lora", "r target_modules use_dora use_rslora rank_pattern", "result"),
        ("lora", "modules_to_save trainable_token_indices layer_replication bias", "closed"),
        ("lora", "task_type inference_mode revision", "closed"),
        ("bitsandbytes", "load_in_4bit bnb_4bit_quant_type llm_int8_threshold", "closed"),
    ],
)
def test_standing_and_effect(tables: str, names: str, standing: str) -> None:
    for table in tables.split():
        for name in names.split():
            found = field_tables()[table][name]
            said = found.effect if found.standing == "passed" else "closed"
            assert said == standing, f"{table}.{name}"


def test_our_defaults() -> None:
    ours = {
        f"{table}.{name}": (field_.default, field_.ours, field_.our_default(lora=False))
        for table, fields in field_tables().items()
        for name, field_ in fields.items()
        if field_.ours is not None
    }
    assert ours == {
        "sft.learning_rate": (2e-5, 2e-4, None),
        "reward.learning_rate": (1e-4, 1e-4, None),
        "ppo.learning_rate": (3e-6, 1e-4, None),
        "reward.center_rewards_coefficient": (None, 0.01, 0.01),
        "dpo.learning_rate": (1e-6, 1e-4, None),
        "kto.learning_rate": (1e-6, 1e-4, None),
        "rloo.learning_rate": (1e-6, 1e-4, None),
        "grpo.learning_rate": (1e-6, 1e-4, None),
        "grpo.beta": (0.0, 0.04, 0.04),
        **{f"{kind}.per_device_eval_batch_size": (8, 64, 64) for kind in ("rloo", "grpo")},
        **{f"{kind}.eval_strategy": ("no", "steps", "steps") for kind in ("rloo", "grpo")},
        **{f"{kind}.eval_steps": (None, 0.2, 0.2) for kind in ("rloo", "grpo")},
        "ppo.lam": (0.95, 1.0, 1.0),
        "ppo.missing_eos_penalty": (None, 1.0, 1.0),
        "ppo.eval_strategy": ("no", "steps", "steps"),
        "ppo.eval_steps": (None, 0.2, 0.2),
        **{f"{kind}.save_steps": (500, 0.1, 0.1) for kind in TRAINED},
        **{f"{kind}.save_total_limit": (None, 2, 2) for kind in TRAINED},
        "lora.r": (8, 16, 16),
        "lora.lora_alpha": (8, 32, 32),
        "lora.target_modules": (None, "all-linear", "all-linear"),
    }


def test_the_configs_take_what_a_recipe_passes(generator: ModuleType, tmp_path: Path) -> None:
    recipe = load_recipe(next(path for path in shipped_recipes() if path.stem == "smoke"))
    for stage in recipe.stages:
        table = recipe.table(stage)
        config = generator.CONFIGS[table.kind](
            **table.options, output_dir=str(tmp_path), use_cpu=True, bf16=False
        )
        for name in ("learning_rate", "per_device_train_batch_size", "weight_decay"):
            assert getattr(config, name) == table.options[name]
    assert generator.CONFIGS["lora"](**recipe.lora).r == recipe.lora["r"]


def test_the_schema_knows_the_keys_that_may_be_set() -> None:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    ppo = schema["$defs"]["ppo"]["properties"]
    passed = {name for name, f in field_tables()["ppo"].items() if f.standing == "passed"}
    own = {"kind", "policy", "reward_model", "reference", "dataset"}
    extras = {"value_learning_rate", "value_warmup_epochs", "keep", "guard", "minimum_accuracy"}
    extras |= {"rewards"}
    assert set(ppo) == passed | own | extras
    assert ppo["keep"] == {
        "enum": ["best", "last"],
        "default": "best",
        "description": "ends with the best score − kl_coef × KL on validation",
    }
    assert ppo["kind"] == {"const": "ppo", "type": "string"}
    assert {k: v["default"] for k, v in ppo["guard"]["properties"].items()} == GUARD
    assert ppo["lam"] == {
        "type": "number",
        "minimum": 0,
        "maximum": 1,
        "default": 1.0,
        "description": "λ of generalised advantage estimation.",
    }
    assert schema["properties"]["model"]["properties"]["dtype"]["enum"][1] == "bfloat16"


# ---- types, choices, ranges


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Sample:
    flag: bool = False
    size: int | None = None
    rate: float = 0.5
    mode: Literal["a", "b"] | None = "a"
    colour: Colour | str = Colour.RED
    names: list[str] | str | None = None
    layers: list[int] | int | None = None
    words: dict[str, Any] | str | None = None
    patterns: dict | None = field(default_factory=dict)
    off: str | Literal[False] | None = None
    odd: Counter | None = None
    hidden: str = field(default="", metadata={"key": False})


def test_types_are_read_from_a_dataclass() -> None:
    read = {n: (f.types, f.default, f.choices) for n, f in fields_of(Sample).items()}
    assert read == {
        "flag": (("bool",), False, ()),
        "size": (("int",), None, ()),
        "rate": (("float",), 0.5, ()),
        "mode": (("str",), "a", ("a", "b")),
        "colour": (("str",), "red", ("red", "blue")),
        "names": (("str", "list[str]"), None, ()),
        "layers": (("int", "list[int]"), None, ()),
        "words": (("dict",), None, ()),
        "patterns": (("dict",), {}, ()),
        "off": (("bool", "str"), None, ()),
        "odd": ((), None, ()),
    }


@pytest.mark.parametrize(
    ("field", "value", "wrong"),
    [
        (Field(("int",)), True, "must be a whole number, not true"),
        (Field(("int",)), 1.0, "must be a whole number, not 1.0"),
        (Field(("int",)), "8", 'must be a whole number, not "8" (leave out the quotes)'),
        (Field(("float",)), "3e-4", 'must be a number, not "3e-4" (leave out the quotes)'),
        (Field(("float",)), "fast", 'must be a number, not "fast"'),
        (Field(("float",)), float("nan"), "must be a finite number, not NaN"),
        (Field(("bool",)), "true", 'must be true or false, not "true" (leave out the quotes)'),
        (Field(("bool",)), 1, "must be true or false, not 1"),
        (Field(("str",)), 3, "must be text, not 3"),
        (Field(("list[str]",)), ["a", 1], 'must be a list of texts, not ["a", 1]'),
        (Field(("list[int]", "int")), True, "must be a list of whole numbers or a whole number, not true"),
        (Field(("dict",)), 1, "must be a table, not 1"),
        (Field(("str",), choices=("linear", "cosine")), "cosin", 'must be "linear" or "cosine", not "cosin" (did you mean "cosine"?)'),
        (Field(("list[str]",), choices=("sigmoid", "ipo")), ["ipo", "sigmod"], 'must be "sigmoid" or "ipo", not "sigmod" (did you mean "sigmoid"?)'),
        (Field(("list[float]",)), [1, "2"], 'must be a list of numbers, not [1, "2"]'),
        (Field(("float",), range="from 0 to 1"), 1.5, "must be from 0 to 1, not 1.5"),
        (Field(("float",), range="at least 0 and below 1"), 1, "must be at least 0 and below 1, not 1"),
        (Field(("int",), range="at least 1, or -1"), 0, "must be at least 1, or -1, not 0"),
        (Field(("float",), range="above 0"), 0.0, "must be above 0, not 0.0"),
        (Field(("float",), range="a whole number, or a share below 1"), 2.5, "must be a whole number, or a share below 1, not 2.5"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_value(field: Field, value: Any, wrong: str) -> None:
    assert field.check(value)[1] == wrong


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (Field(("bool", "str"), choices=(True, "gaussian")), True),
        (Field(("list[str]", "str")), "all-linear"),
        (Field(("list[str]", "str")), ["q_proj"]),
        (Field(("list[str]",), choices=("sigmoid", "ipo")), ["ipo", "sigmoid"]),
        (Field(("list[float]",)), [1, 0.5]),
        (Field(("int",), range="at least 1, or -1"), -1),
        (Field(("dict",)), {"power": 2}),
        (Field(("float",), range="a whole number, or a share below 1"), 0.1),
        (Field(("float",), range="a whole number, or a share below 1"), 5),
    ],
)
def test_what_is_right(field: Field, value: Any) -> None:
    assert field.check(value) == (value, "")


def test_a_whole_number_becomes_a_float_where_one_is_meant() -> None:
    value, wrong = Field(("float",)).check(3)
    assert (repr(value), wrong) == ("3.0", "")


@pytest.mark.parametrize(
    ("types", "raw", "value"),
    [
        ("str", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("str", "12345", "12345"),
        ("str", "true", "true"),
        ("str", '"quoted"', "quoted"),
        ("str", "", ""),
        ("int", "8", 8),
        ("int", "eight", "eight"),
        ("float", "3e-4", 3e-4),
        ("bool", "false", False),
        ("list[str] str", '["q_proj", "v_proj"]', ["q_proj", "v_proj"]),
        ("list[str] str", "all-linear", "all-linear"),
        ("dict", "{power = 2}", {"power": 2}),
    ],
)
def test_raw_text_is_read_as_its_field_asks(types: str, raw: str, value: Any) -> None:
    assert Field(tuple(types.split())).read(raw) == value
