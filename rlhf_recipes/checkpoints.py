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


def newest(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The state of the last checkpoint in `folder` that is whole; None where there is none."""
    for file in reversed(_files(folder)):
        with contextlib.suppress(OSError, EOFError, RuntimeError, pickle.UnpicklingError):
            return torch.load(file, map_location=device, weights_only=True)
    return None


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.pt"))
