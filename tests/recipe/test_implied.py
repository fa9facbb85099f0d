"""The stages that [evaluation] asks for: what they take, what they redo, and what they are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tomlkit

from rlhf_recipes.errors import RecipeError
from rlhf_recipes.pipeline.plan import Plan, plan_run
from rlhf_recipes.recipe.load import Recipe, load_recipe, smaller_layout
from rlhf_recipes.sources.fetch import _models
from rlhf_recipes.store import history
from rlhf_recipes.store.clean import unused
from tests.helpers.counting import RECIPE, toy
from tests.helpers.worlds import HEAD

INDEPENDENT = "evaluation.judge=independent"
CHAIN = ["sft", "reward", "ppo"]


def finish(made: Plan) -> Plan:
    from tests.helpers.records import finish as write_records

    write_records(made)
    return made


def plan(recipe: Path, *changes: str) -> Plan:
    return plan_run(load_recipe(recipe, set=changes), recipe.parent / "runs", name="run")


def again(made: Plan) -> dict[str, str]:
    return {stage.name: stage.reason for stage in made.stages if not stage.done}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    (tmp_path / "rule.py").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    return toy(tmp_path)


def test_they_come_in_order_and_only_where_asked(recipe: Path) -> None:
    def names(*changes: str) -> list[str]:
        loaded = load_recipe(recipe, set=changes)
        assert [s.name for s in plan_run(loaded, recipe.parent / "runs").stages] == (
            loaded.all_stages
        )
        return loaded.all_stages[3:]

    assert names() == names("evaluation.judge=none") == ["evaluation"]
    assert names(INDEPENDENT) == ["judge", "evaluation"]
    assert names("evaluation.best_of=16") == ["evaluation", "best_of"]
    both = 'evaluation.judge=["python:./rule.py:score", "independent"]'
    assert names(both, "evaluation.best_of=2") == ["judge", "evaluation", "best_of"]
    assert names("evaluation=false") == []


def test_the_judge_has_the_settings_of_reward_even_where_no_stage_uses_them(recipe: Path) -> None:
    words = (INDEPENDENT, "reward.learning_rate=0.002", "reward.max_steps=7")
    used = plan(recipe, *words)
    alone = plan(recipe, *words, 'stages=["sft", "dpo"]')
    judges = [{s.name: s for s in made.stages}["judge"] for made in (used, alone)]
    assert judges[0].key == judges[1].key
    loaded = alone.recipe
    assert "[reward] is the judge's alone: stages does not name it" in loaded.notes
    assert loaded.tables["judge"].options["max_steps"] == 7
    assert loaded.written_as("judge") == "reward"
    assert "--set reward.per_device_train_batch_size=" in smaller_layout(loaded, "judge", "run")
    file = recipe.with_name("resolved.toml")
    file.write_text(tomlkit.dumps(loaded.resolved()))
    assert loaded.resolved()["reward"]["learning_rate"] == 0.002
    again = plan(file)
    assert [(s.name, s.key) for s in again.stages] == [(s.name, s.key) for s in alone.stages]
    wrong = (*words, 'stages=["sft", "dpo"]', "reward.max_step=3")
    with pytest.raises(RecipeError, match="max_step: unknown key"):
        load_recipe(recipe, set=wrong)


def test_how_policies_are_asked_is_in_the_resolved_recipe_and_in_the_fingerprint(
    recipe: Path,
) -> None:
    asked = load_recipe(recipe, set=["ppo.temperature=0.9"]).resolved()["evaluation"]
    assert (asked["temperature"], asked["response_length"]) == (0.9, 16)
    sft = load_recipe(recipe, set=['stages=["sft"]'])
    length = sft.dataset.max_answer_tokens
    asked = sft.resolved()["evaluation"]
    assert (asked["temperature"], asked["response_length"]) == (0.7, length)
    as_ppo, said, other = (
        plan(recipe, "ppo.temperature=0.9", *words).stages[-1].key
        for words in ([], ["evaluation.temperature=0.9"], ["evaluation.temperature=0.7"])
    )
    assert as_ppo == said != other


def test_what_serves_their_roles(recipe: Path) -> None:
    both = 'evaluation.judge=["independent", "./other"]'
    made = plan(recipe, both, "evaluation.best_of=16")
    judge, evaluation, best_of = made.stages[3:]
    assert [stage.kind for stage in (judge, evaluation, best_of)] == [
        "judge", "evaluation", "best_of"
    ]  # fmt: skip
    assert judge.inputs == {} and judge.folder.name.startswith("judge-")
    shared = {"reward_model": "reward", "judge": "judge"}
    assert evaluation.inputs == {"policy:sft": "sft", "policy:ppo": "ppo"} | shared
    assert best_of.inputs == {"policy": "sft"} | shared
    assert evaluation.payload["judge2"] == best_of.payload["judge2"] != {}
    assert best_of.payload["settings"] == {
        "prompts": 8, "response_length": 16, "temperature": 0.7, "best_of": 16,
        "missing_eos_penalty": 1.0,
    }  # fmt: skip
    second = plan(recipe, 'evaluation.judge=["./other", "independent"]').stages[4]
    assert second.inputs["judge2"] == "judge" and "content" in second.payload["judge"]


@pytest.mark.parametrize(
    ("changes", "redone"),
    [
        ([INDEPENDENT], ["judge", "evaluation"]),
        (["evaluation.judge=./other"], ["evaluation"]),
        (["evaluation.judge=python:./rule.py:score"], ["evaluation"]),
        (["evaluation.best_of=16"], ["best_of"]),
        (["reward.minimum_accuracy=0.5", "ppo.minimum_accuracy=0.4"], []),
    ],
)
def test_asked_for_later_they_redo_nothing_before_them(
    recipe: Path, changes: list[str], redone: list[str]
) -> None:
    finish(plan(recipe))
    assert list(again(plan(recipe, *changes))) == redone


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ("ppo.learning_rate=2e-4", ["ppo", "evaluation"]),
        ("ppo.response_length=32", ["ppo", "evaluation", "best_of"]),
        ("ppo.missing_eos_penalty=2.0", ["ppo", "evaluation", "best_of"]),
        ("sft.learning_rate=2e-4", [*CHAIN, "evaluation", "best_of"]),
        ("reward.learning_rate=2e-5", ["reward", "ppo", "judge", "evaluation", "best_of"]),
        ("reward.logging_steps=3", []),
        ("evaluation.best_of=8", ["best_of"]),
        ("evaluation.judge=none", ["evaluation", "best_of"]),
        ("dataset.judge_fraction=0.5", [*CHAIN, "judge", "evaluation", "best_of"]),
    ],
)
def test_a_change_redoes_what_takes_it(recipe: Path, change: str, redone: list[str]) -> None:
    with recipe.open("a") as file:
        file.write('judge = "independent"\nbest_of = 16\n')
    finish(plan(recipe))
    assert list(again(plan(recipe, change))) == redone


def test_why_the_evaluation_runs_again(recipe: Path) -> None:
    finish(plan(recipe))
    assert again(plan(recipe, INDEPENDENT)) == {"judge": "new", "evaluation": "input judge added"}
    shutil.rmtree(recipe.parent / "runs" / ".stages")  # an equally near kin, by one difference too
    finish(plan(recipe, "evaluation.judge=./other"))
    (recipe.parent / "other" / "config.json").write_text('{"other": 1}')
    changed = again(plan(recipe, "evaluation.judge=./other"))
    assert changed == {"evaluation": "judge config.json changed"}


def table_of(recipe: Recipe) -> tuple[object, ...]:
    table = recipe.table("judge")
    return table.kind, table.policy, table.options, table.extras, table.given, table.dataset


def test_the_judge_learns_as_the_last_reward_stage_does(recipe: Path) -> None:
    text = RECIPE.replace('"ppo"]', '"second", "ppo"]').replace(
        "[ppo]", '[second]\nkind = "reward"\nmax_steps = 7\ndataset.path = "./pairs.jsonl"\n[ppo]'
    )
    loaded = load_recipe(toy(recipe.parent, "two", text), set=[INDEPENDENT])
    second = loaded.table("second")
    own = (second.options, second.extras, second.given, second.dataset)
    assert table_of(loaded) == ("judge", None, *own)
    assert loaded.table("judge").options["max_steps"] == 7 and loaded.table("judge").dataset
    assert "--set second." in smaller_layout(loaded, "judge", "two")


def test_without_a_reward_stage_it_learns_as_one_would(recipe: Path) -> None:
    text = RECIPE.replace('"reward", "ppo"', '"dpo"').replace("[reward]\nlearning_rate = 1e-5", "")
    loaded = load_recipe(toy(recipe.parent, "dpo", text), set=[INDEPENDENT])
    default = load_recipe(recipe, unset=["reward.learning_rate"]).table("reward")
    none = (default.options, default.extras, default.given, None)
    assert table_of(loaded) == ("judge", None, *none)
    assert loaded.all_stages == ["sft", "dpo", "judge", "evaluation"]


def test_resolved_is_the_same_recipe(recipe: Path) -> None:
    both = 'evaluation.judge=["independent", "./other"]'
    loaded = load_recipe(recipe, set=[both, "evaluation.best_of=4", "ppo.minimum_accuracy=0.6"])
    resolved = loaded.resolved()
    assert "judge" not in resolved and resolved["ppo"]["minimum_accuracy"] == 0.6
    assert resolved["evaluation"]["judge"] == ["independent", str(recipe.parent / "other")]
    file = recipe.parent / "sub" / "resolved.toml"
    file.parent.mkdir()
    file.write_text(tomlkit.dumps(resolved))
    again = load_recipe(file)
    assert again.all_stages == loaded.all_stages and again.resolved() == resolved
    assert again.table("judge").options == loaded.table("judge").options


def test_fetch_brings_a_judge_from_the_hub(recipe: Path) -> None:
    both = 'evaluation.judge=["python:./rule.py:score", "me/judge"]'
    brought = {both: ["me/judge"], "evaluation.judge=./other": ["./other"]}
    for word, names in {**brought, INDEPENDENT: [], "evaluation=false": []}.items():
        assert list(_models(load_recipe(recipe, set=[word]))) == names


def test_a_run_is_known_by_its_reward_model_not_by_its_judge(recipe: Path) -> None:
    made = finish(plan(recipe, INDEPENDENT, "evaluation.best_of=2"))
    entries = [
        {"name": s.name, "kind": s.kind, "folder": f".stages/{s.folder.name}"} for s in made.stages
    ]
    made.run_folder.mkdir()
    for name, told in {
        "manifest": HEAD | {"stages": entries},
        "results": {"format": 1, "reward.accuracy": 0.9, "judge.accuracy": 0.7, "ppo.kl": 5.0},
    }.items():
        (made.run_folder / f"{name}.json").write_text(json.dumps(told))
    assert history.list_runs(made.runs)["runs"][0]["numbers"] == {
        "reward.accuracy": 0.9, "ppo.kl": 5.0
    }  # fmt: skip
    # A stage whose kind is of two words is known for one, too, and goes when no run refers to it.
    entries.pop()
    (made.run_folder / "manifest.json").write_text(json.dumps(HEAD | {"stages": entries}))
    assert [spare[0].name for spare in unused(made.runs)[0]] == [made.stages[-1].folder.name]
