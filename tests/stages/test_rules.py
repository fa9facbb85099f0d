"""The rules of `rewards`: what each gives, and that no answer, however hostile, holds one up."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.errors import StageError
from rlhf_recipes.recipe.rewards import lacking, term, terms, wrong_pattern
from rlhf_recipes.stages.rewards.rule import Rule, Said, last_number, load_rule

HERE = Path(".")


def rule(**words: Any) -> Rule:
    found = load_rule(term(words), HERE)
    assert found
    return found


def said(text: str = "", ids: tuple[int, ...] = (), ended: bool = True, **row: Any) -> Said:
    return Said("a question", row, text, list(ids), ended)


@pytest.mark.parametrize(
    ("words", "answer", "gives"),
    [
        ({"rule": "equals", "text": "Yes"}, said(" yes\n"), 1),
        ({"rule": "equals", "text": "Yes", "exact": True}, said("yes"), 0),
        ({"rule": "equals", "column": "gold"}, said("Paris", gold="PARIS "), 1),
        ({"rule": "equals", "column": "gold"}, said("7", gold=7), 1),
        ({"rule": "equals", "column": "gold"}, said("Paris"), None),
        ({"rule": "contains", "text": "as an AI"}, said("I, AS AN AI, think"), 1),
        ({"rule": "contains", "column": "gold"}, said("it is Rome", gold="Paris"), 0),
        ({"rule": "matches", "pattern": r"^(Yes|No)\b"}, said("No, thanks"), 1),
        ({"rule": "matches", "pattern": r"^(Yes|No)\b"}, said("Not so"), 0),
        ({"rule": "number", "column": "gold"}, said("9 + 3 = 12.", gold="#### 12"), 1),
        ({"rule": "number", "column": "gold"}, said("12 or 13", gold=12), 0),
        ({"rule": "number", "column": "gold"}, said("none", gold=12), 0),
        ({"rule": "number", "column": "gold"}, said("12", gold="twelve"), None),
        ({"rule": "number", "column": "gold"}, said("12"), None),
        ({"rule": "number", "column": "g", "tolerance": 0.01}, said("3.14", g=3.1415), 1),
        ({"rule": "words", "at_most": 4}, said("one two three four"), 1),
        ({"rule": "words", "at_most": 4}, said("1 2 3 4 5 6"), 0.5),
        ({"rule": "words", "at_most": 4}, said("w " * 9), 0),
        ({"rule": "words", "at_least": 4}, said("one"), 0.25),
        ({"rule": "words", "at_least": 2, "at_most": 4}, said("one two three"), 1),
        ({"rule": "json"}, said('[{"a": 1}, "[[["]'), 1),
        ({"rule": "json"}, said("[1, 2"), 0),
        ({"rule": "json"}, said("NaN"), 0),
        ({"rule": "json", "keys": ["a"]}, said('{"a": null, "b": 2}'), 1),
        ({"rule": "json", "keys": ["a", "c"]}, said('{"a": null, "b": 2}'), 0),
        ({"rule": "json", "keys": ["a"]}, said("[1]"), 0),
        ({"rule": "ended"}, said("red", ended=True), 1),
        ({"rule": "ended"}, said("red", ended=False), 0),
        ({"rule": "think"}, said("<think>hm</think>so"), 1),
        ({"rule": "think"}, said("hm</think>so"), 0),
        ({"rule": "repetition"}, said(ids=(1, 2, 3, 4)), 0),
        ({"rule": "repetition", "ngram_size": 2}, said(ids=(5, 5, 5, 5, 5)), -0.75),
        (
            {"rule": "overlong", "max_completion_len": 100, "soft_punish_cache": 20},
            said(ids=(1,) * 90),
            -0.5,
        ),
    ],
)
def test_what_each_rule_gives(words: dict[str, Any], answer: Said, gives: float | None) -> None:
    assert rule(**words)(answer) == gives


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5-3", 3.0),
        ("= -3", -3.0),
        ("\u22123", -3.0),
        ("1,234,567.5 $", 1234567.5),
        ("about 2.5e3.", 2500.0),
        ("4 of 10", 10.0),
        ("v2 x", None),
        ("9" * 1000, None),
        ("", None),
    ],
)
def test_the_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


# ---- hostile answers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "text", "bound"),
    [
        ({"rule": "matches", "pattern": "(a|aa)+$"}, "a" * 5000 + "b", "0.1 s"),
        ({"rule": "json"}, json.dumps(["x" * 5_000_000]), "64 KiB"),
        ({"rule": "json"}, "é" * 40_000, "64 KiB"),  # characters are not bytes
        ({"rule": "json"}, "[" * 60_000, "a nesting of 100"),
        ({"rule": "json"}, "[" * 101 + "]" * 101, "a nesting of 100"),
    ],
)
def test_an_answer_over_the_bound_is_0_soon_and_counted(
    words: dict[str, Any], text: str, bound: str
) -> None:
    asked, begun = rule(**words), time.process_time()
    assert [asked(said(text)), asked(said(text))] == [0.0, 0.0]
    assert asked.over == {bound: 2}
    assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"rule": "json"}, '"' + '\\"' * 32_000),
        ({"rule": "json"}, "1" * 60_000),
        ({"rule": "json"}, "[" * 100 + "]" * 100),
        ({"rule": "number", "column": "gold"}, "1," * 1_000_000),
        ({"rule": "number", "column": "gold"}, "9" * 2_000_000),
        ({"rule": "number", "column": "gold"}, "9e999"),
        ({"rule": "think"}, "<think>" * 100_000),
        ({"rule": "words", "at_most": 5}, "w " * 2_000_000),
        ({"rule": "contains", "text": "a" * 50 + "b"}, "a" * 2_000_000),
    ],
)
def test_no_rule_takes_long(words: dict[str, Any], text: str) -> None:
    asked, begun = rule(**words), time.process_time()
    assert asked(said(text, gold=3)) in (0.0, 1.0)
    assert time.process_time() - begun < 2 and not asked.over


@pytest.mark.parametrize(
    "pattern", ["((a{1000}){1000}){1000}", "(a{99999})", "a" * 301, "(", "a{1000,}{1000}"]
)
def test_a_pattern_that_takes_long_to_compile_is_refused(pattern: str) -> None:
    """The first took 63 s and 8 GB."""
    begun = time.process_time()
    assert wrong_pattern(pattern)
    assert time.process_time() - begun < 1
    assert not wrong_pattern(r"^\d{1,3}(,\d{3})*$")


def test_math_is_by_math_verify() -> None:
    pytest.importorskip("math_verify")
    asked = rule(rule="math", column="gold")
    assert asked(said("so it is $\\frac{2}{4}$", gold="1/2")) == 1
    assert asked(said("so it is 0.6", gold="1/2")) == 0
    assert asked(said("0.5", gold="no idea")) is None
    assert not asked.over
    assert asked(said("9" * 30_000, gold="3")) == 0
    assert asked.over.total() == 1


def test_math_outside_of_the_main_thread_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time limits are signals. Without them `9^9^9^9` would take for ever."""
    caught: list[Exception] = []

    def ask() -> None:
        try:
            rule(rule="math", column="gold")(said("9", gold="9"))
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert isinstance(caught[0], StageError)
    assert "outside of the main thread" in str(caught[0])


