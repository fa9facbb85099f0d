"""All runs, the newest first: what state each is in, and what came of it."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_recipes.cli_tables import when
from rlhf_recipes.report.facts import Facts
from rlhf_recipes.report.verdict import verdict
from rlhf_recipes.store import history
from rlhf_recipes.ui.house import House


def routes(house: House) -> list[Route]:
    def show(request: Request) -> Response:
        return house.page("runs.html", request, **_listed(house))

    def now(request: Request) -> Response:
        return JSONResponse({"parts": house.blocks("runs.html", ["list"], **_listed(house))})

    return [Route("/", show), Route("/now", now)]


def _listed(house: House) -> dict[str, Any]:
    found = history.list_runs(house.runs)
    runs = found["runs"][::-1]
    runs.sort(key=lambda run: run["outcome"] != "running")
    for run in runs:
        first = [*verdict(Facts(house.runs / run["name"])), None][0]
        run["level"], run["says"] = (first.level, first.text) if first else ("note", "")
        run["when"] = when(run["ended"])
    return {"runs": runs, "others": found["others"], "folder": house.runs.resolve().name}
