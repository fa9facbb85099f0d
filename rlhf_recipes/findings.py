"""A sentence of the verdict, and the words that the rules share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlhf_recipes.facts import Facts, Share


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


def title(facts: Facts, name: str) -> str:
    """How a sentence names a stage: by its kind, where that is its name."""
    if name == "base":
        return "the base model"
    stage = facts.stage(name)
    return name.upper() if stage and name == stage.kind and len(name) < 4 else f"`{name}`"


def plain_title(facts: Facts, name: str) -> str:
    return title(facts, name).strip("`")


def setting(facts: Facts, stage: str, key: str) -> str:
    value = facts.of(stage, key)
    return f"`{stage}.{key}`" + (f" ({value:g} now)" if isinstance(value, int | float) else "")


def steps(facts: Facts, stage: str) -> str:
    key = "max_steps" if (facts.of(stage, "max_steps") or -1) > 0 else "num_train_epochs"
    return setting(facts, stage, key)


def leash(facts: Facts, stage: str) -> str:
    """The setting that holds a policy near its start."""
    return setting(facts, stage, "kl_coef" if facts.of(stage, "kl_coef") is not None else "beta")


def slower(facts: Facts, stage: str) -> str:
    """What keeps a policy nearer to its start."""
    return f"Raise {leash(facts, stage)} or lower {setting(facts, stage, 'learning_rate')}"
