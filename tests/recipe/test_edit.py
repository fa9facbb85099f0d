# ruff: noqa: E501 (tables of messages: a case a line)
from __future__ import annotations

import textwrap
import tomllib
from pathlib import Path

import pytest

from rlhf_recipes.errors import RecipeError, UsageError
from rlhf_recipes.recipe.edit import edit
from rlhf_recipes.recipe.load import fork_recipe, load_recipe
from tests.helpers.recipes import COMMENTED, MINIMAL, SAVING, problems, write


def test_set_keeps_comments_and_order(tmp_path: Path) -> None:
    words = [
        "ppo.kl_coef=0.2",
        "title=After",
        "model.name=Qwen/Qwen2.5-0.5B",
        "ppo.guard.max_kl=4",
        "sft.dataset.max_rows=6",
        "sft.max_steps=3",
    ]
    recipe = load_recipe(write(tmp_path, COMMENTED), set=words, unset=["seed", "lora.r"])
    assert recipe.text == (
        COMMENTED.replace("0.1  #", "0.2  #")
        .replace("Before", "After")
        .replace('./model"  #', 'Qwen/Qwen2.5-0.5B"  #')
        .replace("8.0", "4")
        .replace("max_rows = 5 }\n", "max_rows = 6 }\nmax_steps = 3\n")
        .replace("seed = 42\n", "")
        .replace("r = 8\n", "")
    )
    assert (recipe.title, recipe.model.name, recipe.lora["r"]) == ("After", "Qwen/Qwen2.5-0.5B", 16)
    assert recipe.overrides == (*words, "unset seed", "unset lora.r")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("lora=false", {"lora": False}),
        ("evaluation=false", {"evaluation": False}),
        ("evaluation.prompts=9", {"evaluation": {"prompts": 9}}),
        ("seed=7", {"seed": 7}),
        ("title=3", {"title": "3"}),
        ('stages=["sft"]', {"stages": ["sft"]}),
        ("reward.max_steps=2", {"reward": {"max_steps": 2}}),
        ("lora.target_modules=all-linear", {"lora": {"r": 8, "target_modules": "all-linear"}}),
        ("lora={r = 2}", {"lora": {"r": 2}}),
        ("reward.lr_scheduler_kwargs.power=2", {"reward": {"lr_scheduler_kwargs": {"power": 2}}}),
        ('sft.dataset={path = "z"}', {"sft": {"dataset": {"path": "z"}}}),
    ],
)
def test_set(word: str, expected: dict) -> None:
    edited = edit(COMMENTED, [word], [])
    assert edited.problems == []
    assert tomllib.loads(edited.text) == tomllib.loads(COMMENTED) | expected


@pytest.mark.parametrize(
    "text",
    [
        'model = {name = "a"}\nppo = {kl_coef = 0.1}\nlora = false\n',
        'model.name = "a"\nppo.kl_coef = 0.1\nppo.guard.max_kl = 3\nlora.r = 3\n',
        '[ppo.guard]\nmax_kl = 3\n[model]\nname = "a"\n[ppo]\nkl_coef = 0.1\n[lora]\nr = 3',
        '[ppo]\nguard = {max_kl = 2}\n[lora]\n',
        '# only\n',
    ],
    ids=["inline", "dotted", "out of order", "empty table", "no tables"],
)  # fmt: skip
def test_set_in_every_way_to_write_a_table(text: str) -> None:
    words = ["seed=7", "lora=false", "ppo.guard.max_kl=9", "ppo.gamma=0.5", "ppo.kl_coef=0.2",
             "ppo.lr_scheduler_kwargs.power=2", "evaluation.prompts=3", "model.name=b"]  # fmt: skip
    edited = edit('stages = ["ppo"]\n' + text, words, [])
    assert edited.problems == []
    assert tomllib.loads(edited.text) == {
        "stages": ["ppo"],
        "seed": 7,
        "lora": False,
        "ppo": {
            "kl_coef": 0.2,
            "gamma": 0.5,
            "guard": {"max_kl": 9},
            "lr_scheduler_kwargs": {"power": 2},
        },
        "evaluation": {"prompts": 3},
        "model": {"name": "b"},
    }


