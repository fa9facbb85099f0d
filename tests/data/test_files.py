"""Rows as they are written: encodings, separators, packings, and what stops with a line."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path

import pyarrow
import pytest

from rlhf_recipes.data.files import rows_of
from rlhf_recipes.errors import DataError

ROWS = [
    {"prompt": "crème brûlée; how, please?", "chosen": "Egg yolks, cream", "rejected": "None"},
    {"prompt": "what is 2 · 4", "chosen": "8", "rejected": '"9"\nsays the other'},
    {"prompt": "when", "chosen": "2024-05-01", "rejected": "007"},
]


def table(mark: str) -> str:
    cells = [list(ROWS[0]), *(list(row.values()) for row in ROWS)]
    quoted = [['"' + cell.replace('"', '""') + '"' for cell in line] for line in cells]
    return "\r\n".join(mark.join(line) for line in quoted) + "\r\n"


LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
COMMAS, SEMICOLONS = "", "semicolons between its columns"
FILES = {
    "rows.csv": (table(",").encode(), ""),
    "mark.csv": (table(",").encode("utf-8-sig"), ""),
    "excel.csv": (table(";").encode("utf-8-sig"), SEMICOLONS),
    "hint.csv": (("sep=;\r\n" + table(";")).encode(), SEMICOLONS),
    "ansi.csv": (table(";").encode("cp1252"), f"text in cp1252, {SEMICOLONS}"),
    "unicode.csv": (table("\t").encode("utf-16"), "text in utf-16, tabs between its columns"),
    "rows.tsv": (table("\t").encode(), ""),
    "rows.csv.gz": (gzip.compress(table(",").encode()), ""),
    "rows.jsonl": (LINES.encode(), ""),
    "mark.jsonl": (LINES.replace("\n", "\r\n\r\n").encode("utf-8-sig"), ""),
    "blank.jsonl": (("\n \n" + LINES).encode(), ""),
    "list.jsonl": (json.dumps(ROWS, indent=1).encode(), ""),
    "rows.json": (json.dumps(ROWS).encode(), ""),
    "data.json": (json.dumps({"version": "1", "data": ROWS}).encode(), ""),
    "pandas.json": (
        json.dumps({n: {i: r[n] for i, r in enumerate(ROWS)} for n in ROWS[0]}).encode(),
        "",
    ),
    "columns.json": (json.dumps({n: [r[n] for r in ROWS] for n in ROWS[0]}).encode(), ""),
    "rows.jsonl.gz": (gzip.compress(LINES.encode()), ""),
    "named_plain.jsonl": (gzip.compress(LINES.encode()), ""),
    "rows.jsonl.zst": (pyarrow.compress(LINES.encode(), "zstd", asbytes=True), ""),
    "rows.jsonl.bz2": (bz2.compress(LINES.encode()), ""),
}


def form(name: str) -> str:
    return "csv" if ".csv" in name or ".tsv" in name else "json"


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows_in_every_file(tmp_path: Path, name: str) -> None:
    content, said = FILES[name]
    (tmp_path / name).write_bytes(content)
    rows, how = rows_of(tmp_path / name, form(name))
    assert list(rows) == ROWS and how == said


def test_numbers_keep_their_digits_and_empty_cells_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\nq,8,\n,,\nq,1e3,08\n")
    rows, _ = rows_of(tmp_path / "a.csv", "csv")
    assert list(rows) == [
        {"prompt": "q", "chosen": "8", "rejected": None},
        {"prompt": "q", "chosen": "1e3", "rejected": "08"},
    ]
    (tmp_path / "a.jsonl").write_text('{"a": 1.50, "b": [2], "c": true, "d": null, "e": NaN}\n{}\n')
    rows, _ = rows_of(tmp_path / "a.jsonl", "json")
    assert list(rows) == [{"a": "1.50", "b": ["2"], "c": True, "d": None, "e": None}, {}]


def test_a_column_may_change_what_it_holds(tmp_path: Path) -> None:
    """A reader that guesses types from the first ten thousand rows stops at the next."""
    values = ["null"] * 15_000 + ['"late"', "7", '{"a": [1]}', "[2]"]
    lines = [f'{{"prompt": "q{n}", "extra": {value}}}\n' for n, value in enumerate(values)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    rows, _ = rows_of(tmp_path / "a.jsonl", "json")
    assert [row["extra"] for row in rows][-5:] == [None, "late", "7", {"a": ["1"]}, ["2"]]


def test_a_single_row_is_a_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "a.json").write_text(json.dumps(row))
    assert list(rows_of(tmp_path / "a.json", "json")[0]) == [row]
    (tmp_path / "b.csv").write_text("prompt\na; b c\n")
    assert len(list(rows_of(tmp_path / "b.csv", "csv")[0])) == 1


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 2},\n', "a.jsonl:2: not JSON: Extra data"),
        ("a.jsonl", '{"a": 1}\n{"a": 2', "a.jsonl:2: not JSON"),
        ("a.jsonl", '{"a": 1}\n[2]\n', "row 2 is not an object"),
        ("a.json", '[{"a": 1},\n{"a": 2},\n]', "a.json:3: not JSON"),
        ("a.json", '["a", "b"]', "row 1 is not an object"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.csv", "prompt,chosen\na,b\na,b, c\n", "a.csv:3: 3 cells, where the first line"),
        ("a.csv", "prompt,chosen,chosen\na,b,c\n", "a.csv has two columns 'chosen'"),
    ],
)
def test_what_is_not_what_it_says_stops_with_its_line(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as error:
        list(rows_of(tmp_path / name, form(name))[0])
    assert said in str(error.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(bytes(range(128, 256)) * 9)
    with pytest.raises(DataError, match="save it as UTF-8"):
        rows_of(tmp_path / "a.csv", "csv")
