"""A page over a store of pairs, and a client that is this machine's own browser."""

from __future__ import annotations

import contextlib
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from rlhf_recipes.feedback.asks import Asks
from rlhf_recipes.feedback.items import Item, item
from rlhf_recipes.feedback.page import Page
from rlhf_recipes.feedback.serving import listening, served
from rlhf_recipes.feedback.store import Store
from tests.helpers.browser import chromium, tab  # noqa: F401

ADDRESS = "http://127.0.0.1:8017"
ADA, BOB = "a" * 32, "b" * 32


def pairs(count: int) -> list[Item]:
    return [
        item([{"role": "user", "content": f"How much is {n}?"}], [f"It is {n}.", f"Maybe {n}."])
        for n in range(count)
    ]


class Labelling:
    """A page and what it keeps."""

    def __init__(self, store: Store, **words: Any) -> None:
        self.store = store
        votes, wanted = words.pop("votes", 1), words.pop("wanted", 0)
        self.asks = Asks(store, "q", votes=votes, draw=random.Random(0))
        self.ended: list[bool] = []
        plain = {"people": {ADA: "ada"}, "title": "sums", "soonest": 0.0}
        self.page = Page(self.asks, **plain | words)
        self.page.missing = lambda: max(wanted - self.asks.progress("ada").judged, 0)
        self.page.ended = lambda: self.ended.append(True)
        self.client = TestClient(
            self.page.app, base_url=ADDRESS, follow_redirects=False, raise_server_exceptions=False
        )

    def next(self, token: str = ADA) -> str:
        """The address of the ask that is next."""
        answer = self.client.get(f"/{token}/")
        assert answer.status_code == 303
        return answer.headers["location"]

    def say(self, address: str, verdict: str, **fields: str) -> Any:
        return self.client.post(address, data={"verdict": verdict, **fields})

    @property
    def kept(self) -> list[tuple[Any, ...]]:
        with self.store.reading() as db:
            rows = db.execute("select ask, verdict, strength, note from judgement order by n")
            return [tuple(row) for row in rows]

    @contextlib.contextmanager
    def live(self) -> Iterator[int]:
        """The port at which the page is served, by a thread of this process."""
        ended: list[bool] = []
        with listening(0) as listener:
            port = listener.getsockname()[1]
            serve = partial(served, self.page, listener)
            thread = threading.Thread(target=lambda: ended.append(serve()), daemon=True)
            thread.start()
            try:
                yield port
            finally:
                form = "content-type: application/x-www-form-urlencoded\r\ncontent-length: 0\r\n"
                with contextlib.suppress(ConnectionError):  # a test may have ended it
                    raw(port, f"POST /{next(iter(self.page.people))}/end HTTP/1.1\r\n{form}")
                thread.join(20)
        assert ended == [True]


def raw(port: int, request: str | bytes, host: str = "host: localhost\r\n") -> str:
    """What the server says to a request that no client of good manners would send."""
    data = request if isinstance(request, bytes) else f"{request}{host}\r\n".encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        answer = b""
        connection.settimeout(5)
        with contextlib.suppress(ConnectionError, TimeoutError):
            while piece := connection.recv(65536):
                answer += piece
                head, ended, body = answer.partition(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                if ended and len(body) >= int(length[1] if length else 0):
                    break
    return answer.decode("latin1")


@pytest.fixture
def labelling(tmp_path: Path) -> Callable[..., Labelling]:
    def make(items: list[Item] | int = 6, **words: Any) -> Labelling:
        store = words.pop("store", None) or Store(tmp_path)
        store.put(pairs(items) if isinstance(items, int) else items, "q")
        return Labelling(store, **words)

    return make


def text_of(html: str) -> str:
    """A page's words, as a person reads them."""
    bare = re.sub(r"<(script|style|kbd).*?</\1>|<[^>]+>", " ", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", bare).strip()
