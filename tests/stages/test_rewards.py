"""PPO, the evaluation and best-of-n on a list of rewards: rules alone, or with a reward model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_recipes.errors import StageError
from rlhf_recipes.models.reward_model import read_floor
from rlhf_recipes.recipe.load import load_recipe
from tests.helpers.chains import Chain
from tests.helpers.tiny import OTHERS, RECIPE, WORDS

pytestmark = pytest.mark.train

REWARDS = "objective/rewards/"
RED = 'ppo.rewards=[{ rule = "contains", text = "red" }]'
BOTH = 'ppo.rewards=["reward", { rule = "words", at_most = 2, weight = 0.5 }]'


@pytest.fixture
def chain_of(trained: SimpleNamespace, tmp_path: Path) -> Callable[..., Chain]:
    def made(*changes: str, recipe: Path = trained.recipe, name: str = "stages") -> Chain:
        loaded = load_recipe(recipe, set=changes)
        return Chain(loaded, tmp_path / name, outputs=dict(trained.outputs))

    return made


BESIDE = {"policy": "sft", "reward_model": "reward"}


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- rules alone --------------------------------------------------------------------------------


def test_ppo_learns_a_rule_without_a_reward_model(chain_of: Callable[..., Chain]) -> None:
    """To say "red": of the first three updates' answers a third do, of the last three's most."""
    changes = ['stages=["sft", "ppo"]', RED, "ppo.total_episodes=320", "ppo.kl_coef=0.01"]
    chain = chain_of(*changes)
    result = chain.run("ppo", {"policy": "sft"})
    said = [update[f"{REWARDS}contains"] for update in chain.progress.updates]
    assert len(said) == 20
    assert fmean(said[:3]) < 0.5 < fmean(said[:3]) + 0.3 < fmean(said[-3:])
    assert "minimum_accuracy" not in result.metrics  # there is nothing to hold it against
    assert "rules alone: a cut-off answer keeps its score, less the penalty" in chain.progress.notes
    for update in chain.progress.updates:  # a cut-off answer costs a unit, and has no floor
        cut = 1 - update["val/ended"]
        assert update["objective/scores"] == pytest.approx(update[f"{REWARDS}contains"] - cut)

    metrics = chain.run("evaluation", {"policy:sft": "sft", "policy:ppo": "ppo"}).metrics
    rows = lines(chain.outputs["evaluation"] / "answers.jsonl")
    for row in rows:
        by_hand = {name: float("red" in answer) for name, answer in row["answers"].items()}
        assert row["scores"] == row["reward.contains"] == by_hand
    gains = [row["scores"]["ppo"] - row["scores"]["sft"] for row in rows]
    assert metrics["ppo.score_gain"] == metrics["ppo.reward.contains_gain"] == fmean(gains)
    assert metrics["ppo.reward.contains_score"] == fmean(row["scores"]["ppo"] for row in rows)


def test_the_best_of_n_is_chosen_by_rules(chain_of: Callable[..., Chain]) -> None:
    rewards = (
        '[{ rule = "contains", text = "red" }, { rule = "words", at_most = 2, weight = -0.5 }]'
    )
    changes = ['stages=["sft", "ppo"]', f"ppo.rewards={rewards}", "evaluation.best_of=4"]
    changes += ['evaluation.judge={ rule = "contains", text = "red" }']
    chain = chain_of(*changes)
    result = chain.run("best_of", {"policy": "sft"})
    rows = lines(chain.outputs["best_of"] / "answers.jsonl")
    gains = []
    for row in rows:
        red = [float("red" in answer) for answer in row["answers"]]
        words = [max(0.0, min(1.0, 2 - len(a.split()) / 2)) for a in row["answers"]]
        assert row["judged"] == row["reward.contains"] == red and row["reward.words"] == words
        sums = [r - w / 2 for r, w in zip(red, words, strict=True)]
        assert row["scores"] == pytest.approx(sums)
        paid = [s - (not ended) for s, ended in zip(sums, row["ended"], strict=True)]
        best = [r for r, p in zip(red, paid, strict=True) if p == max(paid)]
        gains.append(fmean(best) - fmean(red))
    assert result.metrics["best_of.4.judge_gain"] == pytest.approx(fmean(gains))
    assert result.metrics["best_of.4.reward.contains_gain"] == pytest.approx(fmean(gains))


# ---- beside a reward model ----------------------------------------------------------------------


def test_each_reward_is_told_apart_and_their_sum_is_trained_on(
    chain_of: Callable[..., Chain], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a floor, which is the reward model's own, the sum can be told from the means."""
    chain = chain_of(BOTH)
    chain.run("ppo", BESIDE)
    floored = chain.progress.updates[0]
    chain.progress.updates.clear()
    monkeypatch.setattr("rlhf_recipes.stages.ppo.stage.read_floor", lambda _: math.inf)
    free = chain_of(BOTH, name="free")
    free.run("ppo", BESIDE)
    for update in free.progress.updates:
        whole = update[f"{REWARDS}reward"] + update[f"{REWARDS}words"] / 2
        cut = 1 - update["val/ended"]
        assert update["objective/scores"] == pytest.approx(whole - cut, abs=1e-5)
    first = free.progress.updates[0]
    assert [floored[f"{REWARDS}{n}"] for n in ("reward", "words")] == [
        first[f"{REWARDS}{n}"] for n in ("reward", "words")
    ]
    assert floored["objective/scores"] < first["objective/scores"]

    inputs = {"policy:sft": "sft", "policy:ppo": "ppo", "reward_model": "reward"}
    metrics = chain.run("evaluation", inputs).metrics
    parts = [metrics[f"ppo.reward.{name}_score"] for name in ("reward", "words")]
    assert metrics["ppo.score"] == pytest.approx(parts[0] + parts[1] / 2)
    assert metrics["ppo.reward.words_gain_low"] <= metrics["ppo.reward.words_gain"]
    assert "ppo.reward.words_win_rate" not in metrics


