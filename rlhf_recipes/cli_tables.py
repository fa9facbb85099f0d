"""Plans, runs and what differs between them, as aligned tables for people."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.text import cut, plain, size, table

if TYPE_CHECKING:
    from rlhf_recipes.pipeline.plan import Plan

WIDEST = 40  # of a value


def plan(made: Plan) -> str:
    """Every reason of every stage on a line of its own."""
    rows = [["stage", "", "why"]]
    for stage in made.stages:
        first, *more = [""] if stage.done else stage.reasons
        rows.append([stage.name, "cached" if stage.done else "runs", first])
        rows += [["", "", reason] for reason in more]
    return table(rows)


def runs(found: dict[str, Any], folder: Path) -> str:
    rows = [["run", "ended", "outcome", "stages", "accuracy", "win rate", "KL", "size", "+ stages"]]
    for run in found["runs"]:
        numbers = {key.rpartition(".")[2]: value for key, value in run["numbers"].items()}
        if (judged := numbers.get("judge_win_rate")) is not None:
            numbers["win_rate"] = judged  # by whom it was not trained against
        forms = {"accuracy": ".1%", "win_rate": ".0%", "kl": ".2f"}
        said = [f"{numbers[key]:{form}}" if key in numbers else "" for key, form in forms.items()]
        stages = f"{run['stages_done']} of {run['stages']}"
        sizes = [size(run["bytes"]), size(run["stages_bytes"])]
        rows.append([run["name"], when(run["ended"]), run["outcome"], stages, *said, *sizes])
    running = [run for run in found["runs"] if run["progress"]]
    own, shared = size(sum(run["bytes"] for run in found["runs"])), size(found["stages_bytes"])
    lines = [table(rows, right=(4, 5, 6, 7, 8)), ""] if found["runs"] else []
    lines += [f"{plain(run['name'])} is at {run['progress']}" for run in running]
    count = len(found["runs"])
    lines.append(f"runs in {folder}: {count}, {own}; their stages, each once: {shared}")
    lines += [f"{folder / plain(other['name'])} {other['why']}" for other in found["others"]]
    return "\n".join(lines)


def comparison(names: list[str], parts: dict[str, dict[str, list[Any]]]) -> str:
    """A table a part; a number of the results with its difference from the first run's."""
    tables = []
    for part, rows in parts.items():
        lines = [[part, *names]] if rows else [[f"{part}: the same"]]
        for key, (first, *others) in rows.items():
            if key.endswith(("_low", "_high")) and key.rpartition("_")[0] in rows:
                continue  # an interval's ends: --json and --page have them
            after = [_value(value) + _gain(first, value, part) for value in others]
            lines.append([key, _value(first), *after])
        tables.append(table(lines))
    return "\n\n".join(tables)


def judged(numbers: Mapping[str, float]) -> str:
    """What a judge said, in numbers; an agreement with its interval."""
    ends = {"agreement_low", "agreement_high"}
    rows = [[key.replace("_", " "), _value(n)] for key, n in numbers.items() if key not in ends]
    if "agreement" in numbers:
        told = f"{numbers['agreement_low']:.0%} to {numbers['agreement_high']:.0%}"
        rows = [[k, f"{n} ({told})" if k == "agreement" else n] for k, n in rows]
    return table(rows, right=(1,))


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if value is None or re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text):
        return "—" if value is None else text[:12]
    text = f"{value:.4g}" if isinstance(value, float) else text
    return cut(text, WIDEST)


def _gain(first: Any, value: Any, part: str) -> str:
    numbers = all(isinstance(one, int | float) for one in (first, value))
    return f" ({value - first:+.3g})" if part == "results" and numbers and value != first else ""


def when(ended: str) -> str:
    """A time of ours, by this machine's clock."""
    try:
        return f"{datetime.fromisoformat(ended).astimezone():%Y-%m-%d %H:%M}"
    except ValueError:
        return ""
