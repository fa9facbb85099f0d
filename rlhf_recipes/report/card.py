"""The model's card, model/README.md: the run's facts, for whoever meets the model without the run.

It goes where the model goes: no path of this machine is in it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rlhf_recipes.findings import Finding
from rlhf_recipes.recipe.kinds import listed, makes
from rlhf_recipes.recipe.tables import form_of, is_path
from rlhf_recipes.report.facts import Facts
from rlhf_recipes.report.html import page
from rlhf_recipes.store import files
from rlhf_recipes.text import plain

SIGNS = re.compile(r"([\\`*_\[\]|#<>~])")


def write(facts: Facts, found: Sequence[Finding], policies: list[list[str]]) -> None:
    """Write the card beside a finished run's model; `policies` is the report's table of them."""
    source = files.read_json(facts.folder / "model" / "source.json")
    if source is None or facts.manifest.get("outcome") != "finished":
        return
    file = facts.folder / "model" / "README.md"
    base, hub = named((facts.recipe.get("model") or {}).get("name"))
    tables = facts.recipe.get("dataset")
    tables = tables if isinstance(tables, list) else [tables or {}]
    stages = [one for one in facts.stages if one.record and one.kind in listed()]
    values = {
        "md": _text,
        "facts": facts,
        "base": base,
        "base_on_hub": hub,
        "data": [named(table.get("path")) for table in tables],
        "stage": plain(str(source.get("stage"))),
        "stages": stages,
        "kinds": list(dict.fromkeys(one.kind for one in stages if makes(one.kind, "policy"))),
        "found": found,
        "policies": policies,
    }
    text = page("card.md", values) + "\n"
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        aside = facts.folder / ".card.md"  # nothing half-written lies where the model goes from
        files.write_text(aside, text)
        aside.replace(file)


def named(place: Any) -> tuple[str, bool]:
    """What a recipe names, and whether that is on the hub; of a path, the last part alone."""
    text = str(place or "unknown")
    local = is_path(text) or form_of(text) != "" or not place
    return (Path(text).name or text, False) if local else (text, True)


def _text(value: Any) -> Markup:
    """One line of Markdown that says what `value` says, whatever signs are in it."""
    return Markup(SIGNS.sub(r"\\\1", html.escape(plain(str(value)), quote=False)))
