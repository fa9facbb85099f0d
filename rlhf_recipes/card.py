"""The model's card, model/README.md: the run's facts, for whoever meets the model without the run.

It goes where the model goes: no path of this machine is in it.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_recipes import rundir
from rlhf_recipes.facts import Facts, number
from rlhf_recipes.findings import Finding
from rlhf_recipes.progress import duration, plain
from rlhf_recipes.tables import DATA_SUFFIXES, KINDS, POLICY_KINDS, is_path

SIGNS = re.compile(r"([\\`*_\[\]|#<>~])")


def write(facts: Facts, found: Sequence[Finding], policies: list[list[str]]) -> None:
    """Write the card beside a finished run's model; `policies` is the report's table of them."""
    source = rundir.read_json(facts.folder / "model" / "source.json")
    if source is None or facts.manifest.get("outcome") != "finished":
        return
    file = facts.folder / "model" / "README.md"
    text = "\n".join(_lines(facts, found, policies, str(source.get("stage")))) + "\n"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        aside = facts.folder / ".card.md"  # nothing half-written lies where the model goes from
        rundir.write_text(aside, text)
        aside.replace(file)


def _lines(
    facts: Facts, found: Sequence[Finding], policies: list[list[str]], stage: str
) -> Iterator[str]:
    base, hub = named((facts.recipe.get("model") or {}).get("name"))
    tables = facts.recipe.get("dataset")
    tables = tables if isinstance(tables, list) else [tables or {}]
    data = [named(table.get("path")) for table in tables]
    stages = [one for one in facts.of_kind(*KINDS) if one.record]
    kinds = dict.fromkeys(one.kind for one in stages if one.kind in POLICY_KINDS)
    yield "---\nlibrary_name: transformers\npipeline_tag: text-generation"
    yield f"tags: {json.dumps(['trl', 'rlhf-recipes', *kinds])}"
    if hub:
        yield f"base_model: {json.dumps(base)}"
    if names := [name for name, on_hub in data if on_hub]:
        yield f"datasets: {json.dumps(names)}"
    yield f"---\n\n# {_text(facts.manifest.get('title') or facts.folder.resolve().name)}\n"
    way = " → ".join(one.name for one in stages)
    yield f"{_text(base)}, trained by {_text(way)}; this is the model of `{plain(stage)}`.\n"
    yield from (f"- {_text(one.text)}" for one in found)
    if policies:
        yield "\n## Before and after\n"
        yield from _table(policies)
        yield "\nOn test prompts that nothing was trained on; in brackets, intervals of 95 %."
    yield "\n## Use\n\n```python\nfrom transformers import pipeline\n"
    yield 'answer = pipeline("text-generation", "FOLDER-OR-HUB-ID")'
    yield 'print(answer([{"role": "user", "content": "…"}], max_new_tokens=256))\n```'
    yield "\n## How it was made\n"
    made = [["stage", "training rows", "time", "result"]]
    for one in stages:
        seconds = duration(number(one.record, "seconds") or 0)
        made.append([one.name, one.data.get("train", ""), seconds, one.record.get("summary", "")])
    yield from _table(made)
    versions = facts.manifest.get("versions") or {}
    libraries = ", ".join(f"{name} {version}" for name, version in versions.items())
    sources, seed = ", ".join(name for name, _ in data), facts.manifest.get("seed")
    yield f"\nData: {_text(sources)}. Seed {_text(seed)}. {_text(libraries)}.\n"
    yield "It inherits the limits and the licence of the model and the data that it was made from."
    yield "Nobody has tested it for more than the numbers above."


def named(place: Any) -> tuple[str, bool]:
    """What a recipe names, and whether that is on the hub; of a path, the last part alone."""
    text = str(place or "unknown")
    local = is_path(text) or text.endswith(DATA_SUFFIXES) or not place
    return (Path(text).name or text, False) if local else (text, True)


def _text(value: Any) -> str:
    """One line of Markdown that says what `value` says, whatever signs are in it."""
    return SIGNS.sub(r"\\\1", html.escape(plain(str(value)), quote=False))


def _table(rows: list[list[Any]]) -> Iterator[str]:
    for at, row in enumerate(rows):
        yield f"| {' | '.join(map(_text, row))} |"
        if not at:
            yield "|" + " --- |" * len(row)
