"""The real command, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(fault: str = "") -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "COUNTING": fault}


def command(*words: str, cwd: Path, fault: str = "") -> subprocess.CompletedProcess[str]:
    """`rlhf-recipes WORDS`, with stages that only count."""
    return subprocess.run(
        [sys.executable, "-m", "tests.helpers.counting", *words],
        cwd=cwd,
        env=environment(fault),
        capture_output=True,
        text=True,
    )
