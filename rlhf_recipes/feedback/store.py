"""The one store of judgements of a runs folder: `feedback.db`, SQLite, which is only added to.

An item is there once, by content. An *ask* is one showing of it to one person, with its sides; a
*judgement* is what they said to it, and the latest one of an ask counts. `call` holds what an AI
judge was asked, which is its cache and its bill.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf_recipes.errors import UsageError
from rlhf_recipes.feedback.items import Item
from rlhf_recipes.store.digests import digest
from rlhf_recipes.store.files import aside, to_json

NAME = "feedback.db"
APPLICATION, VERSION = 1380730950, 1  # in the file's header
QUESTION = "better"  # of training; the evaluation's is another, and trains nothing
OF_PAIRS = ("first", "second", "tie", "both_bad", "skip")
OF_ONE = ("good", "bad", "skip")
SECONDS_BUSY = 5.0
PAUSE = 180.0  # seconds: who takes longer for one item was away

SCHEMA = """
create table item (
  id text primary key, prompt text not null, first text not null,
  second text,  -- null: a single answer
  made text not null, row text not null) strict;
create table queue (  -- its key first: SQLite 3.40's integrity_check finds fault with other orders
  name text not null, item text not null references item, place integer not null,
  primary key (name, item)) strict, without rowid;
create table ask (
  id text primary key, item text not null references item, question text not null,
  person text not null,
  flipped integer not null check (flipped in (0, 1)),  -- 1: the second answer stood left
  again integer not null check (again in (0, 1)),  -- to see whether a person agrees with themselves
  guideline text not null, at real not null) strict;
create index ask_item on ask (item, question);
create index ask_person on ask (person, question, at);
create table judgement (
  n integer primary key, ask text not null references ask,
  verdict text not null check (
    verdict in ('first', 'second', 'tie', 'both_bad', 'skip', 'good', 'bad')),
  strength integer check (strength between 1 and 3), note text check (length(note) <= 4000),
  seconds real not null, at real not null) strict;
create index judgement_ask on judgement (ask);
create table call (
  id text primary key,  -- digest of judge, prompt version, principles, item, order, sample
  judge text not null, item text not null references item, first_is integer not null,
  logit real, verdict text, reason text, model text, tokens_in integer, tokens_out integer,
  error text, seconds real not null, at real not null) strict;
create view counted as
  select j.n, a.item, a.question, a.person, a.flipped, a.again, a.guideline,
         j.verdict, j.strength, j.note, j.seconds, j.at, a.id as ask
  from ask a join judgement j on j.n = (select max(n) from judgement where ask = a.id);
