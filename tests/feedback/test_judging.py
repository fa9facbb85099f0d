"""`judge_items` against a server whose judge is known: what is kept, said and paid."""

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlhf_recipes.cli import app
from rlhf_recipes.data.shapes import Row, understand
from rlhf_recipes.errors import GateError, UsageError
from rlhf_recipes.feedback.calls import Ask, replies
from rlhf_recipes.feedback.items import item, write_items
from rlhf_recipes.feedback.judging import JudgeSettings, judge_items
from rlhf_recipes.feedback.store import Store
from tests.helpers.fake_judge import FakeJudge
from tests.helpers.judged import numbered, odds, right

ROOT = Path(__file__).parents[2]
SOON = (0.0, 0.1, 0.1)


def judged(server, items, folder, told=None, **words):
    asked = JudgeSettings("fake", server.url, **{"tie": 0.0, **words})
    said = told.append if told is not None else lambda line: None
    return judge_items(items, asked, Store(folder), said, pauses=SOON)


def test_the_mean_of_both_orders_finds_what_a_biased_judge_knows(tmp_path):
    items = numbered(120)
    with FakeJudge(odds, bias=0.3, noise=0.1) as server:
        found = judged(server, items, tmp_path)
        assert right(found.better, items) >= 0.9
        numbers = found.metrics
        assert numbers["place_logit"] == pytest.approx(0.3, abs=0.05)
        assert (numbers["pairs"], numbers["kept"], numbers["no_verdict"]) == (120, 120, 0)
        assert (numbers["calls"], numbers["tokens_in"]) == (240, server.tokens_in)
        # One order alone is right less often.
        known = replies(Store(tmp_path), JudgeSettings("fake", server.url).name)
        alone = {}
        for one in items:
            reply = known[Ask(one, 0).id(JudgeSettings("fake", server.url).name)]
            alone[one.id] = float(reply.logit > 0)
        assert right(alone, items) < right(found.better, items) - 0.05
        # What was said is not asked again: not with another tie, nor in another order.
        again = judged(server, items[::-1], tmp_path, tie=0.2)
        assert server.asked == 240
        assert again.better == found.better
        assert again.metrics["kept"] < 120 and again.metrics["ties"] == 120 - again.metrics["kept"]


def test_another_judge_is_asked_anew_and_neutral_settings_are_not_another_judge():
    one = JudgeSettings("m", "http://127.0.0.1:1/v1")
    neutral = {"url": "http://localhost/v1", "budget": 1.0, "price": (1.0, 2.0), "concurrency": 2}
    other = replace(one, **neutral, timeout=1.0)
    assert (other.name, other.identity()) == (one.name, one.identity())
    for change in (
        {"principles": "Be brief."},
        {"question": "?"},
        {"reasons": True},
        {"model": "n"},
    ):
        assert replace(one, **change).name != one.name
        assert replace(one, **change).identity() != one.identity()
    for change in ({"tie": 0.2}, {"people": 5}):
        assert replace(one, **change).name == one.name
        assert replace(one, **change).identity() != one.identity()
    local = JudgeSettings("m", content="a")
    assert replace(local, content="b").name != local.name
    assert replace(local, quantization="4bit").name != local.name


def test_a_text_judge_that_looks_at_the_place_alone_is_stopped_by_the_pilot(tmp_path):
    items = numbered(60)
    with FakeJudge(lambda prompt, a, b: 9.0, logprobs="refused") as server:
        for _ in range(2):
            with pytest.raises(
                GateError, match="fake says 1 in 48 of 48 replies.*nothing can be kept"
            ):
                judged(server, items, tmp_path)
            assert server.billed == 48  # and the second time nothing is paid
    told = []
    with FakeJudge(lambda prompt, a, b: odds("", a, b) + 9) as server:
        found = judged(server, items, tmp_path / "logits", told)
    assert any("fake says 1 in 48 of 48 replies; the mean" in line for line in told)
    assert right(found.better, items) == 1.0
    assert found.metrics["first_share"] == 1.0 and found.metrics["consistency"] == 0.0


def test_agreement_with_people_and_a_liking_for_length_are_reported(tmp_path):
    prompt = [{"role": "user", "content": "?"}]
    items = [item(prompt, [f"{n} short", f"{n} much longer than that"]) for n in range(30)]
    store = Store(tmp_path)
    store.put(items)
    with store.writing() as db:
        for n, one in enumerate(items):
            longer = "first" if len(one.answers[0]) > len(one.answers[1]) else "second"
            shorter = "second" if longer == "first" else "first"
            said = longer if n < 21 else shorter if n < 29 else "tie"
            db.execute(
                "insert into ask values (?, ?, 'better', 'ada', 0, 0, '', 0)", [str(n), one.id]
            )
            db.execute(
                "insert into judgement (ask, verdict, seconds, at) values (?, ?, 1, 0)",
                [str(n), said],
            )
    with FakeJudge(lambda prompt, a, b: 0.1 * (len(a) - len(b)), bias=1.0) as server:
        found = judged(server, items, tmp_path)
    numbers = found.metrics
    assert numbers["longer_share"] == 1.0
    assert numbers["longer_share_people"] == pytest.approx(21 / 29)
    assert numbers["agreement"] == pytest.approx(21 / 29)
    assert numbers["agreement_low"] < 21 / 29 < numbers["agreement_high"]
    assert numbers["agreement_pairs"] == 29
    assert 0 < numbers["agreement_alpha"] < 1
    assert sum(one["pairs"] for one in found.bins) == 29


