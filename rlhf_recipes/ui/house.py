"""What the pages of the ui share: the runs folder, the address, and how a page is made."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
PATIENCE = 20
ME = "\0ui"  # whose address it is: no person of the labelling page can have that name


class House:
    """The ui of one runs folder."""

    def __init__(self, runs: Path, files: Sequence[Path] = ()) -> None:
        runs.mkdir(parents=True, exist_ok=True)
        self.runs = runs
        self.files = files
        self.people: Mapping[str, str] = {token(runs, ME): "you"}
        self._kept: dict[str, tuple[Any, Any, float]] = {}
        self._drawing = threading.Lock()  # matplotlib's settings are one for all threads

    def page(self, template: str, request: Request, /, code: int = 200, **values: Any) -> Response:
        shared = {"base": self.base, "version": VERSION, "here": request.url.path}
        made = PAGES.get_template(template).render(shared | values)
        return HTMLResponse(made, code, {"content-security-policy": POLICY})

    def blocks(self, template: str, names: Iterable[str], /, **values: Any) -> dict[str, str]:
        """Pieces of a page as the page itself has them: what changes as one looks at it."""
        found = PAGES.get_template(template)
        context = found.new_context({"base": self.base, **values})
        return {name: "".join(found.blocks[name](context)).strip() for name in names}

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
            before, value, _ = self._kept.get(place, (None, None, 0.0))
            if before != about:
                begun = time.monotonic()
                value = make()
                now = time.monotonic()
                self._kept[place] = about, value, now + PATIENCE * (now - begun)
            return value

    def soon(self, place: str, about: Any, make: Callable[[], list[Any]]) -> list[Any]:
        """What `make` gave at last, at first []; where `about` has changed, a thread makes it anew.

        Not before PATIENCE times as long has passed as it took: a run needs the cores.
        """
        before, value, until = self._kept.get(place, (None, [], 0.0))
        if before != about and time.monotonic() >= until and not self._drawing.locked():
            threading.Thread(target=self.kept, args=(place, about, make), daemon=True).start()
        return value
