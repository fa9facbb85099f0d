"""What no run refers to, and what killed processes left: it can go. No torch in here."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path

from rlhf_recipes.errors import BusyError
from rlhf_recipes.store import files, layout, locks
from rlhf_recipes.store.history import run_folders, stage_folders
from rlhf_recipes.store.kept import ROWS, value_of

STAGE = re.compile(r"[a-z_]+-[0-9a-f]{12}")
ASIDE = re.compile(r"\.(.+)\.(fresh|old|gone)")  # beside a stage: its next, its last, one removed
HALF_A_FILE = r"\.[0-9a-z]+\.(json|jsonl|toml|html|md|arrow)\.[0-9a-f]+"
Spare = tuple[Path, str, Path]  # what can go, why, and the run or stage whose lock it takes


def unused(runs: Path) -> tuple[list[Spare], list[str]]:
    """What can go, less what a live process holds; and what speaks against letting any stage go."""
    found, doubts = _unused(runs)
    return [spare for spare in found if not locks.held(spare[2])], doubts


def remove(spare: Spare, runs: Path) -> bool:
    """Remove what `unused` found, unless it is held or referred to by now."""
    path, _, owner = spare
    with contextlib.suppress(BusyError), locks.lock(owner, owner.name):
        if spare not in _unused(runs)[0]:
            return False
        if path.parent == runs / ".stages":  # cut off half-way, it must not look whole
            gone = path.with_name(f".{owner.name}.gone")
            if path != gone:
                shutil.rmtree(gone, ignore_errors=True)
            path = path.rename(gone)
            locks.lock_file(owner).unlink(missing_ok=True)
        files.remove(path)
        return True
    return False


def _unused(runs: Path) -> tuple[list[Spare], list[str]]:
    found, doubts, used, stages, read = [], [], set(), runs / ".stages", []
    goes_on = set()  # what a `--fresh` that was cut off goes on with
    for folder, manifest in run_folders(runs):
        names = {stage.name for stage in stage_folders(runs, manifest)}
        used |= names
        goes_on |= names if (folder / ".fresh").exists() else set()
        read.append((manifest or {}).get("dataset"))
        live = locks.held(folder)
        ours = live or any((folder / name).exists() for name in (layout.MANIFEST, "recipe.toml"))
        if ours:
            found += _left(folder, rf"\.model(\.fresh|\.old)?|{HALF_A_FILE}", folder)
            rehearsed = layout.beside(folder, "rehearsal")
            found += [(rehearsed, "left over", folder)] if rehearsed.is_dir() else []
        if ours and manifest is None:
            doubts.append(f"{folder} has no manifest that can be read: any stage may be its own")
        elif live and not _says_what_it_runs(folder):
            doubts.append(f"{folder} is only just beginning: any stage may be its own")
    if stages.is_symlink():
        return found, [*doubts, f"{stages} is a link: what it leads to is left alone"]
    for link in runs.glob("[!.]*"):
        if not link.exists():
            doubts.append(f"{link} leads to nothing: it may be a run on a disk that is not here")
    for path in sorted(stages.glob("*")):
        aside = ASIDE.fullmatch(path.name)
        stage = stages / aside[1] if aside else path
        if path.is_symlink() or not STAGE.fullmatch(stage.name):
            continue
        whole = layout.read_record(path) is not None
        if stage.name not in used and not doubts:
            found.append((path, f"no run refers to it{'' if whole else ', unfinished'}", stage))
        elif not aside:
            found += _left(path, HALF_A_FILE, path)
            found += _left(path / "work", ".*" if whole else r"partial|damaged-.*", path)
        else:
            idle = not whole and stage.name not in goes_on and layout.read_record(stage)
            if {"fresh": idle, "old": stage.is_dir(), "gone": True}[aside[2]]:
                found.append((path, "left over", stage))
    read += [(layout.read_record(stages / name) or {}).get("payload") for name in sorted(used)]
    found += _left(stages / ROWS, HALF_A_FILE, stages / ROWS)
    found += [] if doubts else _spare_rows(stages / ROWS, json.dumps(read))
    return found, doubts


def _spare_rows(folder: Path, read: str) -> list[Spare]:
    """The files of kept rows that no run reads: `read` has the identities of what runs read."""
    found = []
    for file in [] if folder.is_symlink() else sorted(folder.glob("[!.]*")):
        sources = (value_of(file.with_suffix(".json")) or {}).get("sources", [])
        if not any(str(value) in read for source in sources for value in source.values()):
            found.append((file, "no run reads these rows", folder))
    return found


def _left(folder: Path, names: str, owner: Path) -> list[Spare]:
    """What a process that was killed left in a folder of its own; links are left alone."""
    there = [] if folder.is_symlink() else sorted(folder.glob("*"))
    found = [path for path in there if re.fullmatch(names, path.name) and not path.is_symlink()]
    return [(path, "left over", owner) for path in found]


def _says_what_it_runs(folder: Path) -> bool:
    """Whether a live run has written its manifest since it began."""
    began, wrote = locks.lock_file(folder).stat(), (folder / layout.MANIFEST).stat()
    return wrote.st_mtime_ns >= began.st_mtime_ns
