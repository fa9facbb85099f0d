"""SIGKILL at any moment: the same command again ends with the bytes of a run in one piece."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.tiny import OTHERS

pytestmark = pytest.mark.train

LONGER = {
    "[sft]\nmax_steps = 4": "[sft]\nmax_steps = 20",
    "[reward]\nmax_steps = 6": "[reward]\nmax_steps = 20",
    "total_episodes = 32": "total_episodes = 320",
}
LONG_ENOUGH = {"total_episodes = 32": "total_episodes = 64"}  # PPO dies at two of four updates


SAMPLED = """
[sample]
answers = 8
prompts = 24

[label]
minimum = 1
minimum_test = 0
"""
ALL = '"sft", "sample", "label", "reward", "ppo", "kto", "rloo", "grpo"'


@pytest.mark.parametrize("points", [2, pytest.param(20, marks=pytest.mark.torture)])
def test_a_killed_run_ends_with_the_same_bytes(
    tiny_recipe: Path, tmp_path: Path, points: int, record_property: Callable
) -> None:
    text, chain = tiny_recipe.read_text() + SAMPLED, '"sft", "reward", "ppo"'
    for short, long in (LONGER if points == 20 else LONG_ENOUGH).items():
        assert short in text
        text = text.replace(short, long)
    if points == 20:
        text = text.replace(chain, ALL) + OTHERS
        text = text.replace("max_steps = 40", "max_steps = 48")  # 12 updates: 13 steps to die at
    text = text.replace(chain, '"sft", "sample", "label", "reward", "ppo"')
    tiny_recipe.write_text(text)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.helpers.killing",
            tiny_recipe,
            tmp_path / "killed",
            str(points),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    killed = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [line for line in killed if line["differs"]]
    record_property("cases", f"{len(killed) - len(wrong)} of {len(killed)}")
    counts = Counter(line["stage"] for line in killed)
    assert len(killed) >= (135 if points == 20 else 12)
    assert counts["sample"] >= (10 if points == 20 else 2) and counts["label"]
    assert wrong == []
