"""Who is asked what next, and what they said: a person's side of the store.

An ask that is not judged yet is a lease of ten minutes: nobody else takes that vote, and a second
tab of the same person gets another item. Every fifth ask is of an item that no training reads.
Every twentieth shows again what this person judged before, sides swapped: it measures how well they
agree with themselves.
"""

from __future__ import annotations

import random
import secrets
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlhf_recipes.feedback.items import Item
from rlhf_recipes.feedback.store import OF_ONE, OF_PAIRS, PAUSE, QUESTION, Store, as_item

LEASE = 600.0  # seconds
HELD_OUT, AGAIN, APART = 5, 20, 15  # every so many asks; and an item's two asks lie so far apart
LATEST = 40  # asks that say how fast a person is
SIDES = {"left": ("first", "second"), "right": ("second", "first")}  # as stored: plain, flipped

# Items that this person may be asked, those first that others have begun to judge.
OPEN = """
with latest as (
    select a.item, a.person, a.at between :since and :now as waits, j.verdict
    from ask a left join judgement j on j.n = (select max(n) from judgement where ask = a.id)
    where a.question = :question and a.again = 0
), taken as (
    select item, max(person = :person and (waits or verdict is not null)) as mine,
        count(distinct person) filter (
            where person <> :person and coalesce(verdict <> 'skip', waits)) as votes
    from latest group by item
)
select q.item from queue q left join taken t on t.item = q.item
where q.name = :queue and coalesce(t.votes, 0) < :votes and coalesce(t.mine, 0) = 0
order by coalesce(t.votes, 0) desc, q.place
"""
OWN = """
select a.rowid as place, a.*, j.verdict, j.strength, j.note, j.seconds
from ask a join queue q on q.item = a.item and q.name = :queue
left join judgement j on j.n = (select max(n) from judgement where ask = a.id)
where a.person = :person and a.question = :question
"""


@dataclass(frozen=True)
class Ask:
    """One showing of an item to a person, and the latest that they said to it."""

    id: str
    item: Item
    flipped: bool
    again: bool
    verdict: str | None  # as it was seen: left, right, tie, …
    strength: int | None
    note: str | None
    at: float  # when it was asked
    earlier: bool  # there is an ask before it

    @property
    def answers(self) -> tuple[str, ...]:
        """As they are shown, the left one first."""
        return self.item.answers[::-1] if self.flipped else self.item.answers


@dataclass(frozen=True)
class Progress:
    """How far one person is, and all of them."""

    yours: int  # items of this queue that they judged or skipped
    left: int  # that they can still be asked
    seconds: float | None  # that one takes them: the median
    items: int
    judged: int  # by anyone, skips apart

    @property
    def total(self) -> int:
        return self.yours + self.left