def test_a_list_of_one_model_is_that_model(chain_of: Callable[..., Chain]) -> None:
    chain = chain_of()
    wanted = chain.run("ppo", BESIDE)
    other = chain_of('ppo.rewards=["reward"]', name="other")
    assert other.run("ppo", BESIDE) == wanted


def test_half_of_a_reward_model_has_half_of_its_floor(chain_of: Callable[..., Chain]) -> None:
    chain = chain_of()
    changes = ['ppo.rewards=[{ model = "reward", weight = 0.5 }]', "evaluation.best_of=4"]
    half = chain_of(*changes, "ppo.missing_eos_penalty=1.5", name="half")
    half.run("best_of", BESIDE)
    floor, rows = (
        read_floor(chain.outputs["reward"]),
        lines(half.outputs["best_of"] / "answers.jsonl"),
    )
    curve = json.loads((half.outputs["best_of"] / "best_of.json").read_text())
    gains = []
    for row in rows:
        own = row["reward.reward"]
        assert row["scores"] == pytest.approx([score / 2 for score in own])
        both = zip(own, row["ended"], strict=True)
        paid = [s / 2 if ended else min(s, floor) / 2 - 1.5 for s, ended in both]
        top = [s for s, p in zip(own, paid, strict=True) if p == pytest.approx(max(paid))]
        gains.append(fmean(top) / 2 - fmean(own) / 2)
    assert curve["score_gain"][-1] == pytest.approx(fmean(gains), abs=1e-6)


# ---- rows and their columns ---------------------------------------------------------------------


@pytest.fixture
def keyed(tiny_model: Path, tmp_path: Path) -> Path:
    """Each prompt twice, with a word of its own each time, in a column that no shape reads."""
    rows = [
        {"prompt": f"{a} {b}", "completion": a, "gold": word, "other": "cat"}
        for a in WORDS
        for b in WORDS[:5]
        for word in ("red", "dog")
    ]
    data = tmp_path / "keyed.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = RECIPE.format(model=tiny_model, data=data)
    file = tmp_path / "keyed.toml"
    file.write_text(text.replace('"sft", "reward", "ppo"', '"sft", "ppo"'))
    return file


def seen_by_a_function(folder: Path, kind: str) -> tuple[str, Path]:
    """Rewards of a stage: a rule, and a function that notes what it is shown in a file."""
    log = folder / "seen.jsonl"
    code = "import json\ndef seen(prompt, answer, row):\n    with open(%r, 'a') as out:\n"
    code += "        out.write(json.dumps([prompt, answer, row]) + '\\n')\n    return 0.0\n"
    (folder / "seen.py").write_text(code % str(log))
    seen = '{ python = "./seen.py:seen", column = "gold" }'
    return f'{kind}.rewards=[{{ rule = "contains", column = "gold" }}, {seen}]', log


def scored_by_hand(log: Path, chain: Chain) -> list[list[Any]]:
    """Each update's prompts, answers and rows, whose mean is what was told of that update."""
    said = lines(log)
    updates = [said[start : start + 16] for start in range(0, len(said), 16)]
    for update, told in zip(updates, chain.progress.updates, strict=True):
        by_hand = fmean(float(row["gold"] in answer) for _, answer, row in update)
        assert told[f"{REWARDS}contains"] == pytest.approx(by_hand)
    assert all(row.keys() == {"gold"} for update in updates for *_, row in update)
    return updates


