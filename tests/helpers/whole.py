"""The whole command, and digests of what it made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def command(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`rlhf-recipes WORDS`, as a person types it into a pipe."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-m", "rlhf_recipes", *map(str, words)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def digests(runs: Path) -> dict[str, bytes]:
    """The bytes of every weight file, by its place below the runs folder."""
    return {str(f.relative_to(runs)): f.read_bytes() for f in runs.rglob("*.safetensors")}
