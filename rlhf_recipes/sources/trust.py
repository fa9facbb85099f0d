"""What comes from elsewhere, looked at before anything opens it. SECURITY.md says what is promised.

No torch in here, and nothing of a folder is run or unpickled to look at it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.errors import DataError, ModelError, UsageError
from rlhf_recipes.recipe.load import shipped_folder
from rlhf_recipes.recipe.rewards import Term
from rlhf_recipes.recipe.tables import located

ALLOW = "RLHF_RECIPES_ALLOW_CODE"  # set by a person, never by a recipe
# What `datasets` may read rows with; others unpickle, fetch, or need what is not here.
READERS = ("arrow", "csv", "json", "parquet", "text")
# What a column may be made of; a picture or a sound is a path or an address that is opened.
PLAIN = {"Value", "List", "LargeList", "ClassLabel", "Json"}
ARCHIVES = ("tar", "zip", "7z", "rar")  # by what is in them: a name says nothing
OUTSIDE = re.compile(r"^[/~]|(^|/)\.\.(/|$)|://|::")
CONFIG_BYTES = 16 * 2**20
DESCRIBED = 100_000  # words of a dataset's description; a few lines of YAML can hold billions
LOOK = "look at it and at where it comes from before you use it"
AGAIN = "bring it again"
TOKENIZER = ("tokenizer*", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
TOKENIZER_HINT = "copy tokenizer.json and tokenizer_config.json there, from the model it is made of"
UNREADABLE = (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError)


def check_model(folder: Path, *, trusted: bool = False) -> None:
    """Raise ModelError where a model's folder asks for more than weights, tokens and settings.

    `trusted` is what the recipe's `trust_remote_code` says.
    """
    config = check_config(folder, trusted=trusted)
    try:
        index = folder / "model.safetensors.index.json"
        shards = {"model.safetensors"}
        if not (folder / "model.safetensors").is_file() and index.is_file():
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        shards |= {config["transformers_weights"]} if "transformers_weights" in config else set()
    except UNREADABLE as error:
        raise _refused(folder, f"has no index that can be read: {error}", AGAIN) from error
    for name in sorted(map(str, shards)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            what = f"names {name!r} as its weights, which is no safetensors file in it"
            raise _refused(folder, what)
        if not (folder / name).is_file():
            hint = "weights must be safetensors: a pickle (.bin, .pt) can run any code as it loads"
            if any(folder.glob("*.bin")):  # as it loads there, not here
                hint += "; where you trust it, AutoModelForCausalLM.from_pretrained(folder)"
                hint += ".save_pretrained(new) writes them"
            raise _refused(folder, f"has no {name}", hint)
    if (folder / "adapter_config.json").exists():
        hint = "name one of the two: a folder of its own"
        raise _refused(folder, "holds an adapter as well", hint)


def check_tokenizer(folder: Path) -> None:
    """Raise ModelError where a model's folder has no file that a tokenizer is made of."""
    if not any(file.is_file() for name in TOKENIZER for file in folder.glob(name)):
        raise ModelError(f"{folder} has no tokenizer", TOKENIZER_HINT)


def last_added_token(folder: Path) -> int | None:
    """The largest id of a token that was added to a model's vocabulary; -1 where none was.

    None where that cannot be told: another kind of tokenizer, or a file that cannot be read.
    """
    try:
        written = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return max((token["id"] for token in written["added_tokens"]), default=-1)
    except UNREADABLE:
        return None


def check_config(folder: Path, *, trusted: bool = False) -> dict[str, Any]:
    """A model's config.json. Raises ModelError where it asks for more than to build a model."""
    try:
        if (folder / "config.json").stat().st_size > CONFIG_BYTES:
            raise ValueError("it is too large")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantized = config.get("quantization_config") or {}
    except UNREADABLE as error:
        raise _refused(folder, f"has no config that can be read: {error}", AGAIN) from error
    for key, value in _entries(config):
        if key.endswith(("attn_implementation", "attn_implementation_internal")):
            if any("/" in str(one) for one in leaves(value)):
                raise _refused(folder, f"asks for a kernel of {value!r} by its {key}")
        if key == "auto_map" and any("--" in str(one) for one in leaves(value)):
            raise _refused(folder, "takes its code from yet another repository, by its auto_map")
    method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
    if method not in (None, "bitsandbytes"):
        hint = "name the model in 16 bit instead"
        raise _refused(folder, f"is quantized already ({method})", hint)
    if "auto_map" in config and not trusted:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        if config.get("model_type") not in CONFIG_MAPPING_NAMES:
            raise _refused(
                folder,
                "is of a kind that only code of its own knows",
                "where you have looked at that code: trust_remote_code = true in [model], with the "
                "revision's 40 hex digits",
            )
    return config


