"""What a file of rows holds, before there is a recipe: its columns, its kind of rows, its lengths.

`init` writes a recipe from this. The columns are those that the file's own names say, or else a
guess from names and texts, whichever makes more of the rows.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.labels import BAD, GOOD, says
from rlhf_recipes.data.names import guessed, plain_name, wordy
from rlhf_recipes.data.rows import written
from rlhf_recipes.data.shapes import Row, understand
from rlhf_recipes.data.splits import load_split
from rlhf_recipes.data.tokens import ids
from rlhf_recipes.data.turns import Unusable
from rlhf_recipes.errors import DataError
from rlhf_recipes.recipe.tables import COLUMNS

if TYPE_CHECKING:
    from rlhf_recipes.data.tokens import Tokens
    from rlhf_recipes.recipe.tables import DatasetTable

# What rows may hold, the least first: all that a kind teaches, the next teaches too.
HOLDS = ("prompts", "answers", "labels", "pairs")
SAMPLE = 200  # rows, by which the columns are settled
LABELS = re.compile(r"label|good|ok|correct|useful|helpful|vote|thumb|like|rat(e|ing)|judg|quality")
# Without the tokenizer: characters a token (English has about 4), and a template's own tokens.
CHARACTERS, TEMPLATE = 3, 24


@dataclass
class Looked:
    columns: dict[str, str]  # ours = the file's; {}: known by their names
    holds: str  # of HOLDS: what most usable rows hold
    rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    asked: set[str] = field(default_factory=set)  # every prompt
    prompts: list[int] = field(default_factory=list)  # tokens, of each usable row's prompt …
    answers: list[int] = field(default_factory=list)  # … and longest answer, with its end of turn
    read_as: dict[str, None] = field(default_factory=dict)

    @property
    def used(self) -> int:
        return self.rows - self.dropped.total()


def look(table: DatasetTable, tokens: Tokens | None) -> Looked:
    """What the rows of `table` hold; its `columns`, if it has any, are not guessed.

    Without `tokens`, lengths are estimated. Raises DataError where the format is not recognised.
    """
    read_as: dict[str, None] = {}
    every = list(load_split(table, table.split or "train", read_as))
    if not every:
        raise DataError(f"{table.path} holds no rows")
    sample = every[:SAMPLE]
    guess = dict(table.columns or {}) or _columns(sample)
    columns = {name: guess[name] for name in COLUMNS.split() if name in guess}
    held = Counter(_holds(Row(row, columns)) for row in sample)
    del held[""]
    if held.total() * 2 < len(sample):
        raise _unknown(table, sample[0], columns)
    found = Looked(columns, max(HOLDS, key=lambda kind: held[kind]), read_as=read_as)
    for row in every:
        _measure(found, Row(row, columns), table, tokens)
    if not found.used:
        raise DataError(f"{table.path}: no row can be used ({found.dropped.most_common(1)[0][0]})")
    return found


def _columns(sample: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{} where the file's own names do as well as any guess."""
    fullest = max(sample, key=lambda row: sum(map(wordy, row.values())))
    label = _label(sample)
    guess = guessed({name: value for name, value in fullest.items() if name != label})
    if label and "completion" in guess:
        guess["label"] = label

    def worth(columns: Mapping[str, str]) -> int:
        return sum(1 + HOLDS.index(kind) for row in sample if (kind := _holds(Row(row, columns))))

    return max(({}, guess), key=worth)


def _label(sample: Sequence[Mapping[str, Any]]) -> str:
    """A column that calls answers good or bad."""
    for name in sample[0]:
        said = {says(row.get(name)) for row in sample if row.get(name) is not None}
        if said & GOOD and said & BAD and "" not in said and LABELS.search(plain_name(name)):
            return name
    return ""


def _holds(row: Row) -> str:
    """What of HOLDS a row holds; "" where it cannot be used."""
    try:
        _, chosen, rejected = understand(row)
    except (Unusable, DataError):
        return ""
    if chosen is not None and rejected is not None:
        return "pairs"
    if chosen is None and rejected is None:
        return "prompts"
    return "labels" if "label" in row.used else "answers"


def _unknown(table: Any, row: Mapping[str, Any], columns: Mapping[str, str]) -> DataError:
    """For rows whose format is not recognised: what to type, with the names that there are."""
    try:
        understand(Row(row, columns))
        way = ""
    except (Unusable, DataError) as error:
        way = getattr(error, "way", "") or getattr(error, "hint", "")
    texts = [name for name, value in row.items() if wordy(value)] + ["…"] * 3
    words = zip(("prompt", "chosen", "rejected"), texts, strict=False)
    named = ", ".join(f'{ours} = "{theirs}"' for ours, theirs in words)
    what = f"{table.path}: row format not recognised; its columns are {', '.join(row)}"
    return DataError(what, way or f"name them, as in --set 'dataset.columns={{{named}}}'")


def _measure(found: Looked, row: Row, table: Any, tokens: Tokens | None) -> None:
    found.rows += 1
    try:
        if tokens:
            made = written(row, table, tokens)
            prompt, *answers = map(len, ids(tokens, made.texts))
            found.asked.add(made.key)
        else:
            turns, *said = understand(row)
            found.asked.add(repr(turns))
            prompt = TEMPLATE + sum(_estimate(turn["content"]) for turn in turns)
            answers = [_estimate(one) for one in said if one is not None]
    except Unusable as reason:
        found.dropped[str(reason)] += 1
        return
    found.prompts.append(prompt)
    found.answers.append(max(answers, default=0) + 1)


def _estimate(said: Any) -> int:
    text = said if isinstance(said, str) else " ".join(map(str, said.values()))
    return math.ceil(len(text) / CHARACTERS)
