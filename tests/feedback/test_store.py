"""The store: by content, only added to, and never another program's."""

import sqlite3

import pytest

from rlhf_recipes.errors import UsageError
from rlhf_recipes.feedback.items import item, read_items, write_items
from rlhf_recipes.feedback.store import Judged, Store, majority, snapshot

PROMPT = [{"role": "user", "content": "Two and two?"}]


def test_an_item_is_its_content_whatever_the_order_and_whoever_made_it():
    one = item(PROMPT, ["four", "five"], {"stage": ["sft", "ppo"], "side": "test"})
    other = item(PROMPT, ["five", "four"], {"stage": ["ppo", "sft"], "side": "test"})
    assert one == other
    assert item(PROMPT, ["four", "six"]).id != one.id
    with pytest.raises(ValueError, match="two that differ"):
        item(PROMPT, ["four", "four"])


def test_what_is_there_is_not_there_twice_and_comes_back(tmp_path):
    pair, single = item(PROMPT, ["four", "five"], {"side": "test"}), item(PROMPT, ["four"])
    write_items(tmp_path / "items.jsonl", [pair, single])
    assert list(read_items(tmp_path / "items.jsonl")) == [pair, single]
    for queue in ("a", "b", "a"):
        Store(tmp_path).put([pair, single], queue)
    store = Store(tmp_path)
    assert store.items([single.id, "none", pair.id]) == [single, pair]
    assert store.file.stat().st_mode & 0o777 == 0o600
    with store.reading() as db:
        places = db.execute("select name, place, item from queue order by name, place").fetchall()
    assert [tuple(row) for row in places] == [
        ("a", 0, pair.id), ("a", 1, single.id), ("b", 0, pair.id), ("b", 1, single.id),
    ]  # fmt: skip


def test_another_programs_file_is_refused_in_one_line(tmp_path):
    file = tmp_path / "feedback.db"
    file.write_text("a note that happens to have this name, and is longer than a header " * 9)
    with pytest.raises(UsageError, match="cannot be read"):
        Store(tmp_path)
    file.unlink()
    with sqlite3.connect(file) as db:
        db.execute("create table t (x)")
    with pytest.raises(UsageError, match="is not a store of judgements"):
        Store(tmp_path)
    file.unlink()
    Store(tmp_path)
    with sqlite3.connect(file) as db:
        db.execute("pragma user_version = 2")
    with pytest.raises(UsageError, match="is of version 2"):
        Store(tmp_path)


def test_the_majority_counts_and_an_even_split_is_a_tie():
    said = [("i", "ada", "first"), ("i", "bob", "second"), ("k", "ada", "second")]
    said += [("k", "bob", "second"), ("k", "cy", "first"), ("l", "ada", "skip")]
    rows = [Judged(item, person, verdict, False) for item, person, verdict in said]
    assert majority(rows) == {"i": "tie", "k": "second"}
    assert snapshot(rows) == snapshot(rows[::-1])
    assert snapshot(rows)["judged"] == 3
    assert snapshot(rows)["digest"] != snapshot(rows[:-1])["digest"]
