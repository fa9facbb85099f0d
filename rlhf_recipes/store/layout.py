"""The disk layout: runs, stage folders, records, locks, provenance.

A stage folder is complete where its `stage.json` stands: it is written last, to a temporary name,
synced, then renamed. Nothing on disk says "running"; a lock is a kernel lock that dies with its
process, so nobody ever clears one by hand.

    <runs>/<name>/                    one run: recipe, manifest, results, log, model/
    <runs>/.stages/<kind>-<key12>/    one stage, shared by all runs: stage.json, work/, output/, …

Beside each lies its lock, `.<name>.lock`, and while it is replaced what is to take its place and
what had it: `.<name>.fresh`, `.<name>.old`.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from pathlib import Path
from typing import Any

from rlhf_recipes.errors import UsageError
from rlhf_recipes.store.files import read_json, remove, sync, sync_all, write_json, write_text
from rlhf_recipes.store.provenance import now

RECORD = "stage.json"
MANIFEST = "manifest.json"
REPORT = "report.html"
PROGRESS = "progress.json"  # in a stage's folder until it is complete: how far it is, and when
FRESH = ".fresh"  # in a run's folder: when its pass of `--fresh` began that is not finished
CHECKPOINTS = "checkpoint-*"  # in a stage's work/
BEGUN = "begun"  # there, too: when the pass of `--fresh` began that the stage is computed in


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def runs_folder(given: Path | None = None) -> Path:
    """`--runs`, else RLHF_RECIPES_RUNS, else ./runs."""
    return given or Path(os.environ.get("RLHF_RECIPES_RUNS") or "runs")


def stage_folder(runs: Path, kind: str, key: str) -> Path:
    return runs / ".stages" / f"{kind}-{key[:12]}"


def entry_folder(runs: Path, entry: dict[str, Any]) -> Path:
    """The folder of a stage in a manifest: one of the stages here, whatever the manifest says."""
    return runs / ".stages" / re.sub(r"[^\w-]", "_", Path(str(entry["folder"])).name)


def find_run(word: str, runs: Path) -> Path:
    """The run that a person means: its folder, or its name. Raises UsageError with the nearest."""
    for folder in (Path(word), runs / word):
        if (folder / MANIFEST).is_file():
            return folder
    known = sorted(manifest.parent.name for manifest in runs.glob(f"*/{MANIFEST}"))
    near = difflib.get_close_matches(Path(word).name, known, n=1, cutoff=0.5)
    hint = f"runs there: {', '.join(known)}" if known else "none was made there yet"
    if near:
        hint = f"did you mean {runs / near[0]}?"
    raise UsageError(f"no run {word!r} in {runs}", hint)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a complete stage; None where the stage is not complete."""
    return read_json(folder / RECORD)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Complete the stage. What it made is synced first: the record must not outlive it."""
    sync_all(folder)
    write_json(folder / RECORD, record)


def clear_stage(folder: Path, *, begun: str = "") -> None:
    """Make the stage folder ready to run in; only for who holds its lock, and where no record is.

    A stage's checkpoints stay, and the numbers and samples that led to them; of those that were
    made when nothing was to be taken as done, only those of the pass that `begun` names.
    """
    work, folder = folder / "work", folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sync(folder.parent)
    goes_on = any(work.glob(CHECKPOINTS)) and begun in ("", _read(work / BEGUN))
    for path in folder.iterdir():
        if not (goes_on and path.name in ("work", "metrics.jsonl", "samples.jsonl", "tensorboard")):
            remove(path)
    work.mkdir(exist_ok=True)
    (folder / "output").mkdir()
    if begun:
        write_text(work / BEGUN, begun)


def tidy(folder: Path) -> None:
    """Let go of what a complete folder has no use for: its checkpoints, and what it replaced."""
    for path in (folder / "work", folder / PROGRESS, beside(folder, "old")):
        with contextlib.suppress(OSError):
            remove(path)


def beside(folder: Path, what: str) -> Path:
    """Where a run's or a stage's `what` lies: beside the folder itself, wherever a link is."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.{what}")


def swap(new: Path, folder: Path) -> None:
    """`new`, on the same disk, takes the place of `folder`."""
    old, folder = beside(folder, "old"), folder.resolve()
    remove(old)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    with contextlib.suppress(OSError):  # another process may be at it; `tidy` comes again
        remove(old)


def settle(folder: Path) -> None:
    """End a swap that was cut off; only for who holds the stage's lock."""
    if read_record(beside(folder, "fresh")) is not None:
        swap(beside(folder, "fresh"), folder)


def begun(run_folder: Path) -> str:
    """When the pass of `--fresh` began that is under way; now, where none is."""
    if _read(run_folder / FRESH) is None:
        write_text(run_folder / FRESH, now())
    return (run_folder / FRESH).read_text(encoding="utf-8")


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None