def test_a_server_that_changes_its_model_is_noted(tmp_path):
    items, told = numbered(4), []
    with FakeJudge(odds) as server:
        judged(server, items[:2], tmp_path, told)
        assert not any("changed" in line for line in told)
        server.model = "fake-2"
        judged(server, items, tmp_path, told)
    assert told[-1] == "the server changed its model: fake-1, fake-2"


def test_single_answers_are_left_out_and_verdicts_are_of_the_items_answers(tmp_path):
    prompt = [{"role": "user", "content": "?"}]
    items = [
        item(prompt, ["0.9 a"]),
        item(prompt, ["0.1 a", "0.9 b"]),
        item(prompt, ["0.5 a", "0.5 b"]),
    ]
    with FakeJudge(odds) as server:
        found = judged(server, items, tmp_path, tie=0.1)
    pair = items[1]
    assert found.verdict(items[0].id) is None
    assert found.verdict(pair.id) == ("first" if pair.answers[0] == "0.9 b" else "second")
    assert found.verdict(items[2].id) == "tie"


KILLED = """
import sys
from pathlib import Path
from rlhf_recipes.feedback.items import read_items
from rlhf_recipes.feedback.judging import JudgeSettings, judge_items
from rlhf_recipes.feedback.store import Store
url, folder = sys.argv[1], Path(sys.argv[2])
asked = JudgeSettings("fake", url, tie=0.0, concurrency=4)
judge_items(list(read_items(folder / "items.jsonl")), asked, Store(folder), print)
"""


def test_killed_at_any_moment_it_goes_on_and_pays_for_no_kept_verdict_again(tmp_path):
    """What is under way as a kill comes, or on its way to the disk, is lost: eight calls at most.

    Ctrl-C waits for those.
    """
    items = numbered(40)
    write_items(tmp_path / "items.jsonl", items)
    store, kills = Store(tmp_path), 0
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with FakeJudge(odds, seconds=0.02) as server:
        name = JudgeSettings("fake", server.url).name
        for number in (signal.SIGINT, signal.SIGKILL):
            words = [sys.executable, "-c", KILLED, server.url, str(tmp_path)]
            process = subprocess.Popen(words, cwd=ROOT, **quiet)
            enough = server.asked + 25
            while process.poll() is None and server.asked < enough:
                time.sleep(0.01)
            kept = {*replies(store, name)}
            if process.poll() is None:
                process.send_signal(number)
                kills += number == signal.SIGKILL
            process.wait()
            after = {*replies(store, name)}
            assert kept <= after
            assert number == signal.SIGKILL or len(after) == server.billed  # all is kept
        assert kills and len(replies(store, name)) < 80
        found = judged(server, items, tmp_path)
        twice = sum(count - 1 for count in server.served.values())
    assert len(server.served) == 80 and twice <= 2 * 4 * kills
    assert found.metrics["no_verdict"] == 0 and right(found.better, items) == 1.0
    assert found.metrics["calls"] == 80


def test_the_command_writes_what_it_keeps_and_says_what_that_is_worth(tmp_path):
    items, output = numbered(30), tmp_path / "kept.jsonl"
    write_items(tmp_path / "items.jsonl", items)
    (tmp_path / "principles.md").write_text("The larger number is better.\n")
    words = ["judge", str(tmp_path / "items.jsonl"), "--model", "fake", "--runs", str(tmp_path)]
    words += ["--principles", str(tmp_path / "principles.md"), "-o", str(output), "--show"]
    with FakeJudge(odds, bias=0.3) as server:
        words += ["--url", server.url, "--price", "1", "--price", "2", "--limit", "28"]
        done = CliRunner().invoke(app, words, catch_exceptions=False)
        assert server.asked == 56
        assert "1. The larger number is better." in server.bodies[0]["messages"][0]["content"]
    assert re.search(r"^pairs +28$", done.stdout, re.MULTILINE)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert f"{len(rows)} pairs  {output}" in done.stdout
    assert done.stdout.count("that the first is better") == 28
    assert all(float(r["chosen"].split()[0]) > float(r["rejected"].split()[0]) for r in rows)
    assert {"prompt", "chosen", "rejected", "p", "judge"} == rows[0].keys()
    # The file is a dataset: a reward stage reads it.
    prompt, chosen, rejected = understand(Row(rows[0]))
    assert (chosen, rejected) == (rows[0]["chosen"], rows[0]["rejected"])


def test_the_command_refuses_half_a_price_and_its_own_file(tmp_path):
    write_items(tmp_path / "items.jsonl", numbered(1))
    words = ["judge", str(tmp_path / "items.jsonl"), "--model", "fake", "--runs", str(tmp_path)]
    for more, said in ((["--price", "1"], "a price is of"), (["-o", words[1]], "to be judged")):
        with pytest.raises(UsageError, match=said):
            CliRunner().invoke(app, [*words, *more], catch_exceptions=False)
