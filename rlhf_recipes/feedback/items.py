"""What is judged: a prompt with two answers, or with one; by content, so that it is asked once.

A file of items is JSON lines, one item a line, in the order in which they are to be asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.data.turns import Messages
from rlhf_recipes.store.digests import digest
from rlhf_recipes.store.files import to_json, whole

ANSWERS = "answers.jsonl"  # in the output of a `sample` stage
ROWS = "feedback.jsonl"  # in the output of a `label` stage: what can be learned from


@dataclass(frozen=True)
class Item:
    """A prompt and its answers, those with the smaller digest first; see `item`."""

    id: str  # of the prompt and the answers alone, whatever their order and whoever made them
    prompt: Messages
    answers: tuple[str, ...]  # two, or one
    # Where it is from, an entry an answer where a value is a list: stage, key, draw, ended; side.
    made: Mapping[str, Any] = field(default_factory=dict)
    place: Mapping[str, Any] = field(default_factory=dict)  # why it stands where it does
    row: Mapping[str, Any] = field(default_factory=dict)  # the columns that rules name

    @property
    def side(self) -> str:
        """train, validation or test."""
        return self.made.get("side", "train")


def item(
    prompt: Messages,
    answers: Iterable[str],
    made: Mapping[str, Any] | None = None,
    place: Mapping[str, Any] | None = None,
    row: Mapping[str, Any] | None = None,
) -> Item:
    """An item of answers in any order; lists in `made` are in the order of `answers`.

    Raises ValueError for equal answers, and for other than one or two.
    """
    found = list(answers)
    if len(found) not in (1, 2) or len({*found}) < len(found):
        raise ValueError(f"an item has one answer or two that differ, not {found!r}")
    order = sorted(range(len(found)), key=lambda place: digest(found[place]))
    texts = tuple(found[place] for place in order)
    moved = {
        name: [value[place] for place in order] if isinstance(value, list) else value
        for name, value in (made or {}).items()
    }
    key = digest([[dict(turn) for turn in prompt], sorted(texts)])
    return Item(key, prompt, texts, moved, place or {}, row or {})


def write_items(file: Path, items: Iterable[Item]) -> None:
    """The file is there whole, or not at all."""
    with whole(file) as stream:
        for one in items:
            stream.write((to_json(asdict(one)) + "\n").encode())


def ids_of(file: Path) -> list[str]:
    return [one.id for one in read_items(file)]


def read_items(file: Path) -> Iterator[Item]:
    """The items of a file that `write_items` wrote."""
    with file.open(encoding="utf-8") as stream:
        for line in stream:
            held = json.loads(line)
            yield Item(**held | {"answers": tuple(held["answers"])})
