"""Chromium's tabs, which ask no other machine for anything."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and find_spec("playwright")), reason="needs chromium and playwright"
)
LOOPBACK = re.compile(r"https?://(127\.0\.0\.1|localhost):\d+/")
AXE = "axe_core_python"  # where its script is installed, a page is looked at with it
needs_axe = pytest.mark.skipif(not find_spec(AXE), reason=f"needs {AXE}")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def tab(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Opens a tab at an address; none may ask another machine for anything, or show a dialog."""
    asked, dialogs, contexts = [], [], []

    def open_tab(address: str, **words: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}} | words)
        contexts.append(context)
        page = context.new_page()
        context.on("request", lambda request: asked.append(request.url))
        page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(address)
        return page

    yield open_tab
    for context in contexts:
        context.close()
    assert [url for url in asked if not LOOPBACK.match(url)] == []
    assert dialogs == []


def press(page: Any, key: str) -> None:
    with page.expect_navigation():
        page.keyboard.press(key)


def faults(page: Any) -> list[Any]:
    """What axe finds wrong with a page that was opened with bypass_csp, light and dark."""
    found = find_spec(AXE)
    assert found and found.submodule_search_locations
    page.evaluate(Path(found.submodule_search_locations[0], "axe.min.js").read_text())
    wrong = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        # Of a plot's many parts none is looked at: a page of plots took minutes.
        rules = page.evaluate("axe.run({exclude: [['figure svg *']]})")["violations"]
        wrong += [(one["id"], [node["html"] for node in one["nodes"]]) for one in rules]
    return wrong
