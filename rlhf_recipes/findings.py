"""A sentence of the verdict, and how shares are said in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rlhf_recipes.stats import Share
from rlhf_recipes.text import plain


@dataclass(frozen=True)
class Finding:
    level: str  # of LEVELS
    stage: str  # that it is about; of a fault, where to look first
    text: str
    change: str = ""  # what to do about it; words in `…` are keys


Found = Iterator[Finding]
LEVELS = ("fault", "success", "doubt", "good", "note")  # the order in which they are said


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def said(share: Share, of: str) -> str:
    """71 % of 128 prompts (62–79)"""
    return f"{percent(share.value)} of {share.count} {of} ({interval(share)})"


def interval(share: Share) -> str:
    return f"{100 * share.low:.0f}–{100 * share.high:.0f}"


MARKS = {"fault": "✗", "success": "✓", "doubt": "?", "good": "✓", "note": "·"}


def shown(found: Iterable[Finding]) -> str:
    """A sentence a line, and below it what to change."""
    lines = []
    for one in found:
        lines.append(f"{MARKS[one.level]} {plain(one.text)}")
        lines += [f"  → {plain(one.change)}"] if one.change else []
    return "\n".join(lines)
