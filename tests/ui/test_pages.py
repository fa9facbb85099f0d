"""What the pages of the ui say of runs: as they go, done, side by side, to be judged."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from rlhf_recipes.feedback.page import SOONEST
from rlhf_recipes.feedback.store import Store
from rlhf_recipes.feedback.winrate import QUESTION_EVALUATION
from tests.helpers.runs import call
from tests.ui.conftest import STEPS, finished, running, unfinished, words_of


def beat(run: Path, ago: float) -> None:
    """PPO's last step was so many seconds ago."""
    at = (datetime.now(UTC) - timedelta(seconds=ago)).isoformat()
    value = {"format": 1, "step": 12, "of": 30, "seconds": 24.0, "at": at}
    stage = next((run.parent / ".stages").glob("ppo-*"))
    value["first"] = {"step": 0, "seconds": 0.0}
    (stage / "progress.json").write_text(json.dumps(value))


def test_runs_are_listed_with_their_state_and_what_came_of_them(tmp_path, site):
    run = finished(tmp_path)
    killed = tmp_path / "runs" / "killed"
    shutil.copytree(run, killed)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest |= {"outcome": "unfinished", "ended": "2026-11-20T00:00:00+00:00"}
    (killed / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "runs" / "other").mkdir()
    page = site()
    said = words_of(page.get("/").text)
    assert "PPO beat SFT on 71 % of 128 prompts (63–79)" in said
    assert said.index("told finished") < said.index("killed interrupted")
    assert "other has no manifest.json that can be read" in said
    with running(killed):
        said = words_of(page.get("/").text)
        assert said.index("killed running") < said.index("told finished")
        assert "killed" in page.get("/now").json()["parts"]["list"]
    assert "makes one in a minute" in words_of(site(tmp_path / "none").get("/").text)


def test_a_run_as_it_goes(tmp_path, site):
    run = unfinished(tmp_path, STEPS)
    page = site()
    with running(run, at="none"):
        beat(run, 3)
        said = words_of(page.get("/run/told").text)  # nobody holds the stage yet
        assert "▸ ppo getting ready: the rows, memory, a rehearsal it was at step 12 of 30" in said
    with running(run):
        assert "they are drawn after a few steps" in page.get("/run/told").text  # it is being drawn
        until = time.monotonic() + 60
        while (html := page.get("/run/told").text).count("<figure>") < 3:  # score, KL, length
            assert time.monotonic() < until
            time.sleep(0.05)
        said = words_of(html)
        assert "ppo needs about 36 s more" in said
        assert "✓ sft sft done 1 min 01 s ✓ reward" in said
        assert re.search(r"▸ ppo step 12 of 30 · about 36 s left last step \d+ s ago", said)
        assert "· judge · evaluation · best_of" in said
        assert "It is &lt;b&gt;2&lt;/b&gt;." in html and "score −0.50" in said
        assert "loading\nstep 10</pre>" in html
        assert '<noscript><meta http-equiv="refresh" content="3">' in html
        parts = page.get("/run/told/now").json()["parts"]
        assert set(parts) == {"state", "stages", "curves", "more", "samples", "log"}
        for part in ("stages", "samples", "log"):
            assert words_of(parts[part]) in said
        assert parts["curves"].count("<figure>") == 3
        beat(run, 300)
        assert 'class="loud">last step 5 min 0' in page.get("/run/told").text
    assert page.get("/run/told/now").json() == {"reload": True}
    assert "The run has not come to its end: 2 of 6 stages are done" in words_of(
        page.get("/run/told").text
    )
    assert "told interrupted" in words_of(page.get("/").text)


def test_runs_side_by_side(tmp_path, site):
    one = finished(tmp_path)
    other = finished(tmp_path / "b", recipe={"ppo": {"kl_coef": 0.3}})
    stage = tmp_path / "runs" / ".stages" / "ppo-ffffffffffff"
    shutil.copytree(next((tmp_path / "b" / "runs" / ".stages").glob("ppo-*")), stage)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["stages"][2]["folder"] = ".stages/ppo-ffffffffffff"
    (other / "manifest.json").write_text(json.dumps(manifest))
    shutil.move(other, one.with_name("gentle"))
    page = site()
    said = words_of(html := page.get("/compare?run=told&run=gentle").text)
    assert "told · gentle" in said and "ppo.kl_coef 0.15 0.3" in said
    assert "told · ppo score 0.70 Maybe 7. gentle · ppo score 0.70 Maybe 7." in said
    heads = re.findall("<figcaption>(.*?)</figcaption>", html)
    assert heads == ["The score of ppo", "The KL of ppo", "Length of ppo"]  # SFT's is one stage
    assert "told rose from +0.10 to +1.00" in html
    for path, code in {"?run=told": 400, "?run=told&run=x": 404, "": 400}.items():
        assert page.get(f"/compare{path}").status_code == code


def test_what_can_be_judged_is_judged_on_the_one_page_and_stands_in_the_report(tmp_path, site):
    finished(tmp_path)
    rows = tmp_path / "answers.jsonl"
    rows.write_text('{"prompt": "Why?", "answers": ["So.", "Because."]}\n')
    page = site(files=[rows])
    said = words_of(html := page.get("/label").text)
    assert "answers.jsonl A file of answers." in said
    assert "told Its PPO against its SFT, without names" in said
    places = re.findall(r'action="(/[^"]+)"', html)
    for place in places:
        opened = page.client.post(place, data={"open": "1"})
        assert opened.status_code == 303
        address = page.client.get(opened.headers["location"]).headers["location"]
        asked = page.client.get(address)
        assert asked.status_code == 200 and "Which answer is better?" in asked.text
        assert page.ui.base not in asked.text
        time.sleep(SOONEST)
        judged = page.client.post(address, data={"verdict": "left"})
        assert judged.status_code == 303
        end = page.client.post(address.rpartition("/")[0] + "/end", data={"end": "1"})
        assert end.headers["location"] == f"{page.ui.base}/label"
    store = Store(tmp_path / "runs")
    assert len(store.judged(store.ids())) == 1
    assert len(store.judged(store.ids(), QUESTION_EVALUATION)) == 1
    answer = page.get("/run/told")
    said = words_of(answer.text)
    assert (
        "It cannot be told yet" in said and "Before and after" in said and "Time and memory" in said
    )
    assert "People prefer" in said
    policy = answer.headers["content-security-policy"]
    assert "style-src-attr 'unsafe-inline'; script-src 'self'" in policy
    assert "<style" not in answer.text and 'http-equiv="Content' not in answer.text
    assert page.get("/run/nobody").status_code == 404
    assert page.client.get(f"/label/{'0' * 16}/{'a' * 32}/").status_code == 404
    rows.write_text("{}\n")
    refused = page.client.post(places[0], data={"open": "1"})
    assert refused.status_code == 409 and "holds no answers to judge" in refused.text


def test_without_its_libraries_it_says_what_to_install(monkeypatch, capfd):
    for name in [*sys.modules]:
        if name.startswith("rlhf_recipes.ui"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in ("rlhf_recipes.feedback.serving",):
        monkeypatch.delitem(sys.modules, name, raising=False)
    _, err = call(monkeypatch, capfd, "ui", code=2)
    assert err == [
        "the page needs uvicorn, which is not installed (pip install 'rlhf-recipes[ui]')"
    ]


@pytest.mark.parametrize("port", ["-1", "99999"])
def test_a_port_that_is_none_is_refused(tmp_path, monkeypatch, capfd, port):
    _, err = call(monkeypatch, capfd, "ui", "--port", port, "--runs", str(tmp_path), code=2)
    assert "is between 0 and 65535" in err[0]
