"""What a model or a dataset is, by content: a digest where it is local, a commit where it is not.

A hub branch means the commit that this machine already has, so that a run today and one tomorrow
are the same run; only where nothing is cached is the hub asked.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rlhf_recipes.errors import ModelError
from rlhf_recipes.recipe.kinds import JUDGE
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.tables import DatasetTable, is_path, located
from rlhf_recipes.recipe.wiring import code_of, model_judges, principles_of
from rlhf_recipes.sources import mirror, trust
from rlhf_recipes.sources.hub import MODEL_FILES, Repo, says_no
from rlhf_recipes.store.digests import digest, file_digest
from rlhf_recipes.store.files import read_json, write_json
from rlhf_recipes.store.fingerprint import Identities, foreign_models, tables_read

# Smaller files are read each time; the digest of a larger one is kept by size and time of change.
REMEMBERED_BYTES = 8 * 2**20


def model_repo(name: str, revision: str | None = None, trusted: bool = False) -> Repo:
    return Repo("model", name, revision, (*MODEL_FILES, *(["*.py"] if trusted else [])))


def base_repo(recipe: Recipe) -> Repo:
    model = recipe.model
    return model_repo(model.name, model.revision, model.trust_remote_code)


def dataset_repo(table: DatasetTable) -> Repo:
    # Without its folder, a dataset's README may want any of its files.
    inside = PurePosixPath(table.data_dir or ".") / "*"
    wanted = (str(inside), "README.md") if table.data_dir else ("*",)
    return Repo("dataset", table.path, table.revision, wanted)


def identify(recipe: Recipe, runs: Path) -> Identities:
    """What every name in the recipe means here. Raises DataError and ModelError."""
    rules = {one.code[0] for one in code_of(recipe) if one.code} | {*principles_of(recipe)}
    base, judging = identify_base(recipe, runs), recipe.model_of(JUDGE)
    own = {judging.name} if judging is not recipe.model else set()
    named = {*foreign_models(recipe), *model_judges(recipe), *own}
    models = {n: identify_model(n, recipe, runs) for n in named}
    if any(models[name] == base for name in own):
        what = f"evaluation.judge_model is the recipe's own base, {recipe.model.name}"
        raise ModelError(what, "name a model of another make, or leave it out")
    return Identities(
        base,
        models,
        {table: identify_dataset(table, runs) for table in dict.fromkeys(tables_read(recipe))},
        {file: content_digest(located(file, recipe.model.base), runs) for file in rules},
    )


def identify_base(recipe: Recipe, runs: Path) -> dict[str, str]:
    """The identity of the base model: as `identify_model` has it, or its mirror's.

    {"repo": …, "mirror": sha256} where no hub answers. What is on this machine already wins, the
    hub's before the mirror's.
    """
    model = recipe.model
    if model.is_local:
        return identify_model(model.name, recipe, runs)
    repo = base_repo(recipe)
    table = model.mirror
    if table is None or repo.cached():
        return {"repo": model.name, "revision": repo.commit()}
    if not mirror.folder_of(table).is_dir():
        try:
            return {"repo": model.name, "revision": repo.commit(newest=True)}
        except ModelError as error:
            if says_no(error.__cause__):
                raise
    return {"repo": model.name, "mirror": table.sha256}


def identify_model(name: str, recipe: Recipe, runs: Path) -> dict[str, str]:
    """The identity of a model: {"content": sha256} or {"repo": …, "revision": commit}."""
    if is_path(name):
        return {"content": content_digest(located(name, recipe.model.base), runs)}
    return {"repo": name, "revision": model_repo(name).commit()}


def identify_dataset(table: DatasetTable, runs: Path) -> dict[str, Any]:
    """The identity of a dataset's files, before any of our settings chooses among its rows."""
    if table.is_local:
        return {"content": content_digest(table.file, runs, _row_files(table))}
    return {"repo": table.path, "revision": dataset_repo(table).commit()}


