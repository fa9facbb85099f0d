"""Judgements as files: for TRL, for arenas, for crowd-kit, Label Studio and Argilla; and for us.

A file of the form "judgements" holds all that was said, corrections too, one judgement a line:
`imports.py` reads it. The other forms hold what counts now.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.errors import UsageError
from rlhf_recipes.feedback.items import ANSWERS, Item, items_of, read_items
from rlhf_recipes.feedback.store import Judged, Store, as_item, majority, strengths
from rlhf_recipes.store import layout
from rlhf_recipes.store.files import read_json, to_json, write_text

Json = dict[str, Any]
# A verdict on two answers, as Argilla, Label Studio and the arenas may say it.
WINNERS = {"first": "response_a", "second": "response_b", "tie": "tie", "both_bad": "both_bad"}
ARENA = WINNERS | {"first": "a", "second": "b", "both_bad": "tie (bothbad)"}
STUDIO = """\
<View>
  <Paragraphs name="prompt" value="$prompt" layout="dialogue" nameKey="role" textKey="content"/>
  {texts}
  <Choices name="{question}" toName="prompt" choice="single">
    {choices}
  </Choices>
</View>"""


def items_named(source: str, runs: Path, tell: Callable[[str], Any]) -> list[Item]:
    """The items of a file of answers, or of the `sample` stages of a run; `tell` as `items_of`.

    Raises UsageError and DataError.
    """
    if Path(source).is_file():
        return items_of(Path(source), tell)
    folder = layout.find_run(source, runs)
    entries = (read_json(folder / layout.MANIFEST) or {}).get("stages", [])
    sampled = [entry for entry in entries if entry.get("kind") == "sample"]
    files = [layout.entry_folder(runs, entry) / "output" / ANSWERS for entry in sampled]
    found = [one for file in files if file.is_file() for one in read_items(file)]
    if not found:
        raise UsageError(f"{folder} has no answers of a `sample` stage", "name a file of items")
    return found


def export(
    store: Store, ids: Iterable[str], form: str, file: Path, without: Sequence[str] = ()
) -> str:
    """Write the judgements of these items in a form of FORMS, and say what was written.

    What people in `without` said is left out.
    """
    if form not in FORMS:
        raise UsageError(f"{form!r} is not a form", f"--as is one of {', '.join(FORMS)}")
    items = store.items(dict.fromkeys(ids))
    if form == "judgements":
        rows: list[Any] = list(_all_said(store, items, without))
        said = f"{len(rows)} judgements"
    else:
        judged = [one for one in store.judged([i.id for i in items]) if one.person not in without]
        rows, said = FORMS[form](items, judged)
    text = "".join(to_json(row) + "\n" for row in rows)
    if form == "csv":
        table = io.StringIO(newline="")
        csv.writer(table).writerows([("task", "worker", "label"), *rows])
        text = table.getvalue()
    elif form in ("label-studio", "argilla"):
        text = to_json(rows, indent=1) + "\n"
    write_text(file, text)
    return f"{file}: {said}"


def pair_rows(items: Iterable[Item], judged: Iterable[Judged]) -> list[Json]:
    """Pairs in TRL's form, one for each item of which most people prefer the same answer.

    `margin` is by how much it is better, where every pair has one: TRL reads all or none.
    """
    judged = list(judged)
    by_item, margins = _by_item(judged), strengths(judged)
    rows, most = [], majority(judged)
    for one in items:
        if (verdict := most.get(one.id)) not in ("first", "second"):
            continue
        best = one.answers[verdict == "second"]
        worst = one.answers[verdict == "first"]
        said = [each.verdict for each in by_item[one.id] if each.verdict != "skip"]
        row: Json = {
            "prompt": one.prompt,
            "chosen": [{"role": "assistant", "content": best}],
            "rejected": [{"role": "assistant", "content": worst}],
            "votes": {"chosen": said.count(verdict), "all": len(said)},
        }
        rows.append(row | ({"margin": margins[one.id]} if one.id in margins else {}))
    if not all("margin" in row for row in rows):
        for row in rows:
            row.pop("margin", None)
    return rows


def thumb_rows(items: Iterable[Item], judged: Iterable[Judged]) -> list[Json]:
    """Single answers with what most people call them, and both answers of what is both bad."""
    rows, most = [], majority(judged)
    for one in items:
        if (verdict := most.get(one.id)) in ("good", "bad", "both_bad"):
            rows += [
                {
                    "prompt": one.prompt,
                    "completion": [{"role": "assistant", "content": answer}],
                    "label": verdict == "good",
                }
                for answer in one.answers
            ]
    return rows


Made = tuple[list[Any], str]


def _pairs(items: list[Item], judged: list[Judged]) -> Made:
    rows = pair_rows(items, judged)
    left = sum(verdict in ("tie", "both_bad") for verdict in majority(judged).values())
    return rows, f"{len(rows)} pairs" + (f"; {left} items prefer neither answer" if left else "")


def _thumbs(items: list[Item], judged: list[Judged]) -> Made:
    rows, pairs = thumb_rows(items, judged), len(pair_rows(items, judged))
    return rows, f"{len(rows)} labels" + (f"; {pairs} pairs go to --as pairs" if pairs else "")


def _arena(items: list[Item], judged: list[Judged]) -> Made:
    most, rows = majority(judged), []
    for one in items:
        if (verdict := most.get(one.id)) in ARENA and len(one.answers) == 2:
            rows.append({"prompt": one.prompt, **_fields(one), "winner": ARENA[verdict]})
    return rows, f"{len(rows)} comparisons"


def _csv(items: list[Item], judged: list[Judged]) -> Made:
    rows = [(one.item, one.person, one.verdict) for one in judged if one.verdict != "skip"]
    return rows, f"{len(rows)} labels, as crowd-kit reads them"


def _studio(items: list[Item], judged: list[Judged]) -> Made:
    """Label Studio refuses people whom it does not know, so a name is in the result's `meta`."""
    items, note = _of_one_kind(items)
    by_item, tasks = _by_item(judged), []
    question, words = _question(items)
    for one in items:
        task: Json = {"data": {"prompt": one.prompt, **_fields(one)}, "annotations": []}
        for said in by_item[one.id]:
            result = {
                "from_name": question,
                "to_name": "prompt",
                "type": "choices",
                "value": {"choices": [words[said.verdict]] if said.verdict in words else []},
                "meta": {"text": [said.person]},
            }
            task["annotations"].append(
                {
                    "result": [result],
                    "was_cancelled": said.verdict == "skip",
                    "lead_time": said.seconds,
                }
            )
        tasks.append(task)
    names = _fields(items[0]) if items else {}
    shown = {
        "texts": [f'<Text name="{name}" value="${name}"/>' for name in names],
        "choices": [
            f'<Choice value="{word}" hotkey="{key}"/>' for key, word in enumerate(words.values(), 1)
        ],
        "question": [question],
    }
    config = STUDIO.format(**{name: "\n    ".join(lines) for name, lines in shown.items()})
    return tasks, f"{len(tasks)} tasks{note}; its project's labeling interface is\n{config}"


