"""The ui in Chromium: as a run goes, by keyboard, narrow, in the dark, and as axe sees it."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from rlhf_recipes.feedback.store import Store
from rlhf_recipes.ui import stop
from rlhf_recipes.ui.talk import Talks
from tests.helpers.browser import faults, needs_axe, needs_chromium, press
from tests.ui.conftest import STEPS, Site, finished, running, unfinished

pytestmark = needs_chromium


def stage_of(run):
    return next((run.parent / ".stages").glob("ppo-*"))


def step(run, number: int) -> None:
    beat = {"format": 1, "step": number, "of": 30, "seconds": 2.0 * number, "at": ""}
    (stage_of(run) / "progress.json").write_text(json.dumps(beat))


def tab_to(page, words: str) -> None:
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent.trim()") == words:
            return
    raise AssertionError(f"no Tab leads to {words}")


def test_a_run_is_watched_and_stopped_by_keyboard_and_then_is_its_report(
    tab, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(stop.os, "kill", lambda *words: asked.append(words))
    run = unfinished(tmp_path, STEPS)
    step(run, 10)
    with Site(run.parent).live() as address:
        with running(run):
            page = tab(address)
            tab_to(page, "told")
            press(page, "Enter")
            page.evaluate("window.same = true")
            page.get_by_text("step 10 of 30").wait_for()
            page.locator("#curves figure").nth(2).wait_for()  # drawn meanwhile
            page.get_by_text("Log", exact=True).click()
            step(run, 17)
            page.get_by_text("step 17 of 30").wait_for()
            assert page.evaluate("window.same") and page.locator("#log").is_visible()
            tab_to(page, "Stop this run")
            page.keyboard.press("Enter")
            page.keyboard.press("Tab")
            press(page, "Enter")
            assert asked == [(os.getpid(), signal.SIGINT)]
            assert page.get_by_text("got what Ctrl-C sends").is_visible()
        page.get_by_text("The run has not come to its end").wait_for()
        assert page.locator("figure svg").first.is_visible()


def test_without_javascript_a_page_loads_itself_again(tab, tmp_path):
    run = unfinished(tmp_path)
    step(run, 10)
    with running(run), Site(run.parent).live() as address:
        page = tab(f"{address}/run/told", java_script_enabled=False)
        assert page.get_by_text("step 10 of 30").is_visible()
        step(run, 12)
        page.get_by_text("step 12 of 30").wait_for()


@pytest.fixture
def models(monkeypatch):
    """Policies that say who they are, with no model."""

    def answer(self, talk):
        for side, name in enumerate(talk.names):
            talk.doing = "Answering"
            talk.texts[side] = f"I am {name}. <b>"
            time.sleep(0.2)

    monkeypatch.setattr(Talks, "_answer", answer)


def test_a_chat_by_keyboard(tab, tmp_path, models):
    run = finished(tmp_path)
    with Site(run.parent).live() as address:
        page = tab(f"{address}/chat/told")
        page.keyboard.type("Who are you? x")
        press(page, "Enter")
        page.locator(".votes").wait_for()
        left, right = page.locator(".answer .text").all_inner_texts()
        assert {left, right} == {"I am sft. <b>", "I am ppo. <b>"}
        assert page.locator(".answer b").all_inner_texts() == ["Left", "Right"]
        press(page, "ArrowRight")
        assert [f"I am {n}. <b>" for n in page.locator(".answer b").all_inner_texts()] == [
            left, right,
        ]  # fmt: skip
        assert page.get_by_text("Kept: Right is better").is_visible()
        page.keyboard.type("And now? t")  # goes to the question, not to a verdict
        with page.expect_navigation():
            page.get_by_role("button", name="Ask on").click()
        page.locator(".votes").wait_for()
        turns = page.locator(".turn .text").all_inner_texts()
        assert turns == ["Who are you? x", right, "And now? t"]
    store = Store(run.parent)
    [one], [said] = store.items(store.ids()), store.judged(store.ids())
    assert one.answers[said.verdict == "second"] == right


@needs_axe
def test_every_page_fits_and_axe_finds_nothing(tab, tmp_path, models):
    run = finished(tmp_path)
    (tmp_path / "other").mkdir()
    going = unfinished(tmp_path / "b")
    step(going, 10)
    seen = [(run, f"/{place}") for place in ("", "run/told", "label", "chat/told", "run/none")]
    seen += [(run, "/compare?run=told&run=copy"), (going, "/run/told")]
    os.symlink(run, run.with_name("copy"))
    wrong = []
    with running(going), Site(run.parent).live() as done, Site(going.parent).live() as live:
        page = tab(f"{done}/", bypass_csp=True)
        for whose, path in seen:
            page.set_viewport_size({"width": 400, "height": 700})
            page.goto((done if whose is run else live) + path)
            if path == "/chat/told":
                page.keyboard.insert_text("w" * 300)
                press(page, "Enter")
                page.locator(".votes").wait_for()
            for details in page.locator("details").all():
                details.evaluate("one => one.open = true")
            width, screen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert width <= screen, path
            page.set_viewport_size({"width": 1280, "height": 800})
            wrong += [(path, one[0], one[1][:3]) for one in faults(page)]
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert paper == "rgb(19, 21, 24)"  # the last that axe saw was the dark one
    assert wrong == []
