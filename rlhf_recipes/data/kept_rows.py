"""Encoded rows, kept in the runs folder by all that decides them: the next command reads them.

Two files for each dataset: `<digest>.json` (`store.kept`) has what was counted and the checksum of
`<digest>.arrow`, which has the ids. A file that is damaged, or that is not what this module writes,
counts as missing. Neither file can hold code.
"""

from __future__ import annotations

import contextlib
import functools
import json
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.dataset import Data, load_data
from rlhf_recipes.data.rows import IDS, Example
from rlhf_recipes.data.tokens import Tokens
from rlhf_recipes.sources.resolve import identify_dataset
from rlhf_recipes.store.digests import digest, file_digest
from rlhf_recipes.store.files import whole
from rlhf_recipes.store.kept import ROWS, keep, name_of, recall
from rlhf_recipes.store.provenance import versions

if TYPE_CHECKING:
    import pyarrow as pa

FEWEST = 5_000  # rows; fewer are read from their files in a second or two
FORM = 1  # of the files here
SIDES = ("train", "validation", "test")  # and those of `Data.bad`, in the same order
MORE = ("labelled", "margin", "weight", "turns", "row")  # what JSON holds of an example
BATCH = 10_000  # rows that are written together


def load_rows(
    table: Any, tokens: Tokens, tested: set[str], columns: Sequence[str], runs: Path | None
) -> Data:
    """What `load_data` returns, from `runs` where it was kept there. None: nothing is kept.

    Of a dropped row that people are shown, its number and the cure are kept, and not the row.
    """
    about = runs and _about(table, tokens, tested, columns, runs)
    if runs is None or about is None:
        return load_data(table, tokens, tested, columns)
    folder = runs / ".stages" / ROWS
    found = _recalled(folder, about, tokens)
    if found is None:
        found = load_data(table, tokens, tested, columns)
        if found.rows >= FEWEST:
            # A full disk, or a column that JSON has no form for, costs time and nothing else.
            with contextlib.suppress(OSError, TypeError):
                _keep(folder, about, found)
    return found


def _about(
    table: Any, tokens: Tokens, tested: set[str], columns: Sequence[str], runs: Path
) -> dict[str, Any] | None:
    """All that decides the rows. None where a tokenizer cannot be told by its content."""
    tokenizer = tokens.tokenizer
    if not tokenizer.is_fast:
        return None
    settled = (str(tokenizer.chat_template), tokens.eos_id, list(tokens.specials), tokens.rows)
    return {
        "form": FORM,
        "readers": _readers(),
        "versions": versions(),
        "tokenizer": digest([tokenizer.backend_tokenizer.to_str(), *settled]),
        "tested": digest(sorted(tested)),
        "columns": [*columns],
        "tables": [
            {**asdict(one), "path": Path(one.path).name, "base": None, "more": None}
            | {"source": identify_dataset(one, runs)}
            for one in (table, *table.more)
        ],
    }


@functools.cache
def _readers() -> dict[str, str]:
    """The code that reads rows: other code may read the same files otherwise."""
    return {file.name: file_digest(file) for file in sorted(Path(__file__).parent.glob("*.py"))}


# ---- to files


def _keep(folder: Path, about: dict[str, Any], data: Data) -> None:
    import pyarrow as pa

    file = folder / f"{name_of(about)}.arrow"
    both = (data, data.bad)
    judge = {id(example) for sides in both for example in sides.judge}
    every = [getattr(sides, side) for sides in both for side in SIDES]
    rows = [(number, example) for number, side in enumerate(every) for example in side]
    options = pa.ipc.IpcWriteOptions(compression="lz4")
    with (
        whole(file) as stream,
        pa.ipc.new_file(stream, _schema(), options=options) as writer,
    ):
        for start in range(0, len(rows), BATCH):
            writer.write_batch(_batch(rows[start : start + BATCH], judge))
    told = {
        "rows": data.rows,
        "dropped": dict(data.dropped),
        "unused": dict(data.unused),
        "read_as": [*data.read_as],
        "columns": [[*names, count] for names, count in data.columns.items()],
        "first": {why: [number, way] for why, (number, _, way) in data.first.items()},
        "tested": sorted(data.tested),
        "named": sorted(data.named),
    }
    sources = [one["source"] for one in about["tables"]]
    keep(folder, about, {"sha256": file_digest(file), "sources": sources, **told})


