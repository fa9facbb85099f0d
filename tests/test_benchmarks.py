"""What the benchmarks' numbers rest on: the order of sides, the ratios, the prompts, the bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from benchmarks import common, memory_by_size, ppo_vs_trl, recipe_vs_scripts
from benchmarks.meter import held_bytes
from rlhf_recipes.recipe.load import load_recipe

pytestmark = pytest.mark.train


def test_sides_run_in_turn_and_ratios_are_taken_pair_by_pair() -> None:
    order: list[str] = []
    sides = {name: lambda name=name: order.append(name) or {"n": len(order)} for name in "ab"}
    found = common.in_turn(sides, 2)
    assert order == ["a", "b", "a", "b"]
    seconds = {name: [run["n"] for run in runs] for name, runs in found.items()}
    assert seconds == {"a": [1, 3], "b": [2, 4]}
    ratio = common.ratios(seconds["a"], seconds["b"])
    assert ratio == {"median": 0.625, "min": 0.5, "max": 0.75}
    assert common.at_most(0.6, ratio) == {"at_most": 0.6, "got": 0.625, "met": False}
    assert common.at_least(0.6, ratio)["met"]


def test_prompts_are_64_of_5_to_60_words() -> None:
    prompts = ppo_vs_trl.prompts()
    lengths = [len(prompt.split()) for prompt in prompts]
    assert len(set(prompts)) == 64 and (min(lengths), max(lengths)) == (5, 60)


def test_the_scripts_are_given_every_setting_of_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(recipe_vs_scripts.SMOKE)
    commands = recipe_vs_scripts.script_commands(recipe, tmp_path)
    for stage, words in commands.items():
        given = {k: v for k, v in recipe.table(stage).given.items() if k != "eval_strategy"}
        assert {f"--{key}={value}" for key, value in given.items()} <= set(words)
        assert {f"--lora_r={recipe.lora['r']}", f"--dtype={recipe.model.dtype}"} <= set(words)


@pytest.mark.parametrize("bits", [16, 4])
def test_bytes_by_role_are_what_the_shapes_say(bits: int) -> None:
    """Two layers of 64 and 128, four heads: counted by hand."""
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)
    rest = 2 * 100 * 64 + 5 * 64  # embedding, language head, norms
    adapter = 4 * 16 * 2 * (4 * (64 + 64) + 3 * (64 + 128))
    with torch.device("meta"):
        ours, trl = memory_by_size.ours(config, bits), memory_by_size.trl(config, bits, 16)
    each = 2 if bits == 16 else 0.5 + 1 / 64 + 1 / 4096
    head = 4 * 65
    assert ours["base"] == linear * each + rest * 2
    assert (ours["policy adapter"], ours["value adapter"]) == (adapter, adapter + head)
    assert ours["gradients"] == 2 * adapter + head
    value = 2 * (linear + rest - 100 * 64 + 64)  # a scalar head in place of the language head
    assert (trl["value"], trl["gradients"]) == (value, value + adapter)
    steps = 4 * len(list(memory_by_size.classifier(config).parameters())) + 4 * 28
    assert trl["optimizer"] == 2 * (value + adapter) + steps


def test_held_bytes_count_each_storage_once() -> None:
    before = held_bytes()
    one = torch.nn.Linear(10, 10, bias=False)
    other = torch.nn.Linear(10, 10, bias=False)
    other.weight = one.weight
    optimizer = torch.optim.AdamW(one.parameters())
    one(torch.ones(10)).sum().backward()
    optimizer.step()
    after = held_bytes()
    assert after["weights_bytes"] - before["weights_bytes"] == 400
    assert after["optimizer_bytes"] - before["optimizer_bytes"] == 2 * 400 + 4
    del other
