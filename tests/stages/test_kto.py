"""KTO on a tiny model: who is good and bad, what it starts from, what moves, what is counted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_recipes.data.rows import Example, labelled
from rlhf_recipes.pipeline import runner
from rlhf_recipes.pipeline.plan import plan_run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages.kto import Collator, even
from tests.helpers.chains import Chain, adapter, base_weights, differs
from tests.helpers.roles import logp

pytestmark = pytest.mark.train

KTO = """
[kto]
max_steps = 10
per_device_train_batch_size = 8
learning_rate = 2e-2
logging_steps = 1
"""


@pytest.fixture
def kto_recipe(tiny_recipe: Path) -> Path:
    text = tiny_recipe.read_text().replace('["sft", "reward", "ppo"]', '["sft", "kto"]')
    tiny_recipe.write_text(text + KTO)
    return tiny_recipe


@pytest.fixture
def thumbs(kto_recipe: Path, tiny_pairs: Path) -> Path:
    """One answer a prompt, every third of them good."""
    rows = [json.loads(line) for line in tiny_pairs.read_text().splitlines()]
    lines = [
        {"prompt": row["prompt"], "label": "up", "completion": row["chosen"]}
        if number % 3 == 0
        else {"prompt": row["prompt"], "label": "down", "completion": row["rejected"]}
        for number, row in enumerate(rows)
    ]
    file = kto_recipe.parent / "thumbs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    kto_recipe.write_text(kto_recipe.read_text().replace(str(tiny_pairs), str(file)))
    return kto_recipe


def test_an_answer_that_is_called_bad_is_learned_by_kto_alone(thumbs: Path, tmp_path: Path) -> None:
    chain = Chain(load_recipe(thumbs), tmp_path / "stages")
    data = chain.session.data(chain.recipe.dataset)
    assert data.dropped == {"an answer that its label calls bad": 64}
    assert all(e.rejected_ids is None for e in (*data.train, *data.validation, *data.test))
    assert all(e.chosen_ids is None and e.rejected_ids for e in data.bad.train)
    learned = data.learned("labels")
    assert len(learned) == len(data.reward_train) + len(data.bad.reward_train) > 50
    assert len(data.learned("answers")) == len(data.reward_train)  # the judge's are kept from SFT
    result = chain.run("kto", {})
    good = sum(e.chosen_ids is not None for e in learned)
    assert (result.metrics["good"], result.metrics["bad"]) == (good, len(learned) - good)


def test_a_pair_is_one_good_and_one_bad_answer() -> None:
    pair, bad = Example("q", [1], [2], [3]), Example("q", [1], None, [4])
    demonstration, prompt = Example("q", [1], [5], None), Example("q", [1], None, None)
    assert labelled([pair, bad, demonstration, prompt]) == [
        replace(pair, rejected_ids=None),
        demonstration,
        replace(pair, chosen_ids=None),
        bad,
    ]


@pytest.mark.parametrize("change", ["lora.r=4", "model.quantization=4bit"])
def test_it_starts_as_the_reference_and_tells_good_from_bad_more_and_more(
    thumbs: Path, tmp_path: Path, change: str
) -> None:
    chain = Chain(load_recipe(thumbs, set=[change]), tmp_path / "stages")
    chain.run("sft", {})
    chain.progress.updates.clear()
    weights = "2.2"  # of good answers: a third of all
    result = chain.run("kto", {"policy": "sft"})
    steps = chain.progress.updates
    assert len(steps) == 10 and any(weights[:2] in note for note in chain.progress.notes)
    assert steps[0]["margin"] == 0.0 and steps[0]["KL"] == 0.0
    assert steps[-1]["margin"] > 0.1
    assert result.metrics["validation_margin"] > 0.1


def test_only_its_own_adapter_moves_and_none_is_left(thumbs: Path, tmp_path: Path) -> None:
    chain = Chain(load_recipe(thumbs), tmp_path / "stages")
    base = base_weights(chain.session.base)
    chain.run("sft", {})
    chain.run("kto", {"policy": "sft"})
    assert not differs(base, base_weights(chain.session.base))
    assert len(differs(adapter(chain.outputs["sft"]), adapter(chain.outputs["kto"]))) == 28
    assert [n for n, _ in chain.session.base.lm.named_parameters() if "lora_" in n] == []


def test_its_loss_is_that_of_the_saved_policy_against_the_one_it_started_from(
    thumbs: Path, tmp_path: Path
) -> None:
    """By hand, one unpadded answer at a time; without the KL, which hangs on who shares a batch."""
    words = ["kto.loss_type=apo_zero_unpaired", "kto.desirable_weight=1", "kto.beta=0.2"]
    chain = Chain(load_recipe(thumbs, set=words), tmp_path / "stages")
    chain.run("sft", {})
    metrics = chain.run("kto", {"policy": "sft"}).metrics
    policy, start = (
        chain.session.base.open(stage, chain.outputs[stage], seed=0) for stage in ("kto", "sft")
    )
    data, losses = chain.session.data(chain.recipe.dataset), []
    for e in labelled(data.judged("validation")):
        answer = e.chosen_ids or e.rejected_ids or []
        ratio = logp(policy, e.prompt_ids, answer) - logp(start, e.prompt_ids, answer)
        sign = 1 if e.chosen_ids else -1
        losses.append(1 - 1 / (1 + math.exp(-0.2 * sign * ratio)))
    assert metrics["validation_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)


def test_each_prompt_is_paired_with_the_answer_of_the_row_before() -> None:
    rows = [
        {"prompt_ids": [1], "completion_ids": [10 + n] * (n + 1), "label": n % 2 == 0}
        for n in range(3)
    ]
    batch = Collator(pad_token_id=0)(rows)
    assert batch["KL_input_ids"].tolist() == [[1, 12, 12, 12], [1, 10, 0, 0], [1, 11, 11, 0]]
    assert batch["KL_completion_mask"].sum(1).tolist() == [3, 1, 2]
    assert batch["input_ids"][:, 1].tolist() == [10, 11, 12]


@pytest.mark.parametrize(
    ("good", "bad", "weights"),
    [(30, 60, (2.0, 1.0)), (90, 10, (1.0, 9.0)), (5, 5, (1.0, 1.0)), (5, 0, (1.0, 1.0))],
)
def test_the_rarer_kind_weighs_more(good: int, bad: int, weights: tuple[float, float]) -> None:
    assert even(good, bad) == weights


def test_the_micro_batch_and_the_judge_s_share_are_part_of_its_key(
    kto_recipe: Path, tmp_path: Path
) -> None:
    def keys(*words: str) -> list[str]:
        return [s.key for s in plan_run(load_recipe(kto_recipe, set=words), tmp_path).stages]

    usual = keys()
    micro = keys("kto.per_device_train_batch_size=4", "kto.gradient_accumulation_steps=2")
    judged = keys("dataset.judge_fraction=0.4")
    assert micro[0] == usual[0] != judged[0]  # SFT does not learn the judge's pairs either
    assert micro[1] != usual[1] != judged[1]


def test_it_runs_alone_and_is_evaluated(thumbs: Path, tmp_path: Path) -> None:
    recipe = load_recipe(thumbs, set=["stages=['kto']"], unset=["sft"])
    outcome = runner.run(recipe, runs=tmp_path / "runs", name="tiny")
    assert outcome.results["kto.steps"] == 10 and 0 < outcome.results["kto.kl"] < 50
    again = runner.run(recipe, runs=tmp_path / "runs", name="tiny")
    assert {s.did for s in again.stages} == {"cached"}
