"""`rlhf-recipes label RECIPE` from a recipe to a report, by a person who is cut off on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlhf_recipes.cli import app
from rlhf_recipes.errors import PeopleNeeded
from rlhf_recipes.feedback.page import SOONEST
from rlhf_recipes.feedback.store import Store
from tests.feedback.test_kept import Tab

pytestmark = pytest.mark.train

STAGES = '"sft", "sample", "label", "reward", "ppo"'
TABLES = """
[sample]
prompts = 30

[label]
minimum = 6
minimum_test = 1
"""


@contextmanager
def page(folder: Path) -> Iterator[tuple[subprocess.Popen[str], Tab]]:
    """The command, and the tab of its only person once the page is there."""
    with subprocess.Popen(
        [sys.executable, "-m", "rlhf_recipes", "label", "tiny.toml", "--port", "0"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said = ""
            while "http://127.0.0.1:" not in said and (line := process.stdout.readline()):
                said += line
            port, token, _ = said.partition("http://127.0.0.1:")[2].split("/")
            yield process, Tab([int(port)], token, 0, threading.Event())
        finally:
            process.kill()


def judge(tab: Tab, count: int) -> None:
    for _ in range(count):
        place = tab.ask("GET", f"/{tab.token}/")
        tab.ask("GET", place)
        time.sleep(SOONEST)
        assert tab.ask("POST", place, "verdict=left") == f"/{tab.token}/"


def test_from_a_recipe_to_a_report_through_people(tiny_recipe: Path, monkeypatch) -> None:
    folder = tiny_recipe.parent
    text = tiny_recipe.read_text().replace('"sft", "reward", "ppo"', STAGES)
    text = text.replace("[reward]\n", "[reward]\nminimum_accuracy = 0\n")
    text = text.replace("prompts = 12", "prompts = 4").replace("episodes = 32", "episodes = 16")
    tiny_recipe.write_text(text + TABLES)
    monkeypatch.chdir(folder)

    # Without a judgement `run` says what to type, and that is what goes on.
    with pytest.raises(PeopleNeeded) as stopped:
        app(["run", "tiny.toml"], standalone_mode=False)
    assert stopped.value.exit_code == 4
    assert stopped.value.hint == "rlhf-recipes label tiny.toml"

    with page(folder) as (process, tab):
        judge(tab, 3)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=30)
    assert process.returncode == 4
    assert out == "the same command goes on from here\n"

    with page(folder) as (process, tab):
        judge(tab, 3)
        process.kill()

    with page(folder) as (process, tab):
        judge(tab, 3)
        tab.ask("POST", f"/{tab.token}/end", "end=")
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "report   runs/tiny/report.html" in out

    runs = folder / "runs"
    manifest = json.loads((runs / "tiny" / "manifest.json").read_text())
    assert manifest["outcome"] == "finished"
    results = json.loads((runs / "tiny" / "results.json").read_text())
    assert results["label.judged"] == results["label.pairs"] == 9
    assert "ppo.win_rate" in results
    with Store(runs).reading() as db:
        asked = db.execute("select item, count(*) from counted group by item").fetchall()
        sides = Counter(row["verdict"] for row in db.execute("select verdict from counted"))
    assert [count for _, count in map(tuple, asked)] == [1] * 9
    assert sides.keys() <= {"first", "second"}
    assert "People have to judge first" not in (runs / "tiny" / "report.html").read_text()
