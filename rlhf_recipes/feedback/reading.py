"""From what a judge replied to a verdict, or to the reason why there is none.

A verdict is of the answer's *place*: "1" is the one that was shown first. What cannot be read is
not a tie.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_recipes.feedback.prompt import NAMES

LEAST_MASS = 0.5  # of a reply's first token, on the two names: under it the text is asked for
FLOOR = 1e-6  # of a name that is not among the likeliest tokens
# A whole line that says one thing. A shorter match could be the end of a quotation.
LINE = re.compile(r"\W{0,9}better\W{0,9}[:=]\W{0,9}(1|2|tie)\W{0,9}", re.IGNORECASE)
ALONE = re.compile(r"\W{0,9}(1|2|tie)\W{0,9}", re.IGNORECASE)


@dataclass(frozen=True)
class Reply:
    """What one call came to: a log odds, or a verdict, or an error."""

    logit: float | None = None  # log odds that the answer in place 1 is better
    verdict: str | None = None  # "1", "2", "tie"
    error: str | None = None
    mass: float | None = None  # of the first token, on the two names
    reason: str | None = None  # the text
    model: str | None = None  # as the server names it
    tokens_in: int | None = None
    tokens_out: int | None = None
    seconds: float = 0.0
    answered: bool = False  # the judge has dealt with it: to wait and ask again may not help

    @property
    def named(self) -> str | None:
        """The place that is named: "1", "2" or "tie"."""
        if self.logit is None:
            return self.verdict
        return "tie" if self.logit == 0 else "1" if self.logit > 0 else "2"

    def but(self, **changes: Any) -> Reply:
        return replace(self, **changes)


def from_text(text: str) -> str | None:
    """The verdict of a reply: its last line's, unless another line says otherwise.

    A reply may quote an answer that holds a verdict. Then there are two, and neither is taken.
    """
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        return None
    if len(lines) == 1 and (alone := ALONE.fullmatch(lines[0])):
        return alone[1].lower()
    said = [found[1].lower() for line in lines if (found := LINE.fullmatch(line))]
    return said[-1] if len({*said}) == 1 and LINE.fullmatch(lines[-1]) else None


def from_tokens(likeliest: Iterable[tuple[str, float]]) -> tuple[float, float]:
    """Log odds of place 1 over place 2, and the mass on both.

    `likeliest` are tokens with their log-probabilities. Tokens that are one name apart from space
    and case count together.
    """
    mass = dict.fromkeys(NAMES, 0.0)
    for token, logp in likeliest:
        name = token.strip().casefold()
        if name in mass and math.isfinite(logp):
            mass[name] += math.exp(min(logp, 0.0))
    first, second = (max(mass[name], FLOOR) for name in NAMES)
    return math.log(first / second), min(sum(mass.values()), 1.0)


def from_completion(body: Any, mode: str) -> Reply:
    """What a chat completion says; `error` where it holds no verdict, `mass` where it is small."""
    if not isinstance(body, Mapping):
        return Reply(error="the reply is not JSON of a completion")
    used: Any = body.get("usage")
    used = used if isinstance(used, Mapping) else {}
    counts = [used.get(name) for name in ("prompt_tokens", "completion_tokens")]
    tokens_in, tokens_out = (n if type(n) is int and n >= 0 else None for n in counts)
    names = [body.get(name) for name in ("model", "system_fingerprint")]
    model = " ".join(name for name in names if isinstance(name, str) and name) or None
    blank = Reply(model=model, tokens_in=tokens_in, tokens_out=tokens_out, answered=True)
    try:
        choice = body["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        if message.get("refusal"):
            return blank.but(error="refused", reason=str(message["refusal"]))
        if not isinstance(text, str):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError):
        return blank.but(error="the reply is not JSON of a completion", answered=False)
    if mode == "logits":
        found = _likeliest(choice)
        if found is None:
            return blank.but(error="no log-probabilities", reason=text)
        logit, mass = from_tokens(found)
        if mass < LEAST_MASS:
            return blank.but(error="another token than 1 or 2", mass=mass, reason=text)
        return blank.but(logit=logit, mass=mass)
    verdict = from_text(text)
    if verdict is None or choice.get("finish_reason") == "length":
        cut = choice.get("finish_reason") == "length"
        why = "cut off" if cut else "no verdict in it" if text.strip() else "empty"
        return blank.but(error=why, reason=text)
    return blank.but(verdict=verdict, reason=text)


def _likeliest(choice: Mapping[str, Any]) -> list[tuple[str, float]] | None:
    """The first token's alternatives; None where the server gave none."""
    try:
        first = choice["logprobs"]["content"][0]
        listed = first.get("top_logprobs") or []
        found = {str(one["token"]): float(one["logprob"]) for one in [*listed, first]}
        return list(found.items()) if listed else None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None


# ---- both orders together


def preference(straight: Sequence[Reply], swapped: Sequence[Reply]) -> float | None:
    """How likely the item's first answer is better; None without a verdict in either order.

    `straight` are replies where it was shown first, `swapped` where it was shown second. Of
    log-probabilities: the sigmoid of the mean of both orders' log odds, in which a judge's liking
    for a place cancels. Else the share of votes, where orders that differ are ½ together.
    """
    straight, swapped = ([one for one in some if one.error is None] for some in (straight, swapped))
    if not straight or not swapped:
        return None
    if all(one.logit is not None for one in (*straight, *swapped)):
        mean = sum(one.logit or 0.0 for one in straight) / len(straight)
        mean -= sum(one.logit or 0.0 for one in swapped) / len(swapped)
        return 1 / (1 + math.exp(-max(-30.0, min(30.0, mean / 2))))
    worth = {"1": 1.0, "2": 0.0, "tie": 0.5}
    first = [worth[one.named or "tie"] for one in straight]
    second = [1 - worth[one.named or "tie"] for one in swapped]
    if len(first) == len(second) == 1 and first != second:
        return 0.5  # also where one order is a tie: the orders differ
    return (sum(first) / len(first) + sum(second) / len(second)) / 2
