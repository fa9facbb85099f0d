"""What was run, and what differs between runs. No torch in here."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes import facts, rundir
from rlhf_recipes.errors import UsageError
from rlhf_recipes.tables import JUDGE, POLICY_KINDS

ELSEWHERE = re.compile(r"^(python:)?/.*/")  # where a file lies is no difference, what it holds is


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A run's manifest; None where it is missing or damaged."""
    manifest = rundir.read_json(folder / rundir.MANIFEST)
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        texts = [manifest[key] for key in ("title", "outcome", "ended", "recipe")]
        for entry in manifest["stages"]:
            texts += [
                entry["name"],
                entry["folder"],
                entry.get("kind", ""),
                entry.get("outcome", ""),
            ]
        Path(*texts, *manifest.get("overrides", ()), *manifest.get("model", ()))  # all are texts
        return manifest
    return None


def manifest_of(folder: Path) -> dict[str, Any]:
    """The same. Raises UsageError where there is none."""
    if (manifest := read_manifest(folder)) is None:
        raise UsageError(f"{folder} has no manifest.json that can be read", "run it again")
    return manifest


def run_folders(runs: Path) -> Iterator[tuple[Path, dict[str, Any] | None]]:
    """Every folder that a run of ours made or may have made, with its manifest."""
    for folder in sorted(runs.iterdir()) if runs.is_dir() else ():
        if folder.is_dir() and not folder.name.startswith("."):
            yield folder, read_manifest(folder)


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; links count for themselves."""
    files = [Path(at, name) for at, _, names in os.walk(path) for name in names]
    total = 0
    for file in [path] if path.is_file() else files:
        with contextlib.suppress(OSError):  # a live run's files come and go
            total += file.lstat().st_size
    return total


# ---- what was run -------------------------------------------------------------------------------


def list_runs(runs: Path) -> dict[str, Any]:
    """Every run, the newest last; what is none; and the size of all stages, each once."""
    found, others, known = [], [], {}
    for folder, manifest in run_folders(runs):
        if manifest is None:
            why = "is running" if rundir.held(folder) else "has no manifest.json that can be read"
            others.append({"name": folder.name, "why": why})
            continue
        stages = stage_folders(runs, manifest)
        known |= {stage: size(stage) for stage in stages if stage not in known}
        run = {
            "name": folder.name,
            "title": manifest.get("title"),
            "ended": str(manifest.get("ended") or ""),
            "outcome": "running" if rundir.held(folder) else manifest.get("outcome"),
            "stages_done": sum(rundir.read_record(stage) is not None for stage in stages),
            "stages": len(manifest["stages"]),
            "numbers": _headline(manifest, rundir.read_json(folder / "results.json") or {}),
            "bytes": size(folder),
            "stages_bytes": sum(known[stage] for stage in stages),
        }
        found.append(run)
    found.sort(key=lambda row: row["ended"])
    return {"runs": found, "others": others, "stages_bytes": sum(known.values())}


def stage_folders(runs: Path, manifest: dict[str, Any] | None) -> set[Path]:
    """The folders of a run's stages."""
    return {rundir.entry_folder(runs, entry) for entry in (manifest or {}).get("stages", [])}


def _headline(manifest: dict[str, Any], results: dict[str, Any]) -> dict[str, float]:
    """The numbers that an evaluation's summary is made of, as far as there are any."""
    accuracies = [key for key in results if key.endswith(".accuracy")]
    accuracy = [key for key in accuracies if key != f"{JUDGE}.accuracy"][-1:]
    made = [entry["name"] for entry in manifest["stages"] if entry.get("kind") in POLICY_KINDS]
    keys = [*accuracy, *(f"{name}.{what}" for name in made[-1:] for what in ("win_rate", "kl"))]
    return {key: results[key] for key in keys if isinstance(results.get(key), int | float)}


# ---- what differs -------------------------------------------------------------------------------


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
    manifest, found = manifest_of(folder), facts.read(folder)
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