def _schema() -> pa.Schema:
    import pyarrow as pa

    ids = [(name, pa.list_(pa.int32())) for name in IDS]
    plain = [("side", pa.int8()), ("judge", pa.bool_()), ("prompt", pa.string())]
    return pa.schema([*plain, ("more", pa.string()), *ids])


def _batch(rows: list[tuple[int, Example]], judge: set[int]) -> pa.RecordBatch:
    import pyarrow as pa

    columns = [
        pa.array([side for side, _ in rows], pa.int8()),
        pa.array([id(example) in judge for _, example in rows]),
        pa.array([example.prompt for _, example in rows]),
        pa.array([json.dumps(_more(example)) for _, example in rows]),
    ]
    for name in IDS:
        held = [vars(example)[name] for _, example in rows]  # compact, as `data.rows.Ids` has it
        ends = array("i", [0])
        for ids in held:
            ends.append(ends[-1] + len(ids or ()))
        values = array("i", b"".join(ids.tobytes() for ids in held if ids))
        places, flat = (
            pa.Array.from_buffers(pa.int32(), len(numbers), [None, pa.py_buffer(numbers)])
            for numbers in (ends, values)
        )
        none = pa.array([ids is None for ids in held])
        columns.append(pa.ListArray.from_arrays(places, flat, mask=none))
    return pa.record_batch(columns, schema=_schema())


def _more(example: Example) -> dict[str, Any]:
    said = {name: getattr(example, name) for name in MORE}
    others = [_more(one) | {name: getattr(one, name) for name in IDS} for one in example.others]
    return said | ({"others": others} if others else {})


# ---- and back


def _recalled(folder: Path, about: dict[str, Any], tokens: Tokens) -> Data | None:
    """The rows that were kept for exactly this; None where there are none that are whole."""
    import pyarrow as pa

    told, file = recall(folder, about), folder / f"{name_of(about)}.arrow"
    data = Data()
    try:
        if not isinstance(told, dict) or file_digest(file) != told["sha256"]:
            return None
        every = [(sides, side) for sides in (data, data.bad) for side in SIDES]
        for number, judges, example in _read(file, tokens.rows):
            sides, side = every[number]
            getattr(sides, side).append(example)
            if judges:
                sides.judge.append(example)
        data.rows, data.tested = int(told["rows"]), set(told["tested"])
        data.named = set(told["named"])
        data.dropped, data.unused = Counter(told["dropped"]), Counter(told["unused"])
        data.read_as = dict.fromkeys(told["read_as"])
        data.columns = Counter({(ours, theirs): n for ours, theirs, n in told["columns"]})
        data.first = {why: (number, {}, way) for why, (number, way) in told["first"].items()}
    except (OSError, pa.ArrowException, LookupError, TypeError, ValueError, AttributeError):
        return None
    return data


def _read(file: Path, vocabulary: int) -> Iterator[tuple[int, bool, Example]]:
    """Each row of a file: its side, whether it is the judge's, and what it holds.

    Raises ValueError and ArrowException where the file is not of ours.
    """
    import pyarrow as pa

    with pa.memory_map(str(file)) as stream, pa.ipc.open_file(stream) as reader:
        if reader.schema != _schema():
            raise ValueError("another schema")
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            batch.validate(full=True)
            plain = batch.columns[:4]
            if any(column.null_count for column in plain):
                raise ValueError("a row without a side")
            told = [column.to_pylist() for column in plain]
            ids = [_ids(column, vocabulary) for column in batch.columns[4:]]
            for side, judge, prompt, more, *own in zip(*told, *ids, strict=True):
                said = json.loads(more)
                others = tuple(Example(prompt, **one) for one in said.pop("others", ()))
                yield side, judge, Example(prompt, *own, **said, others=others)


def _ids(column: pa.ListArray, vocabulary: int) -> list[array[int] | None]:
    import pyarrow.compute as pc

    flat = column.flatten()  # without what no row has
    span = pc.min_max(flat).as_py()
    if len(flat) and not 0 <= span["min"] <= span["max"] < vocabulary:
        raise ValueError("ids that the model does not have")
    values, at = memoryview(flat.to_numpy()).cast("B"), 0
    found: list[array[int] | None] = []
    for length in pc.list_value_length(column).to_pylist():
        if length is None:
            found.append(None)
            continue
        own: array[int] = array("i")
        own.frombytes(values[at : at + 4 * length])
        found.append(own)
        at += 4 * length
    return found
