"""Values that are kept to be used again: a file for each, named by the digest of all that decides
the value. A damaged file counts as missing. No torch in here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_recipes.store.digests import digest
from rlhf_recipes.store.files import read_json, write_json

ROWS = "rows"  # in .stages: where encoded rows are kept


def name_of(about: dict[str, Any]) -> str:
    """The name, less its suffix, of every file that is kept for exactly this."""
    return digest(about)


def recall(folder: Path, about: dict[str, Any]) -> Any:
    """The value that was kept for exactly this; None where there is none that is whole."""
    return value_of(folder / f"{name_of(about)}.json")


def value_of(file: Path) -> Any:
    """The value in a file of `keep`; None where the file is not whole."""
    found = read_json(file) or {}
    value = found.get("value")
    return value if found.get("digest") == digest(value) else None


def keep(folder: Path, about: dict[str, Any], value: Any) -> None:
    write_json(folder / f"{name_of(about)}.json", {"value": value, "digest": digest(value)})
