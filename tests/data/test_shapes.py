"""What a row says: in every shape, in every spelling; and what is refused, with its reason."""

from __future__ import annotations

import json
from datetime import date

import pytest

from rlhf_recipes.data.names import guess
from rlhf_recipes.data.shapes import Row, normalise, understand
from rlhf_recipes.data.turns import Unusable
from rlhf_recipes.errors import DataError

ASK = [{"role": "user", "content": "red"}]


def says(who: str, what: str) -> dict[str, str]:
    return {"role": who, "content": what}


BLUE, CAT = says("assistant", "blue"), says("assistant", "cat")
TALK = [*ASK, says("assistant", "owl"), says("user", "pig")]  # a prompt of three turns
HH = "\n\nHuman: red\n\nAssistant: {}"
HH_TALK = HH.format("owl") + "\n\nHuman: pig\n\nAssistant: {}"
SHAREGPT = [{"from": "human", "value": "red"}, {"from": "gpt", "value": "owl"}]
GPT_BLUE, GPT_CAT = {"from": "gpt", "value": "blue"}, {"from": "gpt", "value": "cat"}
AB, BA = {"response_a": "blue", "response_b": "cat"}, {"response_a": "cat", "response_b": "blue"}
SHAPES = {
    "texts": {"prompt": "red", "chosen": "blue", "rejected": "cat"},
    "messages": {"prompt": ASK, "chosen": [BLUE], "rejected": [CAT]},
    "implicit messages": {"chosen": [*ASK, BLUE], "rejected": [*ASK, CAT]},
    "implicit texts": {"chosen": "red blue", "rejected": "red cat", "score": 0.5},
    "UltraFeedback": {
        "prompt": "red",
        "messages": [*ASK, BLUE],
        "chosen": [*ASK, BLUE],
        "rejected": [*ASK, CAT],
        "score_chosen": 8.5,
    },
    "HH-RLHF": {"chosen": HH.format("blue"), "rejected": HH.format("cat")},
    "HH-RLHF's prompt": {"prompt": HH.format(""), "chosen": "blue", "rejected": "cat"},
    "ShareGPT": {"conversations": SHAREGPT[:1], "chosen": GPT_BLUE, "rejected": GPT_CAT},
    "a": {"prompt": "red", "winner": "a", **AB},
    "model_a": {"prompt": ASK, "winner": "model_a", **AB},
    "1.0": {"prompt": "red", "winner": 1.0, **AB},
    "B": {"prompt": "red", "winner": "B", **BA},
    "response_b": {"prompt": "red", "winner": "response_b", **BA},
    "2": {"prompt": "red", "winner": 2, **BA},
    "an arena's": {
        "response_a": [*ASK, CAT],
        "response_b": [*ASK, BLUE],
        "winner": "model_b",
        "chosen": None,
    },
    "a model's name": {"prompt": "red", "model_a": "x", "model_b": "y", "winner": "x", **AB},
    "in words": {"prompt": "red", "winner": "Response A is better", **AB},
    "Kaggle's": {"prompt": "red", "winner_model_a": "False", "winner_model_b": "True", **BA},
    "A<B": {"prompt": "red", "winner": "A << B", **BA},
    "A>B": {"prompt": "red", "winner": "A>>B", **AB},
    "Label Studio's": {"prompt": "red", "winner": '[{"selected": "left"}]', **AB},
    "Argilla's": {
        "prompt": "red",
        "response1": "cat",
        "response2": "blue",
        "winner": ["response2"],
    },
    "a hyphen": {
        "prompt": "red",
        "winner": "response-2",
        "response-1": "cat",
        "response-2": "blue",
    },
    "StackExchange": {"question": "red", "response_j": "blue", "response_k": "cat"},
    "OpenAI's parts": {
        "prompt": [{"role": "user", "content": [{"type": "input_text", "text": "red"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "output_text", "text": "blue"}]}],
        "rejected": "cat",
    },
    "a rank for each": {"prompt": "red", "answers": ["cat", "owl", "blue"], "rank": [3, 2, 1]},
    "SHP's columns": {"prompt": "red", "human_ref_A": "cat", "human_ref_B": "blue", "winner": "b"},
    "HelpSteer3": {
        "prompt": "red",
        "response1": "cat",
        "response2": "blue",
        "overall_preference": 2,
    },
    "WebGPT": {
        "question": "red",
        "answer_0": "blue",
        "answer_1": "cat",
        "score_0": "1",
        "score_1": -1,
    },
    "torchtune's": {"chosen_conversations": [*ASK, BLUE], "rejected_conversations": [*ASK, CAT]},
    "OpenRLHF's": {"context_messages": ASK, "chosen": [BLUE], "rejected": [CAT]},
    "the prompt repeated": {"prompt": "red", "chosen": "red blue", "rejected": "red cat"},
    "messages before": {"messages": ASK, "chosen": BLUE, "rejected": CAT},
    "two conversations": {"messages": [*ASK, BLUE], "rejected_messages": [*ASK, CAT]},
    "lists of one": {"prompt": "red", "chosen": ["blue"], "rejected": ["cat", "pig"]},
    "objects": {"prompt": "red", "chosen": {"text": "blue", "n": 1}, "rejected": {"answer": "cat"}},
    "HH-RLHF from Windows": {
        "chosen": HH.format("blue").replace("\n", "\r\n"),
        "rejected": HH.format("cat").replace("\n", "\r\n"),
    },
    "left and right": {"prompt": "red", "answer1": "cat", "answer2": "blue", "choice": "right"},
    "ids": {"prompt": "red", "response_0": "cat", "response_1": "blue", "better_response_id": 1},
    "Kaggle's arena": {
        "prompt": '["red"]',
        "response_a": '["cat"]',
        "response_b": '["blue"]',
        "winner_model_a": "0",
        "winner_model_b": "1",
        "winner_tie": "0",
    },
    "conversations of an arena": {
        "conversation_a": [*ASK, BLUE],
        "conversation_b": [*ASK, CAT],
        "winner": "model_a",
    },
    "OpenAI's": {
        "input": {"messages": ASK, "tools": []},
        "preferred_output": [BLUE],
        "non_preferred_output": [CAT],
    },
    "parts": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "red"}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "blue"}]}],
        "rejected": [{"role": "assistant", "content": ["cat"]}],
    },
    "ShareGPT's other names": {
        "conversations": [{"from": "Human", "value": "red"}],
        "chosen": {"from": "Assistant", "value": "blue"},
        "rejected": {"from": "bot", "value": "cat"},
    },
    "JSON as text": {"chosen": json.dumps([*ASK, BLUE]), "rejected": json.dumps([*ASK, CAT])},
    "JSON as text, and a prompt": {
        "prompt": "red",
        "chosen": json.dumps([*ASK, BLUE]),
        "rejected": json.dumps([*ASK, CAT]),
    },
    "Python's repr": {"chosen": str([*ASK, BLUE]), "rejected": str([*ASK, CAT])},
    "an object with messages": {
        "chosen": json.dumps({"messages": [*ASK, BLUE]}),
        "rejected": {"messages": [*ASK, CAT]},
    },
    "a turn as text": {"prompt": "red", "chosen": json.dumps(BLUE), "rejected": json.dumps(CAT)},
    "columns of structs": {
        "prompt": {"role": ["user"], "content": ["red"]},
        "chosen": {"role": ["user", "assistant"], "content": ["red", "blue"]},
        "rejected": {"role": ["user", "assistant"], "content": ["red", "cat"]},
    },
    "names in any case": {" Prompt": "red", "CHOSEN ": "blue", "Rejected": "cat"},
    "Alpaca's": {"instruction": "red", "input": "", "chosen": "blue", "rejected": "cat"},
    "Alpaca's ranked": {"instruction": "red", "input": "", "output": ["blue", "owl", "cat"]},
    "Orca's": {"system": "", "question": "red", "chosen": "blue", "rejected": "cat"},
    "ms-swift's": {"query": "red", "response": "blue", "rejected_response": "cat"},
    "messages and a rejected answer": {"messages": [*ASK, BLUE], "rejected_response": "cat"},
    "UltraFeedback's completions": {
        "instruction": "red",
        "completions": [
            {"response": "owl", "overall_score": 5.0},
            {"response": "cat", "overall_score": 1.5},
            {"response": "blue", "overall_score": 8.0},
        ],
    },
    "Nectar's": {
        "prompt": HH.format(""),
        "answers": [{"answer": "cat", "rank": 3.0}, {"answer": "blue", "rank": 1.0}],
    },
    "scores": {"prompt": "red", "responses": ["cat", "blue"], "scores": ["0.5", "9"]},
    "ranks": {"prompt": "red", "responses": ["cat", "blue", "owl"], "ranks": [3, 1, 2]},
}


