"""The command `label`: from a file to a page, and to what is kept."""

import json
import threading
import time

import pytest

from rlhf_recipes.cli import app
from rlhf_recipes.errors import UsageError
from rlhf_recipes.feedback.page import SOONEST
from rlhf_recipes.feedback.store import Store
from tests.feedback.conftest import raw

FORM = "content-type: application/x-www-form-urlencoded\r\ncontent-length: {}\r\nhost: localhost"


def label(*words) -> None:
    app(["label", *map(str, words)], standalone_mode=False)


def ask(port: int, path: str, body: str | None = None) -> str:
    """Where it leads."""
    head = f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n"
    if body is not None:
        head = f"POST {path} HTTP/1.1\r\n{FORM.format(len(body))}\r\n\r\n{body}"
    answer = raw(port, head.encode())
    assert answer[9] in "23", answer
    return answer.partition("location: ")[2].partition("\r\n")[0]


def test_label_asks_for_what_is_not_judged_and_says_how_far_it_is(tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"{n}?", "answers": [f"{n}.", f"{n}!"]} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = tmp_path / "runs"
    for judged in (1, 2):
        words = (file, "--port", 0, "--runs", runs, "--person", "ada", "--person", "bob")
        words += ("--strength",)
        thread = threading.Thread(target=label, args=words, daemon=True)
        thread.start()
        said = ""
        while "bob: " not in said and thread.is_alive():
            said += capsys.readouterr().out
            time.sleep(0.02)
        address = said.partition("ada: http://127.0.0.1:")[2].partition("\n")[0]
        port, path = int(address.partition("/")[0]), f"/{address.partition('/')[2]}"
        first = ask(port, path)
        page = raw(port, f"GET {first} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        assert 'value="left-3"' in page  # the seven degrees
        time.sleep(SOONEST)
        assert ask(port, first, "verdict=left-2") == path
        ask(port, f"{path}end", "")
        thread.join(20)
        last = f"{judged} of 3 are judged, in {runs / 'feedback.db'}\n"
        assert capsys.readouterr().out == last
    store = Store(runs)
    assert [one.strength for one in store.judged(store.ids())] == [2, 2]
    assert len(store.judged([])) == 0
    assert (runs / "feedback.db").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--votes", 2], "2 votes an item cannot come from 1 people"),
        (["--guideline", "none.md"], "the guideline none.md cannot be read"),
        (["--port", 99999], "99999 is not a port"),
    ],
)
def test_a_call_that_cannot_be_is_refused_in_one_line(tmp_path, words, message):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "Two?", "answers": ["2", "3"]}\n')
    with pytest.raises(UsageError, match=message):
        label(file, "--runs", tmp_path, *words)


def test_a_store_that_is_not_one_is_refused_before_the_page(tmp_path):
    (tmp_path / "feedback.db").mkdir()
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "Two?", "answers": ["2", "3"]}\n')
    with pytest.raises(UsageError, match="feedback.db cannot be read: unable to open"):
        label(file, "--runs", tmp_path)
