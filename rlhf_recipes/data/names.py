"""What files call the columns of a row, and a guess where they call them otherwise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlhf_recipes.data.turns import text_of

NOUNS = ("response", "answer", "output", "completion", "messages", "conversations")


def _of(*words: str) -> tuple[str, ...]:
    """chosen, chosen_response, response_chosen, …"""
    both = [[f"{word}_{noun}", f"{noun}_{word}"] for word in words for noun in NOUNS]
    return (*words, *(name for names in both for name in names))


# What a file may call a column, best first.
NAMES = {
    "prompt": (
        "prompt",
        "instruction",
        "question",
        "query",
        "input",
        "context_messages",
        "context",
        "history",
    ),
    "conversations": ("conversations", "conversation"),
    "chosen": (*_of("chosen", "preferred", "accepted"), "response_j"),  # and _k: StackExchange's
    "rejected": (*_of("rejected", "non_preferred", "dispreferred"), "response_k"),
    "completion": ("completion", "output", "response", "answer"),
    "system": ("system", "system_prompt", "system_message"),
    "label": (
        *("label", "kto_tag", "thumb", "thumbs", "vote", "rating", "feedback"),
        *("is_good", "thumbs_up", "liked", "is_correct", "is_chosen", "is_preferred"),
    ),
    "winner": ("winner", "preference", "better_response_id", "choice"),
    "responses": ("responses", "completions", "answers", "outputs", "output", "generations"),
    "scores": ("scores", "ratings", "overall_scores", "score", "rating"),
    "ranks": ("ranks", "rankings", "ranking", "rank"),
    "score_chosen": ("score_chosen", "chosen_score", "chosen_rating"),
    "score_rejected": ("score_rejected", "rejected_score", "rejected_rating"),
}


def plain_name(name: str) -> str:
    """A column's name without its case, spaces and hyphens."""
    words = name.replace("\ufeff", "").lower().replace("-", " ").split()
    return re.sub(r"(?<=[a-z])(?=\d$)", "_", "_".join(words))  # response1 is response_1


HINTS = {
    "chosen": r"chosen|good|better|best|win|prefer|accept|pos",
    "rejected": r"reject|bad|worse|worst|los|neg",
    "prompt": r"prompt|question|instruct|quer|input|user|ask|problem",
    "completion": r"completion|answer|respon|output|reply|target|assistant|solution|summary",
}
ASIDE = re.compile(
    r"(^|_)(u?u?ids?|source|date|time|created|updated|lang|model|status|split|url|text)"
)


def guessed(columns: Mapping[str, Any]) -> dict[str, str]:
    """Which column may be what, as far as names and texts tell: ours = the file's."""
    said = [n for n, value in columns.items() if wordy(value) and not isinstance(value, bool)]
    free = [name for name in said if not ASIDE.search(plain_name(name))]
    found: dict[str, str] = {}
    for ours, pattern in HINTS.items():
        fits = [name for name in free if re.search(pattern, name.lower())]
        if fits and (ours != "completion" or "chosen" not in found):
            found[ours] = free.pop(free.index(fits[0]))
    if "prompt" not in found and found and free:
        found["prompt"] = free.pop(0)
    if not found and len(free) in (2, 3):
        found = dict(
            zip(
                ("prompt", "completion") if len(free) == 2 else ("prompt", "chosen", "rejected"),
                free,
                strict=True,
            )
        )
    return found


def guess(columns: Mapping[str, Any]) -> str:
    """The `--set` that names the columns, as `guessed`; empty where nothing tells."""
    if list(columns) == ["text"]:
        return "give each turn by itself: messages, a list of {role, content}"
    found = guessed(columns)
    named = ", ".join(f'{ours} = "{theirs}"' for ours, theirs in sorted(found.items()))
    return f"--set 'dataset.columns={{{named}}}', if that is what they are" if found else ""


def wordy(value: Any) -> bool:
    """Whether a column may hold what people say."""
    said = text_of(value)
    return isinstance(said, list | Mapping) or (
        isinstance(said, str) and bool(re.search(r"[^\W\d]{2}", said))
    )
