"""What an AI judge was asked and what it replied, in the store: its cache and its bill.

A row is a finished call. A verdict's id is what was asked, so it is paid for once. A call without a
verdict has an id of its own: it is on the bill, and it is asked again.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.feedback.items import Item
from rlhf_recipes.feedback.reading import Reply
from rlhf_recipes.feedback.store import Store
from rlhf_recipes.store.digests import digest

COLUMNS = "id judge item first_is logit verdict reason model tokens_in tokens_out error seconds at"
SIGN = {"1": "first", "2": "second", "tie": "tie"}  # of a verdict where the first is in place 1


@dataclass(frozen=True)
class Ask:
    """One question to a judge: an item in one order. `first` is the place that is shown first."""

    item: Item
    first: int = 0  # 0: the item's first answer, 1: its second
    sample: int = 0

    def id(self, judge: str) -> str:
        return digest([judge, self.item.id, self.first, self.sample])


@dataclass(frozen=True)
class Bill:
    """All calls of a judge for some items, from every run: those that failed, too."""

    calls: int = 0
    failed: int = 0  # calls without a verdict
    tokens_in: int = 0
    tokens_out: int = 0
    uncounted: int = 0  # calls whose reply did not say how many tokens
    seconds: float = 0.0

    def dollars(self, price: tuple[float, float]) -> float:
        return (self.tokens_in * price[0] + self.tokens_out * price[1]) / 1e6


def keep(store: Store, judge: str, replies: Iterable[tuple[Ask, Reply]]) -> None:
    """On disk when this returns."""
    with store.writing() as db:
        for ask, reply in replies:
            key = ask.id(judge) if reply.error is None else uuid.uuid4().hex
            row = [key, judge, ask.item.id, ask.first + 1, *_of_item(reply, ask.first)]
            row += [reply.reason, reply.model, reply.tokens_in, reply.tokens_out, reply.error]
            marks = ", ".join("?" * 13)
            words = f"insert or ignore into call ({COLUMNS.replace(' ', ', ')}) values ({marks})"
            db.execute(words, [*row, reply.seconds, time.time()])


def _of_item(reply: Reply, first: int) -> tuple[float | None, str | None]:
    """A reply is of places; the store's log odds and verdicts are of the item's answers."""
    logit = reply.logit if reply.logit is None or not first else -reply.logit
    verdict = reply.verdict and SIGN[reply.verdict]
    if first and verdict in ("first", "second"):
        verdict = "second" if verdict == "first" else "first"
    return logit, verdict


def replies(store: Store, judge: str) -> dict[str, Reply]:
    """The verdicts of a judge, by the id of what was asked."""
    with store.reading() as db:
        rows = db.execute("select * from call where judge = ? and error is null", [judge])
        return {row["id"]: _as_reply(row) for row in rows}


def _as_reply(row: Mapping[str, Any]) -> Reply:
    swapped = row["first_is"] == 2
    logit = row["logit"] if row["logit"] is None or not swapped else -row["logit"]
    verdict = row["verdict"]
    if verdict is not None:
        verdict = "tie" if verdict == "tie" else "12"[(verdict == "second") != swapped]
    return Reply(logit, verdict, reason=row["reason"], model=row["model"], seconds=row["seconds"])


def bill(store: Store, judge: str, items: Iterable[Item]) -> Bill:
    wanted = {one.id for one in items}
    with store.reading() as db:
        rows = db.execute("select * from call where judge = ?", [judge]).fetchall()
    rows = [row for row in rows if row["item"] in wanted]
    return Bill(
        len(rows),
        sum(row["error"] is not None for row in rows),
        sum(row["tokens_in"] or 0 for row in rows),
        sum(row["tokens_out"] or 0 for row in rows),
        sum(row["tokens_in"] is None for row in rows),
        sum(row["seconds"] for row in rows),
    )
