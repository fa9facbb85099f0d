"""`tools/fuzz.py`, a few of its cases; what is too deep or too large; and that it would find."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from rlhf_recipes.errors import RecipeError
from rlhf_recipes.recipe import load as recipe
from rlhf_recipes.recipe.toml import key_lines
from tools import fuzz

pytestmark = pytest.mark.train

ROOT = Path(__file__).parents[2]


def test_no_mutant_is_answered_with_a_traceback_or_late(tmp_path: Path) -> None:
    outcomes, findings, _ = fuzz.fuzz(250, 7, tmp_path)
    assert findings == []
    assert outcomes["right"] > 10 and outcomes["wrong"] > 100 and outcomes["no call"]


def test_it_finds_what_raises_and_what_takes_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow_or_broken(path: Path, **_: list[str]) -> None:
        if len(path.read_bytes()) % 2:
            raise KeyError("deep inside")
        fuzz.SECONDS = 0.0
        raise RecipeError([])

    monkeypatch.setattr(fuzz, "SECONDS", fuzz.SECONDS)
    monkeypatch.setattr(fuzz, "load_recipe", slow_or_broken)
    _, findings, _ = fuzz.fuzz(20, 0, tmp_path)
    assert len(findings) == 20
    assert any("KeyError: 'deep inside'" in finding for finding in findings)
    assert any("AssertionError" in finding for finding in findings)
    assert all(Path(finding.split(" ")[0]).exists() for finding in findings)


def test_mutants_are_those_of_their_seed() -> None:
    texts = ["seed = 1\n[sft]\nmax_steps = 3\n"]
    drawn = [fuzz.mutant(Random(seed), texts) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("number", range(len(fuzz.HUGE)))
def test_what_is_huge_or_deep_is_answered_soon(tmp_path: Path, number: int) -> None:
    path = tmp_path / "huge.toml"
    path.write_text(fuzz.HUGE[number])
    began = time.process_time()
    with pytest.raises(RecipeError):
        recipe.load_recipe(path)
    assert time.process_time() - began < fuzz.SECONDS


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
def test_what_is_huge_or_deep_takes_little_memory(tmp_path: Path) -> None:
    files = []
    for number, text in enumerate(fuzz.HUGE):
        files.append(tmp_path / f"{number}.toml")
        files[-1].write_text(text)
    code = (  # ru_maxrss would count what this process holds
        "import sys; from pathlib import Path; from rlhf_recipes.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: said = end.code\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print(said, int(status.split('VmHWM:')[1].split()[0]) // 1024, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "check", *map(str, [*files, "/dev/zero"])],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    exit_code, megabytes = map(int, done.stderr.split())
    assert exit_code == 2 and megabytes < fuzz.MEGABYTES
    assert done.stdout.count("/dev/zero") == 1 and "Traceback" not in done.stdout


def test_lines_take_time_by_the_line() -> None:
    """They took it by the square: 0.8 s for 400 lines, where it is now 3 ms."""

    def seconds(keys: int) -> float:
        text = "[sft]\n" + "\n".join(f"k{n} = [1, {{ a = 2 }}]" for n in range(keys))
        began = time.process_time()
        assert key_lines(text)["sft", f"k{keys - 1}", 1, "a"] == keys + 1
        return time.process_time() - began

    seconds(100)
    assert seconds(4000) < 20 * max(seconds(400), 0.005)
