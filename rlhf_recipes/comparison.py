"""The page that compares runs: what differs in their recipes, and in their results how surely."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes import history, plots
from rlhf_recipes.facts import Facts, read
from rlhf_recipes.findings import percent
from rlhf_recipes.house import page
from rlhf_recipes.progress import plain
from rlhf_recipes.report import SHARES
from rlhf_recipes.rundir import write_text
from rlhf_recipes.verdict import verdict


def write(folders: Sequence[Path], file: Path) -> None:
    """Write the page of some runs to `file`. Raises UsageError where one cannot be read."""
    parts = history.compare(folders)
    write_text(file, page("compare.html", _comparison([read(f) for f in folders], parts)))


def _comparison(runs: list[Facts], parts: dict[str, dict[str, list[Any]]]) -> dict[str, Any]:
    names = [plain(facts.folder.resolve().name) for facts in runs]
    lasts = [next(reversed(facts.starts()), "") for facts in runs]
    made = []
    for by, whose in (("judge_", "the judge"), ("", "the reward model")):
        rows = []
        for name, last, facts in zip(names, lasts, runs, strict=True):
            if share := facts.share(f"{last}.{by}win_rate", "evaluation.prompts"):
                rows.append((name, *share[:3], plots.PPO))
        if rows:
            told = "; ".join(f"{name} {percent(value)}" for name, value, *_ in rows)
            made.append(plots.ranges(f"wins-{by}", f"Preferred by {whose}: {told}", told, rows))
    return {
        "names": names,
        "runs": [(facts, verdict(facts)) for facts in runs],
        "plots": made,
        "parts": {part: _rows(rows, runs) for part, rows in parts.items()},
    }


def _rows(rows: dict[str, list[Any]], runs: list[Facts]) -> dict[str, list[str]]:
    """Each key's values as text; the ends of an interval beside the value that they are around."""
    made = {}
    for key, values in rows.items():
        if key.endswith(("_low", "_high")) and key.rpartition("_")[0] in rows:
            continue
        ends = [[facts.number(key + end) for end in ("_low", "_high")] for facts in runs]
        made[key] = [_value(key, value, *pair) for value, pair in zip(values, ends, strict=True)]
    return made


def _value(key: str, value: Any, *around: float | None) -> str:
    if not isinstance(value, float):
        return "—" if value is None else str(value)
    share = any(one in key.rpartition(".")[2] for one in SHARES)
    numbers = [one for one in (value, *around) if one is not None]
    first, *ends = [f"{100 * one:.3g}" if share else f"{one:.4g}" for one in numbers]
    text = first + " %" * share + (f" ({' to '.join(ends)})" if len(ends) == 2 else "")
    return text.replace("-", "−")
