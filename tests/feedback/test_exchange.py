"""Judgements out to files and in again: equal, and as the tools that read them expect."""

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from rlhf_recipes.data.exports import plain_rows
from rlhf_recipes.data.files import rows_of
from rlhf_recipes.data.shapes import Row, margin, understand
from rlhf_recipes.data.turns import Unusable
from rlhf_recipes.errors import UsageError
from rlhf_recipes.feedback.agreement import alpha
from rlhf_recipes.feedback.exchange import FORMS, WINNERS, export, items_named
from rlhf_recipes.feedback.imports import add
from rlhf_recipes.feedback.items import item, write_items
from rlhf_recipes.feedback.store import Store
from rlhf_recipes.store.files import write_json
from tests.helpers.people import say
from tests.helpers.runs import call

TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": 'Red, "or"?\n'}]
PAIRS = [
    item([*TALK, *more], ["yes, red", ""], {"side": "test", "seed": 42}, None, {"answer": n})
    for n in range(5)
    for more in [[{"role": "assistant", "content": "?"}, {"role": "user", "content": f"{n}"}]]
]
SINGLES = [item([{"role": "user", "content": f"{n}?"}], ["yes"]) for n in range(3)]
SAID = {
    "ada": ["first", "second", "tie", "both_bad", "skip"],
    "bob": ["first", "second", "tie", "both_bad", "first"],
    "cy": ["first", "first"],
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Of five pairs, two are preferred by most, and one by bob alone; and three single answers."""
    made = Store(tmp_path / "runs")
    for person, verdicts in SAID.items():
        for n, (one, verdict) in enumerate(zip(PAIRS, verdicts, strict=False)):
            say(
                made,
                one,
                person,
                verdict,
                flipped=n % 2 == 1,
                seconds=4.5,
                at=n + 1.5,
                note="no" * n,
            )
    for one, verdict in zip(SINGLES, ["good", "bad", "skip"], strict=True):
        say(made, one, "ada", verdict)
    say(made, PAIRS[0], "ada", "second", again=True, flipped=True)
    return made


def said(store: Store) -> set:
    """What counts, by item and person."""
    return {(one.item, one.person, one.verdict) for one in store.judged(store.ids())}


def read(file: Path) -> list:
    """The rows as this project's data reading has them, and None for one that it drops."""
    found = []
    for raw in rows_of(file, "json")[0]:
        for row in plain_rows(raw):
            try:
                found.append(understand(Row(row)))
            except Unusable as reason:
                assert str(reason) == "a tie"
                found.append(None)
    return found


def test_pairs_are_what_most_prefer(store: Store, tmp_path: Path):
    file = tmp_path / "pairs.jsonl"
    told = export(store, store.ids(), "pairs", file)
    assert told == f"{file}: 3 pairs; 2 items prefer neither answer"
    best = [(PAIRS[0], 0), (PAIRS[1], 1), (PAIRS[4], 0)]
    assert read(file) == [(one.prompt, one.answers[n], one.answers[1 - n]) for one, n in best]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["votes"] for row in rows] == [
        {"chosen": 3, "all": 3}, {"chosen": 2, "all": 3}, {"chosen": 1, "all": 1}
    ]  # fmt: skip
    assert rows[0]["chosen"] == [{"role": "assistant", "content": PAIRS[0].answers[0]}]
    export(store, store.ids(), "pairs", file, without=["bob", "cy"])
    assert len(read(file)) == 2  # bob alone judged the fifth


def test_strengths_are_margins_where_every_pair_has_one(tmp_path: Path):
    store, file = Store(tmp_path), tmp_path / "pairs.jsonl"
    for person, strength in (("ada", 3), ("bob", 2), ("cy", None)):
        say(store, PAIRS[0], person, "first", strength=strength)
    say(store, PAIRS[0], "dan", "second", strength=1)
    export(store, store.ids(), "pairs", file)
    [row] = rows_of(file, "json")[0]
    assert margin(Row(row)) == pytest.approx((3 + 2 - 1) / 3)
    say(store, PAIRS[1], "ada", "first")
    export(store, store.ids(), "pairs", file)
    assert not any("margin" in row for row in rows_of(file, "json")[0])


