"""From a stage's output to a folder for `transformers`, vLLM, llama.cpp or the hub.

"merged" folds the adapter into the base in 16 or 32 bit, whatever it was trained on: merging into a
4-bit model quantizes it again (logit error 0.38 of 0.72, against 0.006 in bfloat16, TRL-facts 32).
What cannot be exported is refused before torch is loaded, and before the hub hears of a model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.errors import ModelError, UsageError
from rlhf_recipes.pipeline import to_gguf
from rlhf_recipes.recipe.kinds import makes
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.tables import BASE
from rlhf_recipes.report import card, run_page
from rlhf_recipes.sources import push as hub
from rlhf_recipes.stages.session import Session
from rlhf_recipes.store.history import manifest_of
from rlhf_recipes.store.layout import entry_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMS = ("merged", "adapter", "gguf")
# Conversations that a chat template must write with the same ids after a round trip.
ASKED = "What is 12 + 345?\n\n  It's 7 o'clock — naïve café, 你好 🙂"
ONCE = [{"role": "user", "content": ASKED}]
TURNS = [*ONCE, {"role": "assistant", "content": "357.\tYes"}, {"role": "user", "content": " a"}]
CONVERSATIONS = (ONCE, TURNS, [{"role": "system", "content": "Be brief."}, *TURNS])


def export(
    *,
    run_folder: Path,
    folder: Path,
    stage: str | None = None,
    form: str = "merged",
    kind: str | None = None,
    push: str | None = None,
) -> str:
    """Write one stage of a run to `folder`, in one of FORMS, with its card; says what is there.

    `kind` is how a GGUF stores its weights. `push` names a new private repository on the hub that
    the folder is uploaded to.

    Raises UsageError where the call makes no sense, or `folder` is not empty, or the run has no
    such stage; ModelError where the hub refuses, or the model is not what it was when read back.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not empty", "name a new folder")
    session = shared_of(run_folder)
    name, made, output = finished_stage(run_folder, stage)
    _check(session, name, made, output, form, kind, push)
    if push:
        hub.open_repo(push)
    write_as(session, output, folder, made, form, kind or to_gguf.KINDS[0], name=name)
    licence = card.licence_of(session.model_folder)
    about = {"form": form, "licence": licence} | ({"place": push} if push else {})
    text = run_page.model_card(run_folder, name, **about)
    (folder / "README.md").write_text(text, encoding="utf-8")
    readable(folder)
    said = f"{folder} holds {name} ({form}{' ' + kind if kind else ''})"
    if form == "gguf":
        return f"{said}; for Ollama: ollama create NAME -f {folder / 'Modelfile'}"
    if push:
        return f"{said}\n{hub.push(push, folder)} holds the same; the model is private there"
    share = f"to share it: export again with --push YOUR-NAME/{run_folder.name}-{name}"
    return f"{said}, ready for from_pretrained\n{share}"


def _check(
    session: Session,
    name: str,
    made: str,
    output: Path,
    form: str,
    kind: str | None,
    push: str | None,
) -> None:
    """Raise UsageError where a stage of this kind cannot be written in this form."""
    recipe = session.recipe
    if not output.is_dir():
        raise UsageError(f"the files of {name} are not there any more", "run the recipe again")
    if kind and form != "gguf":
        raise UsageError("--type is how a GGUF stores its weights", "add --form gguf")
    if form == "adapter" and recipe.lora is None:
        raise UsageError("with lora = false there is no adapter", "leave out --form adapter")
    if form == "adapter" and push and recipe.model.is_local:
        what = f"nobody else has the folder {recipe.model.name} that the adapter belongs to"
        raise UsageError(what, "leave out --form adapter: merged weights need no other folder")
    if form == "gguf":
        if push:
            what = "--push uploads safetensors, for others to convert as they like"
            raise UsageError(what, "leave out --form gguf")
        if not makes(made, "policy"):
            raise UsageError(f"a GGUF holds a policy, and {name} is not one", "name a --stage")
        config = session.model_folder / "config.json"
        to_gguf.check(json.loads(config.read_text(encoding="utf-8")))


def write_as(
    session: Session, output: Path, folder: Path, made: str, form: str, kind: str, *, name: str
) -> None:
    """Write a stage's output of the kind `made`, and check that its chat template came along."""
    if form != "gguf":
        write = write_reward_model if makes(made, "reward_model") else write_model
        write(session, output, folder, form=form)
        return check_template(session, folder)
    from rlhf_recipes.pipeline.modelfile import modelfile

    file = folder / f"model-{kind}.gguf"
    to_gguf.split_of(session.tokens.tokenizer)  # refuses before the weights are loaded
    lm = session.exported(output)
    folder.mkdir(parents=True, exist_ok=True)
    to_gguf.write(lm, session.tokens, file, kind=kind, name=name)
    check_template(session, folder, file.name)
    recipe = session.recipe
    words = {"temperature": recipe.asked_with("temperature")}
    words |= {"system": recipe.dataset.system}
    text = modelfile(session.tokens, file.name, **words)
    (folder / "Modelfile").write_text(text, encoding="utf-8")


