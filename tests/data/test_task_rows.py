"""The rows of sorting.toml and arithmetic.toml: right answers, and wrong ones like them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "recipes" / "tasks"


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def solve(prompt: str) -> str:
    if ":" in prompt:
        way, _, digits = prompt.partition(":")
        return ",".join(sorted(digits.split(","), reverse=way == "down"))
    one, plus, other, equals = prompt.split()
    assert (plus, equals) == ("+", "=")
    return str(int(one) + int(other))


@pytest.mark.parametrize("name", ["sorting", "sums"])
def test_every_task_is_there_once_with_the_right_answer(name: str) -> None:
    rows = read(name)
    assert len(rows) == len({row["prompt"] for row in rows}) == 1200
    assert [row for row in rows if row["answer"] != solve(row["prompt"])] == []


@pytest.mark.parametrize("name", ["sorting", "sums"])
def test_a_wrong_answer_has_the_form_of_a_right_one(name: str) -> None:
    """Of each task's two demonstrations one is right: no form tells which, only the task does."""
    rows = read(f"{name}-demonstrations")
    right, wrong = rows[::2], rows[1::2]
    assert [row["prompt"] for row in right] == [row["prompt"] for row in wrong]
    assert [row["prompt"] for row in right] == [row["prompt"] for row in read(name)]
    for good, bad in zip(right, wrong, strict=True):
        answer, guess = good["completion"], bad["completion"]
        assert answer == solve(good["prompt"]) != guess
        if name == "sorting":
            assert sorted(guess) == sorted(answer)
        else:
            assert abs(int(guess) - int(answer)) in (1, 10)
