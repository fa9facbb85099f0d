"""DPO on a tiny model: what it starts from, what moves, what it says of itself."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_recipes.pipeline import runner
from rlhf_recipes.pipeline.plan import plan_run
from rlhf_recipes.recipe.load import load_recipe
from tests.helpers.chains import Chain, adapter, base_weights, differs
from tests.helpers.roles import logp

pytestmark = pytest.mark.train

DPO = """
[dpo]
max_steps = 8
per_device_train_batch_size = 8
learning_rate = 1e-2
logging_steps = 1
"""


@pytest.fixture
def dpo_recipe(tiny_recipe: Path) -> Path:
    text = tiny_recipe.read_text().replace('["sft", "reward", "ppo"]', '["sft", "dpo"]')
    tiny_recipe.write_text(text + DPO)
    return tiny_recipe


@pytest.fixture
def chain(dpo_recipe: Path, tmp_path: Path, trained: SimpleNamespace) -> Chain:
    """SFT is there."""
    return Chain(load_recipe(dpo_recipe), tmp_path / "stages", outputs=dict(trained.outputs))


def numbers(chain: Chain, start: dict[str, str]) -> list[dict[str, float]]:
    """What DPO tells of each step."""
    chain.progress.updates.clear()
    chain.run("dpo", start)
    return chain.progress.updates


BITS = ["model.quantization=4bit", "model.dtype=bfloat16"]


@pytest.mark.parametrize("change", ["lora.r=2", "lora=false", *BITS])
@pytest.mark.parametrize("start", [{}, {"policy": "sft"}])
def test_it_starts_as_the_reference_and_prefers_more_and_more(
    dpo_recipe: Path, tmp_path: Path, change: str, start: dict[str, str]
) -> None:
    chain = Chain(load_recipe(dpo_recipe, set=[change]), tmp_path / "stages")
    if start:
        chain.run("sft", {})
    steps = numbers(chain, start)
    assert len(steps) == 8
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert steps[0]["margin"] == 0.0
    assert steps[-1]["margin"] > 0.1 and steps[-1]["loss"] < 0.65


def test_in_bfloat16_every_step_sees_the_step_before(dpo_recipe: Path, tmp_path: Path) -> None:
    """Under one autocast for the whole training, it saw the first step's weights: margin 0."""
    sharp = load_recipe(dpo_recipe)
    blunt = load_recipe(dpo_recipe, set=["model.dtype=bfloat16"])
    margins = [
        [step["margin"] for step in numbers(Chain(recipe, tmp_path / recipe.model.dtype), {})]
        for recipe in (sharp, blunt)
    ]
    assert margins[1] == pytest.approx(margins[0], abs=0.03)


def test_only_its_own_adapter_moves_and_none_is_left(chain: Chain) -> None:
    base = base_weights(chain.session.base)
    sft = (chain.outputs["sft"] / "adapter_model.safetensors").read_bytes()
    result = chain.run("dpo", {"policy": "sft"})
    assert not differs(base, base_weights(chain.session.base))
    assert (chain.outputs["sft"] / "adapter_model.safetensors").read_bytes() == sft
    assert len(differs(adapter(chain.outputs["sft"]), adapter(chain.outputs["dpo"]))) == 28
    lm = chain.session.base.lm
    assert [name for name, _ in lm.named_parameters() if "lora_" in name] == []
    assert not lm.get_input_embeddings()._forward_hooks
    data = chain.session.data(chain.recipe.dataset)
    assert result.metrics["pairs"] == len(data.reward_train) < len(data.train)


def test_its_numbers_are_those_of_the_saved_policy_against_the_one_it_started_from(
    chain: Chain,
) -> None:
    """By hand, one unpadded answer at a time; 13 pairs are a batch of 8 and one of 5."""
    metrics = chain.run("dpo", {"policy": "sft"}).metrics
    policy, start = (
        chain.session.base.open(stage, chain.outputs[stage], seed=0) for stage in ("dpo", "sft")
    )
    margins = []
    for e in chain.session.data(chain.recipe.dataset).validation:
        ratio = {
            name: logp(policy, e.prompt_ids, ids) - logp(start, e.prompt_ids, ids)
            for name, ids in {"chosen": e.chosen_ids, "rejected": e.rejected_ids}.items()
        }
        margins.append(0.1 * (ratio["chosen"] - ratio["rejected"]))
    assert len(margins) == 13
    assert metrics["validation_margin"] == pytest.approx(sum(margins) / 13, abs=1e-5)
    assert metrics["validation_accuracy"] == pytest.approx(sum(m > 0 for m in margins) / 13)
    losses = [math.log1p(math.exp(-m)) for m in margins]
    assert metrics["validation_loss"] == pytest.approx(sum(losses) / 13, abs=1e-5)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("change", ["lora.r=2", "lora=false"])
def test_the_chain_runs_and_is_evaluated(dpo_recipe: Path, tmp_path: Path, change: str) -> None:
    recipe = load_recipe(dpo_recipe, set=[change])
    outcome = runner.run(recipe, runs=tmp_path / "runs", name="tiny")
    assert [s.stage.name for s in outcome.stages] == ["sft", "dpo", "evaluation"]
    results: dict[str, Any] = outcome.results
    assert results["dpo.steps"] == 8 and 0 < results["dpo.kl"] < 50
    assert results["dpo.validation_loss"] < math.log(2)
    source = json.loads((outcome.model / "source.json").read_text())
    assert source["stage"] == "dpo"
    again = runner.run(recipe, runs=tmp_path / "runs", name="tiny")
    assert {s.did for s in again.stages} == {"cached"}


def test_the_judges_share_is_part_of_its_key(dpo_recipe: Path, tmp_path: Path) -> None:
    *learners, _ = plan_run(load_recipe(dpo_recipe), tmp_path).stages
    assert [stage.kind for stage in learners] == ["sft", "dpo"]
    assert all(stage.payload["dataset"]["judge_fraction"] == 0.2 for stage in learners)
