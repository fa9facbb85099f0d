"""The pages in Chromium: axe-core, 400 pixels, and the size of a plot's text."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.report import compare, run_page, sweep
from rlhf_recipes.report.sweep import Trial
from tests.helpers.browser import AXE, needs_axe, needs_chromium
from tests.helpers.told import told
from tests.report.test_pages import ROWS, whole

pytestmark = [pytest.mark.train, needs_chromium, needs_axe]
LONG = "Eine Antwort mit vielen Wörtern und einem" + "l" * 200 + "angen Wort. " * 40
SMALLEST = """Math.min(...[...document.querySelectorAll("figure svg text")].map(text => {
    const at = text.getScreenCTM();
    return parseFloat(getComputedStyle(text).fontSize) * Math.hypot(at.a, at.b);
}))"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("looks")
    long = [{**ROWS[0], "prompt": LONG, "answers": dict.fromkeys(("base", "sft", "ppo"), LONG)}]
    one, other = whole(folder / "a", long + ROWS[:2]), told(folder / "b")
    run_page.write(one)
    compare.write([one, other], folder / "compare.html")
    sweep.write([Trial("a", "1", one), Trial("b", "1", other)], "Two", folder / "sweep.html")
    return [one / "report.html", folder / "compare.html", folder / "sweep.html"]


@pytest.mark.parametrize(("width", "scheme"), [(400, "light"), (1280, "dark")])
def test_axe_finds_nothing_and_the_page_fits(
    chromium: Any, pages: list[Path], width: int, scheme: str
) -> None:
    script = Path(find_spec(AXE).submodule_search_locations[0], "axe.min.js").read_text()
    words = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    context = chromium.new_context(bypass_csp=True, **words)
    tab = context.new_page()
    for page in pages:
        tab.goto(page.as_uri())
        tab.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        tab.evaluate(script)
        found = tab.evaluate("axe.run({exclude: ['figure svg *']})")["violations"]
        assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == []
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.goto(pages[0].as_uri())
    assert tab.evaluate(SMALLEST) >= 12
    # The first key skips the top, and the list of parts stays in sight where there is room.
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the text"
    tab.keyboard.press("Enter")
    assert tab.evaluate("document.activeElement.id") == "text"
    tab.evaluate("document.querySelector('#cost').scrollIntoView({behavior: 'instant'})")
    assert (tab.locator("nav").bounding_box()["y"] == 0) == (width == 1280)
    context.close()
