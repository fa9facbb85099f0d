"""Checkpoints of a stage under way: folders in its `work/`, each whole or not there.

One is written to `partial/`: every file synced, `checkpoint.json` with their digests last, and only
then renamed `checkpoint-<step>`. The newest is taken that its digests vouch for and whose stage
began with the same weights. One that is damaged, or another run's, is named and set aside.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers.integrations import TensorBoardCallback

from rlhf_recipes import group
from rlhf_recipes.errors import lost
from rlhf_recipes.screen import StageProgress
from rlhf_recipes.store import layout
from rlhf_recipes.store.digests import file_digest
from rlhf_recipes.store.files import read_json, sync, write_json

RECORD = "checkpoint.json"
WEIGHTS = "weights.safetensors"
STATE = "trainer_state.json"


@contextlib.contextmanager
def written(work: Path, step: int, start: str, keep: int | None) -> Iterator[Path]:
    """A folder to write a checkpoint's files to; of all of them the last `keep` stay."""
    aside = work / "partial"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        for file in (*work.parent.glob("*.jsonl"), *aside.iterdir()):  # what led to it is kept too
            sync(file)
            if file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))  # torch is silent
        files = {file.name: file_digest(file) for file in sorted(aside.iterdir())}
        write_json(aside / RECORD, {"start": start, "step": step, "files": files})
        aside.rename(work / f"checkpoint-{step:06d}")
        sync(work)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    for old in _folders(work)[:-keep] if keep else ():
        old.rename(aside)  # what is deleted by half has no checkpoint's name
        shutil.rmtree(aside)


def newest(work: Path, start: str, note: Callable[[str], None]) -> Path | None:
    """The last checkpoint that is whole and of this start; None where none is."""
    for folder in reversed(_folders(work)):
        wrong = _wrong(folder, start)
        if not wrong:
            return folder
        aside = work / folder.name.replace("checkpoint", "damaged")
        while aside.exists():
            aside = aside.with_name(f"{aside.name}-again")
        folder.rename(aside)
        note(f"{folder.name} is not used: {wrong}; it was set aside as {aside.name}")
    return None


def _folders(work: Path) -> list[Path]:
    found = work.glob(layout.CHECKPOINTS)
    return sorted(found, key=lambda folder: (len(folder.name), folder.name))


def _wrong(folder: Path, start: str) -> str:
    """What is wrong with a checkpoint, as a phrase; nothing where it is whole."""
    try:
        record = read_json(folder / RECORD)
        if record is None:
            return f"{RECORD} is missing or damaged"
        name = f"checkpoint-{str(record.get('step')).zfill(6)}"
        if (record.get("start"), name) != (start, folder.name):
            return "it is another run's"
        files = record.get("files") or {}
        there = {file.name for file in folder.iterdir()} - {RECORD}
        for name in sorted(there | set(files)):
            if name not in there:
                return f"{name} is missing"
            if file_digest(folder / name) != files.get(name):
                return f"{name} is not what was written"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    return ""


class Resumable:
    """Mixed in before a trainer of transformers: its checkpoints are those above.

    transformers' own code writes and reads optimizer, scheduler, random numbers and counters. Its
    heirs say what is trained (`tensors()`, saved from and loaded into), and what else the rest
    depends on (`carried()`, fit for JSON, which `carry` takes back).
    """

    key: str  # the stage's
    progress: StageProgress

    def __init__(self, *args: Any, **words: Any) -> None:
        super().__init__(*args, **words)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                # Not in work/, as it would be: that goes once the stage is complete.
                callback.logging_dir = str(Path(self.args.output_dir).with_name("tensorboard"))

    def newest(self) -> Path | None:
        """The checkpoint to go on from. Call it before anything is trained."""
        sha = hashlib.sha256(self.key.encode())
        for tensor in self.tensors().values():
            sha.update(tensor.detach().float().cpu().numpy().tobytes())
        self.start, work = sha.hexdigest(), Path(self.args.output_dir)
        found = group.first(lambda: newest(work, self.start, self.progress.note))
        self.progress.resume(layout.step_of(found) if found else 0)
        return found

    def _save_checkpoint(self, *_: Any) -> None:
        folder, state, args = Path(self.args.output_dir), self.state, self.args
        if not all(tensor.isfinite().all() for tensor in self.tensors().values()):
            raise lost("weights")
        group.check_same([*self.tensors().values()], f"after step {state.global_step}")
        carried, draws = self.carried(), self._draws()
        if group.rank():
            return
        with written(folder, state.global_step, self.start, args.save_total_limit) as aside:
            tensors = self.tensors().items()
            save_file({name: t.detach().contiguous() for name, t in tensors}, aside / WEIGHTS)
            self._save_optimizer_and_scheduler(aside)
            self._save_scaler(aside)
            for name, drawn in draws.items():
                (aside / name).write_bytes(drawn)
            state.stateful_callbacks["carried"] = carried
            state.save_to_json(aside / STATE)

    def _draws(self) -> dict[str, bytes]:
        """Each process's random numbers, as files of a checkpoint."""
        with tempfile.TemporaryDirectory() as folder:
            self._save_rng_state(folder)
            own = {file.name: file.read_bytes() for file in Path(folder).iterdir()}
        return {name: drawn for one in group.everyone(own) for name, drawn in one.items()}

    def _load_from_checkpoint(self, folder: str | Path, *_: Any) -> None:
        kept = load_file(Path(folder) / WEIGHTS)
        for name, tensor in self.tensors().items():
            tensor.data.copy_(kept[name])
