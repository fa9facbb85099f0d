"""Encoded rows that are kept in the runs folder: the same rows, and none but those."""

from __future__ import annotations

import json
import sys
from array import array
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from rlhf_recipes.data import kept_rows
from rlhf_recipes.data.dataset import Data, load_data
from rlhf_recipes.data.kept_rows import load_rows
from rlhf_recipes.data.rows import Example
from rlhf_recipes.data.tokens import Tokens, settle
from rlhf_recipes.models.load import load_tokenizer
from rlhf_recipes.recipe.tables import DatasetTable
from rlhf_recipes.store.digests import digest, file_digest

pytestmark = pytest.mark.train

GOOD = [{"prompt": f"red {n} sun", "chosen": "blue", "rejected": "cat"} for n in range(40)]
BAD = [
    {"prompt": "red one", "chosen": "blue", "rejected": "blue"},
    {"prompt": "red two", "chosen": "blue " * 20, "rejected": "cat"},
    *({"prompt": f"red {n} three", "completion": "sun", "label": False} for n in range(8)),
    {"prompt": "red four", "completion": "sun", "label": True, "note": "a word"},
    {"prompt": "red five"},
]


@pytest.fixture
def tokens(tiny_model: Path) -> Tokens:
    return settle(load_tokenizer(tiny_model), 32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "rows.jsonl"
    made.write_text("".join(json.dumps(row) + "\n" for row in [*GOOD, *BAD]))
    return made


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tables whose rows were encoded, once each time."""
    seen: list[Any] = []

    def count(table: Any, *given: Any) -> Data:
        seen.append(table)
        return load_data(table, *given)

    monkeypatch.setattr(kept_rows, "load_data", count)
    monkeypatch.setattr(kept_rows, "FEWEST", 10)
    monkeypatch.setattr(kept_rows, "BATCH", 7)
    return seen


def table(file: Path, **changes: Any) -> DatasetTable:
    words = {"max_prompt_tokens": 16, "max_answer_tokens": 8, "validation_fraction": 0.15}
    return DatasetTable(str(file), **{**words, "test_fraction": 0.2, **changes})


def test_rows_are_read_again_as_they_were(
    file: Path, tmp_path: Path, tokens: Tokens, read: list[Any]
) -> None:
    one = table(file)
    first, again = (load_rows(one, tokens, set(), (), tmp_path) for _ in range(2))
    assert read == [one]
    assert first.train and first.validation and first.test and first.judge and first.bad.train
    for side in (
        *kept_rows.SIDES,
        "judge",
        "bad",
        "named",
        "dropped",
        "rows",
        "tested",
        "columns",
        "unused",
    ):
        assert getattr(again, side) == getattr(first, side), side
    assert [*again.dropped] == [*first.dropped]  # in this order, where two are as common
    assert again.spoken() == first.spoken()
    assert again.reward_train == first.reward_train != first.train
    numbers = {why: (number, way) for why, (number, _, way) in first.first.items()}
    assert {why: (n, way) for why, (n, _, way) in again.first.items()} == numbers


def test_what_decides_the_rows_has_them_read_anew(
    file: Path, tmp_path: Path, tiny_model: Path, tokens: Tokens, read: list[Any]
) -> None:
    plain = settle(load_tokenizer(tiny_model), 32, "plain")
    others: list[tuple[DatasetTable, Tokens, set[str]]] = [
        (table(file), tokens, set()),
        (table(file), plain, set()),
        (table(file), tokens, {"user: red 3 sun"}),
        (table(file, max_answer_tokens=7), tokens, set()),
        (table(file, system="red"), tokens, set()),
        (table(file, judge_fraction=0.5), tokens, set()),
        (table(file, max_rows=30), tokens, set()),
        (table(file, columns={"prompt": "prompt"}), tokens, set()),
        (table(file, more=(table(file, weight=0.5),)), tokens, set()),
    ]
    for count, (one, settled, tested) in enumerate(others, 1):
        made, kept = (load_rows(one, settled, tested, (), tmp_path) for _ in range(2))
        assert len(read) == count and made.train == kept.train
    file.write_text(file.read_text().replace("red 7 sun", "sun 7 sun"))
    load_rows(table(file), tokens, set(), (), tmp_path)
    assert len(read) == len(others) + 1


def test_few_rows_or_no_runs_folder_leave_nothing(
    file: Path, tmp_path: Path, tokens: Tokens, read: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_rows(table(file), tokens, set(), (), None)
    monkeypatch.setattr(kept_rows, "FEWEST", 60)
    load_rows(table(file), tokens, set(), (), tmp_path / "runs")
    assert len(read) == 2 and not (tmp_path / "runs").exists()


def kept(runs: Path) -> tuple[Path, Path]:
    [rows], [told] = runs.glob(".stages/rows/*.arrow"), runs.glob(".stages/rows/*.json")
    return rows, told


def other_schema(file: Path) -> None:
    with pa.ipc.new_file(str(file), pa.schema([("side", pa.int8())])):
        pass


def other_ids(file: Path) -> None:
    """One id that the model has no row for."""
    with pa.ipc.open_file(str(file)) as reader:
        held = reader.read_all().to_pylist()
    held[0]["prompt_ids"][0] = 32
    with pa.ipc.new_file(str(file), kept_rows._schema()) as writer:
        writer.write_table(pa.Table.from_pylist(held, schema=kept_rows._schema()))


@pytest.mark.parametrize("vouched", [False, True], ids=["its checksum is off", "it is vouched for"])
@pytest.mark.parametrize(
    "harm",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-40]),
        lambda file: file.write_bytes(b"\x80\x04N."),  # a pickle
        other_schema,
        other_ids,
    ],
)
def test_a_damaged_or_foreign_file_is_made_anew(
    harm: Any, vouched: bool, file: Path, tmp_path: Path, tokens: Tokens, read: list[Any]
) -> None:
    first = load_rows(table(file), tokens, set(), (), tmp_path)
    rows, told = kept(tmp_path)
    whole = rows.read_bytes()
    harm(rows)
    if vouched:
        value = json.loads(told.read_text())["value"] | {"sha256": file_digest(rows)}
        told.write_text(json.dumps({"format": 1, "value": value, "digest": digest(value)}))
    again = load_rows(table(file), tokens, set(), (), tmp_path)
    assert len(read) == 2 and again.train == first.train and rows.read_bytes() == whole
    told.write_text(told.read_text()[:-30])
    assert load_rows(table(file), tokens, set(), (), tmp_path).train == first.train
    load_rows(table(file), tokens, set(), (), tmp_path)
    assert len(read) == 3


def test_an_id_takes_four_bytes() -> None:
    ids = list(range(1000, 2000))
    example = Example("x", ids, ids, None)
    assert example.prompt_ids == ids and example.rejected_ids is None
    assert sys.getsizeof(vars(example)["prompt_ids"]) < 4 * 1000 + 100
    assert Example("x", array("i", ids), array("i", ids), None) == example  # type: ignore[arg-type]
