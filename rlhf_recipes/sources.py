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
from rlhf_recipes.tables import is_path, located

if TYPE_CHECKING:
    from rlhf_recipes.recipe import Recipe
    from rlhf_recipes.tables import DatasetTable

# Smaller files are read each time; the digest of a larger one is kept by size and time of change.
REMEMBERED_BYTES = 8 * 2**20
HUB_TIMEOUT = 10  # seconds, so that a machine with no network hears so quickly
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def identify_model(
    name: str, recipe: Recipe, runs: Path, revision: str | None = None
) -> dict[str, str]:
    """The identity of a model: {"content": sha256} or {"repo": …, "revision": commit}."""
    if is_path(name):
        return {"content": content_digest(located(name, recipe.model.base), runs)}
    return identify_hub_model(name, revision)


def identify_dataset(table: DatasetTable, runs: Path) -> dict[str, Any]:
    """The identity of a dataset's files, before any of our settings chooses among its rows."""
    if table.is_local:
        return {"content": content_digest(table.file, runs)}
    return {"repo": table.path, "revision": dataset_commit(table)}


def dataset_commit(table: DatasetTable) -> str:
    """The commit of a dataset on the hub that is keyed, and so the one to load."""
    return _commit(table.path, table.revision, "dataset")


def identify_hub_model(name: str, revision: str | None) -> dict[str, str]:
    return {"repo": name, "revision": _commit(name, revision, "model")}


def model_folder(recipe: Recipe) -> Path:
    """The folder on this machine to load the base model from."""
    return local_path(recipe.model.name, recipe, recipe.model.revision)


def local_path(name: str, recipe: Recipe, revision: str | None = None) -> Path:
    """The folder on this machine to load a model from; downloads it first where it must."""
    if is_path(name):
        return located(name, recipe.model.base)
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
    raise _hub_trouble(name, "model", reason) from reason


def content_digest(path: Path, runs: Path) -> str:
    """SHA-256 over a file's suffix and bytes, or over a folder's file names and bytes.

    Where it lies does not count, nor do hidden files and Markdown: a moved folder and an edited
    README rerun nothing.
    """
    if path.is_file():
        return digest([path.suffix, _file_digest(path, runs)])
    files = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    shown = [f for f in files if not any(part.startswith(".") for part in f.parts)]
    counted = [f for f in shown if f.suffix != ".md"]
    return digest({f.as_posix(): _file_digest(path / f, runs) for f in counted})


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
    """The 40-hex commit of a branch or tag: the cached one, else what the hub says now.

    Raises ModelError or DataError where neither is to be had.
    """
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    try:
        folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type=kind)
        cached = folder / "refs" / (revision or "main")
        if cached.is_file():
            return cached.read_text().strip()
        api = HfApi()
        return api.repo_info(repo, revision=revision, repo_type=kind, timeout=HUB_TIMEOUT).sha
    except Exception as error:
        raise _hub_trouble(repo, kind, error) from error


def _hub_trouble(name: str, kind: str, error: Exception) -> DataError | ModelError:
    """The hub's own first line says what went wrong."""
    reason = str(error).strip().splitlines() or [""]
    return (DataError if kind == "dataset" else ModelError)(
        f"the {kind} {name} is neither on this machine nor to be had from the hub "
        f"({type(error).__name__}: {reason[0][:160]})",
        f"check the name and the network, or name a local folder (./…) as the {kind}",
    )
