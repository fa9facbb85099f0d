"""A finding of the verdict, of `doctor` or of the data lint; and how shares are said in it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_recipes.text import masked, plain

if TYPE_CHECKING:  # NumPy is no part of what a cached run loads
    from rlhf_recipes.stats import Share

# In the order in which the verdict says them.
MARKS = {"fault": "✗", "success": "✓", "doubt": "?", "good": "✓", "note": "·"}
LEVELS = tuple(MARKS)


@dataclass(frozen=True)
class Finding:
    level: str  # of LEVELS
    about: str  # a stage (for a fault, where to look first), or what was looked at
    text: str
    change: str = ""  # what to do about it; words in `…` are keys

    def __str__(self) -> str:
        after = f"\n  → {self.change}" if self.change else ""
        return masked(f"{MARKS[self.level]} {self.about:<10} {self.text}{after}")


Found = Iterator[Finding]


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def said(share: Share, of: str) -> str:
    """71 % of 128 prompts (62–79)"""
    return f"{percent(share.value)} of {share.count} {of} ({interval(share)})"


def interval(share: Share) -> str:
    return f"{100 * share.low:.0f}–{100 * share.high:.0f}"


def points(value: float, low: float, high: float) -> str:
    """+4.1 points (0.5 to 7.7): a difference of two shares."""
    text = f"{100 * value:+.1f} points ({100 * low:.1f} to {100 * high:.1f})"
    return text.replace("-", "−")


def shown(found: Iterable[Finding]) -> str:
    """A line for each, without what it is about, and below it what to change."""
    lines = []
    for one in found:
        lines.append(f"{MARKS[one.level]} {plain(one.text)}")
        lines += [f"  → {plain(one.change)}"] if one.change else []
    return "\n".join(lines)
