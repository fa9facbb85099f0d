"""Judgements from files: of our form "judgements", of Label Studio's export, of Argilla's.

A file merges: what the store has is not added again.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf_recipes.data.exports import plain_rows
from rlhf_recipes.data.labels import GOOD, preferred, says, word_of
from rlhf_recipes.data.turns import Unusable
from rlhf_recipes.errors import DataError, UsageError
from rlhf_recipes.feedback.items import Item, item, judgeable
from rlhf_recipes.feedback.store import OF_ONE, OF_PAIRS, QUESTION, Store
from rlhf_recipes.store.digests import digest
from rlhf_recipes.store.files import to_json

Json = dict[str, Any]


def add(store: Store, file: Path) -> str:
    """Add the judgements of a file that we, Label Studio or Argilla wrote, and say how many.

    All are added, or none. Raises UsageError, with the place in the file.
    """
    added = there = 0
    dropped: Counter[str] = Counter()
    found: list[tuple[Item, Json]] = []
    for place, record in _records(file):
        try:
            found += _said_in(record, dropped)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"{file}: record {place} is not a judgement: {_short(error)}"
            hint = "give a file of --as judgements, label-studio or argilla"
            raise UsageError(what, hint) from None
    store.put(one for one, _ in found)
    with store.writing() as db:
        for one, said in found:
            new = _keep(db, one, said)
            added, there = added + new, there + (not new)
    notes = [f"{there} were there before"] if there else []
    notes += [f"{count} dropped: {reason}" for reason, count in dropped.items()]
    return "; ".join([f"{added} judgements added", *notes])


def _short(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]


def _records(file: Path) -> Iterator[tuple[int, Json]]:
    """The objects of a JSON list, or of a file with one object a line."""
    place = 1
    try:
        text = file.read_text(encoding="utf-8")
        listed = text.lstrip().startswith("[")
        for place, one in enumerate(_parsed(text) if listed else text.split("\n"), 1):
            if not listed and not one.strip():
                continue
            record = one if listed else _parsed(one)
            if not isinstance(record, dict):
                raise ValueError("not an object")
            yield place, record
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file}: record {place} cannot be read: {_short(error)}") from None


def _parsed(text: str) -> Any:
    def refused(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refused)


def _keep(db: Any, one: Item, said: Json) -> bool:
    """Add a judgement, unless its ask has it; a foreign one's date may be unknown, and is 0."""
    ask = [said[key] for key in ("ask", "question", "person", "flipped", "again", "guideline")]
    key, *about = ask
    words = "insert or ignore into ask values (?, ?, ?, ?, ?, ?, ?, ?)"
    db.execute(words, [key, one.id, *about, said["asked"]])
    words = "select item, question, person, flipped, again from ask where id = ?"
    if tuple(db.execute(words, [key]).fetchone()) != (one.id, *about[:-1]):
        raise UsageError(f"the ask {key[:12]} is another one here", "nothing was added")
    new = tuple(said[key] for key in ("verdict", "strength", "note", "at"))
    words = "select verdict, strength, note, at from judgement where ask = ? order by n"
    before = [tuple(row) for row in db.execute(words, [key])]
    if (said["at"] and new in before) or (before and new[:3] == before[-1][:3]):
        return False
    words = "insert into judgement (ask, verdict, strength, note, at, seconds) "
    db.execute(f"{words} values (?, ?, ?, ?, ?, ?)", [key, *new, said["seconds"]])
    return True


