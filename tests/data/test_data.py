"""Shapes, reasons for dropping, and the split by digest."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_recipes.data.dataset import Data, load_data
from rlhf_recipes.data.rows import answered, pairs, unique_prompts
from rlhf_recipes.data.tokens import Tokens, settle
from rlhf_recipes.errors import DataError
from rlhf_recipes.recipe.tables import DatasetTable
from tests.helpers.tiny import TEMPLATE, WORDS

pytestmark = pytest.mark.train

TALK = [{"role": who, "content": "red"} for who in ("user", "assistant", "user")]


@pytest.fixture
def tokens(tiny_model: Path) -> Tokens:
    return settle(AutoTokenizer.from_pretrained(tiny_model), 32)


def table(file: Path, **changes: Any) -> DatasetTable:
    """A [dataset] table over a local file or folder."""
    words = {"max_prompt_tokens": 16, "max_answer_tokens": 8, "validation_fraction": 0.15}
    return DatasetTable(str(file), **{**words, "test_fraction": 0.2, **changes})


def write(folder: Path, rows: list[dict]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sides_of(data: Data) -> list:
    return [*data.train, *data.validation, *data.test]


def keys(examples: list) -> set[tuple[int, ...]]:
    return {tuple(e.prompt_ids) for e in examples}


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
    file = write(tmp_path, [{"good": "nice red", "bad": "sad blue"}] * 3)
    with pytest.raises(DataError) as error:
        load_data(table(file), tokens)
    assert str(error.value).startswith(
        f"{file}: 3 of 3 rows are unusable (3 × no shape that is understood); "
        "row 1 has good: 'nice red'; bad: 'sad blue' "
        '(--set \'dataset.columns={chosen = "good", rejected = "bad"}\''
    )
    assert "prompt + chosen + rejected" in str(error.value)


def test_an_answer_that_is_called_bad_is_not_among_the_reasons(
    tmp_path: Path, tokens: Tokens
) -> None:
    rows = [{"prompt": "red", "completion": "", "label": True}] * 3
    rows += [{"prompt": "red", "completion": "cat", "label": False}] * 2
    with pytest.raises(DataError, match=r"3 of 5 rows are unusable \(3 × empty answer\); "):
        load_data(table(write(tmp_path, rows)), tokens)


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


def test_copies_are_dropped_where_that_is_asked_for(tmp_path: Path, tokens: Tokens) -> None:
    rows = [{"prompt": f"red {n}", "chosen": "blue", "rejected": "cat"} for n in range(4)]
    file = write(tmp_path, [*rows * 4, {**rows[0], "rejected": "dog"}])
    assert len(sides_of(load_data(table(file), tokens))) == 17
    data = load_data(table(file, dedup=True), tokens)
    assert len(sides_of(data)) == 5
    assert data.dropped == {"copy of an earlier row": 12}  # most of the rows, and nothing is wrong


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


def test_prompts_alone_are_kept_on_the_side_of_their_prompt(
    tmp_path: Path, tiny_pairs: Path, tokens: Tokens
) -> None:
    rows = [json.loads(line) for line in tiny_pairs.read_text().splitlines()]
    rows[1::3] = [{"prompt": row["prompt"]} for row in rows[1::3]]
    rows[2::3] = [row | {"rejected": None} for row in rows[2::3]]
    whole, some = (
        load_data(table(tiny_pairs), tokens),
        load_data(table(write(tmp_path, rows)), tokens),
    )
    for side in ("train", "validation", "test"):
        assert keys(getattr(some, side)) == keys(getattr(whole, side))
    every = [*some.train, *some.validation, *some.test]
    assert (len(every), len(answered(every)), len(pairs(every))) == (96, 64, 32)
    assert not some.dropped
    assert all(
        e.chosen_ids is None and e.rejected_ids is None for e in every if e not in answered(every)
    )


def test_columns_that_the_file_calls_otherwise(tmp_path: Path, tokens: Tokens) -> None:
    rows = [
        {"question": f"red {n}", "prompt": "pig", "rejected": "blue", "chosen": "cat"}
        for n in range(6)
    ]
    file = write(tmp_path, rows)
    columns = {"prompt": "question", "chosen": "rejected", "rejected": "chosen"}
    data = load_data(table(file, columns=columns), tokens)
    every = sorted([*data.train, *data.validation, *data.test], key=lambda e: e.prompt)
    assert [e.prompt for e in every] == [f"red {n}" for n in range(6)]
    assert {tokens.decode(e.chosen_ids) for e in every} == {"blue"}
    assert {tokens.decode(e.rejected_ids) for e in every} == {"cat"}
    with pytest.raises(DataError) as error:
        load_data(table(file, columns={"prompt": "query", "chosen": "good"}), tokens)
    assert str(error.value) == (
        f"{file} has no column good, query; its columns are question, prompt, rejected, chosen"
    )


def test_a_test_file_beside_the_training_file(tmp_path: Path, tokens: Tokens) -> None:
    train = [{"prompt": f"red {word}", "chosen": "blue", "rejected": "cat"} for word in WORDS]
    train[3] |= {"chosen": None, "rejected": None}
    train = [{"good": row.pop("chosen"), **row} for row in train]
    test = [
        {"prompt": "red owl", "id": 7},
        {"prompt": "pig"},
    ]  # other columns, and a prompt of both
    for name, rows in {"train": train, "test": test}.items():
        write(tmp_path, rows).rename(tmp_path / f"{name}.jsonl")
    files = {"train": "train.jsonl", "test": "test.jsonl"}
    words = {"data_files": files, "test_split": "test", "columns": {"chosen": "good"}}
    data = load_data(table(tmp_path, **words), tokens)
    assert [(e.prompt, e.chosen_ids) for e in data.test] == [("red owl", None), ("pig", None)]
    learned = [*data.train, *data.validation]
    assert len(data.validation) > 0 and len(learned) == 15
    assert "red owl" not in [e.prompt for e in learned]
    assert [e.prompt for e in learned if e.chosen_ids is None] == ["red grey"]
    assert data.dropped == {"prompt is in the test split": 1}


CONFIGS = """\
---
configs:
- config_name: default
  data_files: rows.jsonl
