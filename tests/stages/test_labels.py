"""Rankings, ratings and labels train a reward model: what the loss is, and what is learned."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes import stats
from rlhf_recipes.data.rows import Example
from rlhf_recipes.errors import GateError
from rlhf_recipes.models.reward_model import open_reward, read_unit
from rlhf_recipes.models.sampling import score_ids
from rlhf_recipes.recipe.load import load_recipe
from tests.helpers.chains import Chain
from tests.helpers.tiny import WORDS

pytestmark = pytest.mark.train

# One step that hardly moves anything, over all rows at once: its loss is that of the saved model.
STILL = ["reward.max_steps=1", "reward.learning_rate=1e-12", "reward.head_learning_rate=1e-12"]
STILL += ["dataset.judge_fraction=0", "reward.center_rewards_coefficient=0.0"]
STILL += ["dataset.test_fraction=0", "dataset.validation_fraction=0"]

Rows = list[dict[str, Any]]


def at_once(rows: int) -> list[str]:
    """STILL, with a batch of exactly so many rows: a batch that is not full has some twice."""
    return [*STILL, f"reward.per_device_train_batch_size={rows}"]


@pytest.fixture
def chain_of(tiny_recipe: Path, tmp_path: Path) -> Callable[..., Chain]:
    def make(rows: Rows, *words: str) -> Chain:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = load_recipe(tiny_recipe, set=[f"dataset.path={file}", *words])
        return Chain(recipe, tmp_path / "stages")

    return make


def rated() -> Rows:
    """Of each four words the last is best; two rows hold three answers, one a tie."""
    rows = [
        {"prompt": word, "responses": WORDS[at : at + 4], "scores": [1, 2, 4, 8]}
        for at, word in enumerate(WORDS[:6])
    ]
    rows[1] |= {"responses": WORDS[:3], "scores": [5, 5, 1]}
    return rows


def scorer(chain: Chain) -> Callable[[str, str], float]:
    """Of a prompt and an answer, the raw score of the reward stage's model."""
    tokens = chain.session.tokens
    reward = open_reward(chain.session.base, chain.outputs["reward"])
    mean, std = read_unit(chain.outputs["reward"])

    def score(prompt: str, answer: str) -> float:
        from rlhf_recipes.data.tokens import encode

        ids = encode(tokens, [{"role": "user", "content": prompt}], answer)
        return score_ids(reward, [ids], tokens.pad_id, 1).item() * std + mean

    return score


def nll(logit: float) -> float:
    return math.log1p(math.exp(-logit))


