"""The page that compares runs: what differs in their recipes, and in their results how surely."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes import history
from rlhf_recipes.facts import Facts, read
from rlhf_recipes.house import page
from rlhf_recipes.progress import plain
from rlhf_recipes.report import SHARES
from rlhf_recipes.rundir import write_text
from rlhf_recipes.verdict import verdict


def write(folders: Sequence[Path], file: Path) -> None:
    """Write the page of some runs to `file`. Raises UsageError where one cannot be read."""
    parts, runs = history.compare(folders), [read(folder) for folder in folders]
    values = {
        "names": [plain(facts.folder.resolve().name) for facts in runs],
        "runs": [(facts, verdict(facts)) for facts in runs],
        "parts": {part: _rows(rows, runs) for part, rows in parts.items()},
    }
    write_text(file, page("compare.html", values))


def _rows(rows: dict[str, list[Any]], runs: list[Facts]) -> dict[str, list[str]]:
    """Each key's values as text; the ends of an interval beside the value that they are around."""
    made = {}
    for key, values in rows.items():
        if key.endswith(("_low", "_high")) and key.rpartition("_")[0] in rows:
            continue
        made[key] = [_value(key, value, run) for value, run in zip(values, runs, strict=True)]
    return made


def _value(key: str, value: Any, run: Facts) -> str:
    if not isinstance(value, float):
        return "—" if value is None else str(value)
    share = any(one in key.rpartition(".")[2] for one in SHARES)
    around = (run.number(key + end) for end in ("_low", "_high"))
    numbers = [value, *(one for one in around if one is not None)]
    first, *ends = [f"{100 * one:.3g}" if share else f"{one:.4g}" for one in numbers]
    text = first + " %" * share + (f" ({' to '.join(ends)})" if len(ends) == 2 else "")
    return text.replace("-", "−")
