"""Runs side by side: what the page of `compare` has, for those that were ticked."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rlhf_recipes.errors import UsageError
from rlhf_recipes.report import compare, run_page
from rlhf_recipes.report.facts import Facts
from rlhf_recipes.ui.house import House

MOST = 4  # runs: more cannot be told apart side by side


def routes(house: House) -> list[Route]:
    def show(request: Request) -> Response:
        names = list(dict.fromkeys(request.query_params.getlist("run")))
        if not 2 <= len(names) <= MOST:
            raise HTTPException(400, f"Tick two to {MOST} runs, and compare them then.")
        folders = [house.run(name)[0] for name in names]
        about = [run_page.made_from(Facts(folder)) for folder in folders]
        try:
            values = house.kept(f"compare {names}", about, lambda: compare.values(folders))
        except UsageError as error:
            raise HTTPException(409, str(error)) from None
        return house.page("compare.html", request, **values)

    return [Route("/compare", show)]
