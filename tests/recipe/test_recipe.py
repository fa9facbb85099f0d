# ruff: noqa: E501 (tables of messages: a case a line)
from __future__ import annotations

from pathlib import Path

import pytest
import tomlkit

from rlhf_recipes.errors import UsageError
from rlhf_recipes.recipe.load import (
    find_recipe,
    layout_settings,
    load_recipe,
    shipped_recipes,
)
from rlhf_recipes.recipe.tables import MirrorTable
from rlhf_recipes.store.fingerprint import Identities, settings
from tests.helpers.recipes import DATA, MINIMAL, MIRROR, MODEL, SAVING, SHA, TWO, load, write

KNOWN = Identities({}, {}, {}, {})


# ---- what a recipe comes to


def test_a_minimal_recipe(tmp_path: Path) -> None:
    recipe = load(tmp_path, MINIMAL)
    assert (recipe.title, recipe.seed, recipe.stages) == ("my", 42, ("sft", "reward", "ppo"))
    assert recipe.text == MINIMAL
    assert (recipe.model.dtype, recipe.model.quantization) == ("auto", "none")
    assert not recipe.model.is_local
    assert recipe.dataset.is_local
    assert recipe.dataset.file == tmp_path / "pairs.jsonl"
    assert recipe.dataset.judge_fraction == 0.25
    assert recipe.evaluation.prompts == 128
    assert recipe.lora == {
        "r": 16,
        "target_modules": "all-linear",
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
    }
    assert recipe.notes == ()


def test_stages_resolved(tmp_path: Path) -> None:
    text = MINIMAL + "[sft]\nmax_steps = 5\n[ppo]\nnum_ppo_epochs = 2\n[ppo.guard]\nmax_kl = 8\n"
    recipe = load(tmp_path, text)
    sft, reward, ppo = map(recipe.table, recipe.stages)
    assert sft.given == {"learning_rate": 2e-4, "max_steps": 5} | SAVING
    assert sft.options["weight_decay"] == 0.0
    assert "output_dir" not in sft.options and "packing" not in sft.options
    assert sft.extras == {}
    assert reward.given == {"learning_rate": 1e-4, "center_rewards_coefficient": 0.01} | SAVING
    assert reward.extras == {
        "head_learning_rate": 1e-4,
        "minimum_accuracy": 0.55,
        "use_margin": False,
        "pairs": None,
    }
    assert ppo.extras == {
        "value_learning_rate": 1e-4,
        "value_warmup_epochs": 0,
        "rewards": None,
        "keep": "best",
        "minimum_accuracy": None,  # the reward stage's
        "guard": {"max_kl": 8.0, "min_entropy": 0.1, "min_length": 0.2, "max_score_drop": 1.5},
    }
    assert {k: recipe.resolved()["ppo"].get(k) for k in ppo.extras} == ppo.extras
    assert (ppo.given["eval_strategy"], ppo.given["eval_steps"]) == ("steps", 0.2)
    assert ppo.options["lam"] == 1.0 and ppo.options["num_ppo_epochs"] == 2
    roles = [(t.policy, t.reward_model, t.reference) for t in (sft, reward, ppo)]
    assert roles == [(None, None, None), ("sft", None, None), ("sft", "reward", None)]


def test_resolved_is_a_recipe_whose_stages_are_the_same(tmp_path: Path) -> None:
    text = MINIMAL.replace("org/base", "./model") + (
        '[sft]\ndataset = { path = "./pairs.jsonl" }\n[ppo]\nreward_model = "./model"\n'
    )
    recipe = load(tmp_path, text)
    resolved = tmp_path / "elsewhere" / "resolved.toml"
    resolved.parent.mkdir()
    resolved.write_text(tomlkit.dumps(recipe.resolved()))
    again = load_recipe(resolved)
    assert again.lora == recipe.lora and again.dataset.file == recipe.dataset.file
    assert again.model.folder == recipe.model.folder
    assert again.table("ppo").reward_model == str(tmp_path / "model")
    assert again.table("sft").dataset.file == recipe.table("sft").dataset.file
    for stage in recipe.stages:
        assert settings(again, stage, KNOWN) == settings(recipe, stage, KNOWN)
    assert again.resolved() == recipe.resolved() | {"title": "my"}


def test_columns_and_a_test_file_are_resolved(tmp_path: Path) -> None:
    text = MINIMAL.replace(
        DATA,
        'path = "./model"\ndata_files = { train = "a.jsonl", test = "b/*.jsonl" }\n'
        'test_split = "test"\n[dataset.columns]\nprompt = "question"',
    )
    recipe = load_recipe(write(tmp_path, text), set=["dataset.columns.chosen=good"])
    assert recipe.dataset.columns == {"prompt": "question", "chosen": "good"}
    resolved = tmp_path / "elsewhere" / "resolved.toml"
    resolved.parent.mkdir()
    resolved.write_text(tomlkit.dumps(recipe.resolved()))
    again = load_recipe(resolved).dataset
    assert (again.columns, again.data_files) == (recipe.dataset.columns, recipe.dataset.data_files)
    assert (again.file, again.test_split) == (tmp_path / "model", "test")


