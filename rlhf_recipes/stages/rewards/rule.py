"""Rewards and judges that are written down, and that nothing was trained on. No torch in here.

A rule looks at an answer and at the columns of its row, and gives a number, the better the higher;
or None where it does not speak of the row, such as where the row lacks its column. A rule whose
work is bounded gives 0 to an answer over the bound, and counts it. Functions are in `code.py`.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_recipes.data.tokens import THINK
from rlhf_recipes.errors import StageError, UsageError
from rlhf_recipes.recipe.rewards import Term
from rlhf_recipes.stages.rewards.code import load_function

SECONDS = 0.1  # for a pattern, an answer
LARGEST, DEEPEST = 64 * 2**10, 100  # bytes of JSON, and its nesting
DIGITS = 64  # of a number
NUMBER = re.compile(
    rf"(?<![\w.])[-+]?(?:[0-9]{{1,3}}(?:,[0-9]{{3}})+|[0-9]{{1,{DIGITS}}})(?:\.[0-9]{{1,{DIGITS}}})?"
    r"(?:[eE][-+]?[0-9]{1,3})?(?![0-9])"
)


class Said(NamedTuple):
    """An answer, and what it answers."""

    prompt: str  # the last user turn
    row: Mapping[str, Any]  # the columns that rules name, as far as the row has them
    text: str
    ids: Sequence[int]
    ended: bool
    begun: bool = False  # the template has begun the thoughts, so the answer lacks their mark


class Over(Exception):
    """An answer is over a rule's bound: which one, in a few words."""


Words = Mapping[str, Any]  # a rule's settings
Ask = Callable[[Said], float | None]


# ---- the rules


def _plain(text: str, words: Words) -> str:
    return text if words.get("exact") else text.strip().casefold()


def _wanted(said: Said, words: Words) -> str | None:
    """The text that a rule asks for: its own, or that of the row's column."""
    found = words.get("text", said.row.get(words.get("column", "")))
    return None if found is None else _plain(str(found), words)


def _equals(said: Said, words: Words) -> float | None:
    wanted = _wanted(said, words)
    return None if wanted is None else float(_plain(said.text, words) == wanted)


def _contains(said: Said, words: Words) -> float | None:
    wanted = _wanted(said, words)
    return None if wanted is None else float(wanted in _plain(said.text, words))


def _matches(said: Said, words: Words) -> float:
    import regex

    try:
        return float(regex.search(words["pattern"], said.text, timeout=SECONDS) is not None)
    except TimeoutError:
        raise Over(f"{SECONDS:g} s") from None


def last_number(text: str) -> float | None:
    """The last number in a text. Commas between thousands are left out."""
    found = NUMBER.findall(text.replace("\u2212", "-"))
    return float(found[-1].replace(",", "")) if found else None


def _number(said: Said, words: Words) -> float | None:
    wanted = last_number(str(said.row.get(words["column"], "")))
    if wanted is None:
        return None
    found = last_number(said.text)
    return float(found is not None and abs(found - wanted) <= words.get("tolerance", 0.0))