def test_a_rule_sees_the_columns_of_its_own_row(
    keyed: Path, tmp_path: Path, chain_of: Callable[..., Chain]
) -> None:
    """And only those that are named; prompts that differ in them alone are two prompts."""
    rewards, log = seen_by_a_function(tmp_path, "ppo")
    changes = [rewards, "ppo.total_episodes=160", "ppo.eval_strategy=no", "ppo.keep=last"]
    chain = chain_of(*changes, recipe=keyed)
    chain.run("ppo", {"policy": "sft"})
    data = chain.session.data(chain.recipe.dataset)
    prompts = data.learned("prompts", ["gold"])
    assert len(prompts) == 2 * len(data.learned("prompts")) == len(data.train)
    assert all(example.row == {"gold": example.row["gold"]} for example in prompts)
    updates = scored_by_hand(log, chain)
    drawn = {(prompt, row["gold"]) for update in updates for prompt, _, row in update}
    assert len(updates) == 10
    assert len(drawn) == len(prompts)  # each of them was drawn, none twice in an epoch
    assert not any("gold" in note for note in chain.progress.notes)  # not "not used"
    assert "rows: columns that are not used: other" in chain.progress.notes


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_a_group_has_the_columns_of_one_row(
    keyed: Path, tmp_path: Path, chain_of: Callable[..., Chain], kind: str
) -> None:
    keyed.write_text(keyed.read_text().replace('"sft", "ppo"', f'"sft", "{kind}"') + OTHERS)
    rewards, log = seen_by_a_function(tmp_path, kind)
    changes = [f"{kind}.{key}" for key in ("max_steps=8", 'eval_strategy="no"', 'keep="last"')]
    chain = chain_of(rewards, *changes, recipe=keyed)
    result = chain.run(kind, {"policy": "sft"})
    updates = scored_by_hand(log, chain)
    assert len(updates) == result.metrics["updates"] > 1
    for update in updates:
        groups = [update[start : start + 4] for start in range(0, 16, 4)]
        assert all(len({(prompt, row["gold"]) for prompt, _, row in one}) == 1 for one in groups)
        assert len({prompt for prompt, *_ in update}) > 1


def test_a_row_that_no_reward_speaks_of_is_named(
    keyed: Path, tmp_path: Path, chain_of: Callable[..., Chain]
) -> None:
    """One that some speak of is scored by those."""
    number = '{ rule = "number", column = "gold" }'
    chain = chain_of(f"ppo.rewards=[{number}]", recipe=keyed)
    with pytest.raises(
        StageError, match=r"\(number\) can judge .* prompt '\w+ \w+': it has gold = "
    ):
        chain.run("ppo", {"policy": "sft"})
    with_ended = f'ppo.rewards=[{number}, {{ rule = "ended" }}]'
    other = chain_of(with_ended, recipe=keyed, name="other")
    other.run("ppo", {"policy": "sft"})
    assert f"{REWARDS}number" not in other.progress.updates[0]
    assert 0 < other.progress.updates[0][f"{REWARDS}ended"] < 1


def test_a_column_that_no_row_has_ends_the_stage_before_it_starts(
    keyed: Path, tmp_path: Path, chain_of: Callable[..., Chain]
) -> None:
    chain = chain_of('ppo.rewards=[{ rule = "contains", column = "golden" }]', recipe=keyed)
    what = 'ppo: no row has the column "golden" (did you mean "gold"?), which a rule names; there '
    with pytest.raises(StageError) as caught:
        chain.run("ppo", {"policy": "sft"})
    assert str(caught.value).startswith(what + "are completion, gold, other, prompt")


# ---- bounds -------------------------------------------------------------------------------------


def test_answers_over_a_bound_are_counted_in_the_results(
    chain_of: Callable[..., Chain], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_recipes.stages.rewards.rule.LARGEST", 12)
    rewards = 'ppo.rewards=[{ rule = "ended" }, { rule = "json" }]'
    chain = chain_of('stages=["sft", "ppo"]', rewards)
    result = chain.run("ppo", {"policy": "sft"})
    count = result.metrics["ppo.over.json"]
    assert 0 < count < 32 + 2 * 13
    assert f"json: {count} answers over 0 KiB got 0" in chain.progress.notes
    assert "ppo.over.ended" not in result.metrics
