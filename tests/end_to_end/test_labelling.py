"""`rlhf-recipes label RECIPE` from a recipe to a report, by a person who is cut off on the way."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_recipes import cli_feedback
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


LABEL = ["label", "tiny.toml", "--port", "0"]


def tab_at(address: str) -> Tab:
    port, token, _ = address.partition("http://127.0.0.1:")[2].split("/")
    return Tab([int(port)], token, 0, threading.Event())


def judge(tab: Tab, count: int) -> None:
    for _ in range(count):
        place = tab.ask("GET", f"/{tab.token}/")
        tab.ask("GET", place)
        time.sleep(SOONEST)
        assert tab.ask("POST", place, "verdict=left") == f"/{tab.token}/"


def judged_and_killed(folder: Path) -> None:
    """The command in a process of its own: its only person judges three pairs, and it is killed."""
    with subprocess.Popen(
        [sys.executable, "-m", "rlhf_recipes", *LABEL],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            lines = iter(process.stdout.readline, "")
            judge(tab_at(next(line for line in lines if "http://127.0.0.1:" in line)), 3)
        finally:
            process.kill()


def judged_here(monkeypatch: pytest.MonkeyPatch, then: Callable[[Tab], object]) -> list[str]:
    """The command in this process, with a thread as its person, who does `then` after three pairs.

    What it said: its last word is its exit code.
    """
    said: queue.Queue[str] = queue.Queue()

    def person() -> None:
        lines = iter(lambda: said.get(timeout=60), None)
        try:
            tab = tab_at(next(line for line in lines if "http://127.0.0.1:" in line))
            judge(tab, 3)
            then(tab)
        except BaseException:
            os.kill(os.getpid(), signal.SIGINT)  # else the page waits for ever
            raise

    monkeypatch.setattr(cli_feedback, "say", lambda line, **_: said.put(line))
    thread = threading.Thread(target=person, daemon=True)
    thread.start()
    code = app(LABEL, standalone_mode=False)
    thread.join(20)
    return [*iter(lambda: said.get() if said.qsize() else None, None), str(code or 0)]


def test_from_a_recipe_to_a_report_through_people(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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

    judged_and_killed(folder)
    said = judged_here(monkeypatch, lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert said == ["the same command goes on from here", "4"]
    said = judged_here(monkeypatch, lambda tab: tab.ask("POST", f"/{tab.token}/end", "end="))
    assert said == ["0"]
    assert "report   runs/tiny/report.html" in capsys.readouterr().out

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