"""


@dataclass(frozen=True)
class Judged:
    """What one person says of one item, by the latest judgement of the latest ask."""

    item: str
    person: str
    verdict: str
    flipped: bool  # the second answer stood left
    strength: int | None = None
    note: str | None = None
    seconds: float = 0.0
    at: float = 0.0


class Store:
    """Opens, or makes, the store of a runs folder. Each use has a connection of its own."""

    def __init__(self, runs: Path) -> None:
        """Raises UsageError where the file there is not a store of this version."""
        self.file = runs / NAME
        if not self.file.exists():
            runs.mkdir(parents=True, exist_ok=True)
            self._make()
        self._check()

    def _make(self) -> None:
        """The file has its name only once it is whole; of two processes one's is kept."""
        new = aside(self.file)
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        try:
            with contextlib.closing(sqlite3.connect(new)) as db:
                db.executescript(
                    f"pragma application_id = {APPLICATION}; pragma user_version = {VERSION};"
                    f"pragma journal_mode = wal; begin; {SCHEMA} commit;"
                )
            with contextlib.suppress(FileExistsError):
                os.link(new, self.file)
        finally:
            for path in (new, new.with_name(f"{new.name}-wal"), new.with_name(f"{new.name}-shm")):
                path.unlink(missing_ok=True)

    def _check(self) -> None:
        other = "move it away, and a new one is made"
        try:
            with self.reading() as db:
                application = db.execute("pragma application_id").fetchone()[0]
                version = db.execute("pragma user_version").fetchone()[0]
        except sqlite3.Error as error:
            raise UsageError(f"{self.file} cannot be read: {error}", other) from None
        if application != APPLICATION:
            raise UsageError(f"{self.file} is not a store of judgements", other)
        if version != VERSION:
            what = f"{self.file} is of version {version}; this program writes {VERSION}"
            raise UsageError(what, "use the program that wrote it")

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(self._connect()) as db:
            yield db

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: on disk when the block has ended, or nothing of it is."""
        with contextlib.closing(self._connect()) as db:
            db.execute("begin immediate")
            try:
                yield db
                db.execute("commit")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("rollback")
                raise

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.file, timeout=SECONDS_BUSY, isolation_level=None)
        db.row_factory = sqlite3.Row
        db.execute("pragma foreign_keys = on")
        db.execute("pragma synchronous = full")
        return db

    # ---- items

    def put(self, items: Iterable[Item], queue: str | None = None) -> None:
        """Add what is not there; with `queue`, in this order after what it holds."""
        with self.writing() as db:
            last = "select coalesce(max(place), -1) from queue where name = ?"
            place = db.execute(last, [queue or ""]).fetchone()[0]
            for one in items:
                first, second = (*one.answers, None)[:2]
                texts = [to_json(value) for value in (one.prompt, dict(one.made), dict(one.row))]
                db.execute(
                    "insert or ignore into item values (?, ?, ?, ?, ?, ?)",
                    [one.id, texts[0], first, second, *texts[1:]],
                )
                if queue is not None:
                    place += 1
                    words = "insert or ignore into queue values (?, ?, ?)"
                    db.execute(words, [queue, one.id, place])

    def items(self, ids: Iterable[str]) -> list[Item]:
        """Those of them that are there, in this order."""
        with self.reading() as db:
            rows = [db.execute("select * from item where id = ?", [id]).fetchone() for id in ids]
        return [as_item(row) for row in rows if row is not None]

    def ids(self, queue: str | None = None) -> list[str]:
        """Of the items of a queue, in its order; or of all that there are, in that of coming."""
        words = "select id from item where ? is null order by rowid"
        if queue is not None:
            words = "select item from queue where name = ? order by place"
        with self.reading() as db:
            return [row[0] for row in db.execute(words, [queue])]

    # ---- what was said

    def judged(
        self, ids: Iterable[str], question: str = QUESTION, again: bool = False
    ) -> list[Judged]:
        """What each person says of each of these items, apart from asks for self-agreement.

        With `again`, what they say in those asks.
        """
        wanted, found = {*ids}, {}
        with self.reading() as db:
            words = "select * from counted where question = ? and again = ? order by n"
            for row in db.execute(words, [question, again]):
                if row["item"] in wanted:
                    found[row["item"], row["person"]] = Judged(
                        row["item"],
                        row["person"],
                        row["verdict"],
                        bool(row["flipped"]),
                        *(row[name] for name in ("strength", "note", "seconds", "at")),
                    )
        return list(found.values())


def as_item(row: Any) -> Item:
    """Of a row of the table `item`."""
    answers = tuple(text for text in (row["first"], row["second"]) if text is not None)
    prompt, made, own = (json.loads(row[name]) for name in ("prompt", "made", "row"))
    return Item(row["id"], prompt, answers, made, {}, own)


def majority(judged: Iterable[Judged]) -> dict[str, str]:
    """By item: what most people say, those apart who skip; "tie" where they are split evenly."""
    votes: dict[str, Counter[str]] = defaultdict(Counter)
    for one in judged:
        if one.verdict != "skip":
            votes[one.item][one.verdict] += 1
    found = {}
    for key, said in votes.items():
        [(verdict, most), (_, second)] = [*said.most_common(2), ("", 0)][:2]
        found[key] = verdict if most > second else "tie"
    return found


def strengths(said: Iterable[Judged]) -> dict[str, float]:
    """By item: by how much the better answer is better, in the mean; where people said so."""
    votes: dict[str, list[float]] = {}
    for one in said:
        if one.strength is not None and one.verdict in ("first", "second"):
            sign = 1 if one.verdict == "first" else -1
            votes.setdefault(one.item, []).append(sign * one.strength)
    return {key: abs(fmean(values)) for key, values in votes.items() if fmean(values)}


def snapshot(judged: Sequence[Judged]) -> dict[str, Any]:
    """What a stage's key holds of judgements: how many items, and a digest of what counts."""
    said = sorted([one.item, one.person, one.verdict, one.strength] for one in judged)
    return {"judged": len({one.item for one in judged}), "digest": digest(said)}
