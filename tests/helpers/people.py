"""What people said, put into a store as the page does it."""

from __future__ import annotations

import contextlib
import secrets
import sqlite3

from rlhf_recipes.feedback.items import Item
from rlhf_recipes.feedback.store import QUESTION, Store


def say(
    store: Store,
    item: Item,
    person: str,
    verdict: str,
    *,
    again: bool = False,
    flipped: bool = False,
    question: str = QUESTION,
    strength: int | None = None,
    note: str | None = None,
    seconds: float = 10.0,
    at: float = 1.0,
) -> str:
    """One ask of an item, which is put into the store, and what a person said; the ask's id."""
    if not store.items([item.id]):
        store.put([item])
    ask = secrets.token_hex(8)
    asked = [ask, item.id, question, person, flipped, again, "", at]
    said = [ask, verdict, strength, note, seconds, at]
    with contextlib.closing(sqlite3.connect(store.file)) as db, db:
        db.execute("pragma synchronous = off")  # a test outlives no power cut
        db.execute("insert into ask values (?, ?, ?, ?, ?, ?, ?, ?)", asked)
        db.execute("insert into judgement values (null, ?, ?, ?, ?, ?, ?)", said)
    return ask
