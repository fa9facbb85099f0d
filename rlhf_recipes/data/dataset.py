"""From a file or a hub dataset to the ids of train, validation, test and judge.

A row is recognised, normalised to a prompt (messages) and what answers it has (texts), encoded, and
put on one side of the split by a digest of its prompt: the same prompt is on the same side in every
stage, in every dataset, for ever. What is dropped is counted by reason.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rlhf_recipes.data.rows import (
    SHAPES,
    Example,
    Unusable,
    answered,
    encoded,
    pairs,
    unique_prompts,
)
from rlhf_recipes.data.tokens import Tokens
from rlhf_recipes.errors import DataError, ModelError, machine_error
from rlhf_recipes.sources import trust
from rlhf_recipes.sources.resolve import dataset_place
from rlhf_recipes.store.digests import digest


@dataclass
class Data:
    """A dataset on its sides. `judge` is the part of `train` that the reward model never sees."""

    train: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    judge: list[Example] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    rows: int = 0  # read, dropped ones included
    tested: set[str] = field(default_factory=set)  # the prompts of the test side

    @property
    def reward_train(self) -> list[Example]:
        """The training pairs that the reward model learns from: all but the judge's."""
        kept = {id(example) for example in self.judge}
        return [example for example in self.train if id(example) not in kept]

    def learned(self, learns_from: str) -> list[Example]:
        """The rows that a kind learns from, by its `learns_from`; or that it asks about."""
        match learns_from:
            case "answers":
                return answered(self.train)
            case "pairs":
                return pairs(self.reward_train)
            case "judge_pairs":
                return pairs(self.judge)
            case "prompts":
                return unique_prompts(self.train)
            case "test_prompts":
                return unique_prompts(self.test)
        raise ValueError(f"no rows are called {learns_from!r}")


def load_data(table: Any, tokens: Tokens, tested: Iterable[str] = ()) -> Data:
    """Read, encode and split a [dataset] table (`tables.DatasetTable`), with what it holds.

    No prompt in `tested`, another dataset's, comes on another side than test. Raises DataError
    where a column is not there, no row fits a shape, or more than half are bad.
    """
    data, tables = Data(), (table, *table.more)
    test_fraction = 0.0 if any(one.test_split for one in tables) else table.test_fraction
    kept: list[tuple[str, str, Example]] = []
    for one in tables:
        rows, read = _read(one, tokens)
        kept += [
            (side or _side(prompt, test_fraction, table), prompt, e) for side, prompt, e in rows
        ]
        data.rows += read.rows
        data.dropped += read.dropped
    data.tested = {*tested, *(prompt for side, prompt, _ in kept if side == "test")}
    for side, prompt, example in kept:
        if side != "test" and prompt in data.tested:
            data.dropped["prompt is in the test split"] += 1
            continue
        getattr(data, side).append(example)
        if side == "train" and _fraction("judge", prompt) < table.judge_fraction:
            data.judge.append(example)
    return data


def _read(table: Any, tokens: Tokens) -> tuple[list[tuple[str | None, str, Example]], Data]:
    """The usable rows of one table, and what became of all; "test" for those of its test split."""
    data, kept, left_out = Data(), [], 0
    sides = [(_load_split(table, table.split or "train"), None)]
    if table.test_split:
        sides.append((_load_split(table, table.test_split), "test"))
    names, found = table.columns or {}, sides[0][0].column_names
    if lacking := sorted(set(names.values()) - set(found)):
        what = f"has no column {', '.join(lacking)}; its columns are {', '.join(found)}"
        raise DataError(f"{table.path} {what}")
    for rows, side in sides:
        for row in rows:
            data.rows += 1
            try:
                named = {ours: row.get(theirs) for ours, theirs in names.items()}
                prompt, example = encoded(row | named, table, tokens)
            except Unusable as reason:
                data.dropped[str(reason)] += 1
                continue
            if table.weight and _fraction("weight", prompt) >= table.weight:
                left_out += 1
                continue
            kept.append((side, prompt, example))
            if table.max_rows and side is None and len(kept) == table.max_rows:
                break
    _check_share(data, found, table)
    data.dropped["beyond the dataset's weight"] = left_out
    return kept, data


def _side(prompt: str, test: float, table: Any) -> str:
    """train, validation or test, by a digest of the prompt."""
    place = _fraction("split", prompt)
    if place < test:
        return "test"
    return "validation" if place < test + table.validation_fraction else "train"


def _fraction(purpose: str, prompt: str) -> float:
    """A number in [0, 1) that depends on the prompt's text alone."""
    return int(digest([purpose, prompt])[:13], 16) / 16**13


def _load_split(table: Any, split: str) -> Any:
    """A `datasets.Dataset`. Raises DataError where a file holds no rows, or asks for more."""
    try:
        return _read_split(table, split)
    except Exception as error:
        if isinstance(error, (DataError, ModelError)) or machine_error(error):
            raise
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).partition("\n")[0]
        raise DataError(
            f"{table.path} cannot be read: {reason[:200]}", "look at its files"
        ) from error


def _read_split(table: Any, split: str) -> Any:
    """Local files go through the builder that their suffix names."""
    from datasets import load_dataset_builder

    place = dataset_place(table)
    builder = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if place.suffix in builder:
        made = load_dataset_builder(builder[place.suffix], data_files=glob.escape(str(place)))
        mode = None
    else:
        words = {"name": table.name, "data_dir": table.data_dir, "data_files": table.data_files}
        if isinstance(table.data_files, dict) and split in table.data_files:
            words["data_files"] = {split: table.data_files[split]}  # others may have other columns
        trust.check_description(place)
        made = load_dataset_builder(str(place), **words)
        # What `datasets` keeps of a folder is found by its name and patterns alone, not by its
        # bytes: a folder of ours is read anew. A snapshot's name is its commit.
        mode = "reuse_cache_if_exists" if table.is_local else None
    trust.check_reader(place, type(made).__module__)
    trust.check_files(place, *(made.config.data_files or {}).values())
    made.download_and_prepare(download_mode=mode)
    rows = made.as_dataset(split=split)
    return rows.select_columns(trust.plain_columns(rows.features.to_dict()))


def _check_share(data: Data, columns: list[str], table: Any) -> None:
    dropped = sum(data.dropped.values())
    if data.rows == 0:
        raise DataError(f"{table.path} holds no rows")
    if dropped * 2 > data.rows:
        reasons = ", ".join(f"{n} × {why}" for why, n in data.dropped.most_common(3))
        raise DataError(
            f"{table.path}: {dropped} of {data.rows} rows are unusable ({reasons}); "
            f"its columns are {', '.join(columns)}",
            f"the shapes that are understood:\n{SHAPES}",
        )