# ---- functions in a Python file -----------------------------------------------------------------


def function(folder: Path, code: str, **words: Any) -> Rule:
    (folder / "own.py").write_text(code)
    found = load_rule(term({"python": "./own.py:own", **words}), folder)
    assert found
    return found


def test_a_function_takes_prompt_and_answer_and_if_it_asks_the_row(tmp_path: Path) -> None:
    two = function(tmp_path, "def own(prompt, answer):\n    return len(prompt + answer)\n")
    assert two(said("red")) == len("a questionred")
    three = "def own(prompt, answer, row):\n    return row.get('gold') and row['gold'] == answer\n"
    asked = function(tmp_path, three, column="gold")
    assert (asked(said("red", gold="red")), asked(said("red"))) == (1.0, None)
    own = "def own(prompt, answer, row):\n    return len(row)\n"  # not what other rules name
    assert function(tmp_path, own, column=["gold", "gone"])(said("red", gold=1, other=2)) == 1


def test_thoughts_that_the_template_has_begun_are_thoughts() -> None:
    answer = said("some thoughts\n</think>\nblue")
    assert rule(rule="think")(answer) == 0.0
    assert rule(rule="think")(answer._replace(begun=True)) == 1.0


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_what_is_no_number_is_an_error_that_names_the_function(tmp_path: Path, number: str) -> None:
    asked = function(tmp_path, f"def own(prompt, answer):\n    return float('{number}')\n")
    with pytest.raises(StageError, match=rf"own\.py:own does not judge: .*{number} for .*'red'"):
        asked(said("red"))


def test_code_that_fails_is_an_error_that_names_the_function(tmp_path: Path) -> None:
    for code in ("1 / 0", "def other(): ...", "def own(prompt, answer):\n    return 1 / 0\n"):
        with pytest.raises(StageError, match=r"own\.py:own does not judge: \w+Error"):
            function(tmp_path, code)(said("red"))


def test_a_judge_has_to_speak_of_every_row() -> None:
    with pytest.raises(StageError, match=r"\(number\) can judge the row .*'a question': it has no"):
        rule(rule="number", column="gold").verdict(said("7"))


# ---- names, and what a rule needs ---------------------------------------------------------------


def test_each_reward_has_a_name_of_its_own() -> None:
    words = {"rule": "words", "at_most": 3}
    listed = ["reward", words, {"python": "./a.py:words"}, {"model": "org/big.model"}, words]
    names = [one.name for one in terms(listed)]
    assert names == ["reward", "words", "words-2", "reward_model", "words-3"]
    assert [one.name for one in terms(["words-2", words, words])] == ["words-2", "words", "words-3"]


def test_what_a_rule_cannot_be_without() -> None:
    assert [what for _, what in lacking("equals", {})] == [
        'rule = "equals" needs text = … or column = …'
    ]
    assert len([*lacking("equals", {"text": "a", "column": "b"})]) == 1
    assert len([*lacking("words", {"at_least": 5, "at_most": 3})]) == 1
    assert [*lacking("words", {"at_least": 3, "at_most": 5})] == []
    assert len([*lacking("overlong", {})]) == 2
