"""What a model or a dataset is, by content: a digest where it is local, a commit where it is not.

A hub branch means the commit that this machine already has, so that a run today and one tomorrow
are the same run; only where nothing is cached is the hub asked.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes import rundir
from rlhf_recipes.errors import DataError, ModelError
from rlhf_recipes.identity import digest
from rlhf_recipes.tables import is_path

if TYPE_CHECKING:
    from rlhf_recipes.recipe import Recipe
    from rlhf_recipes.tables import DatasetTable

# Smaller files are read each time; the digest of a larger one is kept by size and time of change.
REMEMBERED_BYTES = 8 * 2**20
HUB_TIMEOUT = 10  # seconds, so that a machine with no network hears so quickly
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def identify_model(recipe: Recipe, runs: Path) -> dict[str, str]:
    """The identity of the base model: {"content": sha256} or {"repo": …, "revision": commit}."""
    if recipe.model.is_local:
        return {"content": content_digest(recipe.model.folder, runs)}
    return identify_hub_model(recipe.model.name, recipe.model.revision)


def identify_reward_model(name: str, recipe: Recipe, runs: Path) -> dict[str, str]:
    """The same of a reward model that no stage of the recipe made: a folder or a hub id."""
    if is_path(name):
        return {"content": content_digest(resolve(name, recipe), runs)}
    return identify_hub_model(name, None)


def identify_dataset(table: DatasetTable, runs: Path) -> dict[str, Any]:
    """The identity of a dataset's files, before any of our settings chooses among its rows."""
    if table.is_local:
        return {"content": content_digest(table.file, runs)}
    return {"repo": table.path, "revision": dataset_commit(table)}


def dataset_commit(table: DatasetTable) -> str:
    """The commit of a dataset on the hub that is keyed, and so the one to load."""
    try:
        return _commit(table.path, table.revision, "dataset")
    except Exception as error:
        raise DataError(*_hub_trouble(table.path, "dataset", error)) from error


def identify_hub_model(name: str, revision: str | None) -> dict[str, str]:
    try:
        return {"repo": name, "revision": _commit(name, revision, "model")}
    except Exception as error:
        raise ModelError(*_hub_trouble(name, "model", error)) from error


def resolve(name: str, recipe: Recipe) -> Path:
    """A folder that a recipe names; relative paths are relative to the recipe."""
    return (recipe.path.parent / Path(name).expanduser()).resolve()


def model_folder(recipe: Recipe) -> Path:
    """The folder on this machine to load the base model from."""
    return local_path(recipe.model.name, recipe, recipe.model.revision)


def local_path(name: str, recipe: Recipe, revision: str | None = None) -> Path:
    """The folder on this machine to load a model from; downloads it first where it must."""
    if is_path(name):
        return resolve(name, recipe)
    from huggingface_hub import snapshot_download

    commit = identify_hub_model(name, revision)["revision"]
    reason: Exception = FileNotFoundError("it has no weights in safetensors")
    for here in (True, False):
        try:
            found = snapshot_download(
                name, revision=commit, allow_patterns=MODEL_FILES, local_files_only=here
            )
        except Exception as error:
            reason = error
            continue
        if any(Path(found).glob("*.safetensors")):  # of a snapshot, any part may be here
            return Path(found)
    raise ModelError(*_hub_trouble(name, "model", reason)) from reason


def content_digest(path: Path, runs: Path) -> str:
    """SHA-256 over a file's suffix and bytes, or over a folder's file names and bytes.

    Where it lies does not count, nor do hidden files and Markdown: a moved folder and an edited
    README rerun nothing.
    """
    if path.is_file():
        return digest([path.suffix, _file_digest(path, runs)])
    names = [
        file.relative_to(path).as_posix()
        for file in path.rglob("*")
        if file.is_file() and file.suffix != ".md"
    ]
    shown = sorted(name for name in names if not any(p.startswith(".") for p in name.split("/")))
    return digest({name: _file_digest(path / name, runs) for name in shown})


def _file_digest(path: Path, runs: Path) -> str:
    stat = path.stat()
    if stat.st_size < REMEMBERED_BYTES:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    store = runs / ".stages" / "digests.json"
    known = rundir.read_json(store) or {"files": {}}
    stamp = [stat.st_size, stat.st_mtime_ns]
    entry = known["files"].get(str(path.resolve()))
    if entry is None or entry[:2] != stamp:
        with path.open("rb") as stream:
            entry = [*stamp, hashlib.file_digest(stream, "sha256").hexdigest()]
        known["files"][str(path.resolve())] = entry
        rundir.write_json(store, known)
    return entry[2]


def _commit(repo: str, revision: str | None, kind: str) -> str:
    """The 40-hex commit of a branch or tag: the cached one, else what the hub says now."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=kind)
    cached = folder / "refs" / (revision or "main")
    if cached.is_file():
        return cached.read_text().strip()
    info = HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=HUB_TIMEOUT)
    return info.sha


def _hub_trouble(name: str, kind: str, error: Exception) -> tuple[str, str]:
    """Message and hint; the hub's own first line says what went wrong."""
    reason = str(error).strip().splitlines() or [""]
    return (
        f"the {kind} {name} is neither on this machine nor to be had from the hub "
        f"({type(error).__name__}: {reason[0][:160]})",
        f"check the name and the network, or name a local folder (./…) as the {kind}",
    )
