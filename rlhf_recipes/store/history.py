"""What was run, and what differs between runs. No torch in here."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.errors import UsageError
from rlhf_recipes.recipe.kinds import JUDGE, makes
from rlhf_recipes.store import layout, locks
from rlhf_recipes.store.files import read_json
from rlhf_recipes.text import duration

RECENT = 12  # steps, that a pace is taken from


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """A run's manifest; None where it is missing or damaged."""
    if (manifest := read_json(folder / layout.MANIFEST)) is None:
        return None
    with contextlib.suppress(AttributeError, KeyError, TypeError):
        texts = [manifest[key] for key in ("title", "outcome", "ended", "recipe")]
        for entry in manifest["stages"]:
            texts += [entry["name"], entry["folder"]]
            texts += [entry.get(key, "") for key in ("kind", "outcome")]
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


def list_runs(runs: Path) -> dict[str, Any]:
    """Every run, the newest last; what is none; and the size of all stages, each once."""
    found: list[dict[str, Any]] = []
    others: list[dict[str, str]] = []
    known: dict[Path, int] = {}
    for folder, manifest in run_folders(runs):
        if manifest is None:
            why = "is running" if locks.held(folder) else "has no manifest.json that can be read"
            others.append({"name": folder.name, "why": why})
            continue
        stages = stage_folders(runs, manifest)
        known |= {stage: size(stage) for stage in stages if stage not in known}
        at = [one for one in stages if locks.held(folder) and not layout.read_record(one)][:1]
        run = {
            "name": folder.name,
            "title": manifest.get("title"),
            "ended": str(manifest.get("ended") or ""),
            "outcome": "running" if locks.held(folder) else manifest.get("outcome"),
            "progress": "".join(map(progress, at)),
            "stages_done": sum(layout.read_record(stage) is not None for stage in stages),
            "stages": len(manifest["stages"]),
            "numbers": _headline(manifest, read_json(folder / "results.json") or {}),
            "bytes": size(folder),
            "stages_bytes": sum(known[stage] for stage in stages),
        }
        found.append(run)
    found.sort(key=lambda row: row["ended"])
    return {"runs": found, "others": others, "stages_bytes": sum(known.values())}


def progress(folder: Path) -> str:
    """How far a running stage is: "step 70 of 282, 1 min 20 s left"; "" where it does not say."""
    rows = []
    with contextlib.suppress(OSError):
        for line in (folder / "metrics.jsonl").read_text(errors="replace").split("\n")[-RECENT:]:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                row = json.loads(line)
                rows.append([float(row[key]) for key in ("step", "of", "seconds")])
    rows = [row for row in rows if all(map(math.isfinite, row))]
    if not rows:
        return ""
    (first, _, began), (step, of, now) = rows[0], rows[-1]
    left = duration((now - began) / (step - first) * (of - step)) if step > first else ""
    return f"step {step:.0f} of {of:.0f}" + (f", {left} left" if left and now > began else "")


def stage_folders(runs: Path, manifest: dict[str, Any] | None) -> dict[Path, None]:
    """The folders of a run's stages, in order, each once."""
    entries = (manifest or {}).get("stages", [])
    return dict.fromkeys(layout.entry_folder(runs, entry) for entry in entries)


def _headline(manifest: dict[str, Any], results: dict[str, Any]) -> dict[str, float]:
    """The numbers that an evaluation's summary is made of, as far as there are any."""
    accuracies = [key for key in results if key.endswith(".accuracy")]
    accuracy = [key for key in accuracies if key != f"{JUDGE}.accuracy"][-1:]
    made = [entry["name"] for entry in manifest["stages"] if makes(entry.get("kind", ""), "policy")]
    wanted = ("judge_win_rate", "win_rate", "kl")
    keys = [*accuracy, *(f"{name}.{what}" for name in made[-1:] for what in wanted)]
    return {key: results[key] for key in keys if isinstance(results.get(key), int | float)}
