"""What people can judge: evaluations of runs, runs that wait for people, files that were named.

The page itself is the one of `rlhf-recipes label`, with its own addresses below /label/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from rlhf_recipes.errors import RlhfRecipesError
from rlhf_recipes.feedback import winrate
from rlhf_recipes.feedback.guard import fields
from rlhf_recipes.feedback.page import STATIC, static
from rlhf_recipes.feedback.serving import paged
from rlhf_recipes.pipeline import labelling
from rlhf_recipes.pipeline.labelling import Asking
from rlhf_recipes.store import history
from rlhf_recipes.store.digests import digest
from rlhf_recipes.ui.house import House


@dataclass(frozen=True)
class Offer:
    """Something that can be judged."""

    id: str  # in addresses
    name: str
    about: str
    ask: Callable[[], Asking]


class Labelling:
    """The pages of what was chosen to be judged, by the offers' ids."""

    def __init__(self, house: House) -> None:
        self.house = house
        self._pages: dict[str, ASGIApp] = {}

    def mounts(self) -> list[Any]:
        """Beside the ui's own addresses: the labelling page has a token of its own."""
        pages = Mount("/label/{offer}", app=self._page)
        return [*(Route(f"/{name}", static) for name in STATIC), pages]

    def routes(self) -> list[Route]:
        return [
            Route("/label", self._show),
            Route("/label/{offer}", self._open, methods=["POST"]),
        ]

    def offers(self) -> Iterator[Offer]:
        for file in self.house.files:
            ask = partial(labelling.of_rows, file, self.house.runs, _nobody)
            yield Offer(_id("file", str(file.resolve())), file.name, "A file of answers.", ask)
        for folder, manifest in history.run_folders(self.house.runs):
            if manifest is not None:
                yield from self._of_run(folder, manifest)

    def _of_run(self, folder: Path, manifest: dict[str, Any]) -> Iterator[Offer]:
        from rlhf_recipes.pipeline.plan import plan_run
        from rlhf_recipes.recipe.load import load_recipe

        def waiting() -> Asking:
            recipe = load_recipe(folder / "resolved.toml")
            return labelling.of_stage(plan_run(recipe, self.house.runs, name=folder.name))

        name = folder.name
        if history.state(folder, manifest) == "waiting":
            about = "The run waits for people, and learns from what they say."
            yield Offer(_id("stage", name), name, about, waiting)
        if policies := winrate.compared(folder):
            about = f"Its {policies[0]} against its {policies[1]}, without names: a win rate for "
            about += "the report. Nothing is trained on it."
            ask = partial(labelling.of_evaluation, folder, winrate.PAIRS)
            yield Offer(_id("evaluation", name), name, about, ask)

    def _show(self, request: Request) -> Response:
        return self.house.page("label.html", request, offers=[*self.offers()])

    async def _open(self, request: Request) -> Response:
        await fields(request)
        return await run_in_threadpool(self._opened, request.path_params["offer"])

    def _opened(self, offer: str) -> Response:
        found = next((one for one in self.offers() if one.id == offer), None)
        if found is None:
            raise HTTPException(404)
        try:
            asking = found.ask()
            page = paged(asking.store, asking.queue, **{"end": "Finish"} | asking.put())
        except RlhfRecipesError as error:
            raise HTTPException(409, str(error)) from None
        page.end, page.back = "Finish", f"{self.house.base}/label"
        self._pages[found.id] = page.app
        return RedirectResponse(f"/label/{found.id}/{next(iter(page.people))}/", 303)

    async def _page(self, scope: Scope, receive: Receive, send: Send) -> None:
        page = self._pages.get(scope["path_params"]["offer"])
        if page is None:
            raise HTTPException(404)
        await page(scope, receive, send)


def _nobody(said: str) -> None:
    """Is told of rows that are left out of a file."""


def _id(*words: str) -> str:
    return digest([*words])[:16]
