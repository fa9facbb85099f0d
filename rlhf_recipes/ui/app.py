"""The ui of a runs folder: pages over what is on disk; they work without JavaScript.

    GET  /<token>/                  all runs, the newest first
    GET  /<token>/run/<name>        a run as it goes; then its report

A token is the address of the one person at this machine. There is no cookie. A run is found by its
name among the folders there: no request holds a path.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount, Route, Router
from starlette.types import Receive, Scope, Send

from rlhf_recipes.feedback.guard import Guard, known
from rlhf_recipes.feedback.page import trouble
from rlhf_recipes.ui import compare, run, runs
from rlhf_recipes.ui.chat import Chat
from rlhf_recipes.ui.house import STATIC, House
from rlhf_recipes.ui.label import Labelling

KNOWN = "rlhf-recipes.known"  # in a request's scope: a stranger's answer must not have the address


class Ui(House):
    """The application; `app` is what a server serves."""

    @property
    def app(self) -> Guard:
        labelling = Labelling(self)
        inside = [route for page in (runs, run, compare) for route in page.routes(self)]
        inside += [*labelling.routes(), *Chat(self).routes()]
        routes = [
            *(Route(f"/{name}", _static) for name in STATIC),
            *labelling.mounts(),
            Route("/{token}", self._home),
            Mount("/{token}", app=_Known(self, Router(inside, redirect_slashes=False))),
        ]
        handlers = {HTTPException: self._refused, sqlite3.Error: self._failed}
        made = Starlette(routes=routes, exception_handlers=handlers)
        made.router.redirect_slashes = False  # it would lead "//elsewhere/" there
        return Guard(made)

    def _home(self, request: Request) -> Response:
        known(request, self.people)
        return self.to("")

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = {404: "There is nothing here. Use the address that the terminal shows, whole."}
        line = said.get(error.status_code, error.detail)
        words = {"line": line, "base": self.base if request.scope.get(KNOWN) else ""}
        made = self.page("says.html", request, code=error.status_code, **words)
        if error.status_code in (408, 413):
            made.headers["connection"] = "close"
        return made

    async def _failed(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, sqlite3.Error)
        code, why = trouble(error)
        line = f"Nothing was changed: {why}, then load this page again."
        return await self._refused(request, HTTPException(code, line))


class _Known:
    """Lets in who has the token, and nobody else."""

    def __init__(self, house: House, app: Router) -> None:
        self.house, self.app = house, app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        known(Request(scope), self.house.people)
        scope[KNOWN] = True
        await self.app(scope, receive, send)


def _static(request: Request) -> Response:
    content, kind = STATIC[request.url.path.removeprefix("/")]
    return Response(content, media_type=kind, headers={"cache-control": "max-age=86400"})


def serve(runs_folder: Path, port: int, files: Sequence[Path] = ()) -> None:
    """Serve the ui until Ctrl-C. Raises UsageError where the port cannot be had."""
    from rlhf_recipes.feedback.serving import at_address

    at_address(Ui(runs_folder, files), port, print)
