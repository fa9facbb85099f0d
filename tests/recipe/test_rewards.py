"""`rewards` in a recipe: what may stand there, what determines the result, what is wrong where."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from rlhf_recipes.errors import UsageError
from rlhf_recipes.recipe.load import Recipe, fork_recipe, load_recipe
from rlhf_recipes.recipe.wiring import columns_of, wiring
from rlhf_recipes.sources import trust
from rlhf_recipes.sources.fetch import bring
from rlhf_recipes.store.digests import digest
from rlhf_recipes.store.fingerprint import Identities, fingerprints, tables_read
from tests.helpers.recipes import MINIMAL, load, problems, write
from tests.helpers.runs import call

CODE = "def concise(prompt, answer):\n    return 1.0\n"


def ppo(rewards: str, more: str = "") -> str:
    return f"{MINIMAL}\n[ppo]\nrewards = {rewards}\n{more}"


def keys(recipe: Recipe, **rules: str) -> dict[str, str]:
    """By stage, a digest of what determines its result."""
    tables = {table: {"content": "d"} for table in tables_read(recipe)}
    known = Identities({"content": "b"}, {"./model": {"content": "m"}}, tables, rules)
    return {stage: digest(payload) for stage, payload in fingerprints(recipe, known)}


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ('{ rule = "word", at_most = 3 }', '(did you mean "words"?)'),
        ('{ rule = "words", at_moost = 3 }', '(did you mean "at_most"?)'),
        ('{ rule = "words" }', 'rule = "words" needs at_least = … or at_most = …'),
        ('{ rule = "words", at_most = 0 }', "at_most: must be at least 1, not 0"),
        ('{ rule = "words", at_least = 9, at_most = 3 }', "at_least: is over at_most = 3"),
        ('{ rule = "equals", text = "a", column = "b" }', "text = … or column = …, one of them"),
        ('{ rule = "number", column = 3 }', "column: must be text, not 3"),
        ('{ rule = "matches", pattern = "(" }', "pattern: is not a regular expression: missing )"),
        ('{ rule = "words", at_most = 3, weight = "1" }', "weight: must be a number"),
        ("{ weight = 2.0 }", 'needs one of rule = "…", python = "FILE.py:FUNCTION", model = "…"'),
        ('{ rule = "ended", python = "./a.py:b" }', "needs one of rule"),
        ('{ python = "./gone.py:concise" }', "python: no such file: gone.py"),
        ('{ python = "concise" }', 'python: must be "FILE.py:FUNCTION", not "concise"'),
        ('{ model = "rewrad" }', 'no stage is named "rewrad" (did you mean "reward"?)'),
        ('"./notes.txt"', "no such folder: notes.txt"),
        ('"org/other"', "is a second reward model: a list holds one, and any number of rules"),
        ("3", "must be a list of texts and tables"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(tmp_path: Path, entry: str, says: str) -> None:
    text = ppo(f'[\n  {{ model = "reward", weight = 0.5 }},\n  {entry},\n]')
    if "model =" in entry or "./notes" in entry:
        text = ppo(f'[\n  {{ rule = "ended" }},\n  {entry},\n]')
    [line] = problems(tmp_path, text)
    line_of_key = 10 if "must be a list" in says else 12
    assert line.startswith(f"my.toml:{line_of_key}: ppo.rewards") and says in line


def test_math_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf_recipes.recipe.rewards.find_spec", lambda name: None)
    [line] = problems(tmp_path, ppo('[{ rule = "math", column = "answer" }]'))
    assert line.endswith("needs the package math-verify: pip install 'rlhf-recipes[math]'")


def test_what_does_not_go_together(tmp_path: Path) -> None:
    [line] = problems(tmp_path, ppo('["reward"]', 'reward_model = "reward"\n'))
    assert "ppo.rewards: lists the reward model too: leave out reward_model" in line
    [line] = problems(tmp_path, ppo("[]"))
    assert "ppo.rewards: is empty" in line
    text = MINIMAL.replace('"reward", ', "")
    [line] = problems(tmp_path, text)
    assert "say reward_model = " in line and "or rewards = […]" in line
    [line] = problems(tmp_path, f"{MINIMAL}\n[sft]\nrewards = []\n")
    assert "it is one of [ppo]" in line
    judge = '\n[evaluation]\njudge = { rule = "words", at_most = 3, weight = 2.0 }\n'
    [line] = problems(tmp_path, MINIMAL + judge)
    assert "evaluation.judge.weight: unknown key" in line
    [line] = problems(tmp_path, MINIMAL + '\n[evaluation]\njudge = { model = "a/b" }\n')
    assert "evaluation.judge: needs one of rule" in line


def test_what_a_list_takes(tmp_path: Path) -> None:
    rules = '{ rule = "number", column = "answer" }, { python = "./own.py:concise", column = "x" }'
    (tmp_path / "own.py").write_text(CODE)
    recipe = load(tmp_path, ppo(f'["reward", {rules}]'))
    assert wiring(recipe)["ppo"] == {"policy": "sft", "reward_model": "reward"}
    assert wiring(recipe)["evaluation"]["reward_model"] == "reward"
    alone = load(tmp_path, ppo(f"[{rules}]"))
    assert wiring(alone)["ppo"] == {"policy": "sft"}
    assert "reward_model" not in wiring(alone)["evaluation"]
    assert [columns_of(alone, name) for name in ("sft", "reward", "ppo", "evaluation")] == [
        [],
        [],
        ["answer", "x"],
        ["answer", "x"],
    ]
    foreign = load(tmp_path, ppo('[{ model = "./model", weight = 2.0 }]'))
    assert foreign.table("ppo").reward_model == "./model"


def test_a_resolved_recipe_is_the_same_recipe_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(CODE)
    listed = '["./model", { python = "./own.py:concise", weight = 0.5 }, { rule = "ended" }]'
    judge = '[evaluation]\njudge = [{ python = "own.py:concise" }, { rule = "words", at_most = 9 }]'
    recipe = load(tmp_path, ppo(listed, judge + "\n"))
    (tmp_path / "else").mkdir()
    file = tmp_path / "else" / "resolved.toml"
    file.write_text(tomlkit.dumps(recipe.resolved()))
    again = load_recipe(file)
    own = f"{tmp_path / 'own.py'}:concise"
    assert again.table("ppo").extras["rewards"][1] == {"python": own, "weight": 0.5}
    assert again.evaluation.judge[0] == {"python": own}
    rules = {"./own.py": "c", "own.py": "c", str(tmp_path / "own.py"): "c"}
    known = {"b": "m", str(tmp_path / "model"): {"content": "m"}, "./model": {"content": "m"}}
    found = []
    for one in (recipe, again):
        tables = {table: {"content": "d"} for table in tables_read(one)}
        found.append([*fingerprints(one, Identities({"content": "b"}, known, tables, rules))])
    assert found[0] == found[1]
    assert recipe.table("ppo").extras["rewards"][1]["python"] == "./own.py:concise"

    new = tmp_path / "deep" / "er" / "fork.toml"
    fork_recipe(recipe.path, new)
    assert (
        f'python = "{os.path.relpath(tmp_path / "own.py", new.parent)}:concise"' in new.read_text()
    )
    assert load_recipe(new).table("ppo").reward_model == "../../model"


def test_what_of_a_list_determines_the_result(tmp_path: Path) -> None:
    def made(rewards: str | None, **rules: str) -> dict[str, str]:
        (tmp_path / "own.py").write_text(CODE)
        (tmp_path / "same.py").write_text(CODE)
        return keys(load(tmp_path, ppo(rewards) if rewards else MINIMAL), **rules)

    plain = made(None)
    assert made('["reward"]') == plain == made('[{ model = "reward", weight = 1 }]')
    words = made('["reward", { rule = "words", at_most = 9 }]')
    changed = {stage for stage in plain if plain[stage] != words[stage]}
    assert changed == {"ppo", "evaluation"}
    assert made('["reward", { rule = "words", at_most = 9, weight = 1 }]') == words
    number = made('[{ rule = "number", column = "a" }]')
    assert made('[{ rule = "number", column = "a", tolerance = 0 }]') == number  # its default
    assert made('[{ rule = "number", column = "a", tolerance = 1 }]') != number
    others: list[Any] = [
        made('["reward", { rule = "words", at_most = 8 }]'),
        made('["reward", { rule = "words", at_most = 9, weight = 2 }]'),
        made('[{ model = "reward", weight = 0.5 }, { rule = "words", at_most = 9 }]'),
        made('[{ rule = "words", at_most = 9 }]'),
        made('["reward", { python = "./own.py:concise" }]', **{"./own.py": "1"}),
        made('["reward", { python = "./own.py:concise" }]', **{"./own.py": "2"}),
    ]
    assert len({one["ppo"] for one in [words, plain, *others]}) == 8
    moved = made('["reward", { python = "./same.py:concise" }]', **{"./same.py": "1"})
    assert moved == others[4]


def test_a_function_of_a_stranger_needs_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(trust.ALLOW)
    (tmp_path / "own.py").write_text(CODE)
    for text in (
        ppo('[{ python = "./own.py:concise" }]'),
        MINIMAL + '\n[evaluation]\njudge = { python = "./own.py:concise" }\n',
    ):
        with pytest.raises(UsageError, match=r"has .*own\.py run on this machine \(read it first"):
            bring(load_recipe(write(tmp_path, text)), {})


def test_check_says_that_no_row_has_a_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path, ppo('[{ rule = "number", column = "answr" }]'))
    row = {"prompt": "1 + 1", "chosen": "2", "rejected": "3", "answer": 2}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    lines, _ = call(monkeypatch, capfd, "check", str(file), code=1)
    assert lines[-1].endswith(
        'no row has the column "answr" (did you mean "answer"?), which a rule names; there are '
        "answer, chosen, prompt, rejected"
    )
    call(monkeypatch, capfd, "check", str(file), "--set", "evaluation=false", code=1)
    assert not call(monkeypatch, capfd, "check", str(file), "--unset", "ppo.rewards")[1]