def test_a_mirror_and_a_judge_are_resolved(tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text("")
    text = MINIMAL.replace(MODEL, MIRROR) + '[evaluation]\njudge = "python:./rule.py:rule"\n'
    recipe = load(tmp_path, text)
    assert recipe.model.mirror == MirrorTable("a-wheel==1.0", "a/model.gguf", SHA)
    resolved = tmp_path / "elsewhere" / "resolved.toml"
    resolved.parent.mkdir()
    resolved.write_text(tomlkit.dumps(recipe.resolved()))
    again = load_recipe(resolved)
    assert again.model == recipe.model
    assert again.evaluation.judge == f"python:{tmp_path / 'rule.py'}:rule"
    assert again.resolved() == recipe.resolved() | {"title": "my"}


def test_result_and_layout(tmp_path: Path) -> None:
    def both(words: str) -> tuple[dict, dict]:
        recipe = load(tmp_path, MINIMAL + "[ppo]\n" + words)
        return settings(recipe, "ppo", KNOWN), layout_settings(recipe, "ppo")

    whole = "per_device_train_batch_size = 16\n"
    halved = "per_device_train_batch_size = 8\ngradient_accumulation_steps = 2\n"
    result, layout = both(whole)
    assert result == {"batch_size": 16}  # what equals its default is left out
    assert both(whole + 'keep = "best"\n') == (result, layout)
    assert both(whole + "guard.max_kl = 8\n")[0] == result | {"guard": {"max_kl": 8.0}}
    assert both(whole + "logging_steps = 1\n") == (result, layout)
    assert both(halved)[0] == result
    assert both(halved)[1] == layout | {
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
    }
    assert both(whole + "cliprange = 0.3\n")[0] == result | {"cliprange": 0.3}
    assert both(whole + "learning_rate = 1\n")[0] == result | {"learning_rate": 1.0}
    rates = "learning_rate = 1\nvalue_learning_rate = 2\n"
    assert both(whole + rates)[0] == result | {"learning_rate": 1.0, "value_learning_rate": 2.0}


def test_several_datasets(tmp_path: Path) -> None:
    text = TWO.replace("0.5\ntest", "0.5\nmax_prompt_tokens = 32\njudge_fraction = 0.5\ntest")
    for recipe in (load(tmp_path, TWO), load(tmp_path, text)):
        (more,) = recipe.dataset.more
        assert (recipe.dataset.path, more.path) == ("./pairs.jsonl", "org/more")
        assert (recipe.dataset.weight, more.weight, more.test_split) == (None, 0.5, "test")
        assert (recipe.dataset.judge_fraction, more.judge_fraction) == (0.5, 0.5)
    assert [load(tmp_path, t).dataset.more[0].max_prompt_tokens for t in (TWO, text)] == [64, 32]
    resolved = tmp_path / "elsewhere" / "resolved.toml"
    resolved.parent.mkdir()
    resolved.write_text(tomlkit.dumps(recipe.resolved()))
    again = load_recipe(resolved)
    assert again.resolved() == recipe.resolved() | {"title": "my"}
    assert again.dataset.more == recipe.dataset.more
    assert again.dataset.file == recipe.dataset.file


# ---- files


def test_shipped_recipes_are_found_by_name(tmp_path: Path) -> None:
    assert "smoke" in [path.stem for path in shipped_recipes()]
    assert find_recipe("smoke").name == "smoke.toml"
    file = write(tmp_path, MINIMAL)
    assert find_recipe(str(file)) == file
    assert find_recipe(str(file.with_suffix(""))) == file
    with pytest.raises(UsageError, match="pairs.csv holds rows, not a recipe") as error:
        find_recipe("pairs.csv")
    assert error.value.hint == "rlhf-recipes init pairs.csv writes one"
    with pytest.raises(UsageError, match=r'no recipe smok \(did you mean "smoke"\?\) \(shipped: '):
        find_recipe("smok")


def test_without_lora_the_learning_rates_are_upstreams(tmp_path: Path) -> None:
    recipe = load(tmp_path, "lora = false\nevaluation = false\n" + MINIMAL)
    assert recipe.lora is None and recipe.evaluation is None
    rates = [recipe.table(name).options["learning_rate"] for name in recipe.stages]
    assert rates == [2e-5, 1e-4, 3e-6]


def test_wiring_that_says_otherwise(tmp_path: Path) -> None:
    text = MINIMAL.replace('"ppo"]', '"ppo", "again", "last"]') + (
        '[again]\nkind = "ppo"\npolicy = "sft"\nreference = "ppo"\nreward_model = "./model"\n'
        '[last]\nkind = "sft"\ndataset = { path = "org/data", max_answer_tokens = 9 }\n'
    )
    recipe = load(tmp_path, text.replace("[dataset]", '[dataset]\nsystem = "s"'))
    again, last = recipe.table("again"), recipe.table("last")
    assert (again.kind, again.policy) == ("ppo", "sft")
    assert (again.reward_model, again.reference) == ("./model", "ppo")
    assert last.policy == "again"
    own = last.dataset
    assert (own.path, own.max_answer_tokens, own.max_prompt_tokens) == ("org/data", 9, 512)
    assert (own.system, own.test_split, own.test_fraction) == ("s", None, 0.1)
    text = MINIMAL.replace("[dataset]", '[dataset]\ntest_split = "t"')
    own = load(tmp_path, text + '[sft]\ndataset = { path = "org/data" }\n').table("sft").dataset
    assert (own.test_split, own.test_fraction) == (None, 0.0)


def test_notes(tmp_path: Path) -> None:
    text = MINIMAL.replace('"sft", "reward", "ppo"', '"sft"').replace("org/base", "model")
    assert load(tmp_path, text + "[ppo]\nkl_coef = 0.1\n").notes == (
        'model.name: a hub id; for the folder write "./model"',
        "[ppo] is not used: stages does not name it",
    )