def _refused(folder: Path, what: str, hint: str = LOOK) -> ModelError:
    return ModelError(f"the model in {folder} {what}", hint)


def check_description(folder: Path) -> None:
    """Raise DataError where a dataset's own description names files that are not in its folder."""
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    for name in ("README.md", ".huggingface.yaml"):
        try:
            text = (folder / name).read_text(encoding="utf-8", errors="replace")
            if name == "README.md":
                text = block[2] if (block := REGEX_YAML_BLOCK.search(text)) else ""
            described = yaml.safe_load(text) or {}
        except FileNotFoundError:
            continue
        except (OSError, yaml.YAMLError, RecursionError) as error:
            what = str(error).strip().partition("\n")[0]
            raise DataError(f"{folder / name} cannot be read: {what}", LOOK) from error
        configs = described.get("configs") if isinstance(described, dict) else None
        for count, place in enumerate(leaves(configs)):
            if count == DESCRIBED:
                raise DataError(f"{folder / name} names no end of files", LOOK)
            if OUTSIDE.search(str(place)):
                raise climbs(folder, str(place), name)


def check_reader(place: Path, module: str) -> None:
    """Raise DataError where `datasets` would read rows with more than a plain reader of text."""
    if (kind := module.rpartition(".")[2]) not in READERS:
        raise DataError(f"the rows in {place} are {kind}", "give them as .jsonl, .csv or .parquet")


def plain_columns(features: dict[str, Any]) -> list[str]:
    """The columns of text and numbers, however deep: to read them opens nothing else."""
    return [
        name
        for name, feature in features.items()
        if {str(kind) for key, kind in _entries([feature]) if key == "_type"} <= PLAIN
    ]


def check_files(folder: Path, *groups: Iterable[str]) -> None:
    """Raise DataError where a file, or what a link in its place leads to, is not in `folder`, or
    is an archive."""
    from datasets.utils.extract import Extractor

    root = folder.resolve()
    if folder.parent.name == "snapshots":  # of the hub's cache, where all files are links
        root = folder.parents[1].resolve()
    for file in (file for group in groups for file in group):
        if not Path(file).resolve().is_relative_to(root):
            raise climbs(folder, str(file), "it")
        if Extractor.infer_extractor_format(file) in ARCHIVES:
            raise DataError(f"{file} is an archive", "give rows as .jsonl, .csv or .parquet")


def climbs(folder: Path, place: str, who: str) -> DataError:
    hint = "name the folder that all of it is in as `path`, if it is yours"
    return DataError(f"{who} names {place!r} as rows, which is not inside {folder}", hint)


def check_code(what: str, file: Path | None = None) -> None:
    """Raise UsageError where a recipe would have `what` run that nobody here has agreed to.

    A `file` that ships with this project is agreed to. All other consent comes from the
    environment: a recipe cannot give it to itself.
    """
    known = file is not None and file.resolve().is_relative_to(shipped_folder().resolve())
    if not known and os.environ.get(ALLOW) != "1":
        hint = f"read it first; {ALLOW}=1 before the same command allows it"
        raise UsageError(f"the recipe has {what} run on this machine", hint)


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, however deep."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _entries(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner)


def leaves(value: Any) -> Iterator[Any]:
    """Every value that holds no others, however deep."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from leaves(inner)
    else:
        yield value


def check_judge(judge: Term, base: Path) -> None:
    """Raise UsageError where a judge or a reward is code that nobody has agreed to run."""
    if judge.code:
        file = located(judge.code[0], base)
        check_code(str(file), file)
