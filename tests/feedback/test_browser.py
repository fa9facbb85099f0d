"""The page in Chromium: by keyboard alone, by mouse alone, without JavaScript, and under attack."""

from __future__ import annotations

import contextlib
import http.server
import subprocess
import sys
import threading

import pytest

from rlhf_recipes.feedback.items import item
from rlhf_recipes.feedback.serving import listening
from rlhf_recipes.feedback.store import Store
from tests.feedback.conftest import ADA, BOB, Labelling, pairs
from tests.feedback.test_hostile import NASTY
from tests.helpers.browser import faults, needs_axe, needs_chromium, press

pytestmark = needs_chromium


@pytest.fixture
def tab(tab):
    """Opens a tab at a port and a path."""
    return lambda port, path=f"/{ADA}/", **words: tab(f"http://127.0.0.1:{port}{path}", **words)


def verdicts(made: Labelling) -> list[str]:
    return [row[1] for row in made.kept]


def test_thirty_pairs_by_keyboard_alone_and_a_kill_between(tab, tmp_path):
    store = Store(tmp_path)
    store.put(pairs(30), "q")
    with listening(0) as free:
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "tests.helpers.labelling", str(tmp_path), str(port), "1"]

    def start():
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "serving\n"
        return process

    server = start()
    try:
        page = tab(port)
        for number in range(31):  # one of them is shown again, sides swapped
            if number == 11:
                server.kill()
                server.communicate()
                with page.expect_event("requestfailed"):
                    page.keyboard.press("ArrowLeft")
                server = start()
                page.goto(f"http://127.0.0.1:{port}/{ADA}/")
            press(page, ("ArrowLeft", "ArrowRight", "t")[number % 3])
        assert "Everything is judged" in page.content()
        while page.evaluate("document.activeElement.textContent.trim()") != "Train now":
            page.keyboard.press("Tab")
        press(page, "Enter")
        assert "30 of 30 are judged" in page.content()
        assert page.evaluate("getComputedStyle(document.body).fontSize") == "17px"  # styled
        assert server.wait(10) == 0
        assert server.stdout.read() == "ended\n"
    finally:
        server.kill()
        server.communicate()
    with store.reading() as db:
        rows = db.execute("select item, flipped from counted where again = 0").fetchall()
        again = db.execute("select count(*) from counted where again = 1").fetchone()[0]
    assert len(rows) == len({row["item"] for row in rows}) == 30
    assert 5 <= sum(row["flipped"] for row in rows) <= 25
    assert again == 1


def test_every_key_does_what_it_says(tab, labelling):
    made = labelling(8, guideline="Short is good.", strength=True)
    with made.live() as port:
        page = tab(port)
        press(page, "b")
        first = page.url
        page.keyboard.press("g")
        guideline = page.locator(".panel .rendered")
        assert guideline.inner_text() == "Short is good."
        assert guideline.is_visible()
        page.keyboard.press("?")
        assert page.locator(".keys").is_visible()
        assert not guideline.is_visible()
        page.keyboard.press("Escape")
        assert not page.locator(".keys").is_visible()
        page.keyboard.press("m")
        assert page.locator(".answer .raw").first.is_visible()
        page.keyboard.press("n")
        page.keyboard.type("x is wrong, s too")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("Escape")
        assert made.kept == []
        press(page, "1")
        assert made.kept[0][2:] == (3, "x is wrong, s too")
        assert page.locator(".answer .raw").first.is_visible()  # as the one before was read
        press(page, "u")
        assert page.url == first
        assert page.input_value("textarea") == "x is wrong, s too"
        press(page, "c")
        for key in ("Control+ArrowLeft", "Alt+x", "Shift+ArrowRight"):
            page.keyboard.press(key)
        for key, verdict, degree in [
            ("ArrowLeft", "left", 2), ("7", "right", 3), ("5", "right", 1), ("t", "tie", None),
            ("ArrowDown", "tie", None), ("x", "both_bad", None), ("s", "skip", None),
        ]:  # fmt: skip
            ask = page.url.rpartition("/")[2]
            press(page, key)
            said = made.asks.get(ask, "ada")
            assert (said.verdict, said.strength) == (verdict, degree), key
        assert len(made.kept) == 8
        assert page.url.endswith("/all")


