"""Plans, runs and what differs between them, as aligned tables for people."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.errors import cut
from rlhf_recipes.findings import Finding
from rlhf_recipes.plan import Plan
from rlhf_recipes.progress import duration, plain, size

if TYPE_CHECKING:
    from rlhf_recipes.rehearsal import Rehearsed

WIDEST = 40  # of a value
MARKS = {"fault": "✗", "success": "✓", "doubt": "?", "good": "✓", "note": "·"}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """What libraries say meanwhile is not for a person."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligned columns, those of `right` to the right; nothing in them can move the cursor."""
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        sides = [">" if place in right else "<" for place in range(len(row))]
        cells = [f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def plan(made: Plan) -> str:
    """Every reason of every stage on a line of its own."""
    rows = [["stage", "", "why"]]
    for stage in made.stages:
        first, *more = [""] if stage.done else stage.reasons
        rows.append([stage.name, "cached" if stage.done else "runs", first])
        rows += [["", "", reason] for reason in more]
    return table(rows)


def needs(
    held: dict[str, Counter[str]], beside: Callable[[Counter[str]], float], took: dict[str, float]
) -> str:
    """A stage a line: the most memory, its time, and what the memory is for, the most first."""
    rows = [["stage", "memory", "time", "of which"]]
    for name, roles in held.items():
        named = [f"{role} {size(count)}" for role, count in roles.most_common() if count > 1e5]
        time = f"about {duration(took[name])}" if name in took else ""
        rows.append([name, size(beside(roles)), time, ", ".join(named)])
    return table(rows, right=(1,))


def rehearsed(took: Rehearsed) -> str:
    """What one stage takes, by its rehearsal."""
    most = took.memory.get("gpu_bytes") or took.memory.get("process_bytes")
    held = f"{size(most)}, " if most else ""
    pace = f"{took.step:.2g} s a step, " if took.steps > 1 else ""
    return f"{took.name:<12}{held}{pace}about {duration(took.seconds)}"


def runs(found: dict[str, Any], folder: Path) -> str:
    rows = [["run", "ended", "outcome", "stages", "accuracy", "win rate", "KL", "size", "+ stages"]]
    for run in found["runs"]:
        numbers = {key.rpartition(".")[2]: value for key, value in run["numbers"].items()}
        forms = {"accuracy": ".1%", "win_rate": ".0%", "kl": ".2f"}
        said = [f"{numbers[key]:{form}}" if key in numbers else "" for key, form in forms.items()]
        stages = f"{run['stages_done']} of {run['stages']}"
        sizes = [size(run["bytes"]), size(run["stages_bytes"])]
        rows.append([run["name"], _when(run["ended"]), run["outcome"], stages, *said, *sizes])
    own, shared = size(sum(run["bytes"] for run in found["runs"])), size(found["stages_bytes"])
    lines = [table(rows, right=(4, 5, 6, 7, 8)), ""] if found["runs"] else []
    count = len(found["runs"])
    lines.append(f"runs in {folder}: {count}, {own}; their stages, each once: {shared}")
    lines += [f"{folder / plain(other['name'])} {other['why']}" for other in found["others"]]
    return "\n".join(lines)


def verdict(found: Iterable[Finding]) -> str:
    """A sentence a line, and below it what to change."""
    lines = []
    for one in found:
        lines.append(f"{MARKS[one.level]} {plain(one.text)}")
        lines += [f"  → {plain(one.change)}"] if one.change else []
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


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if value is None or re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", text):
        return "—" if value is None else text[:12]
    text = f"{value:.4g}" if isinstance(value, float) else text
    return cut(text, WIDEST)


def _gain(first: Any, value: Any, part: str) -> str:
    numbers = all(isinstance(one, int | float) for one in (first, value))
    return f" ({value - first:+.3g})" if part == "results" and numbers and value != first else ""


def _when(ended: str) -> str:
    """A time of ours, by this machine's clock."""
    try:
        return f"{datetime.fromisoformat(ended).astimezone():%Y-%m-%d %H:%M}"
    except ValueError:
        return ""