def _argilla(items: list[Item], judged: list[Judged]) -> Made:
    items, note = _of_one_kind(items)
    question, words = _question(items)
    by_item, records = _by_item(judged), []
    for one in items:
        said = [
            {"value": words[each.verdict], "user_id": each.person}
            for each in by_item[one.id]
            if each.verdict in words
        ]
        records.append(
            {
                "id": one.id,
                "fields": {"prompt": one.prompt, **_fields(one)},
                "metadata": {"side": one.side},
                "responses": {question: said} if said else {},
            }
        )
    labels = ", ".join(words.values())
    told = f"a ChatField `prompt`, TextFields, and a LabelQuestion `{question}` of {labels}"
    return records, f"{len(records)} records{note}: {told}. Their user_id is a name here"


FORMS: dict[str, Callable[[list[Item], list[Judged]], Made]] = {
    "pairs": _pairs,
    "arena": _arena,
    "thumbs": _thumbs,
    "judgements": lambda items, judged: ([], ""),  # see `export`
    "csv": _csv,
    "label-studio": _studio,
    "argilla": _argilla,
}


def _by_item(judged: Iterable[Judged]) -> dict[str, list[Judged]]:
    found: dict[str, list[Judged]] = defaultdict(list)
    for one in judged:
        found[one.item].append(one)
    return found


def _fields(one: Item) -> dict[str, str]:
    names = ("response_a", "response_b") if len(one.answers) == 2 else ("response",)
    return dict(zip(names, one.answers, strict=True))


def _question(items: list[Item]) -> tuple[str, dict[str, str]]:
    """Its name, and how each verdict is said: as `data/exports.py` reads them."""
    if items and len(items[0].answers) == 1:
        return "label", {"good": "good", "bad": "bad"}
    return "winner", WINNERS


def _of_one_kind(items: list[Item]) -> tuple[list[Item], str]:
    """The pairs, or the single answers where there are none: a project there has one question."""
    pairs = [one for one in items if len(one.answers) == 2]
    left = len(items) - len(pairs) if pairs else 0
    return pairs or items, f" ({left} single answers are left out)" if left else ""


def _all_said(store: Store, items: Iterable[Item], without: Sequence[str]) -> Iterator[Json]:
    """Every judgement of these items, in the order in which they were made."""
    wanted = {one.id for one in items}
    words = """select i.*, a.id as ask, a.question, a.person, a.flipped, a.again, a.guideline,
        a.at as asked, j.verdict, j.strength, j.note, j.seconds, j.at
        from judgement j join ask a on j.ask = a.id join item i on a.item = i.id order by j.n"""
    with store.reading() as db:
        for row in db.execute(words):
            if row["id"] in wanted and row["person"] not in without:
                one = as_item(row)
                own = {"prompt": one.prompt, "answers": one.answers, "made": one.made}
                said = {key: row[key] for key in row.keys()[row.keys().index("ask") :]}
                yield {"item": one.id, **own, "row": one.row, **said}
