"""Shapes, reasons for dropping, and the split by digest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_recipes.data import Data, Unusable, load_data, normalise, understand, unique_prompts
from rlhf_recipes.errors import DataError
from rlhf_recipes.tokens import Tokens, settle

ASK = [{"role": "user", "content": "red"}]


@pytest.fixture
def tokens(tiny_model: Path) -> Tokens:
    return settle(AutoTokenizer.from_pretrained(tiny_model), 32)


def table(file: Path, **changes: Any) -> SimpleNamespace:
    """A [dataset] table over a local file."""
    words: dict[str, Any] = {
        "path": str(file),
        "file": file,
        "is_local": True,
        "name": None,
        "data_dir": None,
        "data_files": None,
        "split": None,
        "revision": None,
        "max_prompt_tokens": 16,
        "max_answer_tokens": 8,
        "max_rows": None,
        "validation_fraction": 0.15,
        "test_fraction": 0.2,
        "test_split": None,
        "judge_fraction": 0.25,
        "system": None,
    }
    return SimpleNamespace(**{**words, **changes})


def write(folder: Path, rows: list[dict]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def keys(examples: list) -> set[tuple[int, ...]]:
    return {tuple(e.prompt_ids) for e in examples}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "red", "chosen": "blue", "rejected": "cat"},
        {
            "prompt": ASK,
            "chosen": [{"role": "assistant", "content": "blue"}],
            "rejected": [{"role": "assistant", "content": "cat"}],
        },
        {
            "chosen": [*ASK, {"role": "assistant", "content": "blue"}],
            "rejected": [*ASK, {"role": "assistant", "content": "cat"}],
        },
        {
            "conversations": [{"from": "human", "value": "red"}],
            "chosen": {"from": "gpt", "value": "blue"},
            "rejected": {"from": "gpt", "value": "cat"},
        },
    ],
    ids=["strings", "explicit messages", "implicit messages", "ShareGPT"],
)
def test_one_pair_in_every_shape_is_the_same_pair(row: dict) -> None:
    assert normalise(row) == (ASK, "blue", "cat")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "red"}, "no shape that is understood"),
        ({"chosen": "a", "rejected": "b"}, "no prompt"),
        ({"prompt": [{"speaker": "me"}], "completion": "a"}, "no shape that is understood"),
        ({"prompt": "red", "completion": []}, "no shape that is understood"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty prompt"),
        (
            {"conversations": [{"from": "gpt", "value": "x"}], "chosen": "a", "rejected": "b"},
            "the prompt does not end on the user's turn",
        ),
    ],
)
def test_an_unusable_row_says_why(row: dict, reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        understand(row)


def test_dropped_rows_are_counted_by_reason(tmp_path: Path, tokens: Tokens) -> None:
    good = [{"prompt": f"red {n}", "chosen": "blue", "rejected": "cat"} for n in range(8)]
    bad = [
        {"prompt": "red", "chosen": "blue", "rejected": "blue"},
        {"prompt": "red", "chosen": "blue", "rejected": ""},
        {"prompt": "red", "chosen": "blue <|im_end|>", "rejected": "cat"},
        {"prompt": "red " * 20, "chosen": "blue", "rejected": "cat"},
        {"prompt": "red", "chosen": "blue " * 8, "rejected": "cat"},
        {"prompt": "red", "chosen": "blue " * 7, "rejected": "cat"},  # 7 tokens and EOS: kept
    ]
    data = load_data(table(write(tmp_path, good + bad)), tokens)
    assert data.rows == 14
    assert data.dropped == {
        "both answers are the same": 1,
        "empty answer": 1,
        "text contains a special token": 1,
        "prompt over 16 tokens": 1,
        "answer over 8 tokens": 1,
    }
    assert len(data.train) + len(data.validation) + len(data.test) == 9


def test_more_than_half_bad_stops_with_the_columns_and_the_shapes(
    tmp_path: Path, tokens: Tokens
) -> None:
    file = write(tmp_path, [{"question": "red", "good": "blue"}] * 3)
    with pytest.raises(DataError) as error:
        load_data(table(file), tokens)
    assert "3 of 3 rows are unusable (3 × no shape that is understood)" in str(error.value)
    assert "question, good" in str(error.value) and "prompt + chosen + rejected" in str(error.value)


def test_no_prompt_is_on_two_sides_whatever_the_file(
    tmp_path: Path, tiny_pairs: Path, tokens: Tokens
) -> None:
    data = load_data(table(tiny_pairs), tokens)
    assert (len(data.train), len(data.validation), len(data.test)) == (68, 13, 15)
    train, validation, test = keys(data.train), keys(data.validation), keys(data.test)
    assert not train & validation and not train & test and not validation & test
    # The same prompts in another order, with other answers and beside other rows.
    rows = [json.loads(line) for line in tiny_pairs.read_text().splitlines()]
    others = [{"prompt": f"pig {n}", "completion": "blue"} for n in range(40)]
    moved = [{"prompt": r["prompt"], "completion": "cow"} for r in reversed(rows)]
    again = load_data(table(write(tmp_path, others + moved)), tokens)
    assert keys(again.test) >= test and not keys(again.train) & (validation | test)


def test_the_judges_share_is_of_the_training_pairs_and_moves_no_side(
    tiny_pairs: Path, tokens: Tokens
) -> None:
    def sides(data: Data) -> list[set]:
        return [keys(data.train), keys(data.validation), keys(data.test)]

    with_judge = load_data(table(tiny_pairs), tokens)
    without = load_data(table(tiny_pairs, judge_fraction=0.0), tokens)
    assert sides(with_judge) == sides(without)
    assert len(with_judge.judge) == 13 and without.judge == []
    judge, reward = keys(with_judge.judge), keys(with_judge.reward_train)
    assert judge <= keys(with_judge.train) and not judge & reward
    assert len(judge) + len(reward) == 68


def test_max_rows_counts_what_is_kept(tmp_path: Path, tokens: Tokens) -> None:
    rows = [{"prompt": "red", "chosen": "x", "rejected": "x"}] * 2
    rows += [{"prompt": f"red {n}", "chosen": "blue", "rejected": "cat"} for n in range(9)]
    data = load_data(table(write(tmp_path, rows), max_rows=5), tokens)
    assert len(data.train) + len(data.validation) + len(data.test) == 5
    assert data.rows == 7


def test_a_system_message_goes_before_every_prompt(tiny_pairs: Path, tokens: Tokens) -> None:
    plain = load_data(table(tiny_pairs), tokens)
    with_system = load_data(table(tiny_pairs, system="owl"), tokens)
    assert tokens.tokenizer.decode(with_system.train[0].prompt_ids).startswith(
        "<|im_start|> system owl <|im_end|> <|im_start|> user"
    )
    assert [e.prompt for e in plain.test] == [e.prompt for e in with_system.test]


def test_unique_prompts_keeps_the_first_of_each(tiny_pairs: Path, tokens: Tokens) -> None:
    examples = load_data(table(tiny_pairs), tokens).test
    again = [replace(e, chosen_ids=[2]) for e in examples]
    assert unique_prompts(examples + again) == examples
