"""The rows of a file as they are written: texts stay texts, whatever they look like.

Libraries of tables guess types: "None" is read as nothing, 8 as 8.0, 2024-05-01 as a moment. An
answer is a text, so nothing is guessed here. Numbers keep the digits of the file, and an empty cell
of a spreadsheet is None.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from charset_normalizer import from_bytes
from pyarrow import input_stream

from rlhf_recipes.data.turns import turns
from rlhf_recipes.errors import DataError

Rows = Iterator[dict[str, Any]]

MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2"}
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
# What spreadsheets write where they do not write UTF-8; others decode, too, and say nonsense.
NATIONAL = ["cp1252", "cp1251", "gb18030", "shift_jis", "euc_kr", "big5"]
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
HOLDERS = ("data", "rows", "train", "examples", "instances", "items")
SAMPLE = 2**16  # bytes, for what has to be guessed
NUMBERS: dict[str, Any] = {"parse_int": str, "parse_float": str, "parse_constant": lambda _: None}


def rows_of(file: Path, form: str) -> tuple[Rows, str]:
    """The rows of a file of `form`, "json" or "csv", and how it is read where that is not plain.

    JSON may be an object a line, or one list; columns as pandas writes them; or a list under one
    key. Gzip, zstd and bzip2 are known by their first bytes. Raises DataError, also while the rows
    are read, with the line where the file is not what its name says.
    """
    with file.open("rb") as raw:
        start = raw.read(4)
    packing = next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)

    def unpacked() -> Any:
        return input_stream(str(file), compression=packing)

    encoding = _encoding(file, unpacked())
    how = [] if encoding.startswith("utf-8") else [f"text in {encoding}"]

    def text() -> TextIO:
        return io.TextIOWrapper(unpacked(), encoding=encoding, newline="")

    if form == "json":
        return _json(file, text()), ", ".join(how)
    dialect, said = _dialect(file, text().read(SAMPLE))
    return _cells(file, text(), dialect), ", ".join([*how, *said])


def _encoding(file: Path, stream: Any) -> str:
    sample = stream.read(SAMPLE)
    for mark, name in MARKS.items():
        if sample.startswith(mark):
            return name
    decoder, piece, odd = codecs.getincrementaldecoder("utf-8")(), sample, b""
    try:
        while piece:
            odd = piece
            decoder.decode(piece)
            piece = stream.read(SAMPLE)
        decoder.decode(b"", final=True)
        return "utf-8"
    except UnicodeDecodeError:
        best = from_bytes(odd, cp_isolation=NATIONAL).best()
    if best is None:
        raise DataError(f"{file} is text in an encoding that is not known", "save it as UTF-8")
    return best.encoding


# ---- JSON


def _json(file: Path, text: TextIO) -> Rows:
    line, first = next(((n, one) for n, one in enumerate(text, 1) if one.strip()), (1, ""))
    try:
        row = _parsed(first)
    except ValueError:
        row = None  # one value over many lines, or no JSON
    second = text.readline()
    try:
        if not isinstance(row, dict) or not second:
            whole = first + second + text.read()
            yield from _listed(file, _parsed(whole) if whole.strip() else [])
            return
        yield row
        numbers = itertools.count(line + 1)
        for line, written in zip(numbers, itertools.chain([second], text), strict=False):
            if written.strip():
                yield _object(file, _parsed(written), line)
    except json.JSONDecodeError as error:
        found = error.doc[max(error.pos - 20, 0) : error.pos + 20].strip()
        what = f"not JSON: {error.msg}, near {found!r}"
        raise DataError(f"{file}:{line + error.lineno - 1}: {what}", "mend that line") from None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, strict=False, **NUMBERS)
    except RecursionError:
        raise json.JSONDecodeError("nested too deeply", text, 0) from None


def _object(file: Path, row: Any, place: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{file}: row {place} is not an object", 'a row is {"prompt": "…", …}')
    return row


def _listed(file: Path, value: Any) -> Rows:
    """The rows of one JSON value: a list of them, one row, a list under a key, or columns."""
    if isinstance(value, dict) and value:
        held = list(value.values())
        inner = next((value[name] for name in HOLDERS if name in value), held[0])
        if isinstance(inner, list) and inner and isinstance(inner[0], dict) and not turns(inner):
            value = inner
        elif _columns(held):
            columns = [one.values() if isinstance(one, dict) else one for one in held]
            value = [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    for place, row in enumerate(value if isinstance(value, list) else [value], 1):
        yield _object(file, row, place)


def _columns(held: list[Any]) -> bool:
    """Whether these are columns: of one length, lists or under one another's numbers."""
    if all(isinstance(one, list) for one in held):
        return len(held) > 1 and len({len(one) for one in held}) == 1
    keys = {tuple(one) if isinstance(one, dict) else None for one in held}
    return len(keys) == 1 and all(map(str.isdecimal, keys.pop() or ("",)))


# ---- tables


def _dialect(file: Path, sample: str) -> tuple[dict[str, Any], list[str]]:
    """How to read a table, and what to say of it."""
    named = re.match(r"sep=(.)\r?\n", sample)  # Excel's own hint, in a line before the header
    mark = named[1] if named else _separator(sample)
    usual = "\t" if ".tsv" in file.suffixes else ","
    said = [] if mark == usual else [f"{SEPARATORS.get(mark, repr(mark))} between its columns"]
    head = next(csv.reader(io.StringIO(sample, newline=""), delimiter=mark), [])
    spaced = len(head) > 1 and all(name.startswith(" ") for name in head[1:])
    return {"delimiter": mark, "skipinitialspace": spaced}, said


def _separator(sample: str) -> str:
    """The mark that gives the most rows the header's number of cells, and then the most cells."""

    def fits(mark: str) -> tuple[float, int]:
        rows = [row for row in csv.reader(io.StringIO(sample, newline=""), delimiter=mark) if row]
        rows = rows[: max(len(rows) - 1, 1)][:50]  # the last may be cut
        width = len(rows[0]) if rows else 1
        return (sum(len(row) == width for row in rows) / len(rows), width) if width > 1 else (0, 0)

    best = max(SEPARATORS, key=fits)
    return best if fits(best)[1] else ","


def _cells(file: Path, text: TextIO, dialect: dict[str, Any]) -> Rows:
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(text, **dialect)
    head = next(reader, [])
    if "".join(head).startswith("sep="):
        head = next(reader, [])
    if twice := next((name for name in head if name and head.count(name) > 1), None):
        raise DataError(f"{file} has two columns {twice!r}", "rename one of them, or take it out")
    for cells in reader:
        while len(cells) > len(head) and not cells[-1]:
            cells.pop()  # columns that a spreadsheet has, and nobody filled
        if len(cells) > len(head):
            what = f"{len(cells)} cells, where the first line names {len(head)} columns"
            hint = 'a text that holds the separator stands in quotes: "a, b"'
            raise DataError(f"{file}:{reader.line_num}: {what}", hint)
        if any(cells):
            cells += [""] * (len(head) - len(cells))
            yield dict(zip(head, (cell or None for cell in cells), strict=True))
