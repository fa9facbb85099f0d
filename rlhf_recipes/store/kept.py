"""Values that are kept to be used again: a file for each, named by the digest of all that decides
the value. A damaged file counts as missing. No torch in here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_recipes.store.digests import digest
from rlhf_recipes.store.files import read_json, write_json


def recall(folder: Path, about: dict[str, Any]) -> Any:
    """The value that was kept for exactly this; None where there is none that is whole."""
    found = read_json(folder / f"{digest(about)}.json") or {}
    value = found.get("value")
    return value if found.get("digest") == digest(value) else None


def keep(folder: Path, about: dict[str, Any], value: Any) -> None:
    write_json(folder / f"{digest(about)}.json", {"value": value, "digest": digest(value)})
