"""One entry and one file are a kind of stage; and the one rule of what is in a fingerprint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.errors import Interrupted, RecipeError, UsageError
from rlhf_recipes.pipeline import rehearsal, runner
from rlhf_recipes.pipeline.plan import make_plan, plan_run
from rlhf_recipes.recipe import check as checks
from rlhf_recipes.recipe import check_stages, fields, kinds, tables
from rlhf_recipes.recipe.fields import Field
from rlhf_recipes.recipe.kinds import KINDS, Kind, kind_of
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages import sft
from rlhf_recipes.store.fingerprint import Identities, defaults, shared_defaults, tables_read
from tests.helpers.counting import toy

pytestmark = pytest.mark.train

ROOT = Path(__file__).parents[2]
ECHO = Kind(
    "echo",
    version=1,
    module="tests.helpers.throwaway",
    config="trl:SFTConfig",
    makes="policy",
    learns_from="answers",
)


@pytest.fixture
def clean_tables() -> Iterator[None]:
    """What a test does to the tables of keys is forgotten after it."""
    caches = (tables.stage_keys, tables.top_keys)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch, clean_tables: None) -> Kind:
    monkeypatch.setitem(KINDS, "echo", ECHO)
    return ECHO


# ---- a kind is an entry and a file --------------------------------------------------------------


def test_a_kind_is_one_entry_and_one_file(
    echo: Kind, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tiny_recipe.read_text().replace('"sft", ', '"echo", ').replace("[sft]", "[echo]")
    tiny_recipe.write_text(text.replace("max_steps = 4", "max_steps = 4\nsave_steps = 1", 1))

    # ---- check
    recipe = load_recipe(tiny_recipe)
    assert recipe.table("reward").policy == recipe.table("ppo").policy == "echo"
    with pytest.raises(RecipeError, match=r'did you mean "learning_rate"'):
        load_recipe(tiny_recipe, set=["echo.learning_rat=1"])
    with pytest.raises(RecipeError, match="belongs to seed"):
        load_recipe(tiny_recipe, set=["echo.data_seed=1"])

    # ---- plan and key
    runs = tiny_recipe.parent / "runs"
    planned = plan_run(recipe, runs).stages[0]
    assert planned.folder.name.startswith("echo-") and planned.payload["version"] == 1
    other = plan_run(load_recipe(tiny_recipe, set=["echo.learning_rate=1"]), runs).stages[0]
    layout = plan_run(load_recipe(tiny_recipe, set=["echo.logging_steps=9"]), runs).stages[0]
    assert layout.key == planned.key != other.key

    # ---- rehearsal, and an interrupted run that goes on
    monkeypatch.setattr(rehearsal, "SHORT", 0.0)
    monkeypatch.setattr(rehearsal, "SHARE", 1e9)
    step, done = sft.Trainer.training_step, []

    def stopping(trainer: Any, *given: Any) -> Any:
        done.append(trainer.state.global_step)
        if len(done) == 5:  # two in the rehearsal, and three of the stage
            raise KeyboardInterrupt
        return step(trainer, *given)

    monkeypatch.setattr(sft.Trainer, "training_step", stopping)
    with pytest.raises(Interrupted):
        runner.run(recipe, runs=runs)
    assert done == [0, 1, 0, 1, 2]
    [reason] = plan_run(recipe, runs).stages[0].reasons
    assert reason == "was not finished, has a checkpoint of step 2"
    outcome = runner.run(recipe, runs=runs)
    assert done[5:7] == [2, 3]  # it went on after step 2
    assert "echo" in (outcome.run_folder / "log.txt").read_text()

    # ---- results, the verdict, the report
    assert outcome.results["echo.echoes"] == 7 and 0 <= outcome.results["echo.win_rate"] <= 1
    assert any(finding.about == "echo" for finding in outcome.verdict)
    report = (outcome.run_folder / "report.html").read_text()
    assert "echo" in report and outcome.model is not None
    assert [stage.did for stage in runner.run(recipe, runs=runs).stages] == ["cached"] * 4


def test_a_kind_is_in_the_documentation_and_the_schema(echo: Kind) -> None:
    from rlhf_recipes.pipeline.schema import table
    from tools.make_docs import keys_md

    header = next(line for line in keys_md().split("\n") if line.startswith("| key | may be | sft"))
    assert "| echo |" in header
    properties = table(tables.stage_keys("echo"), {})["properties"]
    assert "learning_rate" in properties and "seed" not in properties
    assert "echo" in properties["kind"]["enum"]


def test_an_unknown_kind_is_an_error_everywhere() -> None:
    from rlhf_recipes.stages.contract import module_of

    for ask in (kind_of, module_of, tables.stage_keys):
        with pytest.raises(UsageError, match="'orpo' is not a kind of stage"):
            ask("orpo")


def test_every_module_exports_the_contract() -> None:
    from rlhf_recipes.stages.contract import module_of

    for name, kind in KINDS.items():
        module = module_of(name)
        wanted = {"run", "trial", "work", "memory"} | ({"answer_length"} if kind.samples else set())
        assert wanted <= {*module.__all__}, name


@pytest.mark.parametrize(
    ("learns_from", "changes"),
    [
        ("pairs", True),
        ("judge_feedback", True),
        ("feedback", True),
        ("answers", True),
        ("prompts", False),
    ],
)
def test_judge_fraction_is_of_what_learns_from_pairs(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    clean_tables: None,
    learns_from: str,
    changes: bool,
) -> None:
    kind = dataclasses.replace(ECHO, learns_from=learns_from)
    monkeypatch.setitem(KINDS, "echo", kind)
    recipe = toy(tmp_path)
    stages = 'stages=["echo"]'
    keys = {
        plan_run(load_recipe(recipe, set=[stages, f"dataset.judge_fraction={share}"]), tmp_path)
        .stages[0]
        .key
        for share in (0.25, 0.6)
    }
    assert len(keys) == 1 + changes


# ---- the rule of fingerprints -------------------------------------------------------------------


def keys(recipe: Path) -> dict[str, str]:
    asked = ["evaluation.judge=independent", "evaluation.best_of=4", "ppo.kl_coef=0.3"]
    made = plan_run(load_recipe(recipe, set=asked), recipe.parent / "runs")
    return {stage.name: stage.key for stage in made.stages}


def with_a_key(table: type) -> type:
    """The same table with one more optional key."""
    extra = ("brand_new", int | None, tables._key(None))
    names = {"__module__": table.__module__}
    return dataclasses.make_dataclass(
        table.__name__, [extra], bases=(table,), frozen=True, namespace=names
    )


@pytest.mark.parametrize("table", ["ModelTable", "DatasetTable", "EvaluationTable"])
def test_a_new_optional_key_of_a_table_re_keys_no_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_tables: None, table: str
) -> None:
    recipe = toy(tmp_path)
    before = keys(recipe)
    more = with_a_key(getattr(tables, table))
    for module in (tables, checks, check_stages):
        monkeypatch.setattr(module, table, more, raising=False)
    tables.top_keys.cache_clear()
    tables.stage_keys.cache_clear()
    part = table.removesuffix("Table").lower()
    assert "brand_new" in tables.top_keys()[part]
    assert keys(recipe) == before
    used = load_recipe(recipe, set=[f"{part}.brand_new=3"])
    changed = [s.key for s in plan_run(used, tmp_path / "runs").stages]
    assert part == "evaluation" or not set(changed) & set(before.values())


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_new_optional_key_of_a_stage_re_keys_no_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_tables: None, kind: str
) -> None:
    recipe = toy(tmp_path)
    before = keys(recipe)
    more = {**KINDS[kind].extras, "brand_new": Field(("int",), 3)}
    monkeypatch.setitem(KINDS, kind, dataclasses.replace(KINDS[kind], extras=more))
    tables.stage_keys.cache_clear()
    assert keys(recipe) == before


@pytest.mark.parametrize("config", list(fields.all_fields()))
def test_a_new_field_upstream_re_keys_no_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clean_tables: None, config: str
) -> None:
    recipe = toy(tmp_path)
    before = keys(recipe)
    monkeypatch.setitem(fields.all_fields()[config], "brand_new", Field(("int",), 3))
    tables.stage_keys.cache_clear()
    tables.top_keys.cache_clear()
    assert keys(recipe) == before


def test_a_changed_default_needs_a_new_version() -> None:
    """`tools/defaults.json` holds each kind's version and defaults as they were released."""
    kept = json.loads((ROOT / "tools" / "defaults.json").read_text(encoding="utf-8"))
    shared = json.loads(json.dumps(shared_defaults()))
    for name, kind in KINDS.items():
        now = {"lora": defaults(kind, True), "whole": defaults(kind, False), "shared": shared}
        then = kept[name]
        if json.loads(json.dumps(now)) != then["defaults"]:
            assert kind.version > then["version"], f"{name}: a default changed: raise its version"
            pytest.fail("run python -m tools.make_fields: it writes tools/defaults.json")
        assert kind.version == then["version"], "run python -m tools.make_fields"


