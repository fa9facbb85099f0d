"""Model folders from strangers: what they ask for is not done, and the canary stays away."""

from __future__ import annotations

import builtins
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_recipes.errors import ModelError, RecipeError, RlhfRecipesError, UsageError
from rlhf_recipes.models import load as models
from rlhf_recipes.pipeline.runner import run
from rlhf_recipes.recipe.load import Recipe, load_recipe
from rlhf_recipes.sources import resolve as sources
from rlhf_recipes.sources import trust
from rlhf_recipes.stages.session import Session
from tests.helpers.canary import Canary
from tests.helpers.tiny import RECIPE

pytestmark = pytest.mark.train

WEIGHTS = "model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to spoil; who asks the person for leave is refused it."""

    def asked(*_: object) -> str:
        raise AssertionError("a person was asked")

    monkeypatch.setattr(builtins, "input", asked)
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def recipe_on(model: Path, data: Path, *words: str) -> Recipe:
    file = model.parent / "tiny.toml"
    file.write_text(RECIPE.format(model=model, data=data))
    return load_recipe(file, set=words)


def begun(runs: Path) -> list[Path]:
    return list((runs / ".stages").glob("[!.]*-*"))


def change(file: Path, **keys: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


# ---- refused ------------------------------------------------------------------------------------


def pickled_weights(model: Path, canary: Canary) -> None:
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(canary.torch())


def pickle_named_safetensors(model: Path, canary: Canary) -> None:
    (model / WEIGHTS).unlink()
    (model / "weights.bin").write_bytes(canary.torch())
    index = {"weight_map": {"model.embed_tokens.weight": "weights.bin"}}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def shard_above(model: Path, canary: Canary) -> None:
    shutil.move(model / WEIGHTS, model.parent / WEIGHTS)
    index = {"weight_map": {"model.embed_tokens.weight": f"../{WEIGHTS}"}}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def weights_by_config(model: Path, canary: Canary) -> None:
    (model / "adapter_model.bin").write_bytes(canary.torch())
    change(model / "config.json", transformers_weights="adapter_model.bin")


def an_adapter_beside(model: Path, canary: Canary) -> None:
    (model / "adapter_model.bin").write_bytes(canary.torch())
    adapter = {"base_model_name_or_path": "evil/model", "peft_type": "LORA", "r": 1}
    (model / "adapter_config.json").write_text(json.dumps(adapter))


def a_kind_of_its_own(model: Path, canary: Canary) -> None:
    (model / "evil.py").write_text(canary.code)
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": "evil.T"}
    change(model / "config.json", model_type="evil", auto_map=names)


def code_of_another_repository(model: Path, canary: Canary) -> None:
    change(model / "config.json", auto_map={"AutoModelForCausalLM": "evil/code--evil.M"})


def an_internal_kernel(model: Path, canary: Canary) -> None:
    change(model / "config.json", _attn_implementation_internal="evil/kernel")


def a_kernel(model: Path, canary: Canary) -> None:
    change(model / "config.json", attn_implementation="kernels-community/evil:run")


def a_nested_kernel(model: Path, canary: Canary) -> None:
    change(model / "config.json", text_config={"_attn_implementation": {"": "evil/kernel"}})


def a_quantizer(model: Path, canary: Canary) -> None:
    change(model / "config.json", quantization_config={"quant_method": "torchao"})


def an_endless_config(model: Path, canary: Canary) -> None:
    (model / "config.json").write_text('{"a":' * 200_000 + "1" + "}" * 200_000)


HOSTILE = {
    pickled_weights: r"has no model\.safetensors \(weights must be safetensors: a pickle",
    pickle_named_safetensors: r"names 'weights\.bin' as its weights, which is no safetensors file",
    shard_above: r"names '\.\./model\.safetensors' as its weights",
    weights_by_config: r"names 'adapter_model\.bin' as its weights",
    an_adapter_beside: "holds an adapter as well",
    a_kind_of_its_own: "is of a kind that only code of its own knows",
    code_of_another_repository: "takes its code from yet another repository",
    an_internal_kernel: "asks for a kernel of 'evil/kernel' by its _attn_implementation_internal",
    a_kernel: "asks for a kernel of 'kernels-community/evil:run' by its attn_implementation",
    a_nested_kernel: "asks for a kernel of",
    a_quantizer: r"is quantized already \(torchao\)",
    an_endless_config: "has no config that can be read",
}
Spoil = Callable[[Path, Canary], None]


@pytest.mark.parametrize("spoil", HOSTILE, ids=lambda spoil: spoil.__name__)
def test_a_hostile_base_ends_the_run_with_one_line(
    model: Path, tiny_pairs: Path, canary: Canary, spoil: Spoil, tmp_path: Path
) -> None:
    spoil(model, canary)
    with pytest.raises(ModelError, match=HOSTILE[spoil]) as caught:
        run(recipe_on(model, tiny_pairs), runs=tmp_path / "runs")
    assert "\n" not in str(caught.value)
    assert not canary.touched
    assert begun(tmp_path / "runs") == []


@pytest.mark.parametrize("spoil", HOSTILE, ids=lambda spoil: spoil.__name__)
def test_the_loaders_by_themselves_run_nothing(model: Path, canary: Canary, spoil: Spoil) -> None:
    """What holds where a folder passes for harmless: every load says what it must not do."""
    spoil(model, canary)
    for load in (
        models.load_config,
        models.load_tokenizer,
        lambda folder: models.load_causal_lm(folder, dtype=torch.float32),
        lambda folder: models.load_reward_model(folder, dtype=torch.float32),
    ):
        try:
            load(model)
        except AssertionError:
            raise
        except Exception:
            continue
    assert not canary.touched


@pytest.mark.parametrize("key", ["ppo.reward_model", "evaluation.judge"])
def test_a_hostile_scorer_is_refused_too(
    model: Path, tiny_model: Path, tiny_pairs: Path, canary: Canary, key: str, tmp_path: Path
) -> None:
    a_kind_of_its_own(model, canary)
    stages = ['stages=["sft", "ppo"]'] if key.startswith("ppo") else []
    recipe = recipe_on(model, tiny_pairs, f"model.name={tiny_model}", f"{key}={model}", *stages)
    with pytest.raises(ModelError, match="is of a kind that only code of its own knows"):
        run(recipe, runs=tmp_path / "runs")
    assert begun(tmp_path / "runs") == []


@pytest.mark.parametrize("spoil", HOSTILE, ids=lambda spoil: spoil.__name__)
def test_the_weights_of_a_run_from_elsewhere_are_looked_at(
    model: Path, tiny_model: Path, tiny_pairs: Path, canary: Canary, spoil: Spoil
) -> None:
    spoil(model, canary)
    session = Session(recipe_on(model, tiny_pairs, f"model.name={tiny_model}", "lora=false"), {})
    with pytest.raises(ModelError, match=HOSTILE[spoil]):
        session.exported(model)
    with pytest.raises(ModelError, match=HOSTILE[spoil]):
        session.base.open("policy", model, seed=0)


def test_an_adapter_of_a_run_from_elsewhere_is_what_the_recipe_says(
    model: Path, tiny_pairs: Path, tmp_path: Path, canary: Canary
) -> None:
    session = Session(recipe_on(model, tiny_pairs), {})
    role = session.base.open("policy", None, seed=0, trainable=True)
    session.base.save(role, tmp_path)
    evil = {"peft_type": "XLORA", "adapters": {"0": "evil/repo"}, "hidden_size": 32}
    change(tmp_path / "adapter_config.json", **evil, megatron_config={"a": 1}, megatron_core="this")
    (tmp_path / "adapter_model.bin").write_bytes(canary.torch())
    assert session.exported(tmp_path).config.model_type == "llama"
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        session.exported(tmp_path)


# ---- passed over --------------------------------------------------------------------------------


def test_what_no_load_asks_for_is_left_alone(model: Path, tiny_pairs: Path, canary: Canary) -> None:
    """A pickle beside the weights, code for a kind that is known, a way to generate."""
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt"):
        (model / name).write_bytes(canary.torch())
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(canary.code)
    for name in ("evil.py", "modeling_llama.py", "__init__.py", "setup.py"):
        (model / name).write_text(canary.code)
    change(model / "config.json", auto_map={"AutoModelForCausalLM": "evil.M"})
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]})
    change(model / "generation_config.json", custom_generate=str(model), trust_remote_code=True)
    recipe = recipe_on(model, tiny_pairs)
    session = Session(recipe, {})
    lm = session.base.lm
    ids = torch.tensor([[1, 4, 7, 2]])
    lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
    lm.generation_config = lm.shipped_generation_config
    lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1)
    assert session.tokens.eos_id == 2


