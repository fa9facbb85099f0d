"""Any file of answers can be judged, whatever it says of them already."""

import json

import pytest

from rlhf_recipes.errors import DataError, UsageError
from rlhf_recipes.feedback.items import item, items_of, write_items

PROMPT = [{"role": "user", "content": "Two and two?"}]
PAIR, SINGLE = item(PROMPT, ["Four.", "Five."]), item(PROMPT, ["Four."])
ASKED = {"prompt": "Two and two?"}


@pytest.mark.parametrize(
    "row",
    [
        {**ASKED, "answers": ["Five.", "Four."]},
        {**ASKED, "chosen": "Four.", "rejected": "Five."},
        {**ASKED, "response_a": "Five.", "response_b": "Four."},
        {**ASKED, "response_a": "Five.", "response_b": "Four.", "winner": "tie"},
        {**ASKED, "response_a": "Five.", "response_b": "Four.", "winner": None},
        {**ASKED, "responses": ["Five.", "Four."], "scores": [1, 1]},
        {"messages": PROMPT, "answers": ["Five.", "Four."]},
        {"chosen": [*PROMPT, {"role": "assistant", "content": "Four."}],
         "rejected": [*PROMPT, {"role": "assistant", "content": "Five."}]},
    ],
)  # fmt: skip
def test_a_pair_in_any_shape_is_one_item(tmp_path, row):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    file.write_text(file.read_text() * 2)  # one line alone may be a table's columns
    assert items_of(file) == [PAIR]


@pytest.mark.parametrize(
    "row",
    [
        {**ASKED, "answers": ["Four."]},
        {**ASKED, "completion": "Four."},
        {**ASKED, "completion": "Four.", "label": None},
        {**ASKED, "completion": "Four.", "label": False},
    ],
)
def test_a_single_answer_is_an_item_whatever_its_label(tmp_path, row):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    assert items_of(file) == [SINGLE]


def test_three_answers_are_three_pairs_and_rows_are_left_out_by_name(tmp_path):
    rows = [{**ASKED, "answers": ["a", "b", "c"]}, {**ASKED, "answers": ["b", "a"]}, ASKED]
    rows += [{**ASKED, "answers": ["a", "a"]}]
    file, said = tmp_path / "rows.jsonl", []
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {one.answers for one in items_of(file, said.append)} == {
        item(PROMPT, both).answers for both in (["a", "b"], ["a", "c"], ["b", "c"])
    }
    what = "1 are there twice, 1 left out: no answer, 1 left out: two answers that are equal"
    assert said == [f"{file}: {what}"]


def test_our_own_file_keeps_where_its_answers_are_from(tmp_path):
    made = item(PROMPT, ["Four.", "Five."], {"side": "test", "draw": [0, 1]})
    file = tmp_path / "answers.jsonl"
    write_items(file, [made, SINGLE])
    assert items_of(file) == [made, SINGLE]
    text = file.read_text().replace("Five.", "Six.")  # another text under the old id
    file.write_text(text)
    assert [one.id for one in items_of(file)] == [item(PROMPT, ["Four.", "Six."]).id, SINGLE.id]


def test_a_file_without_answers_is_one_line(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(ASKED) + "\n")
    with pytest.raises(DataError, match="holds no answers to judge \\(1 left out: no answer"):
        items_of(file)
    with pytest.raises(UsageError, match="is not there"):
        items_of(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="is not a file of rows"):
        items_of(tmp_path)