def _math(said: Said, words: Words) -> float | None:
    """By math-verify, whose time limits are signals: those reach the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math-verify has no time limit outside of the main thread")
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException  # which is not an Exception

    if not (wanted := parse(str(said.row.get(words["column"], "")))):
        return None
    try:
        return float(verify(wanted, parse(said.text, raise_on_error=True), raise_on_error=True))
    except TimeoutException:
        raise Over("the seconds that math-verify takes") from None
    except Exception as error:
        raise Over(f"what math-verify can read ({type(error).__name__})") from None


def _words(said: Said, words: Words) -> float:
    """1 within the bounds; from there down to 0 at twice `at_most`, and at no word at all."""
    count = len(said.text.split())
    least, most = words.get("at_least", 0), words.get("at_most", math.inf)
    if count < least:
        return count / least
    return 1.0 if count <= most else max(0.0, 2 - count / most)


def _json(said: Said, words: Words) -> float:
    if len(said.text) > LARGEST or len(said.text.encode()) > LARGEST:
        raise Over(f"{LARGEST // 2**10} KiB")
    depth = deepest = 0
    for mark in re.findall(r'"(?:[^"\\]|\\.)*"?|[\[\]{}]', said.text):
        depth += (mark in "[{") - (mark in "]}")
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        raise Over(f"a nesting of {DEEPEST}")
    try:
        found = json.loads(said.text, parse_constant=_no_constant)
    except ValueError:
        return 0.0
    keys = words.get("keys", ())
    return float(not keys or (isinstance(found, dict) and found.keys() >= {*keys}))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _ended(said: Said, words: Words) -> float:
    return float(said.ended)


def _think(said: Said, words: Words) -> float:
    from trl.rewards import think_format_reward

    text = f"{THINK}\n{said.text}" if said.begun else said.text
    return think_format_reward([[{"content": text}]])[0]


def _repetition(said: Said, words: Words) -> float:
    from trl.rewards import get_repetition_penalty_reward

    return get_repetition_penalty_reward(**words)([list(said.ids)])[0]


def _overlong(said: Said, words: Words) -> float:
    from trl.rewards import get_soft_overlong_punishment

    return get_soft_overlong_punishment(**words)([list(said.ids)])[0]


RULES: dict[str, Callable[[Said, Words], float | None]] = {
    "equals": _equals,
    "contains": _contains,
    "matches": _matches,
    "number": _number,
    "math": _math,
    "words": _words,
    "json": _json,
    "ended": _ended,
    "think": _think,
    "repetition": _repetition,
    "overlong": _overlong,
}


# ---- one that is asked


@dataclass
class Rule:
    """A term that is not a model, ready to be asked, and how many answers were over its bound."""

    term: Term
    ask: Ask
    over: Counter[str] = field(default_factory=Counter)  # by bound

    def __call__(self, said: Said) -> float | None:
        """The rule's number; 0, and counted, over its bound. Raises StageError."""
        try:
            number = self.ask(said)
            number = None if number is None else float(number)
        except Over as bound:
            self.over[str(bound)] += 1
            return 0.0
        except Exception as error:
            raise _trouble(self.term, error) from error
        if number is not None and not math.isfinite(number):
            raise _trouble(self.term, ValueError(f"{number} for the answer {said.text[:60]!r}"))
        return number

    def verdict(self, said: Said) -> float:
        """The number, where there has to be one: of a judge. Raises StageError."""
        if (number := self(said)) is None:
            raise silent([self.term.name], said)
        return number


def load_rule(term: Term, base: Path) -> Rule | None:
    """The rule or function that a recipe in folder `base` names; None for a model.

    Raises StageError, and UsageError for code that nobody has agreed to run.
    """
    if term.rule:
        return Rule(term, lambda said: RULES[term.rule](said, term.words))
    if not term.code:
        return None
    try:
        function, rows = load_function(term, base)
    except UsageError:
        raise
    except Exception as error:
        raise _trouble(term, error) from error

    def ask(said: Said) -> float | None:
        if not rows:
            return function(said.prompt, said.text)
        own = {name: said.row[name] for name in term.columns if name in said.row}
        return function(said.prompt, said.text, own)

    return Rule(term, ask)


def told_over(over: Mapping[str, Mapping[str, int]]) -> list[str]:
    """How many answers were over each rule's bounds, a phrase each."""
    found = [(name, *each) for name, counts in over.items() for each in sorted(counts.items())]
    return [f"{name}: {count} answers over {bound} got 0" for name, bound, count in found]


def silent(names: Sequence[str], said: Said) -> StageError:
    """The error of a row that no reward speaks of."""
    held = ", ".join(f"{name} = {str(value)[:60]!r}" for name, value in said.row.items())
    return StageError(
        f"no reward ({', '.join(names)}) can judge the row with the prompt {said.prompt[:60]!r}: "
        f"it has {held or 'none of the columns that the rewards name'}",
        "take the row out, fill its column, or add a reward that speaks of every row",
    )


def _trouble(term: Term, error: Exception) -> StageError:
    what, hint = f'rule = "{term.rule}"', "see the rule's settings"
    if term.code:
        what = f"python:{':'.join(term.code)}"
        hint = "it must take a prompt and an answer, and give a number"
    return StageError(f"{what} does not judge: {type(error).__name__}: {error}", hint)
