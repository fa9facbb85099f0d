"""`rlhf-recipes init`: at most three questions, at a terminal alone; then the recipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rlhf_recipes.errors import UsageError

if TYPE_CHECKING:
    from rlhf_recipes.pipeline.init import Start


def init(
    file: Path,
    new: Path | None,
    model: str,
    method: str,
    device: str,
    set: Sequence[str],
    unset: Sequence[str],
    runs: Path,
    say: Callable[..., Any],
) -> None:
    asks = sys.stdin.isatty() and sys.stdout.isatty()
    say(f"Looking at {file} and the model …", file=sys.stderr)
    from rlhf_recipes.pipeline.init import MODEL, start

    if not model and asks:
        model = typer.prompt("Which model, on the hub or in a folder?", default=MODEL)
    begun = start(file, new, model=model or MODEL, set=set, unset=unset, runs=runs)
    for line in found(begun):
        say(line)
    guessed = begun.looked.columns and not any("dataset.columns" in word for word in set)
    if guessed and asks and not typer.confirm("Are these columns right?", default=True):
        way = '--set \'dataset.columns={prompt="…", chosen="…", rejected="…"}\''
        raise UsageError("nothing is written", f"name the columns with {way}")
    if not method and asks and len(begun.methods) > 1:
        asked = f"Which method: {', '.join(begun.methods)}?"
        method = typer.prompt(asked, default=begun.methods[0])
    say("Fitting batch sizes to the memory …", file=sys.stderr)
    recipe = begun.write(method, device)
    for note in begun.notes:
        say(f"? {note}")
    say(f"{recipe.path} written: {' → '.join(recipe.all_stages)}")
    name = recipe.path.with_suffix("")
    ways = ["run", "report"] if begun.here else ["fetch", "run", "report"]
    for way in ways:
        after = f"report {name.name} --open" if way == "report" else f"{way} {name}"
        say(f"{'next' if way == ways[0] else '':<9}rlhf-recipes {after}")


def found(begun: Start) -> list[str]:
    """What the file holds, in lines."""
    looked = begun.looked
    lines = [
        f"{begun.file}: {looked.used:,} of {looked.rows:,} rows can be used, as {looked.holds}"
    ]
    lines += [f"  {how}" for how in looked.read_as]
    lines += [f"  {count:,} × {why}" for why, count in looked.dropped.most_common(3)]
    if looked.columns:
        named = ", ".join(f"{theirs} is the {ours}" for ours, theirs in looked.columns.items())
        lines.append(f"  columns: {named}")
    return lines