def test_thumbs_are_labels_for_kto(store: Store, tmp_path: Path):
    file = tmp_path / "thumbs.jsonl"
    told = export(store, store.ids(), "thumbs", file)
    assert told == f"{file}: 4 labels; 3 pairs go to --as pairs"
    bad = [(PAIRS[3].prompt, None, answer) for answer in PAIRS[3].answers]
    good, worse = ((one.prompt, *sides) for one, *sides in
                   [(SINGLES[0], "yes", None), (SINGLES[1], None, "yes")])  # fmt: skip
    assert read(file) == [*bad, good, worse]
    labels = [json.loads(line)["label"] for line in file.read_text().splitlines()]
    assert labels == [False, False, True, False]


def test_an_arena_keeps_its_ties(store: Store, tmp_path: Path):
    file = tmp_path / "arena.jsonl"
    assert export(store, store.ids(), "arena", file) == f"{file}: 5 comparisons"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["winner"] for row in rows] == ["a", "b", "tie", "tie (bothbad)", "a"]
    best = [(PAIRS[0], 0), (PAIRS[1], 1), None, None, (PAIRS[4], 0)]
    assert read(file) == [
        both and (both[0].prompt, both[0].answers[both[1]], both[0].answers[1 - both[1]])
        for both in best
    ]


def test_a_table_for_crowd_kit(store: Store, tmp_path: Path):
    file = tmp_path / "votes.csv"
    export(store, store.ids(), "csv", file)
    with file.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {(r["task"], r["worker"], r["label"]) for r in rows} == {
        one for one in said(store) if one[2] != "skip"
    }


def test_judgements_come_back_whole_and_once(store: Store, tmp_path: Path):
    file, again = tmp_path / "said.jsonl", tmp_path / "again.jsonl"
    say(store, item(TALK, ["<img>", "\x00\u202e"]), "eve", "first", note="<script>")
    assert export(store, store.ids(), "judgements", file) == f"{file}: 17 judgements"
    other = Store(tmp_path / "other")
    assert add(other, file) == "17 judgements added"
    export(other, other.ids(), "judgements", again)
    assert again.read_text() == file.read_text()
    assert other.items(other.ids()) == store.items(store.ids())
    assert alpha(other.judged(other.ids())) == alpha(store.judged(store.ids()))
    assert add(store, file) == "0 judgements added; 17 were there before"
    # A laptop goes on, and corrects itself: what is new merges.
    with other.writing() as db:
        ask = db.execute("select ask from counted where person = 'cy' order by n").fetchone()[0]
        db.execute("insert into judgement values (null, ?, 'tie', null, null, 1, 99)", [ask])
    say(other, PAIRS[2], "cy", "second")
    export(other, other.ids(), "judgements", file)
    assert add(store, file) == "2 judgements added; 17 were there before"
    assert said(store) == said(other)
    export(store, store.ids(), "judgements", file, without=["ada", "bob", "eve"])
    assert len(file.read_text().splitlines()) == 4


@pytest.mark.parametrize("form", ["label-studio", "argilla"])
def test_other_programs_forms_come_back(form: str, store: Store, tmp_path: Path):
    file, other = tmp_path / "out.json", Store(tmp_path / "other")
    for ids in ([one.id for one in PAIRS], [one.id for one in SINGLES]):
        export(store, ids, form, file)
        add(other, file)
    skipped = {one for one in said(store) if one[2] == "skip"}
    assert said(other) == said(store) - (skipped if form == "argilla" else set())
    assert "0 judgements added" in add(other, file)
    told = export(store, store.ids(), form, file)
    assert "(3 single answers are left out)" in told
    # As a dataset, the same file says what most people prefer.
    assert [row is not None for row in read(file)] == [True, True, False, False, True]
    assert read(file)[1] == (PAIRS[1].prompt, PAIRS[1].answers[1], PAIRS[1].answers[0])