@pytest.mark.parametrize("row", SHAPES.values(), ids=SHAPES)
def test_one_pair_in_every_shape_is_the_same_pair(row: dict) -> None:
    assert normalise(Row(row)) == (ASK, "blue", "cat")


TALKS = {
    "messages": {"prompt": TALK, "chosen": [BLUE], "rejected": [CAT]},
    "implicit messages": {"chosen": [*TALK, BLUE], "rejected": [*TALK, CAT]},
    "its first turn as the prompt": {
        "prompt": "red",
        "chosen": [*TALK, BLUE],
        "rejected": [*TALK, CAT],
    },
    "turns after the prompt": {
        "prompt": "red",
        "chosen": [*TALK[1:], BLUE],
        "rejected": [*TALK[1:], CAT],
    },
    "HH-RLHF": {"chosen": HH_TALK.format("blue"), "rejected": HH_TALK.format("cat")},
    "HH-RLHF's prompt": {"prompt": HH_TALK.format(""), "chosen": "blue", "rejected": "cat"},
    "ShareGPT": {
        "conversations": [*SHAREGPT, {"from": "human", "value": "pig"}],
        "chosen": GPT_BLUE,
        "rejected": GPT_CAT,
    },
    "winner": {"prompt": TALK, "winner": "b", **BA},
}


