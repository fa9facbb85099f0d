"""Serves a page on this machine alone, until a person ends it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import platform
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlhf_recipes.errors import UsageError
from rlhf_recipes.feedback.asks import Asks
from rlhf_recipes.feedback.page import Page
from rlhf_recipes.feedback.store import QUESTION, Store
from rlhf_recipes.store.digests import digest
from rlhf_recipes.store.files import aside, no_link
from rlhf_recipes.text import plain

KEY = "feedback.key"  # in the runs folder: what addresses are made of, so that they stay the same
KEY_BYTES, NAME = 32, 60  # characters of a person's name
HALF_OPEN = 10.0  # seconds until a connection that asks for nothing is closed


class Served(Protocol):
    """What can be served: an application, and its people by their tokens."""

    people: Mapping[str, str]

    @property
    def app(self) -> Any: ...


def serve(
    store: Store,
    queue: str,
    *,
    port: int = 8017,
    tell: Callable[[str], None] = print,
    **words: Any,
) -> bool:
    """Serve the page of a queue, `words` as of `paged`. True where a person pressed `end`, False
    on Ctrl-C. Raises UsageError as `paged` does, and where the port is taken.
    """
    page = paged(store, queue, **words)
    with store.reading():  # open, so that SQLite's own files stay
        return at_address(page, port, tell)


def paged(
    store: Store,
    queue: str,
    *,
    title: str,
    people: Sequence[str] = ("you",),
    votes: int = 1,
    guideline: Path | None = None,
    question: str = QUESTION,
    **words: Any,
) -> Page:
    """The page of a queue; `words` are other fields of Page.

    Raises UsageError for names and numbers that cannot be.
    """
    text = _guideline(guideline)
    addresses = _addresses(store.file.parent, people, votes)
    asks = Asks(store, queue, votes=votes, question=question, guideline=digest(text))
    return Page(asks, addresses, plain(title), text, **words)


def at_address(page: Served, port: int, tell: Callable[[str], None]) -> bool:
    """Tell each person's address, and serve a page there. Raises UsageError for the port."""
    with listening(port) as listener:
        port = listener.getsockname()[1]
        for token, person in page.people.items():
            name = f"{person}: " if len(page.people) > 1 else ""
            tell(f"{name}http://127.0.0.1:{port}/{token}/")
        if "SSH_CONNECTION" in os.environ:
            tell(f"from your own machine: ssh -L {port}:127.0.0.1:{port} {platform.node()}")
        return served(page, listener)


def served(page: Served, listener: socket.socket) -> bool:
    """Serve a page at a socket of this machine until it is ended (True) or Ctrl-C comes (False)."""
    config = uvicorn.Config(
        page.app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        date_header=False,
        access_log=False,  # a token is in every line of it
        log_config=None,
        log_level="critical",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    ended = []

    def stop() -> None:
        ended.append(True)
        # The last page is to arrive first, with its style.
        asyncio.get_running_loop().call_later(0.5, setattr, server, "should_exit", True)

    page.ended = stop  # type: ignore[attr-defined]
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        return False
    return bool(ended)


class _Protocol(H11Protocol):
    """Closes a connection that has not asked for anything: they would add up."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(HALF_OPEN, self._close_unused)

    def _close_unused(self) -> None:
        if self.cycle is None:
            self.transport.close()


def listening(port: int) -> socket.socket:
    """A socket at 127.0.0.1 alone. Raises UsageError where the port cannot be had."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        what = f"port {port} of this machine cannot be used: {error.strerror}"
        raise UsageError(what, "--port names another; 0 takes any") from None
    except OverflowError:
        listener.close()
        raise UsageError(f"{port} is not a port", "--port is between 0 and 65535") from None
    return listener


def _guideline(file: Path | None) -> str:
    if file is None:
        return ""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the guideline {file} cannot be read: {error}") from None


def _addresses(runs: Path, people: Sequence[str], votes: int) -> dict[str, str]:
    """Each person's name by their token, which is the same whenever the page is served."""
    for name in people:
        if not name.strip() or plain(name) != name or len(name) > NAME:
            raise UsageError(f"{plain(name)!r} is not a person's name", f"up to {NAME} letters")
    if len({*people}) < len(people):
        raise UsageError("two people have one name", "name each once")
    if not 1 <= votes <= len(people):
        what = f"{votes} votes an item cannot come from {len(people)} people"
        raise UsageError(what, "--person NAME adds one; --votes is at most their number")
    return {token(runs, name): name for name in people}


def token(runs: Path, word: str) -> str:
    """What stands in an address of a runs folder: the same for a word whenever it is served."""
    key = _key(runs / KEY)
    return hmac.new(key, word.encode(), hashlib.sha256).hexdigest()[:32]


def _key(file: Path) -> bytes:
    """Of two processes one's is kept; the file is there whole or not at all."""
    if not file.exists():
        new = aside(file)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(secrets.token_bytes(KEY_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(new, file)
        new.unlink()
    with open(file, "rb", opener=no_link) as stream:
        key = stream.read()
    if len(key) != KEY_BYTES:
        raise UsageError(f"{file} is damaged", "remove it: the addresses will be others")
    return key
