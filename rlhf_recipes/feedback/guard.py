"""What stands before the page: only this machine's own browser, asking from this page, gets in."""

from __future__ import annotations

import re
from typing import Any

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST = re.compile(rb"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?")  # any port: of a tunnel, too
HEADERS = {
    b"content-security-policy": b"default-src 'none'; style-src 'self'; script-src 'self'; "
    b"form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    b"x-content-type-options": b"nosniff",
    b"cache-control": b"no-store",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"same-origin",  # without one, our own forms would be of origin null
}


class Guard:
    """Refuses what is not this page's own, and puts HEADERS on every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name, value) for name, value in message["headers"]]
                names = {name for name, _ in own}
                own += [header for header in HEADERS.items() if header[0] not in names]
                message = message | {"headers": own}
            await send(message)

        if scope["type"] == "http":
            app: Any = self.app
            if refused := refusal(scope["method"], scope["headers"]):
                code, line = refused
                app = PlainTextResponse(f"{line}\n", code)
            await app(scope, receive, answer)


def refusal(method: str, headers: list[tuple[bytes, bytes]]) -> tuple[int, str] | None:
    """The status and the words for a request that is not this page's own; None where it is."""
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        found.setdefault(name.lower(), []).append(value)
    hosts = found.get(b"host", [])
    if len(hosts) != 1 or not HOST.fullmatch(hosts[0]):
        return 400, "This page is at 127.0.0.1 alone."
    if any(origin != b"http://" + hosts[0] for origin in found.get(b"origin", [])):
        return 403, "Another page asks for this."
    if any(one not in (b"same-origin", b"none") for one in found.get(b"sec-fetch-site", [])):
        return 403, "Another page leads here: paste the address instead."
    if method not in ("GET", "POST"):
        return 405, "This page knows GET and POST."
    return None