def test_label_studio_s_own_export(tmp_path: Path):
    """A project of its pairwise template: sides, who, how long, and what was cancelled."""

    def annotation(number: int, person: object, *selected: str, **more: object) -> dict:
        result = [
            {
                "value": {"selected": one}, "id": f"r{number}", "from_name": "pw",
                "to_name": "answer1,answer2", "type": "pairwise", "origin": "manual",
            } for one in selected
        ]  # fmt: skip
        return {
            "id": number, "completed_by": person, "result": result, "was_cancelled": False,
            "ground_truth": False, "created_at": "2026-03-01T10:00:00.250000Z",
            "updated_at": "2026-03-01T10:00:09Z", "draft_created_at": None, "lead_time": 8.25,
            "prediction": {}, "result_count": 1, "unique_id": f"u{number}", "import_id": None,
            "last_action": None, "task": 7, "project": 1, "updated_by": 1, "last_created_by": None,
            "parent_prediction": None, "parent_annotation": None, **more,
        }  # fmt: skip

    data = {"prompt": "red?", "answer1": "no", "answer2": "yes"}
    who = {"id": 3, "email": "ada@example.org", "first_name": "", "last_name": ""}
    task = {
        "id": 7, "data": data, "meta": {}, "drafts": [], "predictions": [], "file_upload": None,
        "annotations": [
            annotation(1, 3, "left"), annotation(2, who, "right"), annotation(4, 5),
            annotation(3, 4, was_cancelled=True),
        ],
        "created_at": "2026-03-01T09:00:00Z", "total_annotations": 3, "cancelled_annotations": 1,
    }  # fmt: skip
    file, store = tmp_path / "export.json", Store(tmp_path)
    file.write_text(json.dumps([task]))
    assert add(store, file) == "3 judgements added; 1 dropped: no verdict"
    [one] = store.items(store.ids())
    assert one == item([{"role": "user", "content": "red?"}], ["no", "yes"])
    left, right = ("first", "second") if one.answers[0] == "no" else ("second", "first")
    found = {by.person: by for by in store.judged([one.id])}
    assert {who: by.verdict for who, by in found.items()} == {
        "3": left, "ada@example.org": right, "4": "skip"
    }  # fmt: skip
    assert found["3"].seconds == 8.25 and found["3"].at == 1772359209.0
    assert found["3"].flipped == (one.answers[0] != "no")
    # The annotator changes their mind there, and the project is exported again.
    task["annotations"][0] = annotation(1, 3, "right", updated_at="2026-03-02T10:00:00Z")
    file.write_text(json.dumps([task]))
    assert add(store, file).startswith("1 judgements added; 2 were there before")
    assert {by.verdict for by in store.judged([one.id]) if by.person == "3"} == {right}


def test_argilla_s_own_list(tmp_path: Path):
    file, store = tmp_path / "records.json", Store(tmp_path)
    user, other = "2c1f7a0e-51a4-4ef0-9d8c-0d8c5f6d2a11", "8a3f3c55-98ac-4b1d-a7cb-7f0b5d7c9e02"
    fields = {"prompt": "red?", "response1": "no", "response2": "yes"}
    record = {
        "id": "a", "fields": fields, "metadata": {}, "vectors": {}, "_server_id": user,
        "suggestions": {"better": {"value": "response1", "score": None, "agent": "model"}},
        "responses": {
            "better": [{"value": "response2", "user_id": user}, {"value": "1", "user_id": other}],
            "why": [{"value": "It answers.", "user_id": user}],
        },
    }  # fmt: skip
    file.write_text(json.dumps([record, record | {"id": "b", "responses": {}}]))
    assert add(store, file) == "1 judgements added; 1 dropped: no verdict"
    record["fields"] = fields | {"response2": "no"}
    odd = record | {"fields": fields, "responses": {"better": [{"value": "0", "user_id": "u"}]}}
    file.write_text(json.dumps([record, odd]))
    why = "2 dropped: two answers that are equal"
    assert add(store, file) == f"0 judgements added; {why}; 1 dropped: no verdict"
    [one] = store.judged(store.ids())
    [of] = store.items([one.item])
    assert one.person == user and of.answers[one.verdict == "second"] == "yes"


