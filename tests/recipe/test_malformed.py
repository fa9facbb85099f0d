# ruff: noqa: E501 (messages as they are)
"""All that is wrong with a recipe is said at once, by line; and every message has a case."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from rlhf_recipes.errors import RecipeError, UsageError
from rlhf_recipes.recipe import aliases, check_stages, edit, fields
from rlhf_recipes.recipe import check as validate
from rlhf_recipes.recipe import load as recipe
from rlhf_recipes.recipe import toml as lines
from tests.helpers.malformed import CASES, TOML, WORDS
from tests.helpers.recipes import (
    COMMENTED,
    MINIMAL,
    MODEL,
    TWO,
    load,
    problems,
)


@pytest.mark.parametrize(("old", "new", "problem"), CASES)
def test_one_problem(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert old in MINIMAL
    assert problems(tmp_path, MINIMAL.replace(old, new)) == [problem]


@pytest.mark.parametrize(("text", "problem"), TOML)
def test_what_is_no_toml(tmp_path: Path, text: bytes, problem: str) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(text)
    with pytest.raises(RecipeError) as caught:
        recipe.load_recipe(path)
    line, _, rest = problem.partition(": ")
    said = rest if rest == "is not UTF-8 text" else f"not TOML: {rest}"
    assert str(caught.value) == f"{path}:{line}: {said}"
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("words", "unset", "found"), WORDS)
def test_problems_name_the_word(
    tmp_path: Path, words: list[str], unset: list[str], found: str
) -> None:
    assert problems(tmp_path, COMMENTED, set=words, unset=unset) == [found]


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
        " (there are title, stages, seed, model, lora, dataset, evaluation)",
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
        "my.toml:30: rloo: is reserved: this version knows sft, reward, ppo, dpo",
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


REST = (
    test_a_hundred_problems_are_enough_to_look_for_near_names,
    test_a_file_that_is_not_there,
    test_all_problems_at_once_with_their_lines,
    test_a_home_that_nobody_has,
    test_all_weights_do_not_train_in_4_bit,
    test_problems_of_several_datasets,
    test_a_table_that_is_not_used_is_checked_all_the_same,
    test_notes,  # what is right runs through the rest of the lines
    test_wiring_that_says_otherwise,
    test_without_lora_the_learning_rates_are_upstreams,
)

# ---- the table is whole


def functions() -> list[Callable[..., Any]]:
    """All that says what is wrong with a recipe."""
    classes = (validate.Checker, check_stages.StageChecker, fields.Field)
    written = [f for c in classes for f in vars(c).values() if inspect.isfunction(f)]
    methods = [f for f in written if "rlhf_recipes" in f.__code__.co_filename]  # a dataclass's own
    modules = (edit._put, edit._remove, edit.edit, lines.parse, lines._beyond, aliases.elsewhere)
    return [*methods, *modules, recipe._read, recipe._no_toml, recipe._load]


def statements(function: Callable[..., Any]) -> set[tuple[str, int]]:
    """File and line of each simple statement."""
    source, first = inspect.getsourcelines(function)
    tree = ast.parse(textwrap.dedent("".join(source)))
    simple = (ast.Expr, ast.Return, ast.Assign, ast.AugAssign, ast.Raise, ast.Continue)
    found = [node for node in ast.walk(tree) if isinstance(node, simple)]
    docs = [n for n in found if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    file = inspect.getsourcefile(function)
    return {(file, first + node.lineno - 1) for node in found if node not in docs}


def test_every_message_has_a_case(tmp_path: Path) -> None:
    """No line that says what is wrong is left out by the tables above."""
    reached: set[tuple[str, int]] = set()
    watched = {function.__code__ for function in functions()}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code not in watched:
            return None
        reached.add((frame.f_code.co_filename, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for old, new, _ in CASES:
            problems(tmp_path, MINIMAL.replace(old, new))
        for words, unset, _ in WORDS:
            problems(tmp_path, COMMENTED, set=words, unset=unset)
        for text, _ in TOML:
            (tmp_path / "my.toml").write_bytes(text)
            with pytest.raises(RecipeError):
                recipe.load_recipe(tmp_path / "my.toml")
        for test in REST:
            test(tmp_path)
        judged = '[evaluation]\njudge = "independent"\n'
        load(tmp_path, f"{MINIMAL}{judged}".replace('"sft", "reward", "ppo"', '"dpo"'))
    finally:
        sys.settrace(before)
    missed = set().union(*map(statements, functions())) - reached
    assert not missed, " ".join(f"{Path(file).name}:{line}" for file, line in sorted(missed))
