"""What a recipe may reward: a model, a rule with its settings, or a function in a Python file.

`rewards` of a stage is a list of these, and `[evaluation] judge` is one or two of them. What each
rule computes is in `stages/rewards/rule.py`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from typing import Any

from rlhf_recipes.recipe.fields import Field, Keys

_TEXT, _COUNT = Field(("str",)), Field(("int",), range="at least 1")
_SAME: Keys = {"text": _TEXT, "column": _TEXT, "exact": Field(("bool",), False)}
# Every rule, with the settings that it takes.
RULES: dict[str, Keys] = {
    "equals": _SAME,
    "contains": _SAME,
    "matches": {"pattern": _TEXT},
    "number": {"column": _TEXT, "tolerance": Field(("float",), 0.0, range="at least 0")},
    "math": {"column": _TEXT},
    "words": {"at_least": _COUNT, "at_most": _COUNT},
    "json": {"keys": Field(("list[str]",))},
    "ended": {},
    "think": {},
    "repetition": {"ngram_size": _COUNT},
    "overlong": {"max_completion_len": _COUNT, "soft_punish_cache": _COUNT},
}
PYTHON: Keys = {"column": Field(("str", "list[str]"))}
# Settings that a rule cannot be without: the groups of which it needs one, and at most so many.
NEEDS: dict[str, list[tuple[tuple[str, ...], int]]] = {
    "equals": [(("text", "column"), 1)],
    "contains": [(("text", "column"), 1)],
    "matches": [(("pattern",), 1)],
    "number": [(("column",), 1)],
    "math": [(("column",), 1)],
    "words": [(("at_least", "at_most"), 2)],
    "overlong": [(("max_completion_len",), 1), (("soft_punish_cache",), 1)],
}
# `regex` unrolls counted repeats as it compiles: ((a{1000}){1000}){1000} took 63 s and 8 GB.
LONGEST, MOST_REPEATS = 300, 10_000
# How their numbers are called: each one's mean in the lines of training, and in the results.
LOGGED, PART = "objective/rewards/", "reward."
WEIGHT = Field(("float",), 1.0)


@dataclass(frozen=True)
class Term:
    """One reward, or one judge. It has a model, a Python function or a rule."""

    name: str  # what its numbers are called
    weight: float = 1.0
    model: str = ""  # a stage, a folder or a hub id
    code: tuple[str, str] | None = None  # file and function
    rule: str = ""  # of RULES
    words: Mapping[str, Any] = field(default_factory=dict)  # the rule's settings

    @property
    def columns(self) -> list[str]:
        """The columns of a row that it asks for."""
        named = self.words.get("column", [])
        return [named] if isinstance(named, str) else list(named)


def function_in(text: str) -> tuple[str, str] | None:
    """File and function of "FILE.py:FUNCTION"."""
    found = re.fullmatch(r"(.+\.py):([A-Za-z_]\w*)", text)
    return found and (found[1], found[2])


def python_judge(text: str) -> tuple[str, str] | None:
    """File and function of "python:FILE.py:FUNCTION"."""
    return function_in(text.removeprefix("python:")) if text.startswith("python:") else None


def term(entry: str | Mapping[str, Any]) -> Term:
    """A reward or a judge as a recipe writes it, which is valid."""
    if isinstance(entry, str):
        code = python_judge(entry)
        return Term(code[1], code=code) if code else Term(_called(entry), model=entry)
    words = {k: v for k, v in entry.items() if k not in ("rule", "python", "model", "weight")}
    weight = float(entry.get("weight", 1.0))
    if "model" in entry:
        return Term(_called(entry["model"]), weight, entry["model"])
    if code := function_in(str(entry.get("python", ""))):
        return Term(code[1], weight, code=code, words=words)
    rule = str(entry.get("rule", ""))  # none: `check` has said so
    return Term(rule, weight, rule=rule, words=words)


def _called(model: str) -> str:
    return model if re.fullmatch(r"[\w-]+", model) else "reward_model"


def terms(entries: Iterable[str | Mapping[str, Any]] | None) -> list[Term]:
    """The rewards of a list, each with a name of its own: words, words-2, …"""
    found: dict[str, Term] = {}
    for one in map(term, entries or ()):
        names = itertools.chain([one.name], (f"{one.name}-{n}" for n in itertools.count(2)))
        name = next(name for name in names if name not in found)
        found[name] = replace(one, name=name)
    return list(found.values())


def lacking(rule: str, values: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """What is wrong with a rule's settings as a whole: a key, or "", and what to say of it."""
    for group, most in NEEDS.get(rule, ()):
        there = [key for key in group if key in values]
        if not 1 <= len(there) <= most:
            one = " or ".join(f"{key} = …" for key in group)
            yield "", f'rule = "{rule}" needs {one}' + ", one of them" * (len(there) > most)
    if values.get("at_least", 0) > values.get("at_most", math.inf):
        yield "at_least", f"is over at_most = {values['at_most']}"
    if values.get("soft_punish_cache", 0) > values.get("max_completion_len", math.inf):
        yield "soft_punish_cache", f"is over max_completion_len = {values['max_completion_len']}"
    if "pattern" in values and (wrong := wrong_pattern(values["pattern"])):
        yield "pattern", wrong
    if rule == "math" and find_spec("math_verify") is None:
        yield "rule", "needs the package math-verify: pip install 'rlhf-recipes[math]'"


def wrong_pattern(pattern: str) -> str:
    """Why a pattern of the rule `matches` cannot be used, or nothing."""
    import regex

    counts = [int(n) for held in re.findall(r"\{[\d, ]+\}", pattern) for n in _numbers(held)]
    if len(pattern) > LONGEST or math.prod(max(n, 1) for n in counts) > MOST_REPEATS:
        return f"is too large: up to {LONGEST} characters, counts of up to {MOST_REPEATS} in all"
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        return f"is not a regular expression: {error}"
    return ""


def _numbers(text: str) -> list[str]:
    return re.findall(r"\d{1,9}", text)