def pairs_of(row: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Better, worse and how many ranks are between, by another way than the product's."""
    ranked = sorted(set(row["scores"]))
    both = zip(row["responses"], row["scores"], strict=True)
    for (a, high), (b, low) in combinations(sorted(both, key=lambda one: -one[1]), 2):
        if high > low:
            yield a, b, ranked.index(high) - ranked.index(low)


@pytest.mark.parametrize("margin", [False, True])
def test_the_loss_weighs_each_pair_by_its_row_and_heeds_the_rank_distance(
    chain_of: Callable[..., Chain], margin: bool
) -> None:
    """By hand: 5 rows of six pairs that weigh 1/6, and one of two that weigh 1/3."""
    chain = chain_of(rated(), *at_once(32), f"reward.use_margin={str(margin).lower()}")
    metrics = chain.run("reward", {}).metrics
    score, losses, weights = scorer(chain), [], []
    for row in rated():
        n = len(row["responses"])
        for a, b, ranks in pairs_of(row):
            apart = score(row["prompt"], a) - score(row["prompt"], b)
            losses.append(nll(apart - margin * ranks))
            weights.append(2 / (n * (n - 1)))
    assert metrics["pairs"] == len(losses) == 32
    assert sorted(set(weights)) == [1 / 6, 1 / 3]
    expected = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    plain = sum(losses) / len(losses)
    assert metrics["train_loss"] == pytest.approx(expected, abs=2e-5)
    assert abs(plain - expected) > 1e-3


@pytest.mark.parametrize("margin", [False, True])
def test_a_pair_s_own_margin_is_heeded_where_the_recipe_says_so(
    chain_of: Callable[..., Chain], margin: bool
) -> None:
    rows = [
        {
            "prompt": word,
            "chosen": "blue",
            "rejected": "cat",
            "score_chosen": at,
            "score_rejected": 1,
        }
        for at, word in enumerate(WORDS[:6])
    ]
    chain = chain_of(rows, *at_once(6), f"reward.use_margin={str(margin).lower()}")
    loss = chain.run("reward", {}).metrics["train_loss"]
    score = scorer(chain)
    apart = [score(word, "blue") - score(word, "cat") for word in WORDS[:6]]
    expected = sum(nll(d - margin * (at - 1)) for at, d in enumerate(apart)) / 6
    assert loss == pytest.approx(expected, abs=2e-5)


def test_a_reward_s_unit_is_measured_without_dropout(chain_of: Callable[..., Chain]) -> None:
    rows = [{"prompt": word, "chosen": "blue", "rejected": "cat"} for word in WORDS[:6]]
    learns = ["reward.max_steps=4", "reward.learning_rate=1e-2", "lora.lora_dropout=0.6"]
    chain = chain_of(rows, *at_once(6), *learns)
    metrics, score = chain.run("reward", {}).metrics, scorer(chain)
    by_hand = [score(word, "blue") for word in WORDS[:6]]
    assert metrics["unit_mean"] == pytest.approx(sum(by_hand) / 6, abs=1e-5)


def test_a_margin_that_no_row_has_is_told(chain_of: Callable[..., Chain]) -> None:
    rows = [{"prompt": word, "chosen": "blue", "rejected": "cat"} for word in WORDS]
    chain = chain_of(rows, *at_once(len(rows)), "reward.use_margin=true")
    chain.run("reward", {})
    assert any("use_margin is set, and no pair has a margin" in n for n in chain.progress.notes)


def test_a_single_answer_is_held_against_a_threshold_beside_pairs(
    chain_of: Callable[..., Chain],
) -> None:
    """By hand: the threshold begins at the good answers' log-odds, and is in no score."""
    said = [("red", "blue", True), ("gold", "cat", False), ("pink", "blue", False)]
    said += [("black", "pig owl", False)]
    rows: Rows = [{"prompt": p, "completion": answer, "label": good} for p, answer, good in said]
    rows += [{"prompt": "grey", "chosen": "blue", "rejected": "cat"}]
    chain = chain_of(rows, *at_once(5))
    metrics = chain.run("reward", {}).metrics
    assert [metrics[key] for key in ("pairs", "good", "bad")] == [1, 1, 3]
    score, bias = scorer(chain), math.log(1 / 3)
    losses = [nll((score(p, answer) + bias) * (1 if good else -1)) for p, answer, good in said]
    losses.append(nll(score("grey", "blue") - score("grey", "cat")))
    assert metrics["train_loss"] == pytest.approx(sum(losses) / 5, abs=2e-5)


# ---- what is learned


def thumbs(pairs: Path, good: Callable[[int], bool] = lambda at: at % 2 == 0) -> Rows:
    """One labelled answer a prompt."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    return [
        {
            "prompt": row["prompt"],
            "completion": row["chosen" if good(at) else "rejected"],
            "label": good(at),
        }
        for at, row in enumerate(rows)
    ]


LEARNS = ["reward.max_steps=30", "ppo.total_episodes=16", "evaluation.prompts=8"]


def test_labels_alone_run_the_whole_chain(chain_of: Callable[..., Chain], tiny_pairs: Path) -> None:
    """Every part that reads a reward model works with labels: unit, floor, gate, judge."""
    chain = chain_of(thumbs(tiny_pairs), *LEARNS)
    results = {name: r.metrics for name, r in chain.all().items()}
    reward, data = results["reward"], chain.session.data(chain.recipe.dataset)
    learned = data.learned("feedback")
    assert reward["pairs"] == 0 and reward["good"] + reward["bad"] == len(learned) > 20
    assert (reward["test_good"], reward["test_bad"]) == (len(data.test), len(data.bad.test))
    assert reward["test_pairs"] == min(len(data.test), len(data.bad.test))
    assert reward["accuracy"] > 0.8
    assert results["ppo"]["updates"] == 1 and math.isfinite(reward["unit_floor"])
    model = open_reward(chain.session.base, chain.outputs["reward"])

    def scores(rows: list[Example]) -> list[float]:
        both = [(e.prompt_ids, e.chosen_ids or e.rejected_ids or []) for e in rows]
        return score_ids(model, both, 0, 4).tolist()

    good, bad = scores(data.test), scores(data.bad.test)
    right = [(g > b) + 0.5 * (g == b) for g in good for b in bad]
    assert reward["accuracy"] == pytest.approx(sum(right) / len(right))
    of_good = scores([e for e in learned if e.chosen_ids])  # the unit is theirs
    assert sum(of_good) / len(of_good) == pytest.approx(0, abs=1e-4)
    found = json.loads((chain.outputs["reward"] / stats.FILE).read_text())
    assert found["pairs"] == len(right) and found["metrics"]["test_good"] == len(good)
    judge = chain_of(thumbs(tiny_pairs), "evaluation.judge=independent").run("judge", {}).metrics
    assert judge["good"] + judge["bad"] == len(data.learned("judge_feedback")) < len(learned)


def test_a_reward_model_that_learned_nothing_from_labels_meets_the_gate(
    chain_of: Callable[..., Chain], tiny_pairs: Path
) -> None:
    words = ["reward.max_steps=1", "reward.learning_rate=1e-9", "ppo.minimum_accuracy=0.999"]
    chain = chain_of(thumbs(tiny_pairs), *words, "dataset.test_fraction=0.6")
    chain.run("sft", {})
    chain.run("reward", {"policy": "sft"})
    with pytest.raises(GateError, match=r"% of \d+ good and \d+ bad test answers right"):
        chain.run("ppo", {"policy": "sft", "reward_model": "reward"})


def test_labels_of_smoke_s_answers_rank_the_good_over_the_bad(tmp_path: Path) -> None:
    """One labelled answer a prompt. Pairs get 97 %, as such labels do (see the README's notes)."""
    recipe = Path(__file__).parents[2] / "recipes" / "smoke.toml"
    file = tmp_path / "thumbs.jsonl"
    rows = thumbs(recipe.parent / "smoke" / "pairs.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"dataset.path={file}", "reward.per_device_train_batch_size=32"]
    words += ["reward.max_steps=80", "evaluation.judge=none"]
    words += [f"reward.{key}_strategy=no" for key in ("eval", "save")]
    chain = Chain(load_recipe(recipe, set=words), tmp_path / "stages")
    metrics = chain.run("reward", {}).metrics
    assert metrics["accuracy"] > 0.9 and metrics["test_bad"] > 80