def test_by_mouse_alone(tab, labelling):
    made = labelling(5)
    with made.live() as port:
        page = tab(port)
        for name in ("Left is better", "Tie", "Right is better", "Both bad", "Skip"):
            box = page.get_by_role("button", name=name).bounding_box()
            with page.expect_navigation():
                page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        said = [made.asks.get(row[0], "ada").verdict for row in made.kept]
        assert said == ["left", "tie", "right", "both_bad", "skip"]
        page.get_by_role("link", name="How much is 4?").click()
        page.locator(".note summary").click()
        page.get_by_label("Note", exact=True).fill("after all")
        page.get_by_role("button", name="Tie").click()
        page.wait_for_url("**/all")
        assert made.kept[-1][1:] == ("tie", None, "after all")
        page.get_by_role("button", name="Train now").click()
        page.get_by_text("Thank you").wait_for()


def test_without_javascript(tab, labelling):
    made = labelling(3)
    with made.live() as port:
        page = tab(port, java_script_enabled=False)
        first = page.url
        page.locator(".note summary").click()
        page.get_by_label("Note", exact=True).fill("by hand")
        page.locator(".switch").click()
        assert page.locator(".answer .raw").first.is_visible()
        page.get_by_role("button", name="Left is better").click()
        page.wait_for_url(lambda url: url != first)
        assert made.kept[0][3] == "by hand"
        page.locator("summary", has_text="Keys").click()
        assert page.locator(".keys").is_visible()
        page.locator("summary", has_text="Keys").click()
        page.get_by_role("link", name="Previous").click()
        page.wait_for_url(first)
        assert page.locator(".before").is_visible()
        page.get_by_role("button", name="Tie").click()
        page.wait_for_url(lambda url: url != first)
        assert verdicts(made)[1] == "tie"


def test_a_held_key_and_a_double_click_judge_once(tab, labelling):
    made = labelling(6, soonest=0.3)
    with made.live() as port:
        page = tab(port)
        page.wait_for_timeout(350)
        page.keyboard.down("ArrowLeft")
        for _ in range(30):
            page.keyboard.down("ArrowLeft")
            page.wait_for_timeout(20)
        page.keyboard.up("ArrowLeft")
        assert len(made.kept) == 1
        page.wait_for_timeout(350)
        box = page.get_by_role("button", name="Tie").bounding_box()
        place = (box["x"] + 20, box["y"] + 20)
        page.mouse.dblclick(*place)
        page.wait_for_timeout(300)
        assert len(made.kept) == 2
        page.wait_for_timeout(350)
        page.mouse.click(*place)  # two clicks, as a slow hand's: the second meets the next page
        page.wait_for_load_state()
        page.mouse.click(*place)
        page.wait_for_timeout(300)
        assert len(made.kept) == 3


def test_back_and_another_verdict(tab, labelling):
    made = labelling()
    with made.live() as port:
        page = tab(port)
        first = page.url
        press(page, "ArrowLeft")
        page.go_back()
        assert page.url == first
        assert page.get_by_text("You said: Left is better").is_visible()
        page.reload()
        press(page, "ArrowRight")
        assert made.asks.get(first.rpartition("/")[2], "ada").verdict == "right"
        assert len(made.kept) == 2
        assert made.asks.progress("ada").yours == 1