def test_a_tokenizer_of_its_own_is_refused(model: Path, tiny_pairs: Path, canary: Canary) -> None:
    (model / "evil.py").write_text(canary.code)
    (model / "tokenizer.json").unlink()
    own = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    change(model / "tokenizer_config.json", **own)
    with pytest.raises(RlhfRecipesError) as caught:
        run(recipe_on(model, tiny_pairs), runs=model.parent / "runs")
    assert "\n" not in str(caught.value)


# ---- on, where it is asked for ------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["model.revision=main"], ["model.revision=0123abc"]])
def test_code_of_the_hub_needs_a_whole_revision(tiny_recipe: Path, words: list[str]) -> None:
    on = ["model.name=owner/model", "model.trust_remote_code=true"]
    with pytest.raises(RecipeError, match="name its revision, all 40 hex digits"):
        load_recipe(tiny_recipe, set=[*on, *words])
    with pytest.raises(RecipeError, match="name its revision, all 40 hex digits"):
        load_recipe(tiny_recipe, set=on[1:])  # a folder


def test_code_of_the_hub_needs_a_person_too(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = ["model.name=owner/model", "model.trust_remote_code=true", f"model.revision={COMMIT}"]
    recipe = load_recipe(tiny_recipe, set=on)
    monkeypatch.delenv(trust.ALLOW)
    with pytest.raises(UsageError, match=f"code of the model owner/model at {COMMIT} run on"):
        sources.base_folder(recipe, {"repo": "owner/model", "revision": COMMIT})


def test_code_that_a_person_agreed_to_is_run(
    model: Path, tiny_pairs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    ran = tmp_path / "ran"
    (model / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig): model_type = 'own'\nclass M(LlamaForCausalLM): config_class = C\n"
    )
    names = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}
    change(model / "config.json", model_type="own", auto_map=names, architectures=["M"])
    cache = tmp_path / "hub"
    (cache / "models--owner--model" / "snapshots").mkdir(parents=True)
    model.rename(cache / "models--owner--model" / "snapshots" / COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    on = ["model.name=owner/model", "model.trust_remote_code=true", f"model.revision={COMMIT}"]
    recipe = recipe_on(model, tiny_pairs, *on)
    session = Session(recipe, sources.identify_base(recipe, tmp_path))
    assert type(session.base.lm).__name__ == "M" and ran.exists()
