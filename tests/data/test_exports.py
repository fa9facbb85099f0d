"""Rows of nested exports, as Argilla, Label Studio and Open-Assistant write them."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_recipes.data.exports import plain_rows
from rlhf_recipes.data.shapes import Row, normalise
from rlhf_recipes.data.turns import Unusable

ASK = [{"role": "user", "content": "red"}]
FIELDS = {"prompt": "red", "response1": "cat", "response2": "blue"}


def read(row: dict[str, Any]) -> list[tuple]:
    return [normalise(Row(one)) for one in plain_rows(row)]


def argilla_1(*answers: Any, status: str = "submitted") -> list[dict]:
    return [{"values": {"better": {"value": one}}, "status": status} for one in answers]


def argilla_2(*answers: Any) -> dict:
    return {"better": [{"value": one, "user_id": "u"} for one in answers]}


@pytest.mark.parametrize("responses", [argilla_1, argilla_2])
def test_argilla_s_choice_is_that_of_most_annotators(responses: Any) -> None:
    said = responses("response1", "response2", "response2")
    assert read({"fields": FIELDS, "responses": said, "suggestions": []}) == [(ASK, "blue", "cat")]


def test_argilla_s_drafts_and_suggestions_say_nothing() -> None:
    row = {"fields": FIELDS, "responses": argilla_1("response1", status="draft")}
    row["suggestions"] = [{"question_name": "better", "value": "response1"}]
    with pytest.raises(Unusable, match="nothing says which is better"):
        read(row)


def test_argilla_s_ranking_and_labels() -> None:
    ranking = [{"value": "response1", "rank": 2}, {"value": "response2", "rank": 1}]
    row = {"fields": FIELDS, "responses": argilla_2(ranking)}
    assert read(row) == [(ASK, "blue", "cat")]
    answer = {"prompt": "red", "response": "blue"}
    assert read({"fields": answer, "responses": argilla_2("Good")}) == [(ASK, "blue", None)]
    assert read({"fields": answer, "responses": argilla_2("bad")}) == [(ASK, None, "blue")]


def studio(*results: dict, **data: str) -> dict:
    made = [{"from_name": "pw", **one} for one in results]
    cancelled = {"was_cancelled": True, "result": [made[0] | {"value": {"selected": "none"}}]}
    return {"id": 1, "data": data, "annotations": [cancelled, {"result": made}], "predictions": []}


@pytest.mark.parametrize(
    ("order", "selected"), [("response1,response2", "right"), ("response2,response1", "left")]
)
def test_label_studio_s_pairs(order: str, selected: str) -> None:
    result = {"type": "pairwise", "to_name": order, "value": {"selected": selected}}
    assert read(studio(result, **FIELDS)) == [(ASK, "blue", "cat")]


def test_label_studio_s_choices_and_ratings() -> None:
    answer = {"prompt": "red", "response": "blue"}
    result = {"type": "choices", "to_name": "a", "value": {"choices": ["bad"]}}
    assert read(studio(result, **answer)) == [(ASK, None, "blue")]
    [row] = plain_rows(studio({"to_name": "a", "value": {"rating": 4}}, **answer))
    assert Row(row).unused() == ["prompt", "response", "pw"] and row["pw"] == "4"


def test_a_tree_is_a_pair_for_each_turn_of_its_user() -> None:
    def says(role: str, text: str, *replies: dict, rank: int | None = None) -> dict:
        return {"role": role, "text": text, "rank": rank, "replies": list(replies)}

    more = says("prompter", "pig", says("assistant", "owl", rank=1), says("assistant", "fox"))
    replies = (says("assistant", "cat", rank=2), says("assistant", "blue", more, rank=0))
    gone = says("assistant", "gone", rank=3) | {"deleted": True}
    tree = {"message_tree_id": "1", "prompt": says("prompter", "red", gone, *replies)}
    talk = [*ASK, {"role": "assistant", "content": "blue"}, {"role": "user", "content": "pig"}]
    assert read(tree) == [(ASK, "blue", "cat"), (talk, "owl", None)]
    alone = {"prompt": says("prompter", "red") | {"replies": None}}
    assert read(alone) == [(ASK, None, None)]


def test_other_rows_stay_as_they_are() -> None:
    for row in ({"prompt": "red", "data": {}}, {"fields": "x", "responses": ["a"]}, {}):
        assert list(plain_rows(row)) == [row]