---
"""


def test_a_folder_whose_readme_lists_its_files_is_read_anew(tmp_path: Path, tokens: Tokens) -> None:
    """`datasets` finds what it kept of such a folder by the folder's name alone."""

    def prompts(folder: Path) -> list[str]:
        data = load_data(table(folder, validation_fraction=0.0, test_fraction=0.0), tokens)
        return [example.prompt for example in data.train]

    one, other = tmp_path / "one" / "same", tmp_path / "other" / "same"
    for folder, prompt in {one: "red", other: "blue"}.items():
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(CONFIGS)
        write(folder, [{"prompt": prompt}])
    assert (prompts(one), prompts(other)) == (["red"], ["blue"])
    write(one, [{"prompt": "gold"}])
    assert prompts(one) == ["gold"]


def test_what_the_chat_template_refuses_is_dropped(tmp_path: Path, tokens: Tokens) -> None:
    tokens.tokenizer.chat_template = (
        "{% if messages[1] %}{{ raise_exception('one turn') }}{% endif %}" + TEMPLATE
    )
    rows = [{"prompt": "red"}, {"prompt": "blue"}, {"prompt": TALK}]
    data = load_data(table(write(tmp_path, rows)), tokens)
    assert data.dropped == {"the chat template refuses it: one turn": 1}


def test_several_datasets_are_one(tmp_path: Path, tiny_pairs: Path, tokens: Tokens) -> None:
    rows = [json.loads(line) for line in tiny_pairs.read_text().splitlines()]
    (tmp_path / "a").mkdir()
    whole = load_data(table(tiny_pairs), tokens)
    parts = [
        table(write(tmp_path / "a", rows[:60]), max_rows=50),
        table(write(tmp_path, rows[40:])),
    ]
    both = load_data(replace(parts[0], more=(parts[1],)), tokens)
    assert (both.rows, len(both.train) + len(both.validation) + len(both.test)) == (106, 106)
    for side in ("train", "validation", "test", "judge"):
        assert keys(getattr(both, side)) == keys(getattr(whole, side))

    half = load_data(replace(parts[0], more=(replace(parts[1], weight=0.5),)), tokens)
    first = load_data(parts[0], tokens)
    added = [e for e in half.train if e not in first.train]
    assert len(both.train) > len(half.train) > len(first.train) and keys(added) < keys(both.train)
    share = load_data(table(tiny_pairs, weight=0.5), tokens)
    assert (share.rows, len(share.train), len(share.test)) == (96, 33, 3)
    assert share.dropped == {"beyond the dataset's weight": 52}
    quarter = load_data(table(tiny_pairs, weight=0.25), tokens)
    assert keys(quarter.train) < keys(share.train)
    half_bad = write(tmp_path, rows[:8] + [{"prompt": " "}] * 8)  # of all rows, not of its weight's
    assert load_data(table(half_bad, weight=0.1), tokens).dropped["empty prompt"] == 8


def test_a_prompt_of_one_test_split_is_learned_from_no_dataset(
    tmp_path: Path, tiny_pairs: Path, tokens: Tokens
) -> None:
    for name, prompts in {"train": WORDS, "test": ["red red", "cat dog", "pig"]}.items():
        rows = [{"prompt": prompt} for prompt in prompts]
        write(tmp_path, rows).rename(tmp_path / f"{name}.jsonl")
    held = table(tmp_path, test_split="test")
    for one, other in ((held, table(tiny_pairs)), (table(tiny_pairs), held)):
        data = load_data(replace(one, more=(other,)), tokens)
        assert [e.prompt for e in data.test] == ["red red", "cat dog", "pig"]
        learned = [*data.train, *data.validation]
        assert data.dropped == {"prompt is in the test split": 2}
        assert len(learned) == 16 + 96 - 2 and not keys(learned) & keys(data.test)
        assert not keys(data.train) & keys(data.validation)
    own = load_data(table(tiny_pairs, test_fraction=0.0), tokens, load_data(held, tokens).tested)
    assert own.dropped == {"prompt is in the test split": 1} and not own.test
    assert not keys(own.train + own.validation) & keys(data.test)


def test_sft_does_not_learn_the_judge_s_pairs(tmp_path: Path, tokens: Tokens) -> None:
    """Else the judge has seen what the policy was taught: its chosen answers, word for word."""
    rows = [{"prompt": f"red {n}", "chosen": "blue", "rejected": "cat"} for n in range(60)]
    shown = [{"prompt": f"sun {n}", "completion": "blue"} for n in range(60)]
    data = load_data(table(write(tmp_path, rows + shown), judge_fraction=0.5), tokens)
    learned, judged = data.learned("answers"), data.learned("judge_feedback")
    assert len(judged) > 10 and not {e.prompt for e in judged} & {e.prompt for e in learned}
    assert len(learned) == len(data.train) - len(judged)
    assert sum(e.rejected_ids is None for e in data.judge) > 10  # demonstrations are no pairs
