"""What differs between runs: how they measured, their recipes, and how surely their results."""

from __future__ import annotations

import contextlib
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes.errors import UsageError
from rlhf_recipes.recipe.kinds import EVALUATION, JUDGE
from rlhf_recipes.report import overlaid
from rlhf_recipes.report.facts import Facts
from rlhf_recipes.report.headline import headline
from rlhf_recipes.report.html import page
from rlhf_recipes.report.run_page import SHARES, policies
from rlhf_recipes.report.verdict import verdict
from rlhf_recipes.store.files import write_text
from rlhf_recipes.store.fingerprint import difference, differences
from rlhf_recipes.store.history import manifest_of
from rlhf_recipes.text import plain

ELSEWHERE = re.compile(r"^(python:)?/.*/")  # where a file lies is no difference, what it holds is
MOST = 3  # differences of two judges that are said


def write(folders: Sequence[Path], file: Path) -> None:
    """Write the page of some runs to `file`. Raises UsageError where one cannot be read."""
    write_text(file, page("compare.html", values(folders)))


def values(folders: Sequence[Path]) -> dict[str, Any]:
    """What the template of the page is filled with. Raises UsageError as `write` does."""
    parts, runs = compare(folders), [Facts(folder) for folder in folders]
    return {
        "names": [plain(facts.folder.resolve().name) for facts in runs],
        "runs": [(headline(facts, found := verdict(facts)), found) for facts in runs],
        "parts": {part: _rows(rows, runs) for part, rows in parts.items()},
        "rulers": rulers(folders),
        "curves": list(overlaid.curves(runs)),
        "answers": overlaid.answers(runs),
    }


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


def compare(folders: Sequence[Path]) -> dict[str, dict[str, list[Any]]]:
    """By part ("recipe", "results", "versions", "hardware"): each key whose values differ.

    A value for each run, None where it has none. Of a stage that not all runs have, there are the
    settings that its recipe says, and no results: "policies" has those of each run's last policy,
    where these are of different names. Raises UsageError where a run cannot be read.
    """
    runs = [Facts(folder) for folder in folders]
    told, written = [_told(facts) for facts in runs], [_written(folder) for folder in folders]
    tables = [{key.partition(".")[0] for key in one["recipe"]} for one in told]
    stages = [{stage.name for stage in facts.stages} for facts in runs]
    parts: dict[str, dict[str, list[Any]]] = {}
    if len({tuple(facts.starts())[-1:] for facts in runs}) > 1:
        parts["policies"] = _last_policies(runs)
    for part in told[0]:
        keys = dict.fromkeys(key for one in told for key in one[part])
        if part == "recipe":
            said = set().union(*written)
            keys = {k: None for k in keys if _everywhere(k, tables) or k in said}
        elif part == "results":
            keys = {k: None for k in keys if _everywhere(k, stages)}
        rows = [(key, [one[part].get(key) for one in told]) for key in keys]
        parts[part] = {key: row for key, row in rows if any(value != row[0] for value in row)}
    return parts


def rulers(folders: Sequence[Path]) -> list[str]:
    """In what the evaluations of runs differ, a phrase each; then their win rates do not compare.

    A run's start counts, too: what a policy wins against.
    """
    first, *others = [_ruler(folder) for folder in folders]
    found: dict[str, None] = {}
    for other in others:
        for what, (value, shown) in first.items():
            mine, its = other.get(what, (None, None))
            older = None in (value, mine)  # a run of a version that did not say it
            if difference(value, mine) and not older:
                said = f" ({shown} → {its})" if shown and its else ""
                if what == "judge" and isinstance(shown, dict) and isinstance(its, dict):
                    changes = [one.removeprefix("settings.") for one in differences(shown, its)]
                    more = ["…"] if len(changes) > MOST else []
                    said = f" ({', '.join(changes[:MOST] + more)})" if changes else ""
                found[f"another {what}{said}"] = None
    return [*found]


def _ruler(folder: Path) -> dict[str, tuple[Any, Any]]:
    """What decides a run's win rates beside its policies, and how that is shown, if it is."""
    facts = Facts(folder)
    entries = {entry["name"]: entry for entry in manifest_of(folder)["stages"]}
    payload = (entries.get(EVALUATION) or {}).get("payload") or {}
    taken, said = payload.get("inputs", {}), payload.get("settings", {})
    judges = [[one.get(role) for role in (JUDGE, "judge2")] for one in (taken, payload, said)]
    heat, length = (facts.of(EVALUATION, key) for key in ("temperature", "response_length"))
    seed = facts.manifest.get("seed")
    start = [*facts.starts().values()][-1:]
    begun = [
        entries[name].get("key") if name in entries else payload.get("model") for name in start
    ]
    return {
        "judge": (judges, (entries.get(JUDGE) or {}).get("payload")),
        "temperature": (heat, heat),
        "answer length": (length, length),
        "set of test prompts": (payload.get("dataset"), None),
        "seed": (seed, seed),
        "start": (begun, None),
    }


def _everywhere(key: str, names: list[set[str]]) -> bool:
    """Whether all runs have the table or stage of a key; or none: then it is no stage's."""
    return len({key.partition(".")[0] in one for one in names}) == 1


def _last_policies(runs: list[Facts]) -> dict[str, list[Any]]:
    """The table of the policies, with the last one of each run."""
    tables = [{row[0] or "policy": row[-1] for row in policies(facts)} for facts in runs]
    words = dict.fromkeys(word for table in tables for word in table)
    return {word: [table.get(word) for table in tables] for word in words}


def _written(folder: Path) -> set[str]:
    """The keys that a run's recipe says."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return {*_flat(tomllib.loads((folder / "recipe.toml").read_text(encoding="utf-8")))}
    return set()


def _told(found: Facts) -> dict[str, dict[str, Any]]:
    manifest = manifest_of(found.folder)
    if not found.recipe:
        raise UsageError(f"{found.folder} has no resolved.toml that can be read", "run it again")
    return {
        "recipe": _flat(found.recipe) | _contents(manifest),
        "results": {key: value for key, value in found.results.items() if key != "format"},
        "versions": _flat(manifest.get("versions", {})),
        "hardware": _flat(manifest.get("hardware", {})),
    }


def _flat(value: Any, where: str = "") -> dict[str, Any]:
    if isinstance(value, list) and any(isinstance(one, dict) for one in value):
        value = {f"[{number}]": one for number, one in enumerate(value, 1)}
    if not isinstance(value, dict):
        return {where: ELSEWHERE.sub(r"\1", value) if isinstance(value, str) else value}
    flat: dict[str, Any] = {}
    for key, one in value.items():
        flat |= _flat(one, where + key if key[:1] == "[" else f"{where}.{key}".lstrip("."))
    return flat


def _contents(manifest: dict[str, Any]) -> dict[str, Any]:
    """The digests and commits of what was read; a stage's own where they are not the recipe's."""
    found = _flat({key: manifest.get(key, {}) for key in ("model", "dataset")})
    for entry in manifest["stages"]:
        for key, value in _flat(entry.get("payload", {})).items():
            if found.get(key) != value:
                found[f"{entry['name']}.{key}"] = value
    ends = ("content", "revision", "mirror")
    return {key: value for key, value in found.items() if key.rpartition(".")[2] in ends}
