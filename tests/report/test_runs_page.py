"""When a report is written, and that nothing about it ever fails a run."""

from __future__ import annotations

import json
import re
import webbrowser
from pathlib import Path

import pytest

from rlhf_recipes.errors import Interrupted, StageError
from rlhf_recipes.pipeline import memory
from rlhf_recipes.pipeline.runner import RunOutcome, run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.report import run_page
from rlhf_recipes.report.verdict import verdict
from tests.helpers import counting
from tests.helpers.counting import Counting, toy
from tests.helpers.runs import call
from tests.helpers.told import told

pytestmark = pytest.mark.train


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


def go(folder: Path, *changes: str, **words: str) -> RunOutcome:
    return run(load_recipe(toy(folder), set=changes), runs=folder / "runs", **words)


def test_a_run_ends_with_its_report_and_one_that_finds_all_done_leaves_it(
    tmp_path: Path, count: Counting
) -> None:
    outcome = go(tmp_path)
    file = outcome.run_folder / "report.html"
    assert "too few prompts to tell" in file.read_text()
    assert [one.level for one in outcome.verdict] == ["doubt"]
    assert (outcome.run_folder / "model" / "README.md").read_text().startswith("---\n")
    written = file.stat().st_mtime_ns
    assert go(tmp_path).verdict == outcome.verdict
    assert file.stat().st_mtime_ns == written
    go(tmp_path, "evaluation.prompts=16", name="toy")  # another result in the same folder
    assert file.stat().st_mtime_ns > written
    file.unlink()
    go(tmp_path, "evaluation.prompts=16", name="toy")
    assert file.exists()


def test_a_run_that_fails_has_one_too_and_says_where(
    tmp_path: Path, count: Counting, capfd: pytest.CaptureFixture[str]
) -> None:
    count.fault["ppo"] = counting.fail
    with pytest.raises(StageError):
        go(tmp_path)
    folder = tmp_path / "runs" / "toy"
    assert f"  report: {folder}/report.html" in capfd.readouterr().err.splitlines()
    manifest = json.loads((folder / "manifest.json").read_text())
    message = "stage ppo failed: ValueError: the loss is NaN"
    hint = f"log: {folder}/log.txt"
    assert manifest["error"] == {"stage": "ppo", "message": message, "hint": hint}
    assert f"The run ended early, 2 of 4 stages are done: {message}." in _text(folder)
    del count.fault["ppo"]
    go(tmp_path)
    assert "The run ended early" not in _text(folder)
    assert json.loads((folder / "manifest.json").read_text())["error"] is None


def test_a_run_that_is_interrupted_has_one_too(tmp_path: Path, count: Counting) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    count.fault["reward"] = interrupt
    with pytest.raises(Interrupted):
        go(tmp_path)
    assert "The run has not come to its end: 1 of 4 stages are done." in _text(
        tmp_path / "runs" / "toy"
    )


def _text(folder: Path) -> str:
    return re.sub("<[^>]+>", "", (folder / "report.html").read_text())


@pytest.mark.parametrize("fault", ["", "reward"])
def test_a_report_that_cannot_be_written_is_a_line_and_fails_nothing(
    tmp_path: Path,
    count: Counting,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no ink\x1b[31m")

    monkeypatch.setattr(run_page, "page", broken)
    if fault:
        count.fault[fault] = counting.fail
        with pytest.raises(StageError, match="the loss is NaN"):
            go(tmp_path)
    else:
        outcome = go(tmp_path)
        assert outcome.verdict == () and outcome.model.is_dir()
    said = capfd.readouterr().err.splitlines()
    assert said[-1] == "  no report: ValueError: no ink"
    assert "Traceback" in (tmp_path / "runs" / "toy" / "log.txt").read_text()


def test_the_command_writes_it_again_and_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, opened = told(tmp_path), []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    for _ in range(2):
        words = ["report", "told", "--runs", str(folder.parent), "--open"]
        out, err = call(monkeypatch, capfd, *words)
        assert out[0].startswith("✓ PPO beat SFT on 71 % of 128 prompts (63–79) by a second ")
        assert out[-1] == f"report   {folder}/report.html" and err == []
        (folder / "report.html").unlink()
    assert opened == [f"file://{folder}/report.html"] * 2


def test_compare_writes_a_page_where_it_is_asked_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    one = told(tmp_path / "a")
    other = told(tmp_path / "b", {"ppo.kl": 9.5}, recipe={"ppo": {"kl_coef": 0.3}})
    page = tmp_path / "page.html"
    out, _ = call(monkeypatch, capfd, "compare", str(one), str(other), "--page", str(page))
    assert out[:2] == ["recipe       told  told", "ppo.kl_coef  0.15  0.3"]
    assert out[-1] == f"page  {page}"
    assert "9.5" in page.read_text()


def test_what_is_said_on_a_terminal_moves_no_cursor(tmp_path: Path) -> None:
    from rlhf_recipes import findings
    from rlhf_recipes.report import facts

    error = {"stage": "ppo", "message": "\x1b[2Jgone\nnext", "hint": "\x1b]0;x\x07try"}
    found = verdict(facts.Facts(told(tmp_path, manifest={"outcome": "failed", "error": error})))
    assert "gone next" in findings.shown(found) and "\x1b" not in findings.shown(found)


def test_a_stage_s_memory_is_measured_from_its_start(tmp_path: Path, count: Counting) -> None:
    if not memory.PROCESS.exists():
        pytest.skip("this system does not tell")
    size = 300_000_000
    count.fault["reward"] = lambda _: len(bytearray(b"x") * size)
    stages = go(tmp_path).stages
    sft, reward, ppo, _ = (done.record["memory"]["process_bytes"] for done in stages)
    assert reward > sft + 0.9 * size and reward > ppo + 0.9 * size
