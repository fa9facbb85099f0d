"""The whole chain on tiny models of other architectures, and with other tokenizers."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from rlhf_recipes.data.tokens import encode
from rlhf_recipes.errors import ModelError, UsageError
from rlhf_recipes.models.reward_model import load_head, open_reward, read_unit
from rlhf_recipes.models.role import logprobs, logprobs_and_values, values
from rlhf_recipes.models.sampling import join, score_ids
from rlhf_recipes.pipeline.data_lint import data_lint
from rlhf_recipes.pipeline.export import write_model, write_reward_model
from rlhf_recipes.pipeline.plan import plan_run
from rlhf_recipes.pipeline.runner import run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages import sft
from rlhf_recipes.stages.session import Session, check_models
from tests.helpers import architectures
from tests.helpers.chains import Chain, adapter, differs
from tests.helpers.tiny import RECIPE

pytestmark = pytest.mark.train
# PEFT finds out by itself how GPT-2 stores its weights, and says so of each layer. It also names
# ranks for a mixture's experts, which are no linear layers and get no adapter.
peft_says = pytest.mark.filterwarnings(
    "ignore:fan_in_fan_out is set to False:UserWarning",
    "ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning",
)

# Two steps a stage; a letter is a token.
SHORT = [
    "dataset.max_prompt_tokens=64",
    "dataset.max_answer_tokens=32",
    "sft.max_steps=2",
    "reward.max_steps=2",
    "ppo.num_ppo_epochs=1",
    "ppo.minimum_accuracy=0",
]
WITH_DPO = ['stages=["sft", "reward", "ppo", "dpo"]', "dpo.max_steps=2", "dpo.policy=sft"]
WITH_DPO += ["dpo.per_device_train_batch_size=8"]
ROWS = [("red cat", "blue dog"), ("green", "red green blue grey"), ("black fox", "ox")]


def chain(model: Path, data: Path, folder: Path, *words: str) -> Chain:
    """A chain of stages on the model, in `folder`."""
    folder.mkdir(exist_ok=True)
    file = folder / "tiny.toml"
    file.write_text(RECIPE.format(model=model, data=data))
    return Chain(load_recipe(file, set=[*SHORT, *words]), folder)


def rows_of(chain: Chain) -> list[tuple[list[int], list[int]]]:
    tokens = chain.session.tokens
    return [encode(tokens, [{"role": "user", "content": p}], a) for p, a in ROWS]


def padded(tokenizer: Any, rows: list[tuple[list[int], list[int]]]) -> Any:
    """As somebody else's script pads a batch of prompts and answers."""
    return tokenizer.pad({"input_ids": [p + a for p, a in rows]}, return_tensors="pt")


def policy_apart(chain: Chain, folder: Path) -> float:
    """How far the logits of the merged export are from those of the run's policy."""
    write_model(chain.session, chain.outputs["ppo"], folder)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy, apart = chain.session.base.open("policy", chain.outputs["ppo"], seed=0), 0.0
    for prompt, answer in rows_of(chain):
        ids = torch.tensor([prompt + answer])
        with policy.active(), torch.no_grad():
            apart = max(apart, (policy.lm(ids).logits - lm(ids).logits).abs().max().item())
    chain.session.base.close(policy)
    return apart


def reward_apart(chain: Chain, folder: Path) -> float:
    """How far the scores of the exported reward model are from those that PPO saw."""
    write_reward_model(chain.session, chain.outputs["reward"], folder, form="merged")
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer, rows = AutoTokenizer.from_pretrained(folder), rows_of(chain)
    with torch.no_grad():
        theirs = model(**padded(tokenizer, rows)).logits[:, 0]
    reward = open_reward(chain.session.base, chain.outputs["reward"])
    ours = score_ids(reward, rows, chain.session.tokens.pad_id, 3)
    chain.session.base.close(reward)
    mean, std = read_unit(chain.outputs["reward"])
    return (ours * std + mean - theirs).abs().max().item()


# ---- padding with EOS


@pytest.fixture
def gpt2(tiny_pairs: Path, tmp_path: Path) -> Chain:
    model = architectures.save(tmp_path / "gpt2", "gpt2", **architectures.GPT)
    return chain(model, tiny_pairs, tmp_path)


@peft_says
@pytest.mark.parametrize("pad", [{}, {"pad_token": "[PAD]"}], ids=["as it is", "[PAD] added"])
def test_gpt2_trains_and_is_exported(gpt2: Chain, tmp_path: Path, pad: dict[str, str]) -> None:
    """No token of its tokenizer is free to pad with, or one that has no row in the embedding."""
    architectures.byte_tokenizer(**pad).save_pretrained(gpt2.recipe.model.folder)
    gpt2.train()
    gpt2.evaluate({"sft": "sft", "ppo": "ppo"})
    assert policy_apart(gpt2, tmp_path / "policy") < 1e-4
    assert reward_apart(gpt2, tmp_path / "reward") < 1e-4


