"""Several answers to one prompt: which pairs they make, what each weighs, and on which side."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.data.compared import PAIRS, compare
from rlhf_recipes.data.dataset import Data, load_data
from rlhf_recipes.data.rows import Example, feedback, judged, pairs
from rlhf_recipes.data.tokens import settle
from rlhf_recipes.recipe.tables import DatasetTable
from tests.helpers.tiny import WORDS, word_tokenizer

pytestmark = pytest.mark.train


def load(folder: Path, rows: list[dict[str, Any]], **words: Any) -> Data:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = settle(word_tokenizer(), 32)
    return load_data(DatasetTable(path=str(file), **words), tokens)


def test_every_pair_weighs_its_share_and_the_widest_comes_first() -> None:
    """By hand: four answers, two alike, give five of six pairs, each of weight 1/6."""
    found = compare([3.0, 9.0, 3.0, 1.0])
    assert found == [
        (1, 3, 2.0, 1 / 6),
        (0, 3, 1.0, 1 / 6),
        (1, 0, 1.0, 1 / 6),
        (1, 2, 1.0, 1 / 6),
        (2, 3, 1.0, 1 / 6),
    ]
    assert compare([5.0, 2.0]) == [(0, 1, 1.0, 1.0)]
    assert compare([2.0, 2.0]) == compare([1.0]) == compare([]) == []


def test_a_prompt_gives_so_many_pairs_at_most_and_their_weight_is_that_of_all() -> None:
    assert len(compare(range(9))) == PAIRS
    many = compare(range(40))
    assert 0 < len(many) <= PAIRS and many[0][:3] == (39, 0, 39.0)
    assert sum(pair.weight for pair in many) == pytest.approx(1.0)


RATED = {"prompt": "red", "responses": ["cat", "blue", "owl", "pig"], "scores": [1, 9, 5, 5]}


def test_a_rated_row_is_one_row_with_pairs_of_its_own(tmp_path: Path) -> None:
    data = load(tmp_path, [RATED], test_fraction=0, validation_fraction=0, judge_fraction=0)
    [row] = data.train
    tokens = {word: number for word, number in word_tokenizer().get_vocab().items()}
    word = {(tokens[name], 2): name for name in WORDS}

    def told(pair: Example) -> tuple[str, str, float | None, float]:
        ends = [word[tuple(ids or ())] for ids in (pair.chosen_ids, pair.rejected_ids)]
        return ends[0], ends[1], pair.margin, round(6 * pair.weight, 9)

    assert told(row) == ("blue", "cat", 2.0, 1.0)
    assert sorted(map(told, row.others)) == [
        ("blue", "owl", 1.0, 1.0),
        ("blue", "pig", 1.0, 1.0),
        ("owl", "cat", 1.0, 1.0),
        ("pig", "cat", 1.0, 1.0),
    ]
    assert len(data.learned("feedback")) == 5
    assert data.learned("pairs") == data.learned("answers") == [row]  # DPO and SFT


def test_an_answer_between_that_cannot_be_used_is_left_out_of_its_row(tmp_path: Path) -> None:
    """It is too long, empty, holds a special token, or is the best one again."""
    for odd in ("owl " * 9, " ", "owl<|im_end|>", "blue"):
        answers = ["cat", "blue", odd]
        rows = [{"prompt": "red", "responses": answers, "scores": [1, 9, 5]}]
        data = load(tmp_path, rows, test_fraction=0, max_answer_tokens=4)
        [row] = data.train or data.validation
        assert [pair.rejected_ids == row.rejected_ids for pair in row.others] in ([], [True])
        assert all(len(pair.chosen_ids or ()) <= 4 for pair in row.others)


@pytest.mark.parametrize(
    ("columns", "margin"),
    [
        ({"margin": 0.5}, 0.5),
        ({"margin": "2"}, 2.0),
        ({"score_chosen": 8.5, "score_rejected": "6"}, 2.5),
        ({"chosen-rating": 5, "rejected-rating": 1}, 4.0),
        ({"score_chosen": 8.5}, None),
        ({"margin": "much better"}, None),
        ({"margin": "nan"}, None),
        ({}, None),
    ],
)
def test_a_pair_has_its_row_s_margin(
    tmp_path: Path, columns: dict[str, Any], margin: float | None
) -> None:
    row = {"prompt": "red", "chosen": "blue", "rejected": "cat", **columns}
    [pair] = load(tmp_path, [row], test_fraction=0, validation_fraction=0).train
    assert (pair.margin, pair.weight) == (margin, 1.0)


def thumbs(*said: tuple[str, str, bool]) -> list[dict[str, Any]]:
    return [{"prompt": p, "completion": answer, "label": good} for p, answer, good in said]


WHOLE = {"test_fraction": 0, "validation_fraction": 0, "judge_fraction": 0}


def test_labels_are_pairs_within_a_prompt_that_has_both_kinds_and_single_answers_else(
    tmp_path: Path,
) -> None:
    rows = thumbs(
        ("red", "blue", True),
        ("red", "cat", False),
        ("red", "pig", False),
        ("gold", "blue", True),
        ("pink", "hen", False),
    )
    data = load(tmp_path, rows, **WHOLE)
    found, alone = judged(data.judged("train"))
    assert [(e.prompt, len(e.others), e.weight) for e in found] == [("red", 1, 1 / 3)]
    assert [(e.prompt, e.chosen_ids is not None) for e in alone] == [
        ("gold", True),
        ("pink", False),
    ]
    learned = data.learned("feedback")
    assert [e.weight for e in learned] == [1 / 3, 1 / 3, 1.0, 1.0]
    assert {e.prompt for e in data.learned("answers")} == {"red", "gold"}  # SFT: good ones alone
    assert all(e.chosen_ids is not None for e in data.learned("answers"))


def test_labels_of_one_kind_alone_teach_nothing(tmp_path: Path) -> None:
    good = load(tmp_path, thumbs(("red", "blue", True), ("gold", "blue", True)), **WHOLE)
    assert good.learned("feedback") == [] and len(good.learned("answers")) == 2
    bad = load(tmp_path, thumbs(("red", "cat", False)), **WHOLE)
    assert bad.learned("feedback") == []
    mixed = [{"prompt": "grey", "chosen": "blue", "rejected": "cat"}]
    mixed += thumbs(("red", "blue", True), ("gold", "pink", True))
    assert len(load(tmp_path, mixed, **WHOLE).learned("feedback")) == 1


def test_demonstrations_beside_pairs_are_no_labels(tmp_path: Path) -> None:
    rows = [{"prompt": "grey", "chosen": "blue", "rejected": "cat"}]
    rows += [{"prompt": "red", "completion": "pink"}, *thumbs(("gold", "pig", False))]
    assert len(load(tmp_path, rows, **WHOLE).learned("feedback")) == 1


def test_a_prompt_s_answers_are_on_one_side_whatever_their_labels(tmp_path: Path) -> None:
    asked = [f"{one} {other}" for one, other in combinations(WORDS, 2)]
    rows = thumbs(*((p, word, word == "blue") for p in asked for word in ("blue", "cat")))
    data = load(tmp_path, rows, test_fraction=0.3, validation_fraction=0.2, judge_fraction=0.3)
    sides = [{e.prompt for e in getattr(data, side)} for side in ("train", "validation", "test")]
    bad = [{e.prompt for e in getattr(data.bad, side)} for side in ("train", "validation", "test")]
    assert sides == bad and all(sides) and sum(map(len, sides)) == len(asked)
    assert {e.prompt for e in data.judge} == {e.prompt for e in data.bad.judge}
    learned = {name: data.learned(name) for name in ("feedback", "judge_feedback")}
    assert learned["feedback"] == pairs(learned["feedback"]) != []
    apart = [{e.prompt for e in found} for found in learned.values()]
    assert apart[0].isdisjoint(apart[1]) and apart[0] | apart[1] == sides[0]


def test_a_file_of_pairs_is_learned_from_as_it_stands() -> None:
    rows = [
        Example("q", [1], [2], [3]),
        Example("q", [1], [4], None),
        Example("q", [1], None, None),
    ]
    assert feedback(rows) == rows[:1]