@pytest.mark.parametrize("row", TALKS.values(), ids=TALKS)
def test_a_prompt_of_several_turns(row: dict) -> None:
    assert normalise(Row(row)) == (TALK, "blue", "cat")


NUMBERS = {
    "numbers": ({"chosen": 8, "rejected": 8.5}, ("8", "8.5")),
    "truth": ({"chosen": True, "rejected": False}, ("true", "false")),
    "a date": ({"chosen": date(2024, 5, 1), "rejected": "never"}, ("2024-05-01", "never")),
    "a JSON list": ({"chosen": '["a", "b"]', "rejected": '["a"]'}, ('["a", "b"]', '["a"]')),
    "a JSON object": ({"chosen": '{"name": "Ann"}', "rejected": "{}"}, ('{"name": "Ann"}', "{}")),
    "a JSON trip": ({"chosen": '{"from": "Rome"}', "rejected": "no"}, ('{"from": "Rome"}', "no")),
    "JSON jobs": ({"chosen": '[{"role": "cook"}]', "rejected": "no"}, ('[{"role": "cook"}]', "no")),
    "nothing's names": ({"chosen": "None", "rejected": "null"}, ("None", "null")),
}


@pytest.mark.parametrize(("answers", "texts"), NUMBERS.values(), ids=NUMBERS)
def test_an_answer_is_the_text_that_stands_there(answers: dict, texts: tuple[str, str]) -> None:
    assert normalise(Row({"prompt": "red", **answers})) == (ASK, *texts)


