"""Checkpoints of a stage under way: one file each in its `work/`, whole or not there."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch


def save(folder: Path, step: int, state: dict[str, Any], keep: int | None) -> None:
    """Write `checkpoint-<step>.pt`; of all of them the last `keep` stay (None: every one)."""
    file, aside = folder / f"checkpoint-{step:06d}.pt", folder / "partial"
    with aside.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)
    for old in _files(folder)[:-keep] if keep else ():
        old.unlink()


def newest(folder: Path, start: str, device: torch.device) -> dict[str, Any] | None:
    """The last state in `folder` that is whole and whose "start" is this; None where none is.

    Those after it, damaged or of a run from another start, are deleted.
    """
    for file in reversed(_files(folder)):
        with contextlib.suppress(OSError, EOFError, RuntimeError, pickle.UnpicklingError):
            state = torch.load(file, map_location=device, weights_only=True)
            if state["start"] == start:
                return state
        file.unlink()
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.pt"))
