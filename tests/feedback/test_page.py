"""The page by its requests: a judgement travels by a form and a redirect, or it is said why not."""

import re
import sqlite3

import pytest

from rlhf_recipes.feedback.guard import BODY
from rlhf_recipes.feedback.items import item
from rlhf_recipes.feedback.page import trouble
from rlhf_recipes.feedback.store import Store
from tests.feedback.conftest import ADA, BOB, text_of

ASK = re.compile(rf"/{ADA}/[0-9a-f]{{24}}")


def test_a_judgement_is_on_disk_before_the_page_moves_on(labelling):
    made = labelling(2)
    first = made.next()
    assert ASK.fullmatch(first)
    shown = made.client.get(first)
    assert shown.status_code == 200
    assert "0 of 2" in text_of(shown.text)
    answer = made.say(first, "left")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/{ADA}/")
    (kept,) = made.kept
    assert kept[0] == first.rpartition("/")[2]
    second = made.next()
    assert second != first
    made.say(second, "right")
    assert made.next() == f"/{ADA}/all"
    assert "Everything is judged" in made.client.get(f"/{ADA}/all").text


def test_an_ask_is_one_item_for_ever_and_says_what_was_said(labelling):
    made = labelling()
    address = made.next()
    before = made.client.get(address).text
    assert "You said" not in before
    assert made.client.get(address).text == before
    made.say(address, "tie", note="They are\r\nequal.")
    after = made.client.get(address).text
    assert "You said: Tie ." in text_of(after)
    assert "They are\nequal.</textarea>" in after
    assert re.search(r'value="tie"[^>]*aria-pressed="true"', after)
    assert re.findall("It is 0|Maybe 0", before) == re.findall("It is 0|Maybe 0", after)
    made.say(address, "left", note="They are\r\nequal.")
    assert "You said: Left is better ." in text_of(made.client.get(address).text)
    assert len(made.kept) == 2


def test_the_one_before_is_a_redirect_and_the_first_has_none(labelling):
    made = labelling()
    first = made.next()
    assert "Previous" not in made.client.get(first).text
    made.say(first, "left")
    second = made.next()
    assert "Previous" in made.client.get(second).text
    assert made.client.get(f"{second}/before").headers["location"] == first
    assert made.client.get(f"{first}/before").headers["location"] == first


def test_the_second_click_of_a_double_click_judges_nothing(labelling):
    made = labelling(soonest=0.3)
    first = made.next()
    assert made.say(first, "left").headers["location"] == first
    assert made.kept == []
    made.asks.clock = lambda now=made.asks.clock: now() + 0.3
    assert made.say(first, "left").headers["location"] == f"/{ADA}/"
    assert made.say(first, "right").status_code == 303  # changing one's mind may be quick
    assert [row[1] for row in made.kept][-1] != made.kept[0][1]


def test_strength_and_single_answers_have_their_own_buttons(labelling):
    single = item([{"role": "user", "content": "Two?"}], ["Two."])
    made = labelling([*labelling(1).asks.store.items([]), single], strength=True)
    first, second = made.next(), None
    made.say(first, "left-3")
    assert made.kept[0][2] == 3
    second = made.next()
    page = made.client.get(second).text
    values = re.findall(r'name="verdict" value="([\w-]+)"', page)
    assert values == ["bad", "good", "skip"]
    values = re.findall(r'name="verdict" value="([\w-]+)"', made.client.get(first).text)
    assert values == ["left-3", "left-2", "left-1", "tie", "right-1", "right-2", "right-3",
                      "both_bad", "skip"]  # fmt: skip
    assert re.findall(r'value="([\w-]+)"[^>]*aria-pressed', made.client.get(first).text) == [
        "left-3"
    ]
    assert made.say(second, "good").status_code == 303
    assert made.say(second, "left").status_code == 400


def test_every_key_that_is_told_is_a_buttons(labelling):
    made = labelling(guideline="Short is *good*.", strength=True)
    made.say(made.client.get(f"/{ADA}/?begin").headers["location"], "left-1")
    page = made.client.get(made.next()).text
    keys = {
        key for keys in re.findall(r'aria-keyshortcuts="([^"]+)"', page) for key in keys.split()
    }
    arrows = {"ArrowLeft", "ArrowRight", "ArrowDown"}
    assert keys == {*"1234567txsunmga?", *arrows}


def test_a_guideline_is_shown_before_the_first_ask_and_on_a_key(labelling):
    made = labelling(guideline="# Rule\n\nShort is *good*. <script>")
    begin = made.client.get(f"/{ADA}/")
    assert begin.status_code == 200
    assert "Short is <em>good</em>. &lt;script&gt;" in begin.text
    first = made.client.get(f"/{ADA}/?begin").headers["location"]
    assert "Short is <em>good</em>" in made.client.get(first).text
    assert made.client.get(f"/{ADA}/").status_code == 303


