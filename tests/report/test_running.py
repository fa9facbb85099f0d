"""What is said of a run while it is running, and which win rate `runs` has."""

from __future__ import annotations

import json
from pathlib import Path

from rlhf_recipes import cli_tables
from rlhf_recipes.report.facts import Facts
from rlhf_recipes.report.verdict import verdict
from rlhf_recipes.store import history, layout, locks
from tests.helpers.told import GOOD, told

STEPS = [{"step": n, "of": 30, "seconds": 2.0 * n} for n in range(1, 11)]


def test_a_running_run_says_how_far_it_is(tmp_path: Path) -> None:
    later = ("ppo", "judge", "evaluation", "best_of")
    measured = {key: None for key in GOOD if key[:3] in ("ppo", "bas", "jud", "bes")}
    run = told(
        tmp_path,
        measured,
        manifest={"outcome": "unfinished"},
        curves={"ppo": STEPS},
        not_run=(*later, "reward"),
    )
    reward = tmp_path / "runs" / ".stages" / "reward-0123456789ab"
    sft = layout.read_record(reward.with_name("sft-0123456789ab"))
    layout.write_record(
        reward, {**(sft or {}), "kind": "reward"}
    )  # cached: not yet in the manifest
    with locks.lock(run, "run told"):
        first = verdict(Facts(run))[0]
        listed = history.list_runs(run.parent)
    said = "2 of 6 stages are done; ppo is at step 10 of 30, 40 s left."
    assert (first.level, first.text) == ("doubt", f"The run is running: {said}")
    [row] = listed["runs"]
    assert (row["outcome"], row["progress"]) == ("running", "step 10 of 30, 40 s left")
    assert "told is at step 10 of 30, 40 s left" in cli_tables.runs(listed, run.parent)
    assert verdict(Facts(run))[0].text.startswith("The run has not come to its end: 2 of 6")


def test_a_curve_that_is_damaged_says_nothing(tmp_path: Path) -> None:
    assert history.pace(tmp_path) is None
    for text in (
        "{",
        "[1]",
        '{"step": 1}',
        '{"step": Infinity, "of": 2, "seconds": 1}',
        "[" * 9999,
    ):
        (tmp_path / "metrics.jsonl").write_text(text)
        assert history.pace(tmp_path) is None
    (tmp_path / "metrics.jsonl").write_text(json.dumps(STEPS[0]))
    assert str(history.pace(tmp_path)) == "step 1 of 30"


def test_the_heartbeat_says_how_far_it_is_where_steps_tell_of_no_numbers(tmp_path: Path) -> None:
    beat = {"format": 1, "step": 50, "of": 90, "seconds": 20.0, "at": "2026-11-27T12:00:00+00:00"}
    file = tmp_path / "progress.json"
    file.write_text(json.dumps(beat | {"first": {"step": 30, "seconds": 10.0}}))
    pace = history.pace(tmp_path)
    assert pace == (50, 90, 20.0, "2026-11-27T12:00:00+00:00")
    assert str(pace) == "step 50 of 90, 20 s left"
    # Rows of this process make it that of the last steps; those of an earlier one do not count.
    rows = [(n, 9000.0 + n) for n in range(10, 31)] + [(n, n - 30.0) for n in range(38, 50)]
    told = [{"step": step, "of": 90, "seconds": seconds} for step, seconds in rows]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    recent = (20.0 - 9.0) / (50 - 39) * 40
    assert history.pace(tmp_path) == (50, 90, recent, beat["at"])
    for damage in ({"first": [1]}, {"first": {"step": "x"}}, {"at": 3}):
        file.write_text(json.dumps(beat | damage))
        assert history.pace(tmp_path).step == 50
    file.write_text('{"format": 1, "step": null}')
    assert history.pace(tmp_path) == (49, 90, 41.0, "")


def test_runs_has_the_win_rate_by_the_judge_where_there_is_one(tmp_path: Path) -> None:
    line = cli_tables.runs(history.list_runs(told(tmp_path / "a").parent), tmp_path).splitlines()[1]
    assert "90.0%" in line and " 71% " in line and "6.20" in line
    none = {f"ppo.judge_win_rate{end}": None for end in ("", "_low", "_high")}
    found = history.list_runs(told(tmp_path / "b", none).parent)
    assert " 90% " in cli_tables.runs(found, tmp_path).splitlines()[1]
