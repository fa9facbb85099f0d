"""The page that compares runs: what differs in their recipes, and in their results how surely."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.errors import UsageError
from rlhf_recipes.report.facts import Facts
from rlhf_recipes.report.html import page
from rlhf_recipes.report.run_page import SHARES
from rlhf_recipes.report.verdict import verdict
from rlhf_recipes.store.files import write_text
from rlhf_recipes.store.history import manifest_of
from rlhf_recipes.text import plain

ELSEWHERE = re.compile(r"^(python:)?/.*/")  # where a file lies is no difference, what it holds is


def write(folders: Sequence[Path], file: Path) -> None:
    """Write the page of some runs to `file`. Raises UsageError where one cannot be read."""
    parts, runs = compare(folders), [Facts(folder) for folder in folders]
    values = {
        "names": [plain(facts.folder.resolve().name) for facts in runs],
        "runs": [(facts, verdict(facts)) for facts in runs],
        "parts": {part: _rows(rows, runs) for part, rows in parts.items()},
    }
    write_text(file, page("compare.html", values))


def _rows(rows: dict[str, list[Any]], runs: list[Facts]) -> dict[str, list[str]]:
    """Each key's values as text; the ends of an interval beside the value that they are around."""
    made = {}
    for key, values in rows.items():
        if key.endswith(("_low", "_high")) and key.rpartition("_")[0] in rows:
            continue
        made[key] = [_value(key, value, run) for value, run in zip(values, runs, strict=True)]
    return made


def _value(key: str, value: Any, run: Facts) -> str:
    if not isinstance(value, float):
        return "—" if value is None else str(value)
    share = any(one in key.rpartition(".")[2] for one in SHARES)
    around = (run.number(key + end) for end in ("_low", "_high"))
    numbers = [value, *(one for one in around if one is not None)]
    first, *ends = [f"{100 * one:.3g}" if share else f"{one:.4g}" for one in numbers]
    text = first + " %" * share + (f" ({' to '.join(ends)})" if len(ends) == 2 else "")
    return text.replace("-", "−")


def compare(folders: Sequence[Path]) -> dict[str, dict[str, list[Any]]]:
    """By part ("recipe", "results", "versions", "hardware"): each key whose values differ.

    A value for each run, None where it has none. Raises UsageError where a run cannot be read.
    """
    told = [_told(folder) for folder in folders]
    parts: dict[str, dict[str, list[Any]]] = {}
    for part in told[0]:
        keys = dict.fromkeys(key for one in told for key in one[part])
        rows = [(key, [one[part].get(key) for one in told]) for key in keys]
        parts[part] = {key: row for key, row in rows if any(value != row[0] for value in row)}
    return parts


def _told(folder: Path) -> dict[str, dict[str, Any]]:
    manifest, found = manifest_of(folder), Facts(folder)
    if not found.recipe:
        raise UsageError(f"{folder} has no resolved.toml that can be read", "run it again")
    return {
        "recipe": _flat(found.recipe) | _contents(manifest),
        "results": {key: value for key, value in found.results.items() if key != "format"},
        "versions": _flat(manifest.get("versions", {})),
        "hardware": _flat(manifest.get("hardware", {})),
    }


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        value = {f"[{number}]": one for number, one in enumerate(value, 1)}
    if not isinstance(value, dict):
        return {where: ELSEWHERE.sub(r"\1", value) if isinstance(value, str) else value}
    flat: dict[str, Any] = {}
    for key, one in value.items():
        flat |= _flat(one, where + key if key[:1] == "[" else f"{where}.{key}".lstrip("."))
    return flat


def _contents(manifest: dict[str, Any]) -> dict[str, Any]:
    """The digests and commits of what was read; a stage's own where they are not the recipe's."""
    found = _flat({key: manifest.get(key, {}) for key in ("model", "dataset")})
    for entry in manifest["stages"]:
        for key, value in _flat(entry.get("payload", {})).items():
            if found.get(key) != value:
                found[f"{entry['name']}.{key}"] = value
    ends = ("content", "revision", "mirror")
    return {key: value for key, value in found.items() if key.rpartition(".")[2] in ends}
