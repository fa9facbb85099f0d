"""Hostile requests and texts: refused or inert. The labelling page's list is its guard's, too."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal

import pytest

from rlhf_recipes.store import locks
from rlhf_recipes.ui import stop
from tests.feedback.conftest import raw
from tests.feedback.test_hostile import HOSTS, NASTY, OTHERS
from tests.ui.conftest import Site, finished, running, unfinished

FORM = {"content-type": "application/x-www-form-urlencoded"}
PATHS = ("/", "/now", "/run/told", "/run/told/now", "/compare?run=told", "/label", "/chat/told")
POSTS = ("/run/told/stop", "/label/0123456789abcdef", "/chat/told", "/chat/told/0123456789abcdef")


@pytest.fixture
def killed(monkeypatch):
    """The signals that a process was to get."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(stop.os, "kill", lambda *words: found.append(words))
    return found


@pytest.fixture
def page(tmp_path, killed):
    """Of a run that is going on; whatever a test does, nobody stops it."""
    run = unfinished(tmp_path)
    with running(run):
        yield Site(run.parent)
    assert killed == []
    assert not (run.parent / "feedback.db").exists()


def test_without_the_token_there_is_nothing_and_no_answer_has_it(page):
    own = page.ui.base.removeprefix("/")
    for token in ("", "c" * 32, own[:-1], own + "0", "é" * 32, "..", "label"):
        for path in PATHS:
            answer = page.client.get(f"/{token}{path}")
            assert (answer.status_code, own in answer.text) == (404, False), (token, path)
        for path in POSTS:
            answer = page.client.post(f"/{token}{path}", data={"a": "b"})
            assert answer.status_code in (404, 405) and own not in answer.text
    for name in ("ui.css", "ui.js", "page.css", "page.js"):
        assert own not in page.client.get(f"/{name}").text


def test_another_host_or_page_is_refused(page):
    for path in (*PATHS, *POSTS):
        ask = page.client.post if path in POSTS else page.client.get
        for host in HOSTS[:3]:
            assert ask(page.ui.base + path, headers={"host": host}).status_code == 400
        for header in OTHERS:
            assert ask(page.ui.base + path, headers=FORM | header).status_code == 403


def test_it_stops_by_a_form_alone(page):
    place = f"{page.ui.base}/run/told/stop"
    assert page.client.get(place).status_code == 405
    for method in ("PUT", "DELETE", "HEAD", "OPTIONS"):
        assert page.client.request(method, place).status_code == 405
    for kind in ("text/plain", "application/json", ""):
        words = {"content": "a=b", "headers": {"content-type": kind}}
        assert page.client.post(place, **words).status_code == 415
    words = {"content": "a" * 50_000, "headers": FORM}
    assert page.client.post(place, **words).status_code == 413


def test_no_name_is_a_path(page, tmp_path):
    (tmp_path / "secret").mkdir()
    shutil.copy(tmp_path / "runs" / "told" / "manifest.json", tmp_path / "secret")
    for name in ("%2e%2e", "..%2fsecret", "%2e%2e/secret", ".stages", "told/../../secret",
                 "/etc", str(tmp_path / "secret"), "told%00", "x" * 5000):  # fmt: skip
        for path in (f"/run/{name}", f"/run/{name}/now", f"/compare?run=told&run={name}"):
            assert page.get(path).status_code in (404, 405), path
        assert page.post(f"/run/{name}/stop", a="b").status_code in (404, 405)


def test_a_link_in_a_foreign_folder_is_not_read(page, tmp_path):
    (tmp_path / "passwords").write_text("hunter2")
    log = tmp_path / "runs" / "told" / "log.txt"
    log.unlink()
    log.symlink_to(tmp_path / "passwords")
    assert "hunter2" not in page.get("/run/told").text


def test_hostile_texts_are_inert(tmp_path):
    rows = [
        {"prompt": NASTY, "answers": {"sft": NASTY, "ppo": f"2{NASTY}"}, "scores": {"ppo": 1.0}}
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    run = finished(
        tmp_path, manifest={"title": NASTY}, outputs={"evaluation": {"answers.jsonl": text}}
    )
    going = unfinished(tmp_path / "b")
    manifest = json.loads((going / "manifest.json").read_text()) | {"title": NASTY}
    (going / "manifest.json").write_text(json.dumps(manifest))
    (going / "log.txt").write_text(NASTY)
    sample = {"step": NASTY, "prompt": NASTY, "answer": NASTY, "score": NASTY}
    stage = next((going.parent / ".stages").glob("ppo-*"))
    (stage / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    pages = [Site(run.parent).get(path).text for path in ("/", "/run/told", "/label")]
    with running(going):
        site = Site(going.parent)
        pages += [site.get("/run/told").text, *site.get("/run/told/now").json()["parts"].values()]
    for html in pages:
        for word in ("<script>", "<img", "<meta http-equiv=refresh", '<a href="http:', "<b>b</b>"):
            assert word not in html


# ---- what is stopped


def test_a_run_is_stopped_once_as_ctrl_c_does(tmp_path, killed, monkeypatch):
    run = unfinished(tmp_path)
    page = Site(run.parent)
    refused = page.post("/run/told/stop", stop="1")
    assert refused.status_code == 409 and "there is nothing to stop" in refused.text
    with running(run):
        assert page.post("/run/told/stop", stop="1").headers["location"].endswith("/run/told")
        assert killed == [(os.getpid(), signal.SIGINT)]
        said = page.get("/run/told").text
        assert f"process {os.getpid()} got what Ctrl-C sends" in said
        assert page.get("/run/told/now").json()["parts"]["state"] in said
        page.post("/run/told/stop", stop="1")
        assert len(killed) == 1  # a second one would stop at once
        monkeypatch.setattr(stop, "AGAIN_SECONDS", -1.0)
        page.post("/run/told/stop", stop="1")
        assert len(killed) == 2
        lock = locks.lock_file(run)
        lock.write_text(lock.read_text().replace(platform.node(), "elsewhere"))
        refused = page.post("/run/told/stop", stop="1")
        assert refused.status_code == 409 and "It runs on elsewhere: stop it there." in refused.text
        lock.write_text("who knows")
        assert page.post("/run/told/stop", stop="1").status_code == 409
    assert len(killed) == 2


def test_a_process_that_ignores_ctrl_c_is_asked_otherwise(tmp_path, killed):
    run = unfinished(tmp_path)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with running(run):
            Site(run.parent).post("/run/told/stop", stop="1")
    finally:
        signal.signal(signal.SIGINT, before)
    assert killed == [(os.getpid(), signal.SIGTERM)]


def test_a_server_refuses_what_a_client_would_not_send(tmp_path):
    page = Site(unfinished(tmp_path).parent)
    with page.live() as address:
        port = int(address.split(":")[2].partition("/")[0])
        get = f"GET {page.ui.base}/ HTTP/1.1\r\n"
        assert " 200 " in raw(port, get)
        assert " 400 " in raw(port, get, "host: localhost\r\nhost: localhost\r\n")
        assert " 400 " in raw(port, get, "")
        assert " 404 " in raw(port, "GET //evil.example/ HTTP/1.1\r\n")
