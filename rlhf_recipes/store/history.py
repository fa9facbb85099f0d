"""What was run, and what differs between runs. No torch in here."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_recipes.errors import UsageError
from rlhf_recipes.recipe.kinds import JUDGE, makes
from rlhf_recipes.store import layout, locks
from rlhf_recipes.store.files import read_json, to_json
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


def state(folder: Path, manifest: dict[str, Any]) -> str:
    """The outcome of a run, or "running". Who was killed wrote none, and holds no lock any more."""
    if locks.held(folder):
        return "running"
    return {"unfinished": "interrupted"}.get(manifest["outcome"], manifest["outcome"])


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
            "outcome": state(folder, manifest),
            "progress": "".join(str(pace(one) or "") for one in at),
            "stages_done": sum(layout.read_record(stage) is not None for stage in stages),
            "stages": len(manifest["stages"]),
            "numbers": _headline(manifest, read_json(folder / "results.json") or {}),
            "bytes": size(folder),
            "stages_bytes": sum(known[stage] for stage in stages),
        }
        found.append(run)
    found.sort(key=lambda row: row["ended"])
    return {"runs": found, "others": others, "stages_bytes": sum(known.values())}


class Pace(NamedTuple):
    """How far a stage is that is running, or was."""

    step: float
    of: float
    left: float | None  # seconds, by its last steps
    at: str  # when that was; "" where nothing says it

    def __str__(self) -> str:
        """step 70 of 282, 1 min 20 s left"""
        left = "" if self.left is None else f", {duration(self.left)} left"
        return f"step {self.step:.0f} of {self.of:.0f}{left}"


def pace(folder: Path) -> Pace | None:
    """By a stage's progress.json and the last of its metrics.jsonl; None where they say nothing."""
    beat, points = read_json(folder / layout.PROGRESS) or {}, []
    with contextlib.suppress(OSError):
        text = (folder / "metrics.jsonl").read_text(errors="replace")
        points = [_point(line) for line in text.split("\n")[-RECENT:]]
    if last := _point(to_json(beat)):
        # What an earlier process wrote has another clock.
        begun = beat.get("first")
        first = _point(to_json(beat | begun)) if isinstance(begun, dict) else None
        first = first or last
        points = [first, *(one for one in points if one and first[0] < one[0] < last[0]), last]
    whole = [one for one in points if one][-RECENT:]
    if not whole:
        return None
    (first_step, _, began), (step, of, now) = whole[0], whole[-1]
    left = None
    if step > first_step and now > began:
        left = (now - began) / (step - first_step) * (of - step)
    return Pace(step, of, left, str(beat.get("at") or ""))


def _point(line: str) -> tuple[float, float, float] | None:
    """Step, of how many, seconds."""
    with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        row = json.loads(line)
        step, of, seconds = (float(row[key]) for key in ("step", "of", "seconds"))
        return (step, of, seconds) if math.isfinite(step + of + seconds) else None
    return None


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
