"""A model's card, README.md beside its weights: the run's facts, for who meets the model alone.

The card goes where the model goes: no path of this machine is in it.
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
from rlhf_recipes.report.html import UNSEEN, page
from rlhf_recipes.store import files
from rlhf_recipes.store.digests import digest
from rlhf_recipes.text import plain

SIGNS = re.compile(r"([\\`*_\[\]|#<>~])")
EXAMPLES = 3
LIBRARIES = {"merged": "transformers", "adapter": "peft", "gguf": "gguf"}
RELATIONS = {"merged": "finetune", "adapter": "adapter", "gguf": "quantized"}
# What of a stage's numbers goes into the card's metadata.
METRICS = "judge_win_rate win_rate judge_gain score_gain kl length accuracy".split()
LICENCE = ("license", "license_name", "license_link")  # as the hub spells it


def write(facts: Facts, found: Sequence[Finding], policies: list[list[str]]) -> None:
    """Write the card beside a finished run's model; `policies` is the report's table of them."""
    source = files.read_json(facts.folder / "model" / "source.json")
    if source is None or facts.manifest.get("outcome") != "finished":
        return
    file = facts.folder / "model" / "README.md"
    said = text(facts, found, policies, str(source.get("stage")))
    if not file.is_file() or file.read_text(encoding="utf-8") != said:
        aside = facts.folder / ".card.md"  # nothing half-written lies where the model goes from
        files.write_text(aside, said)
        aside.replace(file)


def text(
    facts: Facts,
    found: Sequence[Finding],
    policies: list[list[str]],
    stage: str,
    *,
    form: str = "merged",
    place: str = "FOLDER-OR-HUB-ID",
    licence: dict[str, str] | None = None,
) -> str:
    """The card of a stage's model in one of LIBRARIES' forms, which is to be loaded from `place`.

    `licence` is the base model's, where it is known.
    """
    base, hub = named((facts.recipe.get("model") or {}).get("name"))
    tables = facts.recipe.get("dataset")
    tables = tables if isinstance(tables, list) else [tables or {}]
    stages = [one for one in facts.stages if one.record and one.kind in listed()]
    data = [named(table.get("path")) for table in tables]
    about = facts.stage(stage)
    scores = about is not None and makes(about.kind, "reward_model")
    name = plain(place if "/" in place else f"{facts.folder.resolve().name}-{stage}")
    values = {
        "md": _text,
        "verbatim": _verbatim,
        "facts": facts,
        "base": base,
        "base_on_hub": hub,
        "data": data,
        "stage": plain(stage),
        "stages": stages,
        "kinds": list(dict.fromkeys(one.kind for one in stages if makes(one.kind, "policy"))),
        "found": found,
        "policies": policies,
        "form": form,
        "library": LIBRARIES[form],
        "relation": RELATIONS[form],
        "scores": scores,
        "place": plain(place),
        "licence": licence or {},
        "index": _index(facts, name, stage, data[0], scores),
        "examples": [] if scores else _examples(facts, stage),
    }
    return page("card.md", values) + "\n"


def named(place: Any) -> tuple[str, bool]:
    """What a recipe names, and whether that is on the hub; of a path, the last part alone."""
    text = str(place or "unknown")
    local = is_path(text) or form_of(text) != "" or not place
    return (Path(text).name or text, False) if local else (text, True)


def licence_of(folder: Path) -> dict[str, str]:
    """What the metadata of a model's README.md says of its licence; empty where it says nothing."""
    from huggingface_hub import metadata_load

    try:
        said = metadata_load(folder / "README.md") or {}
    except Exception:  # a stranger's file: whatever is in it, it names no licence
        return {}
    return {key: str(said[key]) for key in LICENCE if isinstance(said.get(key), str)}


def _index(
    facts: Facts, name: str, stage: str, data: tuple[str, bool], scores: bool
) -> list[dict[str, Any]]:
    """The numbers of a stage as the hub's `model-index` has them."""
    metrics = []
    for key in METRICS:
        value, low, high = (facts.number(f"{stage}.{key}{end}") for end in ("", "_low", "_high"))
        if value is None:
            continue
        words = key.replace("_", " ")
        between = "" if low is None or high is None else f" (95 %: {low:.4g} to {high:.4g})"
        metrics.append({"type": key, "name": words + between, "value": round(value, 4)})
    task = {"type": "text-classification" if scores else "text-generation"}
    dataset = {"type": data[0], "name": f"{data[0]}, test prompts"}
    results = [{"task": task, "dataset": dataset, "metrics": metrics}]
    return [{"name": name, "results": results}] if metrics else []


def _examples(facts: Facts, stage: str) -> list[tuple[str, str]]:
    """Test prompts, drawn by their digest, and the answers of a stage's policy as they are."""
    rows = [row for row in facts.answers if isinstance(row.get("answers"), dict)]
    rows = [row for row in rows if isinstance(row["answers"].get(stage), str)]
    rows.sort(key=lambda row: digest(str(row.get("prompt"))))
    return [(str(row.get("prompt")), row["answers"][stage]) for row in rows[:EXAMPLES]]


def _text(value: Any) -> Markup:
    """One line of Markdown that says what `value` says, whatever signs are in it."""
    return Markup(SIGNS.sub(r"\\\1", html.escape(plain(str(value)), quote=False)))


def _verbatim(value: str) -> Markup:
    """A block that shows `value` as it is, and that nothing in it ends."""
    text = UNSEEN.sub("", value)
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return Markup(f"{fence}text\n{text}\n{fence}")