@peft_says
def test_what_pads_changes_nothing_that_is_learned(
    gpt2: Chain, tiny_pairs: Path, tmp_path: Path
) -> None:
    """EOS, or a letter that is in no row: the same bytes of every stage, DPO and evaluation too."""
    (tmp_path / "letter").mkdir()
    model = tmp_path / "letter" / "gpt2"
    architectures.save(model, "gpt2", **architectures.GPT)
    architectures.byte_tokenizer(pad_token="!").save_pretrained(model)
    letter = chain(model, tiny_pairs, tmp_path / "letter", *WITH_DPO)
    eos = chain(gpt2.recipe.model.folder, tiny_pairs, tmp_path, *WITH_DPO)
    assert letter.session.tokens.pad_id == 0 and eos.session.tokens.pad_id == 256
    results = []
    for one in (eos, letter):
        one.train()
        one.run("dpo", {"policy": "sft"})
        results.append(one.evaluate({"sft": "sft", "ppo": "ppo", "dpo": "dpo"}).metrics)
    assert results[0] == results[1]
    for stage in ("sft", "reward", "ppo", "dpo"):
        assert not differs(adapter(eos.outputs[stage]), adapter(letter.outputs[stage]))


@peft_says
def test_eos_is_learned_where_it_is_the_pad_too(gpt2: Chain, monkeypatch: Any) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    step = sft.Trainer.training_step

    def spy(self: Any, model: Any, inputs: dict[str, torch.Tensor], *rest: Any) -> Any:
        seen.append({name: inputs[name].clone() for name in ("input_ids", "labels")})
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(sft.Trainer, "training_step", spy)
    gpt2.run("sft", {})
    for batch in seen:
        learned = batch["labels"] == 256
        assert learned.sum(1).tolist() == [1] * len(learned)  # one a row, whatever pads it
        assert batch["input_ids"][learned].tolist() == [256] * len(learned)
    assert any((batch["input_ids"] == 256).sum() > len(batch["labels"]) for batch in seen)


# ---- the whole chain on each architecture


def passes_apart(chain: Chain) -> float:
    """How far values and log-probabilities in one pass are from those in two, as rollouts have it.

    Some models scale or project the hidden states before their head, or never call the base model.
    """
    base, (prompts, answers) = chain.session.base, zip(*rows_of(chain), strict=True)
    policy = base.open("policy", chain.outputs["ppo"], seed=0)
    value = base.open("value", chain.outputs["ppo"] / "value", seed=0)
    value.add_head(load_head(value.lm, chain.outputs["reward"]))
    rows = join(prompts, answers, 0, policy.lm.device)
    tokens, mask, apart = (rows.ids, rows.mask, rows.answer), rows.mask[:, -rows.answer :], 0.0
    if policy.pairs_with(value):
        with torch.no_grad():
            with policy.active(beside=value):
                new, _, guess = logprobs_and_values(policy, value, *tokens, 1.0)
            with policy.active():
                apart = ((new - logprobs(policy, *tokens, 1.0)[0]) * mask).abs().max().item()
            with value.active():
                apart = max(apart, ((guess - values(value, *tokens)) * mask).abs().max().item())
    base.close(policy, value)
    return apart


def whole_chain(name: str, data: Path, folder: Path) -> None:
    kind, settings = architectures.ARCHITECTURES[name]
    made = chain(architectures.save(folder / name, kind, **settings), data, folder)
    lora = copy.deepcopy(made.recipe.lora)
    made.train()
    assert made.recipe.lora == lora  # else PEFT's ranks of experts would be in the stages' keys
    assert passes_apart(made) < 1e-4
    assert policy_apart(made, folder / "policy") < 1e-4
    if name in architectures.NO_CLASSIFIER:
        with pytest.raises(UsageError, match=f"no sequence classifier for a {kind} .*--form adapt"):
            reward_apart(made, folder / "reward-export")
        assert not (folder / "reward-export").exists()
    else:
        assert reward_apart(made, folder / "reward-export") < 1e-4


@peft_says
@pytest.mark.parametrize("name", architectures.SAMPLE)
def test_the_whole_chain_on_a_sample(name: str, tiny_pairs: Path, tmp_path: Path) -> None:
    whole_chain(name, tiny_pairs, tmp_path)


@peft_says
@pytest.mark.torture
@pytest.mark.parametrize("name", sorted(set(architectures.ARCHITECTURES) - {*architectures.SAMPLE}))
def test_the_whole_chain_on_the_others(name: str, tiny_pairs: Path, tmp_path: Path) -> None:
    whole_chain(name, tiny_pairs, tmp_path)


# ---- what is refused by plan, and by run before the first stage