def _ours(record: Json) -> tuple[Item, Json]:
    """A line of --as judgements. Raises ValueError where a value is not one that we write."""
    prompt = [{key: str(value) for key, value in turn.items()} for turn in record["prompt"]]
    one = item(prompt, record["answers"], record["made"], None, record["row"])
    if one.id != record["item"] or list(one.answers) != record["answers"]:
        raise ValueError("its id is not that of its prompt and answers")
    said = {key: record[key] for key in ("verdict", "strength", "note")}
    said |= {key: float(record[key]) for key in ("seconds", "at", "asked")}
    said |= {key: int(bool(record[key])) for key in ("flipped", "again")}
    for key in ("ask", "question", "person", "guideline"):
        said[key] = record[key] + ""  # a text
    if said["verdict"] not in (OF_PAIRS if len(one.answers) == 2 else OF_ONE):
        raise ValueError(f"{said['verdict']!r} is not a verdict on it")
    if said["strength"] not in (None, 1, 2, 3):
        raise ValueError(f"{said['strength']!r} is not a strength")
    if not all(math.isfinite(said[key]) for key in ("seconds", "at", "asked")):
        raise ValueError("a time is not a number")
    if not said["person"]:
        raise ValueError("it names no person")
    if said["note"] is not None and len(said["note"] + "") > 4000:
        raise ValueError("its note is too long")
    return one, said


def _said_in(record: Json, dropped: Counter[str]) -> Iterator[tuple[Item, Json]]:
    """The judgements in a record; those of other programs that hold no verdict are counted."""
    to_json(record).encode()  # no store holds half a character
    if "ask" in record:
        yield _ours(record)
        return
    for fields, row, person, about in _theirs(record):
        try:
            yield _said(fields, row, person, about)
        except Unusable as reason:
            dropped[str(reason)] += 1


def _theirs(record: Json) -> Iterator[tuple[Json, Json, str, Json]]:
    """Of each person in a task of Label Studio or a record of Argilla: `_said`'s arguments."""
    match record:
        case {"data": dict() as fields, "annotations": list() as annotations}:
            for each in annotations:
                row = {} if each.get("was_cancelled") else _row(record | {"annotations": [each]})
                about = {"seconds": float(each.get("lead_time") or 0), "at": _when(each)}
                yield fields, row, _annotator(each), about
        case {"fields": dict() as fields, "responses": dict() as responses}:
            by_person: dict[str, Json] = defaultdict(dict)
            for question, every in responses.items():
                for each in every or ():
                    by_person[str(each["user_id"])][question] = [each]
            for person, own in by_person.items():
                yield fields, _row(record | {"responses": own}), person, {}
        case {"fields": _, "responses": None}:
            return
        case _:
            raise ValueError("neither a judgement of ours, nor Label Studio's, nor Argilla's")


def _row(record: Json) -> Json:
    [row] = plain_rows(record)
    return row


def _annotator(annotation: Json) -> str:
    """Who it is by: the name that we wrote there, else an address or a number."""
    for result in annotation.get("result") or ():
        if named := (result.get("meta") or {}).get("text"):
            return str(named[0])
    by = annotation.get("completed_by")
    by = by.get("email") or by.get("id") if isinstance(by, Mapping) else by
    return "label-studio" if by is None else str(by)


def _when(annotation: Json) -> float:
    date = annotation.get("updated_at") or annotation.get("created_at")
    return datetime.fromisoformat(date).timestamp() if date else 0.0


def _said(fields: Json, row: Json, person: str, about: Json) -> tuple[Item, Json]:
    """The item of a record's fields, and one person's verdict by the columns of `row`.

    Raises Unusable where there is no verdict in it.
    """
    one, plain = judgeable(fields)
    if not row:
        verdict = "skip"
    elif len(one.answers) == 1:
        if not (word := says(row.get("label"))):
            raise Unusable("no verdict")
        verdict = "good" if word in GOOD else "bad"
    else:
        verdict = _compared(row.get("winner"), plain)
    said = {"question": QUESTION, "person": person, "flipped": int(not plain), "again": 0}
    said |= {"strength": None, "note": None, "guideline": "", "seconds": 0.0, "at": 0.0, **about}
    key = digest(["imported", one.id, person])
    return one, said | {"ask": key, "asked": said["at"], "verdict": verdict}


def _compared(winner: Any, plain: bool) -> str:
    if winner is None:
        raise Unusable("no verdict")
    word = word_of(winner)
    if word.lower().replace(" ", "_").startswith(("both_bad", "bothbad")):
        return "both_bad"
    try:
        side = preferred(word, "a", "b")
    except (ValueError, DataError):
        raise Unusable("the winner is neither of the two answers, nor a tie") from None
    return "tie" if not side else "first" if (side > 0) == plain else "second"