def test_a_system_column_goes_before_the_prompt() -> None:
    asked = [says("system", "owl"), *ASK]
    for columns in ({"prompt": "red"}, {"question": "red"}, {"conversations": SHAREGPT[:1]}):
        row = Row({"system": "owl", "chosen": "blue", "rejected": "cat", **columns})
        assert normalise(row) == (asked, "blue", "cat")
        assert not row.unused()
    own = Row({"system": "pig", "prompt": asked, "chosen": "blue", "rejected": "cat"})
    assert normalise(own) == (asked, "blue", "cat")
    assert own.unused() == ["system"]


def test_alpaca_s_input_and_history_are_part_of_the_prompt() -> None:
    row = Row({"instruction": "red", "input": "owl", "output": "blue", "source": "x"})
    assert normalise(row) == ([says("user", "red\n\nowl")], "blue", None)
    assert row.used == {"prompt": "instruction + input", "completion": "output"}
    assert row.unused() == ["source"]
    past = Row({"instruction": "pig", "output": "blue", "history": [["red", "owl"]]})
    assert normalise(past) == (TALK, "blue", None)


def test_rounds_of_an_arena_are_turns() -> None:
    answers = {"response_a": '["owl", "blue"]', "response_b": '["owl", "cat"]'}
    row = Row({"prompt": '["red", "pig"]', "winner": "model_a", **answers})
    assert normalise(row) == (TALK, BLUE["content"], CAT["content"])


@pytest.mark.parametrize("prompt", ['["red"]', ["red"]])
def test_a_prompt_that_is_a_list_of_one_text_is_that_text(prompt: object) -> None:
    assert normalise(Row({"prompt": prompt, "chosen": "blue", "rejected": "cat"})) == (
        *(ASK, "blue", "cat"),
    )
    assert normalise(Row({"prompt": prompt, "response": '["blue"]'})) == (ASK, "blue", None)
    assert normalise(Row({"prompt": prompt})) == (ASK, None, None)
    with pytest.raises(Unusable, match="rounds without a text"):
        normalise(Row({"prompt": '["red", "pig"]', "chosen": "blue", "rejected": "cat"}))


def test_thoughts_stay_with_their_turn() -> None:
    thoughtful = BLUE | {"reasoning_content": "hm"}
    prompt, answer, _ = normalise(Row({"messages": [*ASK, thoughtful, *ASK, thoughtful]}))
    assert prompt == [*ASK, thoughtful, *ASK] and answer == thoughtful


GOOD = [
    True,
    1,
    "1",
    1.0,
    "True",
    "yes",
    "Good",
    "up",
    "thumbs_up",
    "Thumbs up",
    "👍",
    "👍🏽",
    "✅",
    "T",
    "positive",
]
BAD = [
    False,
    0,
    "0",
    -1,
    "-1",
    "FALSE",
    "no",
    "bad",
    "down",
    "thumbs_down",
    "thumbs-down",
    "👎",
    "👎🏿",
    "✗",
    "Decline",
]
ANSWERED = {
    "completion": {"prompt": "red", "completion": "blue"},
    "messages": {"messages": [*ASK, BLUE]},
    "conversations": {"conversations": [*SHAREGPT[:1], GPT_BLUE]},
    "Alpaca's": {"instruction": "red", "output": "blue"},
}


@pytest.mark.parametrize("row", ANSWERED.values(), ids=ANSWERED)
@pytest.mark.parametrize("name", ["label", "kto_tag", "Label", "is_good", "Thumbs Up"])
def test_an_answer_that_is_called_bad_is_a_rejected_one(row: dict, name: str) -> None:
    for label in GOOD:
        assert normalise(Row(row | {name: label})) == (ASK, "blue", None)
    for label in BAD:
        assert normalise(Row(row | {name: label})) == (ASK, None, "blue")
    with pytest.raises(Unusable, match="whose label is empty"):
        normalise(Row(row | {name: None}))


