"""The README's commands are the program's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMANDS = (
    "run plan check fork fetch recipes schema runs compare report doctor clean chat export".split()
)


def helps() -> str:
    """Every command's help, as a terminal of 80 columns shows it."""
    said = []
    for name in COMMANDS:
        words = [sys.executable, "-m", "rlhf_recipes", name, "--help"]
        environment = {**os.environ, "COLUMNS": "80", "TERMINAL_WIDTH": "80"}
        out = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
        said.append(out.stdout.strip())
    return "\n\n".join(said)


def test_the_commands_help_stands_in_the_readme() -> None:
    shown = re.search(r"<!-- help -->\n```text\n(.*?)\n```\n", README, re.DOTALL)
    assert shown and shown[1] == helps()


def test_every_make_target_and_file_that_it_names_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^    |`)make ([a-z]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in re.findall(r"`([a-z_]+\.(?:py|json))`", README):
        assert list((ROOT / "rlhf_recipes").rglob(name)) or name.endswith("results.json"), name


if __name__ == "__main__":  # python -m tests.test_readme: writes the help into the README
    written = re.sub(
        r"<!-- help -->\n(```text\n.*?\n```\n)?",
        lambda _: f"<!-- help -->\n```text\n{helps()}\n```\n",
        README,
        flags=re.DOTALL,
    )
    (ROOT / "README.md").write_text(written)