def test_a_new_stage_by_words_in_any_order(tmp_path: Path) -> None:
    words = ["warm.max_steps=3", "warm.kind=sft", 'stages=["warm"]']
    recipe = load_recipe(write(tmp_path, MINIMAL), set=words)
    assert recipe.table("warm").given == {"learning_rate": 2e-4, "max_steps": 3} | SAVING


def test_no_table_is_made_for_a_stage_that_does_not_run(tmp_path: Path) -> None:
    found = problems(tmp_path, MINIMAL.replace(', "ppo"', ""), set=["ppo.kl_coef=1"])
    assert found == ["--set ppo.kl_coef=1: ppo.kl_coef: the recipe has no table [ppo]"]


def test_problems_of_file_and_words_come_together(tmp_path: Path) -> None:
    text = MINIMAL.replace("org/base", "./nowhere")
    assert problems(tmp_path, text, set=["seed=-1"], unset=["title"]) == [
        "my.toml:4: model.name: no such folder: nowhere",
        "--set seed=-1: seed: must be at least 0, not -1",
        "--unset title: title: is not written in the recipe",
    ]


@pytest.mark.parametrize("stage", ["3", '["reward"]', "{ a = 1 }"])
def test_stages_that_are_no_texts_come_with_the_words_problems(tmp_path: Path, stage: str) -> None:
    text = MINIMAL.replace('["sft", "reward", "ppo"]', f'["sft", {stage}]')
    first, second = problems(tmp_path, text, set=["pop.x=1"])
    assert first.startswith("my.toml:1: stages: must be a list of texts, not [")
    assert second == "--set pop.x=1: pop.x: the recipe has no table [pop]"


def test_a_word_without_a_value(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--set seed: no key=value"):
        load_recipe(write(tmp_path, MINIMAL), set=["seed"])


# ---- fork


def wrapped(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, 98))


def test_fork(tmp_path: Path) -> None:
    source = write(tmp_path, COMMENTED)
    new = fork_recipe(source, tmp_path / "mine" / "trial", set=["seed=7"], unset=["lora.r"])
    assert new == tmp_path / "mine" / "trial.toml"
    assert new.read_text() == (
        wrapped(f"Forked from {source}: lora.r left out, seed 42 → 7")
        + "# The comments are of that recipe; changed lines have none.\n"
        + COMMENTED.replace('title = "Before"  # the title', 'title = "trial"')
        .replace('"./model"', '"../model"')
        .replace('"pairs.jsonl"', '"../pairs.jsonl"')
        .replace('"./pairs.jsonl"', '"../pairs.jsonl"')
        .replace("seed = 42", "seed = 7")
        .replace("r = 8\n", "")
    )
    fork, old = load_recipe(new), load_recipe(source)
    assert fork.model.folder == old.model.folder == tmp_path / "model"
    assert fork.dataset.file == old.dataset.file
    assert fork.table("sft").dataset.file == old.table("sft").dataset.file


def test_a_fork_drops_the_comments_of_changed_lines_and_takes_a_title_of_its_own(
    tmp_path: Path,
) -> None:
    text = (
        'title = "Chat # 1"  # long ago\n'
        + MINIMAL
        + "max_prompt_tokens = 48         # the longest has 46,\n"
        + " " * 31
        + "# with its template\n"
        + "max_answer_tokens = 40         # the longest has 37\n# a comment by itself\n"
    )
    words = ["dataset.max_prompt_tokens=64"]
    new = fork_recipe(write(tmp_path, text), tmp_path / "own.toml", set=words)
    assert new.read_text().partition("none.\n")[2] == (
        'title = "own"\n'
        + MINIMAL
        + "max_prompt_tokens = 64\n"
        + "max_answer_tokens = 40         # the longest has 37\n# a comment by itself\n"
    )
    named = fork_recipe(new, tmp_path / "named.toml", set=["title=Mine"])
    assert load_recipe(named).title == "Mine"


def test_fork_rebases_every_dataset(tmp_path: Path) -> None:
    text = MINIMAL.replace("[dataset]", "[[dataset]]") + '[[dataset]]\npath = "./pairs.jsonl"\n'
    new = fork_recipe(write(tmp_path, text), tmp_path / "sub" / "new.toml")
    assert new.read_text().count('"../pairs.jsonl"') == 2
    fork = load_recipe(new).dataset
    assert [table.file for table in (fork, *fork.more)] == [tmp_path / "pairs.jsonl"] * 2


