"""Finished runs to look at."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.cli import main
from rlhf_recipes.pipeline.runner import run
from rlhf_recipes.recipe.load import load_recipe
from tests.helpers.counting import Counting, toy


def two_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two runs: `toy`, and `other` whose PPO differs. They share SFT and reward."""
    Counting(monkeypatch)
    go(folder)
    go(folder, "ppo.total_episodes=128", name="other")
    return folder / "runs"


def go(folder: Path, *changes: str, **options: Any) -> None:
    run(load_recipe(toy(folder), set=changes), runs=folder / "runs", **options)


def call(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *words: str, code: int = 0
) -> tuple[list[str], list[str]]:
    """The lines that `rlhf-recipes WORDS` says to stdout and to stderr."""
    capfd.readouterr()
    monkeypatch.setattr(sys, "argv", ["rlhf-recipes", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capfd.readouterr()
    assert ended.value.code == code, err
    return out.splitlines(), err.splitlines()


def stages_of(folder: Path) -> dict[str, Path]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {stage["name"]: folder.parent / stage["folder"] for stage in manifest["stages"]}
