"""`[rounds]` writes the stages of further rounds out; the first round is as it was without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.errors import RecipeError
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.wiring import wiring

TOML = """
stages = ["sft", "sample", "label", "reward", "ppo"]

[model]
name = "someone/small"

[dataset]
path = "someone/prompts"

[sample]
prompts = 50

[ppo]
kl_coef = 0.1

[evaluation]
judge = "independent"
"""
ROUNDS = ["rounds.count=3", "rounds.from=sample"]


@pytest.fixture
def load(tmp_path: Path) -> Any:
    file = tmp_path / "mine.toml"
    file.write_text(TOML)
    return lambda *words: load_recipe(file, set=words)


def test_rounds_are_stages_with_names_of_their_own(load: Any):
    recipe, taken = load(*ROUNDS), wiring(load(*ROUNDS))
    ahead = ["sft", "sample", "label", "reward", "ppo"]
    further = [f"{name}-{n}" for n in (2, 3) for name in ahead[1:]]
    assert [*recipe.stages] == ahead + further
    assert taken["sample-2"] == {"policy": "ppo"}
    assert taken["label-2"] == {"answers": "sample-2"}
    assert taken["reward-2"] == {
        "policy": "sft",
        "label:label": "label",
        "label:label-2": "label-2",
    }
    assert taken["ppo-3"] == {"policy": "ppo-2", "reward_model": "reward-3", "reference": "sft"}
    assert taken["judge"].keys() == {"label:label", "label:label-2", "label:label-3"}
    assert [recipe.table(f"sample{n}").extras["skip"] for n in ("", "-2", "-3")] == [0, 50, 100]
    assert recipe.table("ppo-3").options["kl_coef"] == 0.1


def test_the_first_round_is_as_without_rounds(load: Any):
    plain, more = load(), load(*ROUNDS)
    for stage in plain.stages:
        assert plain.table(stage) == more.table(stage)
        assert wiring(plain)[stage] == wiring(more)[stage]


def test_each_choice_of_the_table(load: Any):
    words = ["rounds.policy=first", "rounds.reference=last", "rounds.pairs=last"]
    recipe = load(*ROUNDS, *words, "rounds.prompts=same", 'reward.pairs=["label"]')
    taken = wiring(recipe)
    assert taken["ppo-2"] == {"policy": "sft", "reward_model": "reward-2"}
    assert taken["reward-3"] == {"policy": "sft", "label:label-3": "label-3"}
    assert recipe.table("sample-3").extras["skip"] == 0
    every = wiring(load(*ROUNDS, 'reward.pairs=["dataset", "label"]'))
    assert [role for role in every["reward-2"] if "label" in role] == [
        "label:label",
        "label:label-2",
    ]


def test_the_resolved_recipe_is_the_same_without_the_table(load: Any, tmp_path: Path):
    import tomlkit

    recipe = load(*ROUNDS)
    file = tmp_path / "resolved.toml"
    file.write_text(tomlkit.dumps(recipe.resolved()))
    again = load_recipe(file)
    assert again.stages == recipe.stages and wiring(again) == wiring(recipe)
    assert [again.table(s).extras for s in again.stages] == [
        recipe.table(s).extras for s in recipe.stages
    ]


def test_a_table_of_a_further_round_is_refused(load: Any):
    file = load().path
    file.write_text(f'{TOML}[ppo-2]\nkind = "ppo"\n[rounds]\ncount = 2\nfrom = "sample"\n')
    with pytest.raises(RecipeError, match=r"\[rounds\] writes ppo-2 itself"):
        load_recipe(file)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rounds.count=2"], "must be one of stages: sft, sample"),
        ([*ROUNDS, "rounds.form=sft"], "unknown key"),
        (["rounds.count=0"], "must be at least 1"),
        ([*ROUNDS, "rounds.policy=best"], 'must be "last" or "first"'),
        ([*ROUNDS, 'stages=["sample", "label", "reward", "ppo"]'], "ppo starts from the base"),
    ],
)
def test_what_is_wrong_is_said(load: Any, words: list[str], said: str):
    with pytest.raises(RecipeError) as wrong:
        load(*words)
    assert said in str(wrong.value)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"ppo"]', '"ppp"]', 'stages: "ppp" is no kind of stage'),
        ('"ppo"]', '"ppo", 3]', "stages: must be a list of texts"),
        ('"ppo"]', '"ppo", ["a"]]', "stages: must be a list of texts"),
        ('"ppo"]', '"ppo", "rounds"]', '"rounds" cannot be the name of a stage'),
        ("kl_coef = 0.1", 'kl_coef = "x"', "ppo.kl_coef: must be a number"),
        ("prompts = 50", 'skip = "a"', "sample.skip: must be a whole number"),
        ("[evaluation]", "[reward]\npairs = 3\n[evaluation]", "reward.pairs: must be a list"),
    ],
)
def test_what_is_wrong_in_the_first_round_is_said_once(
    tmp_path: Path, old: str, new: str, said: str
):
    file = tmp_path / "mine.toml"
    assert old in TOML
    file.write_text(TOML.replace(old, new) + '[rounds]\ncount = 2\nfrom = "sample"\n')
    with pytest.raises(RecipeError) as wrong:
        load_recipe(file)
    [problem] = wrong.value.problems
    assert said in str(problem) and problem.line


def test_more_rounds_than_anyone_means_are_refused_at_once(load: Any):
    with pytest.raises(RecipeError) as wrong:
        load("rounds.count=999999999999999999", "rounds.from=sample")
    assert "stages of 4: 400 are the most" in str(wrong.value)


def test_pairs_may_be_one_text(load: Any):
    assert load(*ROUNDS, "reward.pairs=label").table("reward-2").extras["pairs"] == [
        "label",
        "label-2",
    ]
