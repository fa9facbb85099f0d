"""From a [dataset] table to the rows of a split, column by column, as its files have them."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.data.exports import plain_rows
from rlhf_recipes.data.files import rows_of
from rlhf_recipes.errors import DataError, ModelError, machine_error
from rlhf_recipes.recipe.tables import form_of
from rlhf_recipes.sources import trust
from rlhf_recipes.sources.resolve import dataset_place


def load_split(table: Any, split: str, read_as: dict[str, None]) -> Iterator[dict[str, Any]]:
    """The rows of a split. Raises DataError where a file holds none, or asks for more."""
    try:
        for row in _read_split(table, split, read_as):
            yield from plain_rows(row)
    except Exception as error:
        if isinstance(error, (DataError, ModelError)) or machine_error(error):
            raise
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).partition("\n")[0]
        raise DataError(
            f"{table.path} cannot be read: {reason[:200]}", "look at its files"
        ) from error


def _read_split(table: Any, split: str, read_as: dict[str, None]) -> Iterable[dict[str, Any]]:
    """JSON and tables are read as they are written; `datasets` says of a folder which they are."""
    from datasets import load_dataset_builder

    place = dataset_place(table)
    form = form_of(place) if place.is_file() else ""
    if form in ("json", "csv"):
        trust.check_files(place, [str(place)])
        return _part({"train": [place]}, form, split, read_as)
    if form:
        made = load_dataset_builder(form, data_files=glob.escape(str(place)))
        mode = None
    else:
        words = {"name": table.name, "data_dir": table.data_dir, "data_files": table.data_files}
        if isinstance(table.data_files, dict) and split in table.data_files:
            words["data_files"] = {split: table.data_files[split]}  # others may have other columns
        trust.check_description(place)
        made = load_dataset_builder(str(place), **words)
        # What `datasets` keeps of a folder is found by its name and patterns alone, not by its
        # bytes: a folder of ours is read anew. A snapshot's name is its commit.
        mode = "reuse_cache_if_exists" if table.is_local else None
    form = type(made).__module__.rpartition(".")[2]
    trust.check_reader(place, form)
    trust.check_files(place, *(made.config.data_files or {}).values())
    if form in ("json", "csv"):
        files = {name: list(map(Path, held)) for name, held in made.config.data_files.items()}
        return _part(files, form, split, read_as)
    made.download_and_prepare(download_mode=mode)
    rows = made.as_dataset(split=split)
    plain = trust.plain_columns(rows.features.to_dict())
    if left := [name for name in rows.column_names if name not in plain]:
        read_as[f"without {', '.join(left)}: pictures and sounds are not read"] = None
    return rows.select_columns(plain)


def _part(
    files: dict[str, list[Path]], form: str, split: str, read_as: dict[str, None]
) -> Iterator[dict[str, Any]]:
    """The rows of a split, or of parts of some: "train", "train[:100]+test[10%:]"."""

    def rows(name: str) -> Iterator[dict[str, Any]]:
        if name not in files:
            raise DataError(f"there is no split {name!r}: there is {', '.join(files)}")
        for file in files[name]:
            found, how = rows_of(file, form)
            if how:
                read_as[f"{file.name} has {how}"] = None
            yield from found

    if not re.search(r"[\[+]", split):
        yield from rows(split)
        return
    from datasets import ReadInstruction

    names = {re.split(r"[\[(]", part)[0].strip() for part in split.split("+")}
    held = {name: list(rows(name)) for name in names}
    counts = {name: len(every) for name, every in held.items()}
    for part in ReadInstruction.from_spec(split).to_absolute(counts):
        yield from held[part.splitname][part.from_ : part.to]