def base_folder(recipe: Recipe, identity: Mapping[str, str]) -> Path:
    """The folder on this machine to load the base model from, brought here where it must be.

    `identity` is what `identify_base` said, now or when an earlier run was planned. Raises
    ModelError where the folder asks for more than to be loaded.
    """
    model = recipe.model
    if model.trust_remote_code:
        trust.check_code(f"code of the model {model.name} at {model.revision}")
    if model.mirror and "mirror" in identity:
        return mirror.bring(model.mirror)
    folder = model.folder
    if not model.is_local:
        repo = base_repo(recipe)
        folder = repo.snapshot(identity.get("revision") or repo.commit())
    trust.check_model(folder, trusted=model.trust_remote_code)
    return folder


def config_folder(recipe: Recipe, identity: Mapping[str, str]) -> Path:
    """A folder with the base model's config.json: no weights are brought for it.

    Raises ModelError as `base_folder` does.
    """
    model, repo = recipe.model, base_repo(recipe)
    mirrored = model.mirror if "mirror" in identity else None
    if mirrored and not mirror.folder_of(mirrored).is_dir():
        raise ModelError(f"{model.name} is not here", f"rlhf-recipes fetch {recipe.path}")
    if model.is_local or mirrored or repo.cached():
        return base_folder(recipe, identity)
    folder = repo.config(identity["revision"])
    trust.check_config(folder)
    return folder


def model_folder(name: str, recipe: Recipe) -> Path:
    """The folder on this machine to load another model from, brought here where it must be.

    No code of its own is run, whatever the recipe says of its base. Raises as `base_folder` does.
    """
    repo, folder = model_repo(name), located(name, recipe.model.base)
    if not is_path(name):
        folder = repo.snapshot(repo.commit())
    trust.check_model(folder)
    return folder


def dataset_place(table: DatasetTable) -> Path:
    """The file or folder to load a dataset from, brought here where it must be."""
    if table.is_local:
        return table.file
    repo = dataset_repo(table)
    return repo.snapshot(repo.commit())


def _row_files(table: DatasetTable) -> Callable[[Path], bool]:
    """Whether a file, by its place in the dataset's folder, has a say in what its rows are."""
    names = [str(name) for name in trust.leaves(table.data_files or [])]
    places = {PurePosixPath(table.data_dir or ".") / name for name in names}
    patterns = [name for name in names if re.search(r"[*?\[{]", name)]

    def has_a_say(file: Path) -> bool:
        if file == Path("README.md"):  # its front matter may say which files are of which split
            with (table.file / file).open(encoding="utf-8", errors="replace") as stream:
                return stream.read().lstrip().startswith("---")
        return file in places if names and not patterns else file.suffix not in (".md", ".py")

    return has_a_say


def content_digest(
    path: Path, runs: Path, counts: Callable[[Path], bool] = lambda file: file.suffix != ".md"
) -> str:
    """SHA-256 over a file's suffix and bytes, or over the names and bytes of a folder's files.

    Where it lies does not count, nor do hidden files and, as far as `counts` has it, Markdown: a
    moved folder and an edited README rerun nothing.
    """
    if path.is_file():
        files = {path.name: _file_digest(path, runs)}
        found = digest([path.suffix, *files.values()])
    else:
        there = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
        shown = [f for f in there if not any(part.startswith(".") for part in f.parts)]
        files = {f.as_posix(): _file_digest(path / f, runs) for f in shown if counts(f)}
        found = digest(files)
    _remember(runs, "contents", found, files)
    return found


def _file_digest(path: Path, runs: Path) -> str:
    stat = path.stat()
    if stat.st_size < REMEMBERED_BYTES:
        return file_digest(path)
    place, stamp = str(path.resolve()), [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
    entry = remembered(runs)["files"].get(place)
    if entry is None or entry[:-1] != stamp:
        entry = [*stamp, file_digest(path)]
        _remember(runs, "files", place, entry)
    return entry[-1]


# ---- what is kept beside the stages: no result depends on it ------------------------------------


def remembered(runs: Path) -> dict[str, dict[str, Any]]:
    """The digests of large files, by place; and those of all files of a content, by its digest."""
    return {"files": {}, "contents": {}, **(read_json(_store(runs)) or {})}


def _remember(runs: Path, what: str, key: str, value: Any) -> None:
    known = remembered(runs)
    if runs.is_dir() and known[what].get(key) != value:
        known[what][key] = value
        with contextlib.suppress(OSError):
            write_json(_store(runs), known)


def _store(runs: Path) -> Path:
    return runs / ".stages" / "digests.json"