def test_a_changed_default_is_noticed(monkeypatch: pytest.MonkeyPatch, clean_tables: None) -> None:
    field = fields.all_fields()["trl:DPOConfig"]["beta"]
    other = dataclasses.replace(field, default=0.7)
    monkeypatch.setitem(fields.all_fields()["trl:DPOConfig"], "beta", other)
    with pytest.raises(AssertionError, match="dpo: a default changed: raise its version"):
        test_a_changed_default_needs_a_new_version()


def test_every_key_says_its_effect() -> None:
    def walk(keys: Any) -> Iterator[Field]:
        for one in keys.values():
            yield from [one] if isinstance(one, Field) else walk(one)

    found = [*walk(tables.top_keys())]
    for name in kinds.listed():
        found += walk(tables.stage_keys(name))
    assert {one.effect for one in found if one.standing == "passed"} == {
        "result", "layout", "neutral", "source"
    }  # fmt: skip
    with pytest.raises(KeyError, match="effect"):
        made = dataclasses.make_dataclass("Table", [("key", int, 3)])
        made.__module__ = "rlhf_recipes.recipe.tables"
        fields.fields_of(made)


def test_a_plan_is_a_function_of_the_recipe_and_its_identities(tmp_path: Path) -> None:
    recipe = load_recipe(toy(tmp_path))
    for file in sorted(tmp_path.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    known = {table: {"content": "0" * 64} for table in tables_read(recipe)}
    base = {"content": "1" * 64}
    made = make_plan(recipe, Identities(base, {}, known, {}), tmp_path / "runs")
    assert [stage.name for stage in made.stages] == ["sft", "reward", "ppo", "evaluation"]
    again = make_plan(recipe, Identities(base, {}, known, {}), tmp_path / "runs")
    other = make_plan(recipe, Identities({"content": "2" * 64}, {}, known, {}), tmp_path / "runs")
    assert made == again
    assert not {s.key for s in made.stages} & {s.key for s in other.stages}
