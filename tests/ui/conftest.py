"""The ui over runs that were written by hand, and a client that is this machine's own browser."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.testclient import TestClient

from rlhf_recipes.feedback.serving import listening, served
from rlhf_recipes.store import locks
from rlhf_recipes.ui.app import Ui
from tests.feedback.conftest import raw
from tests.helpers.browser import chromium, tab  # noqa: F401
from tests.helpers.told import GOOD, told

ADDRESS = "http://127.0.0.1:8018"
STEPS = [
    {"step": n, "of": 30, "seconds": 2.0 * n, "score": n / 10, "KL": n / 5, "length": 12.0}
    for n in range(1, 11)
]
ANSWERS = [
    {
        "prompt": f"How much is {n}?",
        "answers": {"base": "?", "sft": f"It is {n}.", "ppo": f"Maybe {n}."},
        "scores": {"base": 0.0, "sft": 0.5, "ppo": n / 10},
    }
    for n in range(8)
]
LATER = ("ppo", "judge", "evaluation", "best_of")


class Site:
    """A ui and its client. Paths are those after the token."""

    def __init__(self, runs: Path, **words: Any) -> None:
        self.ui = Ui(runs, **words)
        self.client = TestClient(
            self.ui.app, base_url=ADDRESS, follow_redirects=False, raise_server_exceptions=False
        )

    def get(self, path: str, **words: Any) -> Any:
        return self.client.get(f"{self.ui.base}{path}", **words)

    def post(self, path: str, **fields: str) -> Any:
        return self.client.post(f"{self.ui.base}{path}", data=fields)

    @contextlib.contextmanager
    def live(self) -> Iterator[str]:
        """The address at which it is served, by a thread of this process."""
        page = _Ending(self.ui)
        with listening(0) as listener:
            port = listener.getsockname()[1]
            thread = threading.Thread(target=served, args=(page, listener), daemon=True)
            thread.start()
            yield f"http://127.0.0.1:{port}{self.ui.base}"
            raw(port, "GET /end HTTP/1.1\r\n")
            thread.join(20)


class _Ending:
    """A ui with an address that ends its server: it has none itself."""

    def __init__(self, ui: Ui) -> None:
        self.people, inner = ui.people, ui.app

        async def app(scope: Any, receive: Any, send: Any) -> None:
            if scope.get("path") != "/end":
                return await inner(scope, receive, send)
            self.ended()  # set by the server
            await PlainTextResponse("")(scope, receive, send)

        self.app = app


def finished(folder: Path, **words: Any) -> Path:
    """A run that went well, with the answers of its evaluation."""
    rows = "".join(json.dumps(row) + "\n" for row in ANSWERS)
    about = {"outputs": {"evaluation": {"answers.jsonl": rows}}, "curves": {"ppo": STEPS}}
    return told(folder, **about | words)


def unfinished(folder: Path, steps: Sequence[dict[str, Any]] = ()) -> Path:
    """A run at step 10 of 30 of PPO; nobody holds its lock."""
    early = {key: None for key in GOOD if key.split(".")[0] not in ("sft", "reward")}
    run = told(
        folder, early, manifest={"outcome": "unfinished", "started": "2026-11-27T12:00:00+00:00"},
        curves={"ppo": [*steps]}, not_run=LATER,
    )  # fmt: skip
    sample = {"step": 9, "prompt": "How much is 2?", "answer": "It is <b>2</b>.", "score": -0.5}
    stage = next((run.parent / ".stages").glob("ppo-*"))
    (stage / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (run / "log.txt").write_text("\x1b[31mloading\x1b[0m\nstep 9\rstep 10\n")
    return run


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., Site]:
    return lambda runs=None, **words: Site(runs or tmp_path / "runs", **words)


@contextlib.contextmanager
def running(run: Path, at: str = "ppo") -> Iterator[None]:
    """This process holds a run, and its stage of a kind."""
    with contextlib.ExitStack() as held:
        for folder in (run, *(run.parent / ".stages").glob(f"{at}-*")):
            held.enter_context(locks.lock(folder, folder.name))
        yield


def words_of(html: str) -> str:
    """A page's words, as a person reads them."""
    bare = re.sub(r"<(script|style|svg|kbd).*?</\1>|<[^>]+>", " ", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", bare).strip()