class Asks:
    """The asks of one queue and one question. `guideline` is the digest of the text shown."""

    def __init__(
        self,
        store: Store,
        queue: str,
        *,
        votes: int = 1,
        question: str = QUESTION,
        guideline: str = "",
        clock: Callable[[], float] = time.time,
        draw: random.Random | None = None,
    ) -> None:
        self.store, self.votes, self.clock = store, votes, clock
        self.guideline, self.draw = guideline, draw or random.Random()
        self._names = {"queue": queue, "question": question}

    def _words(self, person: str) -> dict[str, Any]:
        now = self.clock()
        own = {"person": person, "votes": self.votes, "now": now, "since": now - LEASE}
        return self._names | own

    def next(self, person: str) -> str | None:
        """The id of the ask that this person is to see; None where there is nothing to judge.

        It is on disk. Where nothing else is left, it is the oldest that waits for them elsewhere.
        """
        with self.store.writing() as db:
            # Only now: whoever wrote while this waited did so before this moment.
            words = self._words(person)
            made = "select count(*) from ask where person = :person and question = :question"
            place = db.execute(made, words).fetchone()[0] + 1
            found = self._found(db, words, held_out=place % HELD_OUT == 0)
            if found is None:
                waits = "and a.again = 0 and j.n is null and a.item not in (select item from"
                waits += " counted where person = :person and question = :question and again = 0)"
                waiting = db.execute(f"{OWN} {waits} order by place limit 1", words).fetchone()
                return waiting and waiting["id"]
            item, flipped, again = found, self.draw.random() < 0.5, False
            if place % AGAIN == 0 and (before := self._to_repeat(db, words)):
                item, flipped, again = *before, True
            return self._ask(db, item, person, flipped, again, words["now"])

    def put(self, person: str, item: Item, flipped: bool, at: float) -> str:
        """The id of an ask that was made elsewhere; the item is in the queue."""
        with self.store.writing() as db:
            return self._ask(db, item.id, person, flipped, False, at)

    def _ask(self, db: Any, item: str, person: str, flipped: bool, again: bool, at: float) -> str:
        ask, question = secrets.token_hex(12), self._names["question"]
        row = [ask, item, question, person, flipped, again, self.guideline, at]
        db.execute("insert into ask values (?, ?, ?, ?, ?, ?, ?, ?)", row)
        return ask

    def _found(self, db: Any, words: dict[str, Any], held_out: bool) -> str | None:
        """The item that is next, of that side where there is one."""
        sql = "select coalesce(json_extract(made, '$.side'), 'train') from item where id = ?"
        first = None
        for row in db.execute(OPEN, words):
            first = first or row["item"]
            if (db.execute(sql, [row["item"]]).fetchone()[0] != "train") == held_out:
                return row["item"]
        return first

    def _to_repeat(self, db: Any, words: dict[str, Any]) -> tuple[str, bool] | None:
        """An item that this person judged long enough ago and not twice, and its sides swapped."""
        own = db.execute(f"{OWN} order by place", words).fetchall()
        twice = {row["item"] for row in own if row["again"]}
        fit = [
            (row["item"], not row["flipped"])
            for row in own[:-APART]
            if row["verdict"] not in (None, "skip") and row["item"] not in twice
        ]
        return self.draw.choice(fit) if fit else None

    def get(self, id: str, person: str) -> Ask:
        """Raises KeyError where this person was never asked that."""
        with self.store.reading() as db:
            row = self._own(db, id, person)
            item = as_item(db.execute("select * from item where id = ?", [row["item"]]).fetchone())
            earlier = self._before(db, row, person) is not None
        flipped = bool(row["flipped"])
        return Ask(
            id,
            item,
            flipped,
            bool(row["again"]),
            seen(row["verdict"], flipped),
            row["strength"],
            row["note"],
            row["at"],
            earlier,
        )

    def before(self, id: str, person: str) -> str:
        """What this person was asked, and said something to, before that; itself for the first."""
        with self.store.reading() as db:
            row = self._own(db, id, person)
            return self._before(db, row, person) or id

    def _own(self, db: Any, id: str, person: str) -> Any:
        row = db.execute(f"{OWN} and a.id = :id", self._words(person) | {"id": id}).fetchone()
        if row is None:
            raise KeyError(id)
        return row

    def _before(self, db: Any, row: Any, person: str) -> str | None:
        words = self._words(person) | {"place": row["place"]}
        earlier = f"{OWN} and a.rowid < :place and j.n is not null order by a.rowid desc limit 1"
        found = db.execute(earlier, words).fetchone()
        return found and found["id"]

    def judge(
        self, id: str, person: str, verdict: str, strength: int | None = None, note: str = ""
    ) -> None:
        """Keep what a person says of what they see: left, right, tie, both_bad, good, bad, skip.

        It is on disk when this returns. Said once more, nothing is written. Raises KeyError where
        they were not asked, and ValueError for what cannot be said of this item.
        """
        with self.store.writing() as db:
            row = self._own(db, id, person)
            single = db.execute("select second is null from item where id = ?", [row["item"]])
            allowed = OF_ONE if single.fetchone()[0] else OF_PAIRS
            stored = SIDES[verdict][row["flipped"]] if verdict in SIDES else verdict
            if stored not in allowed or (verdict in ("first", "second")):
                raise ValueError(f"{verdict!r} is not a verdict on this")
            if strength is not None and (verdict not in SIDES or strength not in (1, 2, 3)):
                raise ValueError(f"{strength!r} is not a strength of {verdict}")
            said = (stored, strength, note or None)
            if said == (row["verdict"], row["strength"], row["note"]):
                return
            now = self.clock()
            seconds = max(now - row["at"], 0.0) if row["seconds"] is None else row["seconds"]
            words = "insert into judgement (ask, verdict, strength, note, seconds, at)"
            db.execute(f"{words} values (?, ?, ?, ?, ?, ?)", [id, *said, seconds, now])

    # ---- how far it is

    def progress(self, person: str) -> Progress:
        words = self._words(person)
        judged = "from counted c join queue q on q.item = c.item and q.name = :queue"
        judged += " where c.question = :question and c.again = 0"
        with self.store.reading() as db:

            def count(sql: str) -> int:
                return db.execute(f"select count({sql}", words).fetchone()[0]

            yours = count(f"distinct c.item) {judged} and c.person = :person")
            anyone = count(f"distinct c.item) {judged} and c.verdict <> 'skip'")
            items = count("*) from queue q where q.name = :queue")
            waits = "a.at between :since and :now"
            waiting = count(
                f"distinct a.item) from ask a join queue q on q.item = a.item and q.name = :queue"
                f" where a.person = :person and a.question = :question and a.again = 0 and {waits}"
                " and a.item not in (select item from counted where person = :person"
                " and question = :question and again = 0)"
            )
            left = waiting + count(f"*) from ({OPEN})")
            took = "and j.seconds <= :pause order by j.n desc limit :latest"
            latest = words | {"pause": PAUSE, "latest": LATEST}
            seconds = [row["seconds"] for row in db.execute(f"{OWN} {took}", latest)]
        median = statistics.median(seconds) if seconds else None
        return Progress(yours, left, median, items, anyone)

    def said(self, person: str, most: int) -> list[Any]:
        """The latest of what this person said in this queue, as rows, the last first."""
        with self.store.reading() as db:
            sql = f"{OWN} and j.n is not null order by place desc limit :most"
            rows = db.execute(sql, self._words(person) | {"most": most}).fetchall()
        return [{**row, "verdict": seen(row["verdict"], row["flipped"])} for row in rows]

    def counts(self) -> dict[str, Counter[str]]:
        """By person what they said in this queue, and how often: verdicts as they were seen.

        Beside them "earlier guideline": how many were judged under another text than this one.
        """
        found: dict[str, Counter[str]] = {}
        sql = "select c.* from counted c join queue q on q.item = c.item and q.name = :queue"
        with self.store.reading() as db:
            for row in db.execute(f"{sql} where c.question = :question and again = 0", self._names):
                own = found.setdefault(row["person"], Counter())
                own[seen(row["verdict"], row["flipped"]) or ""] += 1
                own["earlier guideline"] += row["guideline"] != self.guideline
        return found

    def begun(self, person: str) -> bool:
        """Whether this person was asked anything under the present guideline."""
        words = self._names | {"person": person, "guideline": self.guideline}
        sql = "select 1 from ask where person = :person and question = :question"
        with self.store.reading() as db:
            return db.execute(f"{sql} and guideline = :guideline", words).fetchone() is not None


def seen(verdict: str | None, flipped: bool) -> str | None:
    """A stored verdict as it was seen: the first answer stood left, or right where flipped."""
    for side, stored in SIDES.items():
        if verdict == stored[flipped]:
            return side
    return verdict
