"""Checkpoints of a stage under way: one file each in its `work/`, whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save(folder: Path, step: int, state: dict[str, Any], keep: int | None) -> None:
    """Write `checkpoint-<step>.pt`; of all of them the last `keep` stay (None: every one)."""
    file = folder / f"checkpoint-{step:06d}.pt"
    aside = file.with_suffix(".partial")
    with aside.open("wb") as stream:
        torch.save(state, stream)
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(file)
    for old in _files(folder)[:-keep] if keep else ():
        old.unlink()


def newest(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """The state of the last checkpoint in `folder`; None where there is none."""
    files = _files(folder)
    if not files:
        return None
    return torch.load(files[-1], map_location=device, weights_only=True)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.pt"))
