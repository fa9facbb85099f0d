"""What a person's word on answers says: good or bad, or which of two is the better."""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from rlhf_recipes.errors import DataError

GOOD = set(
    "true t 1 1.0 +1 yes y good up thumbs_up thumb_up thumbsup upvote like liked positive pos "
    "chosen accepted accept approved desirable preferred correct right helpful pass passed "
    "👍 ✓ ✔ ✅".split()
)
BAD = set(
    "false f 0 0.0 -1 -1.0 no n bad down thumbs_down thumb_down thumbsdown downvote dislike "
    "disliked negative neg rejected reject declined decline undesirable dispreferred incorrect "
    "wrong unhelpful fail failed 👎 ✗ ✘ ❌".split()
)
NO_LABEL = "--set 'dataset.columns={label = \"\"}' passes over the labels"
TIES = ("tie", "both", "neither", "same", "equal", "draw", "none")
VERDICT = re.compile(
    r"left|right|(model|response|answer|output|completion)[-_ ]?[ab012]"
    r"|\[*[ab]\]*|[ab]\s*(>+|<+|=)\s*[ab]",
    re.IGNORECASE,
)
TINTS = "[\U0001f3fb-\U0001f3ff\ufe0f]"  # colours of skin, and how a sign is drawn
WORDS = "true or false, 1 or 0, 1 or -1, yes or no, good or bad, up or down"


def is_good(label: Any) -> bool:
    """Whether a label calls its answer good. Raises DataError where it says neither."""
    if said := says(label):
        return said in GOOD
    rating = " is a rating" if re.fullmatch(r"[\d.+-]+", str(label).strip()) else ""
    raise DataError(
        f"its label {label!r}{rating or ' says neither good nor bad'}",
        f"write {WORDS}; {NO_LABEL}",
    )


def says(label: Any) -> str:
    """A label as the word of GOOD or BAD that it is; "" where it is neither."""
    said = re.sub(r"[\s-]+(?=[a-z])", "_", re.sub(TINTS, "", str(label)).strip().lower())
    return said if said in GOOD or said in BAD else ""


def preferred(winner: Any, first: str, second: str) -> int:
    """1 where `winner` names the first of two answers, -1 for the second, 0 for a tie.

    `first` and `second` are how their columns end: a and b, 1 and 2, or 0 and 1. Raises ValueError.
    """
    said = re.sub(r"[^\w<>=-]+", "_", word_of(winner).lower().removesuffix(".0")).strip("_")
    if found := re.fullmatch(r"([ab])_?(>+|<+|=)_?([ab])", said):
        said = "tie" if found[2] == "=" else found[1 if ">" in found[2] else 3]
    said = re.sub(r"_(is_)?(better|preferred|wins?)$", "", said)
    if said.startswith(TIES):
        return 0
    said = re.sub(
        r"^(model|response|answer|assistant|conversation|completion|output)[-_]?", "", said
    )
    names = {first: 1, second: -1, "left": 1, "right": -1, "first": 1, "second": -1}
    if first == "a":
        names |= {"1": 1, "2": -1}
    elif first == "1":
        names |= {"a": 1, "b": -1}
    if said == "0" and first != "0":  # 0 and 1, or 1 and 2? The one is the other's opposite
        raise DataError("its winner is 0", "say which of the two it is: a, b or tie")
    if said not in names:
        raise ValueError(winner)
    return names[said]


def word_of(value: Any) -> str:
    """A person's word as a text, also where an export keeps it in a list or an object."""
    held = parsed(value) if isinstance(value, str) else value
    if isinstance(held, list) and len(held) == 1:
        return word_of(held[0])
    if isinstance(held, dict) and (inner := held.get("selected", held.get("value"))) is not None:
        return word_of(inner)
    return str(value).strip()


def parsed(text: str) -> Any:
    """What a text holds that is JSON or Python's repr of a list or an object; else None."""
    if text.strip()[:1] + text.strip()[-1:] not in ("[]", "{}"):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None
