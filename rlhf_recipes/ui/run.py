"""A run as it goes: stages with the time left, curves, samples, the log, stop; then its report."""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_recipes.errors import UsageError
from rlhf_recipes.feedback import winrate
from rlhf_recipes.feedback.guard import fields
from rlhf_recipes.recipe.kinds import KINDS
from rlhf_recipes.report import charts, run_page
from rlhf_recipes.report.facts import Facts, Stage, lines
from rlhf_recipes.report.svg import Plot
from rlhf_recipes.report.verdict import verdict
from rlhf_recipes.store import history, locks
from rlhf_recipes.store.files import no_link
from rlhf_recipes.text import duration, masked, plain
from rlhf_recipes.ui.house import House
from rlhf_recipes.ui.stop import Stops

SAMPLES, LOG_LINES, LOG_BYTES = 4, 40, 16_000
FIRST = 3  # curves; the others are behind a line
SILENT = 120.0  # seconds without a step, from which on it is said loudly
PARTS = ("state", "stages", "curves", "more", "samples", "log")


def routes(house: House) -> list[Route]:
    stops = Stops()

    def show(request: Request) -> Response:
        folder, manifest = house.run(request.path_params["name"])
        return shown(request, folder, manifest)

    def shown(
        request: Request, folder: Path, manifest: dict[str, Any], wrong: str = ""
    ) -> Response:
        code = 409 if wrong else 200
        if history.state(folder, manifest) == "running":
            said = {"wrong": wrong, "asked": stops.said(folder)}
            return house.page(
                "run.html", request, code=code, **_live(house, folder, manifest), **said
            )
        with contextlib.suppress(OSError, UsageError, sqlite3.Error):  # as `report` does
            winrate.write(folder)
        facts = Facts(folder)
        about = run_page.made_from(facts)
        values = house.kept(
            f"report {folder.name}", about, lambda: run_page.values(facts, verdict(facts))
        )
        words = {"run": folder.name, "wrong": wrong, "log": _log(folder)}
        return house.page("report.html", request, code=code, **values | words)

    def now(request: Request) -> Response:
        folder, manifest = house.run(request.path_params["name"])
        if history.state(folder, manifest) != "running":
            return JSONResponse({"reload": True})
        live = _live(house, folder, manifest) | {"asked": stops.said(folder)}
        return JSONResponse({"parts": house.blocks("run.html", PARTS, **live)})

    async def stop(request: Request) -> Response:
        await fields(request)
        folder, manifest = house.run(request.path_params["name"])
        if wrong := stops.stop(folder):
            return shown(request, folder, manifest, wrong)
        return house.to(f"run/{folder.name}")

    return [
        Route("/run/{name}", show),
        Route("/run/{name}/now", now),
        Route("/run/{name}/stop", stop, methods=["POST"]),
    ]


def _live(house: House, folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    facts = Facts(folder)
    at = next((stage for stage in facts.stages if not stage.record), None)
    pace = history.pace(at.folder) if at else None
    elapsed, silent = _age(manifest.get("started")), _age(pace.at if pace else "")
    ready = bool(at and locks.held(at.folder))
    before = None  # where an earlier process left it: this one has not made a step yet
    if pace and (not ready or (silent or 0) > (elapsed or math.inf)):
        before, pace = pace, None
    plots = _curves(house, facts, at) if at else []
    return {
        "run": folder.name,
        "title": facts.manifest.get("title") or folder.name,
        "stages": facts.stages,
        "at": at,
        "ready": ready,
        "before": before,
        "pace": pace,
        "share": 100 * pace.step / pace.of if pace and pace.of else 0,
        "left": duration(pace.left) if pace and pace.left is not None else "",
        "silent": duration(silent) if silent is not None else "",
        "loud": silent is not None and silent > SILENT,
        "elapsed": duration(elapsed or 0.0),
        "first": plots[:FIRST],
        "more": plots[FIRST:],
        "samples": lines(at.folder / "samples.jsonl")[: -SAMPLES - 1 : -1] if at else [],
        "log": _log(folder),
    }


def _curves(house: House, facts: Facts, stage: Stage) -> list[Plot]:
    """As in the report, of a stage that is not done yet."""

    def make() -> list[Plot]:
        if KINDS[stage.kind].explores:
            return list(charts.ppo(facts, stage))
        return [*charts.loss(facts, stage), *charts.compared(stage)]

    place = f"curves {facts.folder.name} {stage.name}"
    return house.soon(place, len(stage.curve), make) if stage.kind in KINDS else []


def _age(at: Any) -> float | None:
    """Seconds since a time of ours."""
    try:
        return max((datetime.now(UTC) - datetime.fromisoformat(at)).total_seconds(), 0.0)
    except (TypeError, ValueError):
        return None


def _log(folder: Path) -> str:
    """The last lines of what the libraries and the run itself said."""
    try:
        with open(folder / "log.txt", "rb", opener=no_link) as stream:
            stream.seek(max(os.fstat(stream.fileno()).st_size - LOG_BYTES, 0))
            text = stream.read().decode(errors="replace")
    except OSError:
        return ""
    found = [plain(line.rpartition("\r")[2]) for line in text.split("\n")]
    return masked("\n".join([line for line in found if line][-LOG_LINES:]))