def test_on_a_long_page_the_arrow_scrolls(tab, labelling):
    long = "A line.\n\n" * 60
    items = [item([{"role": "user", "content": "Why?"}], [long + "a", long + "b"])]
    made = labelling([*items, *pairs(2)])
    with made.live() as port:
        page = tab(port)
        page.keyboard.press("ArrowDown")
        page.wait_for_timeout(300)
        assert page.evaluate("scrollY") > 0
        assert made.kept == []
        box = page.get_by_role("button", name="Tie").bounding_box()
        assert box["y"] + box["height"] < 800  # the buttons stay in sight
        press(page, "t")
        assert verdicts(made) == ["tie"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_narrow_screen_and_can_be_read_in_the_dark(tab, labelling, scheme):
    about = [("ada with the others", "85 % of 27 items (68–94)")]
    made = labelling(
        [*pairs(1), item([{"role": "user", "content": NASTY}], [NASTY, "w" * 3000])],
        guideline="Short is good.",
        people={ADA: "ada", BOB: "bob"},
        about=lambda: about,
    )
    made.asks.judge(made.asks.next("ada"), "ada", "left", None, "n" * 400)
    with made.live() as port:
        page = tab(port, color_scheme=scheme, viewport={"width": 320, "height": 568})
        pages = [page.url, f"http://127.0.0.1:{port}/{ADA}/all"]
        for address in pages:
            page.goto(address)
            width, screen = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
            assert width <= screen
            for button in page.get_by_role("button").all():
                box = button.bounding_box()
                assert box["width"] >= 24 and box["height"] >= 24
                assert box["x"] >= 0 and box["x"] + box["width"] <= screen
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(19, 21, 24)") == (scheme == "dark")
        page.emulate_media(media="print")
        page.goto(pages[0])
        assert page.locator(".answer").first.is_visible()


@needs_axe
def test_axe_finds_nothing(tab, labelling):
    made = labelling([*pairs(2), item([{"role": "user", "content": "Two?"}], ["## Two\n\n> 2"])],
                     guideline="# Rule\n\nShort.", wanted=2)  # fmt: skip
    with made.live() as port:
        page = tab(port, bypass_csp=True)

        def look():
            assert faults(page) == []

        look()
        press(page, "b")
        look()
        page.keyboard.press("?")
        look()
        page.keyboard.press("Escape")
        press(page, "ArrowLeft")
        press(page, "u")
        page.keyboard.press("n")
        look()
        page.goto(f"http://127.0.0.1:{port}/{ADA}/all")
        look()


# ---- the hostile requests that only a browser makes: 20, 21 and 24


def test_20_hostile_texts_are_inert_in_chromium(tab, labelling):
    both = [NASTY, NASTY.replace("code", "cord")]
    made = labelling([item([{"role": "user", "content": NASTY}], both)], title=NASTY)
    with made.live() as port:
        page = tab(port)
        page.keyboard.press("n")
        page.keyboard.type("</textarea><script>alert(1)</script>")
        page.wait_for_timeout(300)
        held = "script:not([src]), img, svg, iframe, object, .answer a, .prompt a, meta[http-equiv]"
        assert page.locator(held).count() == 0
        assert page.locator("form").count() == 1
        page.keyboard.press("Escape")
        press(page, "t")
        page.wait_for_timeout(300)
        assert page.locator(held).count() == 0
        assert verdicts(made) == ["tie"]


EVIL = """<!doctype html><iframe src="{url}"></iframe>
<form method="post" action="{url}" target="to"><input name="verdict" value="left"></form>
<iframe name="to"></iframe><img src="{url}"><script src="{url}"></script>
<script>
document.forms[0].submit();
fetch("{url}", {{mode: "no-cors"}})
  .then(() => document.title += " got", () => document.title += " none");
fetch("{url}", {{method: "POST", mode: "no-cors", body: new URLSearchParams("verdict=left")}})
  .then(() => 0, () => 0).then(() => document.title += " sent");
</script>"""


def test_24_a_page_of_another_origin_reads_and_writes_nothing(tab, labelling):
    made = labelling()
    address = made.next()
    with made.live() as port, contextlib.ExitStack() as ends:
        html = EVIL.format(url=f"http://127.0.0.1:{port}{address}").encode()

        class Evil(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("content-type", "text/html")
                self.end_headers()
                self.wfile.write(html)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Evil)
        threading.Thread(target=server.serve_forever).start()
        ends.callback(server.server_close)
        ends.callback(server.shutdown)
        for host in ("127.0.0.1", "localhost"):  # of the same site, and of another
            page = tab(port, f"/{ADA}/all")
            page.goto(f"http://{host}:{server.server_port}/")
            page.wait_for_function("document.title.includes('sent')")
            page.wait_for_timeout(300)
            for frame in page.frames[1:]:
                with contextlib.suppress(Exception):
                    assert "How much" not in frame.content()
        assert made.kept == []
        assert made.client.get(address).status_code == 200
