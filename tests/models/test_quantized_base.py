"""A base model whose own weights are stored in 4 bit, as `*-bnb-4bit` folders are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_recipes.errors import ModelError
from rlhf_recipes.models.load import load_causal_lm
from rlhf_recipes.pipeline.data_lint import data_lint
from rlhf_recipes.pipeline.estimate import reckoning
from rlhf_recipes.pipeline.export import write_model, write_reward_model
from rlhf_recipes.pipeline.plan import plan_run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages.session import Session
from tests.helpers.chains import Chain

pytestmark = pytest.mark.train

IDS = torch.tensor([[1, 4, 7, 8, 2]])


@pytest.fixture(scope="session")
def packed_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in nf4. Its config names another compute dtype than the tiny recipe."""
    from transformers import BitsAndBytesConfig

    folder = tmp_path_factory.mktemp("packed-model")
    words = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    how = BitsAndBytesConfig(**words, bnb_4bit_compute_dtype=torch.bfloat16)
    lm = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=how)
    lm.save_pretrained(folder)
    weights = ["config.json", "model.safetensors", "generation_config.json"]
    shutil.copytree(tiny_model, folder, ignore=lambda *_: weights, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization_config"]["load_in_4bit"]
    return folder


def logits(lm: Any) -> torch.Tensor:
    with torch.no_grad():
        return lm(IDS).logits.float()


@pytest.mark.parametrize("words", [["model.quantization=4bit"], []], ids=["4bit", "unset"])
def test_the_whole_chain_and_both_exports_work(
    packed_model: Path, tiny_recipe: Path, tmp_path: Path, words: list[str]
) -> None:
    recipe = load_recipe(tiny_recipe, set=[f"model.name={packed_model}", *words])
    chain = Chain(recipe, tmp_path / "stages")
    results = chain.all()
    assert results["ppo"].metrics["updates"] == 2
    assert 0 <= results["evaluation"].metrics["ppo.kl"] < 5

    chain.session.release()
    base = chain.session.load_base("none")
    policy = base.open("policy", chain.outputs["ppo"], seed=0)
    with policy.active():
        ours = logits(policy.lm)
    write_model(chain.session, chain.outputs["ppo"], tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    assert (logits(merged) - ours).abs().max() < 1e-4

    write_model(chain.session, chain.outputs["ppo"], tmp_path / "adapter", form="adapter")
    whole = AutoModelForCausalLM.from_pretrained(packed_model, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(whole, tmp_path / "adapter")
    assert (logits(adapted) - ours).abs().max() < 0.1  # it computes in the folder's bfloat16

    write_reward_model(chain.session, chain.outputs["reward"], tmp_path / "reward", form="merged")
    reward = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    assert reward.num_labels == 1


def test_it_is_unpacked_to_what_it_holds(packed_model: Path) -> None:
    """The same numbers packed and unpacked, in the recipe's dtype and not the folder's."""
    packed = load_causal_lm(packed_model, dtype=torch.float32, quantization="4bit")
    whole = load_causal_lm(packed_model, dtype=torch.float32)
    assert not getattr(whole.config, "quantization_config", None)
    assert {p.dtype for p in whole.parameters()} == {torch.float32}
    assert packed.get_memory_footprint() < 0.5 * whole.get_memory_footprint()
    assert torch.allclose(logits(packed), logits(whole), atol=1e-4)


def test_weights_that_train_whole_are_unpacked(
    packed_model: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(tiny_recipe, set=[f"model.name={packed_model}", "lora=false"])
    chain = Chain(recipe, tmp_path / "stages")
    chain.run("sft", {})
    assert chain.session.exported(chain.outputs["sft"]).dtype == torch.float32


def test_plan_counts_it_and_refuses_other_bits(packed_model: Path, tiny_recipe: Path) -> None:
    def planned(*words: str) -> Any:
        recipe = load_recipe(tiny_recipe, set=[f"model.name={packed_model}", *words])
        plan = plan_run(recipe, tiny_recipe.parent / "runs")
        return plan, Session(recipe, plan.model)

    plan, session = planned("model.quantization=4bit")
    assert {finding.level for finding in data_lint(plan, session)} == {"note"}
    assert reckoning(plan, plan.stages, session, "1GB", False).startswith("stage")
    plan, session = planned("model.quantization=8bit")
    [finding] = data_lint(plan, session)
    assert finding.text == "the base model's weights are stored in 4bit, not in 8bit"
    assert 'quantization = "4bit"' in finding.change
    with pytest.raises(ModelError, match="stored in 4bit"):
        session.base.open("policy", None, seed=0)