@pytest.mark.parametrize("label", [4, "4.5", "2", "maybe", "sports"])
def test_a_label_that_says_neither_stops_with_the_words_to_use(label: object) -> None:
    row = {"prompt": "red", "completion": "blue", "label": label}
    with pytest.raises(DataError) as error:
        understand(Row(row))
    assert repr(label) in str(error.value) and "true or false" in str(error.value)
    assert normalise(Row(row, {"label": ""})) == (ASK, "blue", None)
    pair = {"prompt": "red", "chosen": "blue", "rejected": "cat", "label": label}
    assert normalise(Row(pair)) == (ASK, "blue", "cat")


@pytest.mark.parametrize("name", ["accepted", "Preferred", "chosen"])
@pytest.mark.parametrize(("good", "bad"), [(True, False), ("TRUE", "FALSE"), ("1", "0")])
def test_a_label_beside_an_answer_is_not_an_answer(name: str, good: object, bad: object) -> None:
    row = {"prompt": "red", "completion": "blue"}
    labelled = Row(row | {name: good})
    assert normalise(labelled) == (ASK, "blue", None) and "label" in labelled.used
    assert normalise(Row(row | {name: bad})) == (ASK, None, "blue")
    assert normalise(Row({"prompt": "red", name: "yes"})) == (ASK, "yes", None)


def test_a_column_without_a_name_is_none_of_ours() -> None:
    row = Row({"": "0", "prompt": "red", "chosen": "blue", "rejected": "cat"})
    assert normalise(row) == (ASK, "blue", "cat")


def test_a_turn_of_weight_0_is_not_learned() -> None:
    row = {"messages": [*ASK, CAT | {"weight": 0}, *ASK, BLUE | {"weight": 1}]}
    assert normalise(Row(row)) == ([*ASK, CAT, *ASK], "blue", None)
    with pytest.raises(Unusable, match="has the weight 0"):
        normalise(Row({"messages": [*ASK, CAT | {"weight": 0}]}))


def test_columns_of_numbers_and_truth_values_are_named_too() -> None:
    row = Row({"prompt": "red", "response": "blue", "helpfulness": 4, "edited": False, "n": None})
    normalise(row)
    assert row.unused() == ["helpfulness", "edited"]


def test_a_winner_that_means_two_things_stops() -> None:
    """0 and 1 may be a and b; or not a, and a."""
    with pytest.raises(DataError, match="its winner is 0"):
        understand(Row({"prompt": "red", "winner": 0, **AB}))


def test_columns_that_the_recipe_names_come_first() -> None:
    columns = {"prompt": "pig", "Frage": "red", "gut": "blue", "label": "sports", "wertung": "ja"}
    named = {"prompt": "frage", "completion": "gut", "label": ""}
    assert normalise(Row(columns, named)) == (ASK, "blue", None)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("frage gut schlecht", 'chosen="gut", prompt="frage", rejected="schlecht"'),
        ("bad_one good_one problem", 'chosen="good_one", prompt="problem", rejected="bad_one"'),
        ("problem solution", 'completion="solution", prompt="problem"'),
    ],
)
def test_columns_are_guessed_for_the_message(names: str, said: str) -> None:
    assert f"dataset.columns={{{said}}}".replace('="', ' = "') in guess(
        dict.fromkeys(names.split(), "some words")
    )