def test_two_people_have_their_own_addresses_and_see_their_own_words(labelling):
    made = labelling(people={ADA: "ada", BOB: "bob"}, votes=2)
    made.say(made.next(ADA), "left", note="for ada alone")
    made.say(made.next(BOB), "right", note="for bob alone")
    all_of_ada = made.client.get(f"/{ADA}/all").text
    assert "for ada alone" in all_of_ada
    assert "for bob alone" not in all_of_ada
    table = re.findall(r'<th scope="row">(\w+)</th>\s*<td>(\d)</td><td>(\d)</td>', all_of_ada)
    assert table == [("ada", "1", "0"), ("bob", "0", "1")]


def test_the_end_is_offered_first_only_once_enough_is_judged(labelling):
    made = labelling(3, wanted=2, end="Train now", about=lambda: [("Agreement", "α 0.81")])
    made.say(made.next(), "left")
    page = made.client.get(f"/{ADA}/all").text
    assert "1 more is wanted before that." in text_of(page)
    assert re.search('<button class="">Train now', page)
    assert "Agreement α 0.81" in text_of(page)
    made.say(made.next(), "left")
    page = made.client.get(f"/{ADA}/all").text
    assert "wanted" not in page
    assert re.search('<button class="first">Train now', page)
    assert not made.ended
    done = made.client.post(
        f"/{ADA}/end", headers={"content-type": "application/x-www-form-urlencoded"}
    )
    assert "2 of 3 are judged" in text_of(done.text)
    assert made.ended == [True]


def test_a_full_disk_is_a_red_line_on_the_same_ask_and_nothing_is_lost(labelling, tmp_path):
    class Full(Store):
        full = False

        def _connect(self) -> sqlite3.Connection:
            db = super()._connect()
            if self.full:
                pages = db.execute("pragma page_count").fetchone()[0]
                db.execute(f"pragma max_page_count = {pages}")
            return db

    store = Full(tmp_path)
    made = labelling(40, store=store)
    address = made.next()
    store.full = True
    note = "長" * 3999
    while (answer := made.say(address, "left", note=note)).status_code == 303:
        address = made.next()
    kept = made.kept
    assert answer.status_code == 507
    assert "Not saved: the disk is full. Free some space, then choose again." in answer.text
    assert f"{note}</textarea>" in answer.text
    assert 'aria-pressed="true"' not in answer.text
    store.full = False
    assert made.kept == kept
    assert made.say(address, "left", note=note).status_code == 303
    assert len(made.kept) == len(kept) + 1


def test_a_store_that_another_program_holds_is_said(labelling, monkeypatch):
    monkeypatch.setattr("rlhf_recipes.feedback.store.SECONDS_BUSY", 0.05)
    made = labelling()
    address = made.next()
    with made.store.writing():
        answer = made.say(address, "left")
        assert answer.status_code == 503
        assert (
            "Not saved: another program holds the store. Wait a moment, then choose again."
            in answer.text
        )
        assert made.client.get(f"/{ADA}/").status_code == 503
    assert made.kept == []
    assert made.say(address, "left").status_code == 303


@pytest.mark.parametrize("how", ["folder", "text", "other", "gone"])
def test_a_store_that_is_replaced_while_the_page_is_open_is_one_line(labelling, how):
    made = labelling()
    address = made.next()
    file = made.store.file
    for path in file.parent.glob("feedback.db*"):
        path.unlink()
    if how == "folder":
        file.mkdir()
    elif how == "text":
        file.write_text("no database " * 1000)
    elif how == "other":
        with sqlite3.connect(file) as db:
            db.execute("create table item (x)")
    for answer in (made.say(address, "left"), made.client.get(f"/{ADA}/")):
        assert answer.status_code == 503
        assert re.search(r"the store cannot be used .*\. Look at the disk, then", answer.text)
        assert "Traceback" not in answer.text


def test_what_the_store_lacks_is_said_by_its_code():
    error = sqlite3.OperationalError("disk I/O error")
    assert trouble(error) == (503, "the store cannot be used (disk I/O error). Look at the disk")


def test_a_body_is_as_long_as_the_longest_note(labelling):
    made = labelling()
    assert made.say(made.next(), "left", note="長" * 4000).status_code == 303
    assert made.say(made.next(), "left", note="n" * BODY).status_code == 413
    note = made.say(address := made.next(), "left", note="n" * 4001)
    assert note.status_code == 400
    assert "a note has at most 4,000 characters, this one 4,001" in note.text
    assert made.client.get(address).status_code == 200
