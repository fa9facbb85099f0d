"""What stands before the page: only this machine's own browser, asking from this page, gets in."""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HOST = re.compile(rb"(localhost|127\.0\.0\.1|\[::1\])(:\d{1,5})?")  # any port: of a tunnel, too
BODY = 40 * 1024  # bytes: a note of 4,000 Chinese characters takes nine apiece in a form
FIELDS, BODY_SECONDS = 8, 10.0
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


def known(request: Request, people: Mapping[str, str]) -> str:
    """Whose token is in the path. Raises HTTPException 404 where it is nobody's."""
    token = request.path_params["token"].encode()
    for own, person in people.items():
        if hmac.compare_digest(own.encode(), token):
            return person
    raise HTTPException(404)


async def fields(request: Request) -> dict[str, str]:
    """A form's fields, each there once; a body is read no further than it may be long."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/x-www-form-urlencoded":
        raise HTTPException(415, "This is not a form of this page.")
    body = b""
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                body += piece
                if len(body) > BODY:
                    raise HTTPException(413, "That is too long.")
        found = parse_qs(body.decode("ascii"), True, True, errors="strict", max_num_fields=FIELDS)
    except (TimeoutError, ClientDisconnect):
        raise HTTPException(408, "The form did not arrive.") from None
    except ValueError:
        if body:
            raise HTTPException(400, "This form cannot be read.") from None
        found = {}
    if any(len(values) > 1 for values in found.values()):
        raise HTTPException(400, "A field is there twice.")
    return {name: values[0] for name, values in found.items()}
