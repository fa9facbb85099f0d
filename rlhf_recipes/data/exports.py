"""Rows out of the nested exports of annotation tools: Argilla, Label Studio, and OASST's trees."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_recipes.data.labels import VERDICT, says, word_of


def plain_rows(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows that one object of a file holds; most often itself.

    Annotators' answers become columns beside the fields. Where annotators differ, the answer that
    most of them gave counts, and of equally many the first. Suggestions of models do not count.
    """
    match row:
        case {"prompt": {"text": _, "role": _, "replies": _} as root}:
            yield from _of_tree(root, [])
        case {"fields": {**fields}, "responses": list() | dict() as responses}:
            yield fields | _judged(fields, _by_question(responses))
        case {"data": {**fields}, "annotations": [*annotations]}:
            yield fields | _judged(fields, _by_control(fields, annotations))
        case _:
            yield row


def _of_tree(message: Mapping[str, Any], before: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row for each turn of a user: the reply of the best rank, and against it the worst."""
    told = [*before, {"role": message["role"], "content": message["text"]}]
    replies = [one for one in message.get("replies") or () if not one.get("deleted")]
    if message["role"] == "prompter":
        ranked = [one for one in replies if one.get("rank") is not None]
        ranked.sort(key=lambda one: int(one["rank"]))
        row = {"prompt": told, "chosen": None, "rejected": None}
        if replies:
            row["chosen"] = (ranked or replies)[0]["text"]
        if len(ranked) > 1:
            row["rejected"] = ranked[-1]["text"]
        yield row
    for reply in replies:
        yield from _of_tree(reply, told)


Answers = dict[str, list[Any]]  # by question, an answer of each annotator


def _by_question(responses: Any) -> Answers:
    """Argilla's: by question, or in version 1 a record of each annotator."""
    found: Answers = defaultdict(list)
    if isinstance(responses, Mapping):
        for question, every in responses.items():
            found[question] = [one["value"] for one in every or ()]
        return found
    for one in responses:
        if one.get("status", "submitted") == "submitted":
            for question, answer in (one.get("values") or {}).items():
                found[question].append(answer["value"])
    return found


def _by_control(fields: Mapping[str, Any], annotations: list[Any]) -> Answers:
    """Label Studio's: by the control's name. Left and right become the names of what they are."""
    found: Answers = defaultdict(list)
    for one in annotations:
        for result in () if one.get("was_cancelled") else one.get("result") or ():
            value = next(iter(result["value"].values()))
            sides = dict(zip(("left", "right"), result["to_name"].split(","), strict=False))
            named = all(name in fields for name in sides.values())
            found[result["from_name"]].append(sides.get(str(value), value) if named else value)
    return found


def _judged(fields: Mapping[str, Any], answers: Answers) -> dict[str, Any]:
    """Columns of the answers: of a ranking, a choice between two answers, a label, or a text."""
    columns: dict[str, Any] = {}
    for question, given in answers.items():
        if not given:
            continue
        most, _ = Counter(map(repr, given)).most_common(1)[0]
        value = next(one for one in given if repr(one) == most)
        if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
            columns |= dict.fromkeys(one["value"] for one in value)  # they move to the list
            columns["responses"] = [fields[one["value"]] for one in value]
            columns["ranks"] = [one["rank"] for one in value]
        elif VERDICT.fullmatch(word_of(value)):
            columns["winner"] = value
        else:
            columns["label" if says(word_of(value)) else question] = word_of(value)
    return columns