def line(store: Store, file: Path, **changes: object) -> str:
    export(store, store.ids(), "judgements", file)
    return json.dumps(json.loads(file.read_text().splitlines()[0]) | changes)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"verdict": "good"}, "'good' is not a verdict on it"),
        ({"verdict": "first'); drop table judgement;--"}, "is not a verdict"),
        ({"strength": 9}, "9 is not a strength"),
        ({"item": "0" * 64}, "its id is not that of its prompt and answers"),
        ({"answers": ["no", "no"]}, "two that differ"),
        ({"note": "x" * 4001}, "its note is too long"),
        ({"note": "\ud800"}, "surrogates not allowed"),
        ({"note": 5}, "is not a judgement"),
        ({"made": {"stage": ["sft"]}}, "list index out of range"),
        ({"person": ""}, "names no person"),
        ({"at": float("nan")}, "NaN is not JSON"),
        ({"seconds": "1e999"}, "a time is not a number"),
        ({"prompt": "red"}, "is not a judgement"),
        ({"person": "mallory"}, "the ask [0-9a-f]{12} is another one here"),
    ],
)
def test_a_stranger_s_line_is_refused_and_nothing_is_added(changes: dict, why: str, tmp_path: Path):
    store, file = Store(tmp_path), tmp_path / "said.jsonl"
    say(store, PAIRS[0], "ada", "first")
    before = said(store)
    file.write_text(line(store, file) + "\n" + line(store, file, **changes))
    with pytest.raises(UsageError, match=why):
        add(store, file)
    assert said(store) == before


def test_other_files_are_refused_in_one_line(tmp_path: Path):
    file, store = tmp_path / "file", Store(tmp_path)
    for text in ("{", "[1]", '{"prompt": "a"}', "\udcff".encode("utf-8", "surrogateescape"), None):
        if text is not None:
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
        else:
            file.unlink()
        with pytest.raises(UsageError, match=f"{file}: record 1 "):
            add(store, file)
    with pytest.raises(UsageError, match=f"--as is one of {', '.join(FORMS)}"):
        export(store, [], "xml", file)


def test_where_items_come_from(tmp_path: Path):
    file, folder = tmp_path / "items.jsonl", tmp_path / "runs" / "chat"
    write_items(file, PAIRS)
    assert items_named(str(file), tmp_path / "runs", print) == PAIRS
    stages = [{"name": n, "kind": k, "key": n, "folder": f".stages/{n}-1"} for n, k in
              [("sft", "sft"), ("sample", "sample"), ("more", "sample")]]  # fmt: skip
    write_json(folder / "manifest.json", {"stages": stages})
    with pytest.raises(UsageError, match="no answers of a `sample` stage"):
        items_named("chat", tmp_path / "runs", print)
    for name, items in (("sample-1", PAIRS[:2]), ("more-1", SINGLES)):
        write_items(tmp_path / "runs" / ".stages" / name / "output" / "answers.jsonl", items)
    assert items_named("chat", tmp_path / "runs", print) == PAIRS[:2] + SINGLES
    file.write_text('{"prompt": "red?", "chosen": "yes", "rejected": "no"}')
    [one] = items_named(str(file), tmp_path / "runs", print)
    assert {*one.answers} == {"yes", "no"}


def test_the_command_says_writes_and_reads(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    file, new = tmp_path / "said.jsonl", item([{"role": "user", "content": "new?"}], ["yes", "no"])
    runs = ("--runs", str(tmp_path / "runs"))
    out, _ = call(monkeypatch, capfd, "feedback", "-o", str(file), "--as", "judgements", *runs)
    assert out == [f"{file}: 16 judgements"]
    other = ("--runs", str(tmp_path / "other"))
    out, _ = call(monkeypatch, capfd, "feedback", "--add", str(file), "--without", "cy", *other)
    assert out[0] == f"{file}: 16 judgements added"
    shown = [" ".join(line.split()) for line in out[1:]]
    assert shown[0] == "judged 7 items, by 2 people" and "bob 5 judged, 4 s each" in shown
    assert not any("cy" in line for line in shown)
    # A file of items names some; what is not judged yet is a task for others.
    write_items(tmp_path / "items.jsonl", [PAIRS[0], new])
    words = ("feedback", str(tmp_path / "items.jsonl"))
    out, _ = call(monkeypatch, capfd, *words, *runs)
    assert out[0].split() == "judged 1 item, by 3 people".split()
    out, _ = call(monkeypatch, capfd, *words, "-o", str(file), "--as", "label-studio", *runs)
    assert out[0].startswith(f"{file}: 2 tasks")
    config = ElementTree.fromstring("\n".join(out[1:]))
    assert [one.get("value") for one in config.iter("Choice")] == [*WINNERS.values()]
    tasks = json.loads(file.read_text())
    assert [len(task["annotations"]) for task in tasks] == [3, 0]
    assert {one.get("value", "")[1:] for one in config} - {""} == {*tasks[0]["data"]}
