"""What the pages of the ui share: the runs folder, the address, and how a page is made."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, FileSystemLoader
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from rlhf_recipes.feedback.serving import token
from rlhf_recipes.report import html
from rlhf_recipes.store import history

TEMPLATES = Path(__file__).parent / "templates"
# The report's own templates stand in this house, too: its house.html is found before theirs.
LOADER = ChoiceLoader([FileSystemLoader(TEMPLATES), FileSystemLoader(html.TEMPLATES)])
PAGES = html.ENVIRONMENT.overlay(loader=LOADER)
STATIC = {
    "ui.css": (html.STYLE + (TEMPLATES / "ui.css").read_text(encoding="utf-8"), "text/css"),
    "ui.js": ((TEMPLATES / "ui.js").read_text(encoding="utf-8"), "text/javascript"),
}
VERSION = hashlib.sha256("".join(one for one, _ in STATIC.values()).encode()).hexdigest()[:12]
# As the guard's, and: curves have style attributes, and the script asks for what has changed.
POLICY = (
    "default-src 'none'; style-src 'self'; style-src-attr 'unsafe-inline'; script-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
ME = "\0ui"  # whose address it is: no person of the labelling page can have that name


class House:
    """The ui of one runs folder."""

    def __init__(self, runs: Path) -> None:
        runs.mkdir(parents=True, exist_ok=True)
        self.runs = runs
        self.people: Mapping[str, str] = {token(runs, ME): "you"}
        self._kept: dict[str, tuple[Any, Any]] = {}
        self._drawing = threading.Lock()  # matplotlib's settings are one for all threads

    def page(self, name: str, request: Request, code: int = 200, **values: Any) -> Response:
        made = PAGES.get_template(name).render(
            base=self.base, version=VERSION, at=request.url.path, **values
        )
        return HTMLResponse(made, code, {"content-security-policy": POLICY})

    def part(self, name: str, **values: Any) -> str:
        """A piece of a page, as the page itself has it."""
        return PAGES.get_template(name).render(base=self.base, **values)

    @property
    def base(self) -> str:
        return f"/{next(iter(self.people))}"

    def to(self, place: str) -> Response:
        return RedirectResponse(f"{self.base}/{place}", 303)

    def run(self, name: str) -> tuple[Path, dict[str, Any]]:
        """The folder and manifest of a run of that name. Raises HTTPException 404."""
        for folder, manifest in history.run_folders(self.runs):
            if folder.name == name and manifest is not None:
                return folder, manifest
        raise HTTPException(404)

    def kept(self, place: str, about: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made anew where `about` is another than at the last time."""
        with self._drawing:
            if self._kept.get(place, (None, None))[0] != about:
                self._kept[place] = about, make()
            return self._kept[place][1]