def check_template(session: Session, folder: Path, gguf: str | None = None) -> None:
    """Raise ModelError where the tokenizer, read back from `folder`, gives a chat other ids.

    How a text is split before it is merged is not read from a GGUF: `transformers` does not know
    all of llama.cpp's names for it, which `to_gguf.SPLITS` has.
    """
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    from rlhf_recipes.data.tokens import render
    from rlhf_recipes.models.load import SAFELY, load_tokenizer

    before = session.tokens.tokenizer
    if gguf is None:
        after = load_tokenizer(folder, session.recipe.model.trust_remote_code)
    else:
        after = AutoTokenizer.from_pretrained(folder, gguf_file=gguf, **SAFELY)
        after.backend_tokenizer.pre_tokenizer = before.backend_tokenizer.pre_tokenizer
        after.backend_tokenizer.normalizer = before.backend_tokenizer.normalizer
    for turns in CONVERSATIONS:
        try:
            text = render(before, turns, add_generation_prompt=True)
        except TemplateError:
            continue  # a template without a system turn
        again = render(after, turns, add_generation_prompt=True)
        first, second = (
            one(said, add_special_tokens=False)["input_ids"]
            for one, said in ((before, text), (after, again))
        )
        if text != again or first != second:
            what = f"the tokenizer of {folder}, read back, writes a chat with other ids"
            hint = "do not use the folder; please report this with the model's name"
            raise ModelError(what, hint)


def readable(folder: Path) -> None:
    """Let others read what is in `folder`: safetensors writes files for their owner alone."""
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def shared_of(run_folder: Path) -> Session:
    """What the stages of a run share: its recipe, and the base model that it started from."""
    identity = manifest_of(run_folder)["model"]
    return Session(load_recipe(run_folder / "resolved.toml"), identity)


def finished_stage(run_folder: Path, stage: str | None) -> tuple[str, str, Path]:
    """Name, kind and output folder of a run's stage; of its last policy where `stage` is None."""
    entries = [e for e in manifest_of(run_folder)["stages"] if e["outcome"] != "not run"]
    models = [e for e in entries if any(makes(e["kind"], m) for m in ("policy", "reward_model"))]
    policies = [e for e in models if makes(e["kind"], "policy")]
    fitting = policies if stage is None else [e for e in models if e["name"] == stage]
    if not fitting:
        names = ", ".join(e["name"] for e in models) or "none"
        raise UsageError(f"{run_folder} has no finished stage {stage or 'with a policy'}", names)
    entry = fitting[-1]
    return entry["name"], entry["kind"], entry_folder(run_folder.parent, entry) / "output"


def policies(run_folder: Path) -> dict[str, Path | None]:
    """The output of each finished policy of a run, in their order; before them the base's None."""
    entries = [e for e in manifest_of(run_folder)["stages"] if e["outcome"] != "not run"]
    made = [e for e in entries if makes(e["kind"], "policy")]
    return {BASE: None} | {e["name"]: entry_folder(run_folder.parent, e) / "output" for e in made}


def write_model(session: Session, output: Path, folder: Path, *, form: str = "merged") -> None:
    """A stage's `output` as a causal model's folder: weights, tokenizer, generation settings."""
    from rlhf_recipes.models.base import ADAPTER

    folder.mkdir(parents=True, exist_ok=True)
    session.tokens.tokenizer.save_pretrained(folder)
    if form == "adapter":
        model = session.recipe.model
        config: dict[str, Any] = json.loads((output / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = str(model.folder) if model.is_local else model.name
        config["revision"] = session.model.get("revision")
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
        shutil.copy(output / ADAPTER, folder / ADAPTER)
        return readable(folder)
    lm = session.exported(output)
    lm.generation_config = lm.shipped_generation_config
    lm.generation_config.eos_token_id = lm.config.eos_token_id = session.tokens.eos_id
    lm.generation_config.pad_token_id = lm.config.pad_token_id = session.tokens.pad_id
    lm.save_pretrained(folder)
    readable(folder)


def write_reward_model(session: Session, output: Path, folder: Path, *, form: str) -> None:
    """A sequence classifier with one label; its config's `reward_unit` holds mean and deviation.

    Raises UsageError, before anything is written, where transformers has no such class.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoModelForSequenceClassification,
    )

    from rlhf_recipes.models.base import HEAD, UNIT
    from rlhf_recipes.models.load import SAFELY, WEIGHTS, compute_dtype, load_config
    from rlhf_recipes.models.reward_model import read_unit

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
        return readable(folder)
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
    readable(folder)


def _add_pad_token(model: PreTrainedModel, folder: Path) -> None:
    """Give a classifier, and the tokenizer in `folder`, a pad token that is not EOS.

    transformers scores at the last token that is not the pad token. Were that EOS, the score would
    be at the token before it.
    """
    from rlhf_recipes.models.load import load_tokenizer

    tokenizer, embedding = load_tokenizer(folder), model.get_input_embeddings().weight
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    if len(tokenizer) > len(embedding):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        model.get_input_embeddings().weight.data[len(embedding) :] = 0.0
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.save_pretrained(folder)
