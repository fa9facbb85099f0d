"""The package from Python: what `load_recipe` takes, and how its objects show."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import rlhf_recipes
from rlhf_recipes import load_recipe, plan_run
from rlhf_recipes.errors import RecipeError
from tests.helpers.counting import RECIPE, Counting, toy


def test_a_recipe_by_name_and_by_dictionary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_recipe("smoke").path.name == "smoke.toml"
    file = toy(tmp_path)
    monkeypatch.chdir(tmp_path)
    tables = tomllib.loads(RECIPE)
    recipe = load_recipe(tables, set=["seed=7"])
    assert recipe.resolved() == load_recipe(file, set=["seed=7"]).resolved()
    assert repr(recipe) == "<Recipe 'Toy': sft → reward → ppo → evaluation>"
    with pytest.raises(RecipeError, match="seed: must be at least 0, not -1"):
        load_recipe({**tables, "seed": -1})


def test_what_comes_back_is_short_and_a_notebook_shows_its_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlhf_recipes import run

    Counting(monkeypatch)
    monkeypatch.setenv("RLHF_RECIPES_RUNS", str(tmp_path / "own"))
    recipe = load_recipe(toy(tmp_path))
    plan = plan_run(recipe)
    assert plan.run_folder == tmp_path / "own" / "toy"
    shown = "sft runs, reward runs, ppo runs, evaluation runs"
    assert repr(plan) == f"<Plan of {plan.run_folder}: {shown}>"
    outcome = run(recipe)
    assert outcome.report.is_file()
    assert repr(outcome).startswith(
        f"<RunOutcome of {plan.run_folder}: PPO wins against SFT on 75 %"
    )
    page = outcome._repr_html_()
    assert "<li>? PPO wins against SFT on 75 % of 8 prompts" in page
    assert "<td>reward</td><td>ran</td><td>loss 0.50 → 0.25</td>" in page


def test_the_names_are_listed() -> None:
    assert {"load_recipe", "plan_run", "run"} <= {*dir(rlhf_recipes)}
