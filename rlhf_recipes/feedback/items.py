"""What is judged: a prompt with two answers, or with one; by content, so that it is asked once.

A file of items is JSON lines, one item a line, in the order in which they are to be asked.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.data.exports import plain_rows
from rlhf_recipes.data.files import rows_of
from rlhf_recipes.data.names import NAMES, plain_name
from rlhf_recipes.data.shapes import Row, understand
from rlhf_recipes.data.turns import Messages, Unusable
from rlhf_recipes.errors import DataError, UsageError
from rlhf_recipes.recipe.tables import form_of
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


def items_of(file: Path, tell: Callable[[str], Any] = lambda said: None) -> list[Item]:
    """The items in any file of answers, each once: pairs, lists of answers, or single ones.

    What such a file says of them already is not read: they are to be judged anew. `tell` is told of
    rows that are left out. Raises UsageError and DataError where there is nothing to judge.
    """
    form = form_of(file)
    if form not in ("json", "csv") or not file.is_file():
        what = "is not a file of rows" if file.exists() else "is not there"
        raise UsageError(f"{file} {what}", "name a file .jsonl, .json, .csv or .tsv")
    if form == "json" and (ours := _own(file)):
        return ours
    found: dict[str, Item] = {}
    dropped: Counter[str] = Counter()
    rows, _ = rows_of(file, form)
    for columns in itertools.chain.from_iterable(map(plain_rows, rows)):
        try:
            for one in _in_row(columns):
                dropped["are there twice"] += one.id in found
                found.setdefault(one.id, one)
        except Unusable as reason:
            dropped[f"left out: {reason}"] += 1
    said = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
    if not found:
        hint = 'a row is {"prompt": "…", "answers": ["…", "…"]}'
        raise DataError(f"{file} holds no answers to judge{said and f' ({said})'}", hint)
    if said:
        tell(f"{file}: {said}")
    return list(found.values())


def _own(file: Path) -> list[Item]:
    """The items of a file that `write_items` wrote; none of another one."""
    try:
        held = list(read_items(file))
        whole_ones = all(item(one.prompt, one.answers).id == one.id for one in held)
    except (KeyError, TypeError, ValueError):
        return []
    return held if whole_ones else []


def _in_row(columns: Mapping[str, Any]) -> Iterator[Item]:
    """Of several answers each pair. Raises Unusable where there are none, or they are equal."""
    several = next((v for n, v in columns.items() if plain_name(n) in NAMES["responses"]), None)
    if not isinstance(several, list) or not all(isinstance(one, str) for one in several):
        yield judgeable(columns)[0]
    elif len(several) == 1:
        yield judgeable({**columns, "completion": several[0], "label": "good"})[0]
    else:
        for chosen, rejected in itertools.combinations(several, 2):
            yield judgeable({**columns, "chosen": chosen, "rejected": rejected})[0]


def judgeable(columns: Mapping[str, Any]) -> tuple[Item, bool]:
    """The item of a row of two answers or one, and whether its first answer is the row's.

    What the row says of them is not read. Raises Unusable.
    """
    prompt, *answers = understand(Row({**columns, "winner": "left", "label": "good"}))
    texts = [one if isinstance(one, str) else one["content"] for one in answers if one is not None]
    if not texts:
        raise Unusable("no answer")
    if len({*texts}) < len(texts):
        raise Unusable("two answers that are equal")
    one = item([dict(turn) for turn in prompt], texts)
    return one, one.answers[0] == texts[0]
