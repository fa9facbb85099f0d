"""The labelling page: forms and redirects over the store; it works without JavaScript.

    GET  /<token>/              303 to an ask: its item and sides are on disk
    GET  /<token>/<ask>         the same item and sides, for ever; says what was said to it
    POST /<token>/<ask>         on disk, then 303 to the next; else it stays and says why
    GET  /<token>/<ask>/before  303 to what this person judged before
    GET  /<token>/all           how far it is, and what was said
    POST /<token>/end           the page ends; what waits for it goes on

A token is a person's address: who has it may judge in their name. There is no cookie.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from rlhf_recipes.feedback import guard, texts
from rlhf_recipes.feedback.asks import Ask, Asks
from rlhf_recipes.report.html import ENVIRONMENT, STYLE
from rlhf_recipes.store.digests import digest

TEMPLATES = Path(__file__).parent / "templates"
PAGES = ENVIRONMENT.overlay(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined)
TOKENS = STYLE.partition("* {")[0]  # the report's colours, light and dark
STATIC = {
    "page.css": (TOKENS + (TEMPLATES / "page.css").read_text(encoding="utf-8"), "text/css"),
    "page.js": ((TEMPLATES / "page.js").read_text(encoding="utf-8"), "text/javascript"),
}
VERSION = digest([content for content, _ in STATIC.values()])[:12]
NOTE = 4000  # characters
LISTED = 200  # of what a person said
SOONEST = 0.3  # seconds: a verdict that follows its page sooner was a double click's second half
WORDS = {
    "left": "Left is better",
    "right": "Right is better",
    "tie": "Tie",
    "both_bad": "Both bad",
    "good": "Good",
    "bad": "Bad",
    "skip": "Skip",
}


@dataclass
class Page:
    """The application; `app` is what a server serves. `people` are names by token."""

    asks: Asks
    people: Mapping[str, str]
    title: str
    guideline: str = ""
    strength: bool = False
    notes: bool = True
    end: str = "Train now"
    missing: Callable[[], int] = int  # judgements, before `end` is what to do next
    ended: Callable[[], None] = lambda: None
    about: Callable[[], list[tuple[str, str]]] = list  # more to say of what was judged
    soonest: float = SOONEST
    back: str = ""  # where it leads when it has ended; "" where a terminal goes on
    shown_guideline: texts.Text = field(init=False)

    def __post_init__(self) -> None:
        self.shown_guideline = texts.text(self.guideline)

    @property
    def app(self) -> guard.Guard:
        routes = [
            *(Route(f"/{name}", static) for name in STATIC),
            Route("/{token}", self._home),
            Route("/{token}/", self._next),
            Route("/{token}/all", self._all),
            Route("/{token}/end", self._end, methods=["POST"]),
            Route("/{token}/{ask}", self._ask),
            Route("/{token}/{ask}", self._judge, methods=["POST"]),
            Route("/{token}/{ask}/before", self._before),
        ]
        handlers = {HTTPException: self._refused, sqlite3.Error: self._failed}
        made = Starlette(routes=routes, exception_handlers=handlers)
        made.router.redirect_slashes = False  # it would lead "//elsewhere/" there
        return guard.Guard(made)

    # ---- asking

    def _home(self, request: Request) -> Response:
        self._person(request)
        return self._to(request, "")

    def _next(self, request: Request) -> Response:
        person = self._person(request)
        if self.guideline and "begin" not in request.query_params and not self.asks.begun(person):
            return self._page("guideline.html", request)
        ask = self.asks.next(person)
        return self._to(request, ask or "all")

    def _before(self, request: Request) -> Response:
        person = self._person(request)
        with _known():
            return self._to(request, self.asks.before(request.path_params["ask"], person))

    def _ask(self, request: Request) -> Response:
        person = self._person(request)
        with _known():
            return self._shown(request, self.asks.get(request.path_params["ask"], person))

    def _shown(
        self, request: Request, ask: Ask, wrong: str = "", note: str | None = None, code: int = 200
    ) -> Response:
        turns = [(turn["role"], texts.text(turn["content"])) for turn in ask.item.prompt]
        return self._page(
            "ask.html",
            request,
            code,
            ask=ask,
            turns=turns,
            answers=texts.answers(ask.answers),
            note=ask.note or "" if note is None else note,
            wrong=wrong,
            words=WORDS,
        )

    # ---- judging

    async def _judge(self, request: Request) -> Response:
        fields = await guard.fields(request)
        return await run_in_threadpool(self._kept, request, fields)

    def _kept(self, request: Request, fields: dict[str, str]) -> Response:
        person, id = self._person(request), request.path_params["ask"]
        verdict, _, degree = fields.get("verdict", "").partition("-")
        note = texts.clean(fields.get("note", "")).strip()
        with _known():
            ask = self.asks.get(id, person)
        if ask.verdict is None and 0 <= self.asks.clock() - ask.at < self.soonest:
            return self._to(request, id)
        try:
            if len(note) > NOTE:
                raise ValueError(f"a note has at most {NOTE:,} characters, this one {len(note):,}")
            if degree not in ("", "1", "2", "3"):
                raise ValueError(f"{degree!r} is not a strength")
            self.asks.judge(id, person, verdict, int(degree) if degree else None, note)
        except ValueError as error:
            return self._shown(request, ask, f"Not saved: {error}.", note, 400)
        except sqlite3.Error as error:
            code, why = trouble(error)
            return self._shown(request, ask, f"Not saved: {why}, then choose again.", note, code)
        return self._to(request, "")

    # ---- all of it, and the end

    def _all(self, request: Request) -> Response:
        person = self._person(request)
        said = self.asks.said(person, LISTED)
        items = {i.id: i for i in self.asks.store.items(row["item"] for row in said)}
        for row in said:
            row["prompt"] = items[row["item"]].prompt[-1]["content"][:LISTED]
        counts, about = self.asks.counts(), self.about()
        return self._page("all.html", request, words=WORDS, said=said, counts=counts, about=about)

    async def _end(self, request: Request) -> Response:
        await guard.fields(request)
        made = await run_in_threadpool(self._page, "ended.html", request)  # 404 for a stranger
        self.ended()
        return RedirectResponse(self.back, 303) if self.back else made

    # ---- what all of them share

    def _person(self, request: Request) -> str:
        return guard.known(request, self.people)

    def _to(self, request: Request, place: str) -> Response:
        root = request.scope.get("root_path", "")
        return RedirectResponse(f"{root}/{request.path_params['token']}/{place}", 303)

    def _page(self, name: str, request: Request, code: int = 200, **values: Any) -> Response:
        person = self._person(request)
        progress = self.asks.progress(person)
        minutes = round(progress.left * (progress.seconds or 0) / 60)
        rest = f"{minutes} minute{'s' * (minutes > 1)} left" if minutes else "under a minute left"
        shared = {
            "page": self,
            "person": person if len(self.people) > 1 else "",
            "progress": progress,
            "rest": rest,
            "missing": self.missing(),
            "version": VERSION,
        }
        return HTMLResponse(PAGES.get_template(name).render(shared | values), code)

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = {404: "There is nothing here. Use the address that the terminal shows, whole."}
        return _says(said.get(error.status_code, error.detail), error.status_code)

    async def _failed(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, sqlite3.Error)
        code, why = trouble(error)
        return _says(f"Nothing was changed: {why}, then load this page again.", code)


def static(request: Request) -> Response:
    """Of STATIC; at the root of whatever the page is part of."""
    content, kind = STATIC[request.url.path.removeprefix("/")]
    return Response(content, media_type=kind, headers={"cache-control": "max-age=86400"})


def trouble(error: sqlite3.Error) -> tuple[int, str]:
    """An HTTP status, and in words what the store lacks and what to do first."""
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_FULL:
            return 507, "the disk is full. Free some space"
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return 503, "another program holds the store. Wait a moment"
    return 503, f"the store cannot be used ({error}). Look at the disk"


def _says(line: str, code: int) -> Response:
    html = PAGES.get_template("says.html").render(line=line, version=VERSION)
    return HTMLResponse(html, code, {"connection": "close"} if code in (408, 413) else None)


@contextlib.contextmanager
def _known() -> Any:
    try:
        yield
    except KeyError:
        raise HTTPException(404) from None
