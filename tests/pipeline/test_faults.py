"""Whatever fails, wherever: one line, and the same command ends with the same bytes.

Every operation on a file below the runs folder fails once, in a process of its own, with stages
that only count. `make torture` fails them all; here it is every so many.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_recipes.recipe.load import Recipe
from tests.helpers.counting import STEPS
from tests.helpers.faults import (
    FAULT_WORDS,
    FAULTS,
    KILLED,
    attempt,
    no_part_is_taken_for_a_whole,
    outputs,
    steady_recipe,
)

pytestmark = pytest.mark.train


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    return steady_recipe(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "every", [pytest.param(1, id="all", marks=pytest.mark.torture), pytest.param(19, id="some")]
)
@pytest.mark.parametrize("begin", ["new", "resumed", "fresh"])
def test_every_operation_fails_once(
    recipe: Recipe, tmp_path: Path, begin: str, every: int, record_property: Callable
) -> None:
    """`new`: two stages from nothing. `resumed`, `fresh`: one from its checkpoint, or once more."""
    runs, before, steps = tmp_path / "runs", tmp_path / "before", tmp_path / "steps"
    before.mkdir()
    options = {"fresh": begin == "fresh", "until": None if begin == "new" else "sft"}
    seen = attempt(recipe, until=options["until"])[2]
    whole = outputs(runs)
    if begin == "fresh":
        shutil.copytree(runs, before, dirs_exist_ok=True)
        seen = attempt(recipe, **options)[2]
    if begin == "resumed":
        saved = next(i for i, s in enumerate(seen, 1) if re.match("re.* .*/partial$", s))
        shutil.rmtree(runs)
        assert attempt(recipe, saved + 1, "kill", until="sft")[0] == KILLED
        shutil.copytree(runs, before, dirs_exist_ok=True)
        seen = attempt(recipe, until="sft")[2]
    total = STEPS * {"new": 2, "resumed": 1, "fresh": 1}[begin]

    tried, wrong = 0, []
    for at in range(1, len(seen) + 1, every):
        for fault in FAULTS if every == 1 else [sorted(FAULTS)[at % len(FAULTS)]]:
            shutil.rmtree(runs)
            shutil.copytree(before, runs)
            steps.write_text("")
            tried += 1
            try:
                code, line, _ = attempt(recipe, at, fault, **options)
                assert code == KILLED if fault == "kill" else code in (0, 1), line
                assert code != 1 or (FAULT_WORDS[fault] in line and "\n" not in line), line
                no_part_is_taken_for_a_whole(runs, whole)
                if begin == "fresh" and tried % 2:  # what was whole is so, or another is
                    steps.write_text("")
                    assert attempt(recipe, until="sft")[:2] == (0, "")
                    assert steps.read_text() == ""
                else:
                    assert attempt(recipe, **options)[:2] == (0, "")
                    again = total if code == 0 and begin == "fresh" else 1  # of another pass
                    assert len(steps.read_text().splitlines()) <= total + again
                    assert [*runs.rglob("checkpoint-*"), *runs.rglob(".*.old")] == []
                assert outputs(runs) == whole
            except AssertionError as error:
                wrong.append(f"{fault} at {at}, {seen[at - 1]}: {error}")
    record_property("cases", f"{tried - len(wrong)} of {tried}")
    assert not wrong, "\n".join(wrong)