def refused(model: Path, data: Path, folder: Path, *words: str) -> str:
    """What `plan` and `check` find wrong with a model; a run says it before any stage begins."""
    recipe = chain(model, data, folder, *words).recipe
    with pytest.raises(ModelError) as checked:
        check_models(recipe)
    plan = plan_run(recipe, folder / "runs")
    faults = [f for f in data_lint(plan, Session(recipe, plan.model)) if f.level == "fault"]
    with pytest.raises(ModelError) as caught:
        run(recipe, runs=folder / "runs")
    assert not list((folder / "runs").glob(".stages/sft-*"))
    [finding] = faults
    assert (checked.value.message, checked.value.hint) == (finding.text, finding.change)
    assert f"stage sft: {finding.text} ({finding.change}; log: " in str(caught.value)
    return finding.text


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "mistral3"])
def test_a_vision_language_model_is_refused(kind: str, tiny_pairs: Path, tmp_path: Path) -> None:
    folder = tmp_path / kind
    AutoConfig.for_model(kind).save_pretrained(folder)
    architectures.byte_tokenizer().save_pretrained(folder)
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    said = f"the base model is a {kind}, a vision-language model, and not a causal language model"
    assert refused(folder, tiny_pairs, tmp_path) == said


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_type": "newer"}, "has a config that cannot be used: .*`newer`"),
        ({"architectures": ["BertForMaskedLM"]}, "a BertForMaskedLM: it fills gaps"),
    ],
)
def test_a_model_of_another_kind_is_refused(
    changed: dict[str, Any], said: str, tiny_pairs: Path, tmp_path: Path
) -> None:
    model = architectures.save(tmp_path / "llama", "llama", **architectures.GROUPED)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changed))
    assert re.search(said, refused(model, tiny_pairs, tmp_path))


def test_a_tokenizer_that_cannot_be_read_is_refused(tmp_path: Path, tiny_pairs: Path) -> None:
    model = architectures.save(tmp_path / "llama", "llama", **architectures.GROUPED)
    (model / "tokenizer.json").write_text('{"a":')
    said = refused(model, tiny_pairs, tmp_path)
    assert said.startswith(f"{model} has no tokenizer that can be read: JSONDecodeError")


def test_layers_by_names_that_the_model_lacks_are_refused(tmp_path: Path, tiny_pairs: Path) -> None:
    model = architectures.save(tmp_path / "llama", "llama", **architectures.GROUPED)
    words = 'lora.target_modules=["q_proj", "W_pack"]'
    made = chain(model, tiny_pairs, tmp_path, words)
    said = "lora.target_modules names W_pack, and the model has no such layer"
    with pytest.raises(ModelError, match=said):
        check_models(made.recipe)
    found = data_lint(plan_run(made.recipe, tmp_path / "runs"), made.session)
    assert [(f.level, f.text) for f in found] == [("fault", said)]


def test_adapters_on_a_mamba_are_refused_by_peft(tiny_pairs: Path, tmp_path: Path) -> None:
    words = {"state_size": 4, "time_step_rank": 2}
    model = architectures.save(tmp_path / "mamba", "mamba", **words)
    with pytest.raises(ValueError, match="'out_proj' is incompatible with Mamba-based models"):
        chain(model, tiny_pairs, tmp_path).run("sft", {})


def test_a_tokenizer_larger_than_the_embedding_is_refused_where_rows_use_it(
    tmp_path: Path, tiny_pairs: Path
) -> None:
    model = architectures.save(tmp_path / "llama", "llama", **architectures.GROUPED)
    tokenizer = architectures.byte_tokenizer()
    tokenizer.add_tokens(["<tool>", "<call>"])
    tokenizer.save_pretrained(model)
    train_side = chain(model, tiny_pairs, tmp_path)
    assert train_side.session.data(train_side.recipe.dataset).train  # no row uses it
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(tiny_pairs.read_text().replace('"fox', '"<call> fox'))
    said = "the tokenizer has 2 tokens more than the model's embedding has rows (257), "
    assert refused(model, rows, tmp_path) == f"{said}and '<call>' is in use"


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, tiny_pairs: Path) -> None:
    model = architectures.save_model(tmp_path / "llama", "llama", **architectures.GROUPED)
    assert refused(model, tiny_pairs, tmp_path) == f"{model} has no tokenizer"


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("minicpm3", {"dim_model_base": 8}),
        ("cohere", {"logit_scale": 0.25}),  # TRL knows it by this name
        ("gemma2", {"final_logit_softcapping": 2.0}),
    ],
)
def test_sft_s_loss_is_the_models_own(
    tmp_path: Path, tiny_pairs: Path, kind: str, settings: dict[str, float]
) -> None:
    words = architectures.ARCHITECTURES[kind][1] | settings
    model = architectures.save(tmp_path / kind, kind, **words)
    made = chain(model, tiny_pairs, tmp_path)
    told = made.run("sft", {}).metrics["validation_loss"]
    policy, nats = made.session.base.open("policy", made.outputs["sft"], seed=0), []
    for row in made.session.data(made.recipe.dataset).validation:
        rows = join([row.prompt_ids], [row.chosen_ids], 0, policy.lm.device)
        with policy.active(), torch.no_grad():
            nats += logprobs(policy, rows.ids, rows.mask, rows.answer, 1.0)[0][0].tolist()
    assert told == pytest.approx(-fmean(nats), abs=5e-3)
