# ruff: noqa: E501 (messages as they are)
"""All that is wrong with a recipe is said at once, by line; and every message has a case."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.errors import RecipeError, UsageError
from rlhf_recipes.recipe import check as validate
from rlhf_recipes.recipe import check_stages
from rlhf_recipes.recipe import load as recipe
from tests.helpers.malformed import CASES, TOML, WORDS
from tests.helpers.recipes import COMMENTED, MINIMAL, MODEL, TWO, load, problems


@pytest.mark.parametrize(("old", "new", "begins", "word"), CASES)
def test_one_problem(tmp_path: Path, old: str, new: str, begins: str, word: str) -> None:
    assert old in MINIMAL
    (problem,) = problems(tmp_path, MINIMAL.replace(old, new))
    assert problem.startswith(begins) and word in problem.removeprefix(begins)


@pytest.mark.parametrize(("text", "line", "word"), TOML)
def test_what_is_no_toml(tmp_path: Path, text: bytes, line: int, word: str) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(text)
    with pytest.raises(RecipeError) as caught:
        recipe.load_recipe(path)
    said = str(caught.value)
    assert said.startswith(f"{path}:{line}: ") and word in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(("option", "given", "key", "word"), WORDS)
def test_problems_name_the_word(
    tmp_path: Path, option: str, given: str, key: str, word: str
) -> None:
    (problem,) = problems(tmp_path, COMMENTED, **{option[2:]: [given]})
    assert problem.startswith(f"{option} {given}: {key}: ") and word in problem


def test_a_long_word_is_cut(tmp_path: Path) -> None:
    assert problems(tmp_path, COMMENTED, set=[f"seed={'9' * 5_000}"]) == [
        f'--set seed={"9" * 79}…: seed: must be a whole number, not "{"9" * 56}…'
    ]
    assert problems(tmp_path, COMMENTED, unset=["model.name"]) == [
        'my.toml:7: model: needs name = "…": a hub id, or a folder (./…)'
    ]


def test_all_problems_at_once_with_their_lines(tmp_path: Path) -> None:
    text = """\
title = 3
stages = ["sft", "rewrad",
  "ppo", "ppo"]
seed = -1
colour = "red"

[model]
name = "./nowhere"
dtype = "bf16"

[lora]
r = "16"
modules_to_save = ["lm_head"]

[dataset]
path = "./pears.jsonl"
test_fraction = 0.5
validation_fraction = 0.5

[sft]
learning_rat = 1e-3
bf16 = true
packing = true
dataset = { path = "./pairs.jsonl", judge_fraction = 0.1 }

