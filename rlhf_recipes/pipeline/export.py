"""From a stage's output to a folder that `transformers` and vLLM load.

"merged" folds the adapter into the base in 16 or 32 bit, whatever it was trained on: merging into a
4-bit model quantizes it again (logit error 0.38 of 0.72, against 0.006 in bfloat16, TRL-facts 32).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rlhf_recipes.errors import UsageError
from rlhf_recipes.models.base import ADAPTER, HEAD, UNIT
from rlhf_recipes.models.load import SAFELY, WEIGHTS, compute_dtype, load_config, load_tokenizer
from rlhf_recipes.models.reward_model import read_unit
from rlhf_recipes.recipe.kinds import makes
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages.session import Session
from rlhf_recipes.store.history import manifest_of
from rlhf_recipes.store.layout import entry_folder


def export(*, run_folder: Path, folder: Path, stage: str | None, form: str) -> str:
    """Write one stage of a run to `folder`; says what lies there and how to share it.

    Raises UsageError where the folder is not empty or the run has no such finished stage.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", "name a new folder")
    session = shared_of(run_folder)
    if form == "adapter" and session.recipe.lora is None:
        raise UsageError("with lora = false there is no adapter", "leave out --form adapter")
    name, kind, output = finished_stage(run_folder, stage)
    write = write_reward_model if makes(kind, "reward_model") else write_model
    write(session, output, folder, form=form)
    share = f"to share it: hf upload YOUR-NAME/{run_folder.name}-{name} {folder}"
    return f"{folder} holds {name} ({form}), ready for from_pretrained\n{share}"


def shared_of(run_folder: Path) -> Session:
    """What the stages of a run share: its recipe, and the base model that it started from."""
    identity = manifest_of(run_folder)["model"]
    return Session(load_recipe(run_folder / "resolved.toml"), identity)


def finished_stage(run_folder: Path, stage: str | None) -> tuple[str, str, Path]:
    """Name, kind and output folder of a run's stage; of its last policy where `stage` is None."""
    entries = [e for e in manifest_of(run_folder)["stages"] if e["outcome"] != "not run"]
    models = [e for e in entries if not makes(e["kind"], "numbers")]
    policies = [e for e in models if makes(e["kind"], "policy")]
    fitting = policies if stage is None else [e for e in models if e["name"] == stage]
    if not fitting:
        names = ", ".join(e["name"] for e in models) or "none"
        raise UsageError(f"{run_folder} has no finished stage {stage or 'with a policy'}", names)
    entry = fitting[-1]
    return entry["name"], entry["kind"], entry_folder(run_folder.parent, entry) / "output"


def write_model(session: Session, output: Path, folder: Path, *, form: str = "merged") -> None:
    """A stage's `output` as a causal model's folder: weights, tokenizer, generation settings."""
    folder.mkdir(parents=True, exist_ok=True)
    session.tokens.tokenizer.save_pretrained(folder)
    if form == "adapter":
        model = session.recipe.model
        config: dict[str, Any] = json.loads((output / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(model.folder) if model.is_local else model.name
        config["revision"] = session.model.get("revision")
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
        shutil.copy(output / ADAPTER, folder / ADAPTER)
        return
    lm = session.exported(output)
    lm.generation_config = lm.shipped_generation_config
    lm.generation_config.eos_token_id = lm.config.eos_token_id = session.tokens.eos_id
    lm.generation_config.pad_token_id = lm.config.pad_token_id = session.tokens.pad_id
    lm.save_pretrained(folder)


def write_reward_model(session: Session, output: Path, folder: Path, *, form: str) -> None:
    """A sequence classifier with one label; its config's `reward_unit` holds mean and deviation.

    Raises UsageError, before anything is written, where transformers has no such class.
    """
    config = load_config(session.model_folder, session.recipe.model.trust_remote_code)
    kinds = (type(config), type(config.get_text_config()))
    known = any(kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING for kind in kinds)
    if form == "merged" and not known:
        what = f"transformers has no sequence classifier for a {config.model_type}"
        raise UsageError(what, "--form adapter writes the adapter and its head")
    write_model(session, output, folder, form=form)
    if form == "adapter":
        for name in (HEAD, UNIT):
            shutil.copy(output / name, folder / name)
        return
    dtype = compute_dtype(session.recipe.model.dtype)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=dtype, **WEIGHTS, **SAFELY
    )
    with torch.no_grad():
        model.score.weight.copy_(load_file(output / HEAD)["score.weight"])
    if session.tokens.pad_id == session.tokens.eos_id:
        _add_pad_token(model, folder)
    model.config.reward_unit = dict(zip(("mean", "std"), read_unit(output), strict=True))
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    model.save_pretrained(folder)


def _add_pad_token(model: PreTrainedModel, folder: Path) -> None:
    """Give a classifier, and the tokenizer in `folder`, a pad token that is not EOS.

    transformers scores at the last token that is not the pad token. Were that EOS, the score would
    be at the token before it.
    """
    tokenizer, embedding = load_tokenizer(folder), model.get_input_embeddings().weight
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if len(tokenizer) > len(embedding):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.get_input_embeddings().weight.data[len(embedding) :] = 0.0
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.save_pretrained(folder)