def test_a_system_message_of_the_prompt_is_kept() -> None:
    prompt = [says("system", "owl"), *ASK]
    row = {"prompt": prompt, "chosen": [*ASK, BLUE], "rejected": [*ASK, CAT]}
    assert normalise(Row(row)) == (prompt, "blue", "cat")


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"prompt": "red", "completion": "blue"}, (ASK, "blue", None)),
        ({"prompt": "red", "chosen": "blue", "rejected": None}, (ASK, "blue", None)),
        ({"messages": [*TALK, BLUE], "prompt": "red"}, (TALK, "blue", None)),
        ({"conversations": [*SHAREGPT[:1], GPT_BLUE]}, (ASK, "blue", None)),
        ({"conversation": [{"input": "red", "output": "blue"}]}, (ASK, "blue", None)),
        ({"chosen": HH_TALK.format("blue")}, (TALK, "blue", None)),
        ({"prompt": "red"}, (ASK, None, None)),
        ({"prompt": TALK, "chosen": None, "rejected": None}, (TALK, None, None)),
        ({"prompt": "red", "chosen": None, "rejected": "cat"}, (ASK, None, None)),
        ({"prompt": HH_TALK.format("")}, (TALK, None, None)),
        ({"conversations": SHAREGPT[:1], "chosen": None, "rejected": None}, (ASK, None, None)),
        ({"prompt": "red", "winner": None, **AB}, (ASK, None, None)),
    ],
)
def test_a_row_that_is_no_pair_is_what_it_has(row: dict, found: tuple) -> None:
    assert normalise(Row(row)) == found


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "red"}, "no shape that is understood"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": [{"name": "me"}], "completion": "a"}, "no shape that is understood"),
        ({"prompt": "red", "completion": []}, "no shape that is understood"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"problem": "red", "chosen": "I am", "rejected": "I was"}, "no prompt"),
        ({"prompt": [*ASK, BLUE]}, "the prompt does not end on the user's turn"),
        ({"chosen": HH, "rejected": HH_TALK}, "the two answers are to different prompts"),
        ({"chosen": HH.format(""), "rejected": HH}, "the answer is not the assistant's turn"),
        ({"prompt": "red", "winner": "tie", **AB}, "a tie"),
        ({"prompt": "red", "winner": "tie (bothbad)", **AB}, "a tie"),
        ({"prompt": "red", "winner": "Both", **AB}, "a tie"),
        ({"prompt": "red", "winner": "neither", **AB}, "a tie"),
        ({"prompt": "red", "winner": "c", **AB}, "the winner is not a, b or tie"),
        ({"prompt": "red", "winner": -1, **AB}, "the winner is not a, b or tie"),
        ({"prompt": "red", **AB}, "nothing says which is better"),
        ({"messages": [*ASK, BLUE | {"label": False}]}, "its label calls bad"),
        ({"prompt": "red", "responses": ["a", "b"], "scores": [1, 1]}, "a tie"),
        ({"prompt": "red", "responses": ["a", "b"]}, "several answers without scores or ranks"),
        (
            {
                "prompt": '["red", null]',
                "winner": "a",
                "response_a": '["a", null]',
                "response_b": '["b", "c"]',
            },
            "rounds without a text",
        ),
        ({"messages": [*ASK, CAT | {"tool_calls": [{"id": 1}]}, *ASK, BLUE]}, "a tool call"),
        ({"messages": [*ASK, says("tool", "42"), *ASK, BLUE]}, "a tool call"),
        ({"messages": [*ASK, says("assistant", ""), *ASK, BLUE]}, "an empty turn"),
        ({"messages": [*ASK, says("assistant", None)]}, "a turn without text"),
        ({"prompt": "see <image>", "completion": "blue"}, "the place of a picture"),
        ({"prompt": "red", "completion": "blue", "images": ["a.png"]}, "beside the text"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "a"},
            "a turn with a picture",
        ),
        (
            {
                "prompt": "red",
                "chosen": "[{'role': 'user'} {'role': 'assistant'}]",
                "rejected": "a",
            },
            "neither JSON nor a Python list",
        ),
        ({"prompt": "red \ud800", "completion": "blue"}, "half a character"),
        (
            {"conversations": [{"from": "gpt", "value": "x"}], "chosen": "a", "rejected": "b"},
            "the prompt does not end on the user's turn",
        ),
    ],
)
def test_an_unusable_row_says_why(row: dict, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        understand(Row(row))
