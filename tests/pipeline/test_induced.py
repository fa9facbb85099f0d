"""Chains that were made to fail, each in one way, by real training: what the verdict says."""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_recipes.errors import GateError
from rlhf_recipes.findings import Finding
from rlhf_recipes.pipeline.runner import run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.report.facts import Facts
from rlhf_recipes.report.verdict import verdict
from tests.helpers.tiny import RECIPE, WORDS

pytestmark = pytest.mark.train

Made = Callable[..., list[Finding]]
RULE = """
def likes_animals(prompt, answer):
    return sum(word in {!r} for word in answer.split())

def likes_colours(prompt, answer):
    return len(answer.split()) - likes_animals(prompt, answer)
"""


@pytest.fixture(autouse=True)
def quick(stages_alone: None) -> None: ...


@pytest.fixture(scope="module")
def made(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Runs the tiny chain with changes, on pairs that say something or not: its verdict."""
    folder = tmp_path_factory.mktemp("induced")
    (folder / "rule.py").write_text(RULE.format(WORDS[8:]))
    draw = random.Random(0)

    def words(count: int, of: list[str]) -> str:
        return " ".join(draw.sample(of, count))

    def pairs(name: str) -> Path:
        file = folder / f"{name}.jsonl"
        rows = []
        for first in WORDS:
            for second in WORDS:
                for third in WORDS[:2]:
                    short, long = words(2, WORDS), words(3, WORDS)
                    if name == "colours":
                        some = draw.choice((1, 1, 2, 3)), draw.choice((2, 3))
                        short, long = words(some[0], WORDS[8:]), words(some[1], WORDS[:8])
                    if name == "noise" and draw.random() < 0.5:
                        short, long = long, short
                    if name == "length" and draw.random() < 0.2:
                        short, long = long, short
                    row = {"prompt": f"{first} {second} {third}", "chosen": long}
                    rows.append(row | {"rejected": short})
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    files = {name: pairs(name) for name in ("colours", "noise", "length")}
    for name, count in (("shown", 3), ("long", 6)):  # SFT learns answers of both kinds
        rows = [{"prompt": words(4, WORDS), "completion": words(count, WORDS)} for _ in range(400)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def go(*changes: str, data: str = "colours") -> list[Finding]:
        recipe = folder / f"{data}.toml"
        text = RECIPE.format(model=tiny_model, data=files[data])
        recipe.write_text(text.replace("test_fraction = 0.2", "test_fraction = 0.35"))
        always = ["sft.max_steps=40", "sft.dataset.path=./shown.jsonl", "reward.max_steps=40"]
        always += ["evaluation.prompts=64", "ppo.total_episodes=320"]
        loaded = load_recipe(recipe, set=[*always, *changes])
        name = f"{data}-{len(list(folder.glob('runs/*')))}"
        with contextlib.suppress(GateError):
            run(loaded, runs=folder / "runs", name=name)
        return verdict(Facts(folder / "runs" / name))

    return go


# What went wrong: the changes, the pairs, and what the first finding is and says.
FAILED: dict[str, tuple[list[str], str, tuple[str, str], str]] = {
    "SFT that learned nothing, and answers that never end": (
        ['stages=["sft"]', "sft.learning_rate=1e-9"], "colours",
        ("fault", "sft"), "it learned next to nothing.",
    ),
    "a reward model that learned nothing": (
        [], "noise", ("fault", "reward"), "that is chance. Nor did it learn its training pairs",
    ),
    "reward that follows length": (
        ['stages=["reward"]'], "length", ("fault", "reward"), "it learned length. Look there",
    ),
    "KL blow-up": (
        ["ppo.kl_coef=0", "ppo.learning_rate=0.05", "ppo.guard.max_kl=2"], "colours",
        ("fault", "ppo"), "nats an answer away from SFT, over 3:",
    ),
    "collapse": (
        ["ppo.kl_coef=0", "ppo.learning_rate=0.1", "ppo.guard.max_kl=1000",
         "ppo.guard.min_entropy=0"],
        "colours", ("fault", "ppo"), "became alike|one answer|shrank to|repeat|most are cut off",
    ),
    "a policy that fooled its reward model": (
        ["evaluation.judge=python:./rule.py:likes_animals"], "colours",
        ("fault", "reward"), "by the rule `rule.py:likes_animals`: it learned to please its reward",
    ),
    "too few prompts": (
        ["evaluation.prompts=8"], "colours",
        ("doubt", "evaluation"), "of 8 prompts",
    ),
    "nothing": (
        ["evaluation.judge=python:./rule.py:likes_colours"], "colours",
        ("success", "ppo"), "PPO beat SFT on .* by the rule `rule.py:likes_colours`",
    ),
}  # fmt: skip


# Into what a policy collapses hangs on the machine's rounding, and whether it does within so few
# updates on the seed: one of several has to.
SEEDS = {"collapse": (7, 1, 2, 3, 4)}


@pytest.mark.parametrize("what", FAILED)
def test_what_went_wrong_comes_first(made: Made, what: str) -> None:
    changes, data, said, words = FAILED[what]
    for seed in SEEDS.get(what, (7,)):
        first, *others = made(*changes, f"seed={seed}", data=data)
        if (first.level, first.about) == said and re.search(words, first.text):
            break
    assert (first.level, first.about) == said, first
    assert re.search(words, first.text), first
    if "never end" in what:
        assert "of SFT's answers end within their tokens: most are cut off." in others[0].text
        assert (others[0].level, others[0].about) == ("fault", "sft")
    if what == "a reward model that learned nothing":
        assert [one.about for one in others if one.level == "fault"] == ["ppo"]  # the gate
        assert (
            "The run ended early, 2 of 4 stages are done: stage ppo: the reward" in others[0].text
        )