def test_a_path_that_a_fork_is_given_starts_from_where_the_fork_lies(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own.jsonl").write_text("")
    words = ["dataset.path=./own.jsonl"]
    new = fork_recipe(write(tmp_path, MINIMAL), tmp_path / "sub" / "new.toml", set=words)
    assert load_recipe(new).dataset.file == tmp_path / "sub" / "own.jsonl"


def test_fork_rebases_the_judge(tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text("")
    for written in ("./rule.py", "rule.py", f"{tmp_path}/rule.py"):
        text = f'{MINIMAL}[evaluation]\njudge = "python:{written}:rule"  # a rule\n'
        new = fork_recipe(write(tmp_path, text), tmp_path / "sub" / f"{len(written)}.toml")
        moved = written if written.startswith("/") else "../rule.py"
        assert new.read_text().endswith(f'judge = "python:{moved}:rule"  # a rule\n')
        assert (
            load_recipe(new).resolved()["evaluation"]["judge"] == f"python:{tmp_path}/rule.py:rule"
        )
    text = f'{MINIMAL}[evaluation]\njudge = ["./model", "python:rule.py:rule"]\n'
    new = fork_recipe(write(tmp_path, text), tmp_path / "sub" / "two.toml")
    assert load_recipe(new).evaluation.judge == ["../model", "python:../rule.py:rule"]
    for said in ("evaluation = false", 'evaluation.judge = "none"'):
        source = write(tmp_path, f"{said}\n{MINIMAL}")
        new = fork_recipe(source, tmp_path / "sub" / f"{len(said)}.toml")
        assert said in new.read_text().splitlines()


def test_fork_rebases_what_label_stages_read(tmp_path: Path) -> None:
    """But not what a server calls its model."""
    for name in ("guide.md", "fair.md", "rule.py"):
        (tmp_path / name).write_text("")
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text("{}")
    label = """
[label]
guideline = "guide.md"
by = "model"
model = "./judge"
principles = "./fair.md"

[label-2]
kind = "label"
by = "model"
model = "./served"
url = "http://127.0.0.1:8000/v1"

[ruled]
kind = "label"
by = "rule"
rule = "python:./rule.py:f"

[rounds]
count = 2
from = "ppo"
"""
    stages = 'stages = ["sft", "sample", "label", "label-2", "ruled", "reward", "ppo"]\n'
    text = "".join(line for line in MINIMAL.splitlines(True) if not line.startswith("stages"))
    new = fork_recipe(write(tmp_path, stages + text + label), tmp_path / "sub" / "new.toml")
    loaded = load_recipe(new)
    written, whole = loaded.tables, loaded.resolved()
    assert written["label"].extras["model"] == "../judge"
    assert written["label"].extras["principles"] == "../fair.md"
    assert written["label-2"].extras["model"] == "./served"
    assert written["ruled"].extras["rule"] == "python:../rule.py:f"
    assert {key: whole["label"][key] for key in ("guideline", "model", "principles")} == {
        "guideline": f"{tmp_path}/guide.md",
        "model": f"{tmp_path}/judge",
        "principles": f"{tmp_path}/fair.md",
    }
    assert whole["label-2"]["model"] == "./served"
    assert whole["ruled"]["rule"] == f"python:{tmp_path}/rule.py:f"


def test_fork_leaves_hub_ids_and_absolute_paths_alone(tmp_path: Path) -> None:
    text = MINIMAL.replace("./pairs", f"{tmp_path}/pairs")
    new = fork_recipe(write(tmp_path, text), tmp_path / "sub" / "new.toml")
    head = wrapped(f"Forked from {tmp_path}/my.toml: nothing changed yet")
    assert new.read_text() == head + text


def test_fork_writes_over_nothing(tmp_path: Path) -> None:
    source = write(tmp_path, MINIMAL)
    with pytest.raises(UsageError, match="my.toml is there already"):
        fork_recipe(source, source)


def test_a_fork_that_would_be_wrong_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--set ppo.lam=2: ppo.lam: must be from 0 to 1, not 2"):
        fork_recipe(write(tmp_path, MINIMAL), tmp_path / "new.toml", set=["ppo.lam=2"])
    assert not (tmp_path / "new.toml").exists()