[ppo]
num_mini_batches = 3
[ppo.guard]
max_kl = -1
[rloo]
beta = 0
"""
    assert problems(tmp_path, text) == [
        "my.toml:1: title: must be text, not 3",
        'my.toml:2: stages: "rewrad" is no kind of stage, and has no table'
        ' (did you mean "reward"?)',
        'my.toml:3: stages: "ppo" stands twice: a second one needs a name and a kind',
        "my.toml:4: seed: must be at least 0, not -1",
        "my.toml:5: colour: unknown key"
        " (there are title, stages, seed, model, lora, dataset, evaluation, rounds)",
        "my.toml:8: model.name: no such folder: nowhere",
        'my.toml:9: model.dtype: must be "auto", "bfloat16", "float16" or "float32", not "bf16"'
        ' (did you mean "bfloat16"?)',
        'my.toml:12: lora.r: must be a whole number, not "16" (leave out the quotes)',
        "my.toml:13: lora.modules_to_save: is refused: it would train or rebuild the base model"
        " that all adapters share",
        "my.toml:16: dataset.path: no such file or folder: pears.jsonl",
        "my.toml:17: dataset.test_fraction: nothing is left to train on: 0.5 + 0.5 ≥ 1",
        'my.toml:21: sft.learning_rat: unknown key (did you mean "learning_rate"?)',
        "my.toml:22: sft.bf16: belongs to model.dtype: one precision for all stages",
        "my.toml:23: sft.packing: is refused: without FlashAttention, rows that share a sequence"
        " see each other",
        "my.toml:24: sft.dataset.judge_fraction: belongs to dataset.judge_fraction:"
        " a prompt is on the same side of the split in every stage",
        "my.toml:27: ppo.num_mini_batches: 3 does not divide"
        " per_device_train_batch_size × gradient_accumulation_steps = 8",
        "my.toml:29: ppo.guard.max_kl: must be above 0, not -1",
    ]


def test_a_home_that_nobody_has(tmp_path: Path) -> None:
    text = MINIMAL.replace("org/base", "~no-such-user/base").replace("./pairs", "~no-such-user/p")
    assert problems(tmp_path, text) == [
        "my.toml:4: model.name: no such folder: ~no-such-user/base",
        "my.toml:7: dataset.path: no such file or folder: ~no-such-user/p.jsonl",
    ]


def test_all_weights_do_not_train_in_4_bit(tmp_path: Path) -> None:
    text = "lora = false\n" + MINIMAL.replace(MODEL, MODEL + '\nquantization = "4bit"')
    found = problems(tmp_path, text)
    assert found == ["my.toml:1: lora: weights in 4bit cannot train; adapters on them can"]


def test_problems_of_several_datasets(tmp_path: Path) -> None:
    text = TWO.replace("weight = 0.5", 'weight = 1.5\njudge_fraction = 0.25\npaht = "x"')
    text += '[[dataset]]\npath = "./gone.jsonl"\ntest_fraction = 0.2\ntest_split = "t"\n'
    assert problems(tmp_path, text) == [
        "my.toml:13: dataset.weight: must be above 0, at most 1, not 1.5",
        "my.toml:14: dataset.judge_fraction: is 0.5 above, and a prompt is on the same side in every dataset",
        'my.toml:15: dataset.paht: unknown key (did you mean "path"?)',
        "my.toml:18: dataset.path: no such file or folder: gone.jsonl",
        "my.toml:19: dataset.test_fraction: leave it out: test_split says what the test is",
    ]
    both = TWO.replace("judge_fraction = 0.5", "test_fraction = 0.2")
    assert problems(tmp_path, both) == [
        "my.toml:9: dataset.test_fraction: leave it out: test_split says what the test is"
    ]
    for words in ({"set": ["dataset.weight=0.5"]}, {"unset": ["dataset.weight"]}):
        assert len(problems(tmp_path, TWO, **words)) == 1
    assert load(tmp_path, TWO.replace("judge_fraction = 0.5", "validation_fraction = 0.95"))
    assert problems(tmp_path, "dataset = []\n" + MINIMAL[: MINIMAL.index("[dataset]")]) == [
        'my.toml:1: dataset: is missing: [dataset] with path = "…" names the preference data'
    ]


def test_a_table_that_is_not_used_is_checked_all_the_same(tmp_path: Path) -> None:
    text = MINIMAL.replace('"sft", "reward", "ppo"', '"sft"') + "[ppo]\nkl_coff = 1\n"
    assert problems(tmp_path, text) == [
        'my.toml:9: ppo.kl_coff: unknown key (did you mean "kl_coef"?)'
    ]


def test_a_hundred_problems_are_enough_to_look_for_near_names(tmp_path: Path) -> None:
    keys = "".join(f"max_step{n} = 1\n" for n in range(200))
    found = problems(tmp_path, f"{MINIMAL}[sft]\n{keys}")
    assert len(found) == 200
    assert found[0] == 'my.toml:9: sft.max_step0: unknown key (did you mean "max_steps"?)'
    assert found[-1] == "my.toml:208: sft.max_step199: unknown key"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.toml", tmp_path):
        with pytest.raises(UsageError, match=f"{path} is no recipe file"):
            recipe.load_recipe(path)


def test_every_message_has_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test above makes each call of `problem` in the checks."""
    files = [Path(module.__file__) for module in (validate, check_stages)]
    nodes = [(file, node) for file in files for node in ast.walk(ast.parse(file.read_text()))]
    calls = {(file.name, n.lineno) for file, n in nodes if ast.unparse(n).endswith(".problem")}
    made, problem = set(), validate.Checker.problem

    def told(*words: Any) -> None:
        frame = sys._getframe(1)
        made.add((Path(frame.f_code.co_filename).name, frame.f_lineno))
        problem(*words)

    monkeypatch.setattr(validate.Checker, "problem", told)
    for old, new, *_ in CASES:
        problems(tmp_path, MINIMAL.replace(old, new))
    test_all_problems_at_once_with_their_lines(tmp_path)
    test_all_weights_do_not_train_in_4_bit(tmp_path)
    test_problems_of_several_datasets(tmp_path)
    problems(tmp_path, "lora = false\n" + MINIMAL.replace(MODEL, f'{MODEL}\nsampler = "vllm"'))
    assert calls and calls - made == set()


@pytest.mark.parametrize(
    ("model", "lora", "said"),
    [
        ("", "lora = false\n", "needs adapters: with lora = false every update would send all weights"),
        ('quantization = "4bit"\n', "", "serves the base in 16 or 32 bit, and it is trained in 4bit"),
        ("", "lora = { use_dora = true }\n", "loads plain LoRA alone: leave out lora.use_dora"),
        ("", "lora = { alpha_pattern = { q_proj = 2 } }\n", "loads plain LoRA alone: leave out lora.alpha_pattern"),
    ],
)  # fmt: skip
def test_what_vllm_would_not_serve_is_refused(
    tmp_path: Path, model: str, lora: str, said: str
) -> None:
    text = lora + MINIMAL.replace(MODEL, f'{MODEL}\nsampler = "vllm"\n{model}')
    assert problems(tmp_path, text)[0].endswith(f'model.sampler: "vllm" {said}')
    assert (
        load(tmp_path, MINIMAL.replace(MODEL, f'{MODEL}\nsampler = "vllm"')).model.sampler == "vllm"
    )
