"""What the commands share: options, how a recipe and a run are found, and what is printed."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Context, Option

from rlhf_recipes import findings, text

if TYPE_CHECKING:
    from rlhf_recipes.pipeline.runner import RunOutcome
    from rlhf_recipes.recipe.load import Recipe as Loaded


def _recipes(incomplete: str) -> list[str]:
    """For the shell's completion. Where none of these fits, the shell offers files."""
    from rlhf_recipes.recipe.load import shipped_recipes

    own = sorted(file.name for file in Path().glob("*.toml"))
    names = [*(file.stem for file in shipped_recipes()), *own]
    return [name for name in names if name.startswith(incomplete)]


def _runs(context: Context, incomplete: str) -> list[str]:
    from rlhf_recipes.store.layout import MANIFEST, runs_folder

    runs = runs_folder(context.params.get("runs"))
    names = sorted(manifest.parent.name for manifest in runs.glob(f"*/{MANIFEST}"))
    return [name for name in names if name.startswith(incomplete)]


Recipe = Annotated[
    str,
    Argument(metavar="RECIPE", help="A file, or a shipped one's name.", autocompletion=_recipes),
]
Set = Annotated[list[str], Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe.")]
Unset = Annotated[list[str], Option("--unset", metavar="KEY", help="Take a key out of the recipe.")]
NONE: list[str] = []  # never changed
NO_FILES: list[Path] = []
PLAIN: Any = {"show_default": False, "show_envvar": False}
RUNS = Path("runs")
RUNS_HELP = "Where runs are kept. [$RLHF_RECIPES_RUNS, else ./runs]"
Runs = Annotated[Path, Option(envvar="RLHF_RECIPES_RUNS", help=RUNS_HELP, metavar="DIR", **PLAIN)]
Run = Annotated[
    str, Argument(metavar="RUN", help="A run's folder or its name.", autocompletion=_runs)
]
Stage = Annotated[str | None, Option(help="A stage. [the last policy]")]
Name = Annotated[str | None, Option(help="The run's name. [the recipe's]")]
Json = Annotated[bool, Option("--json", help="For a program to read.")]
NoRehearsal = Annotated[bool, Option("--no-rehearsal", help="Start without a step of each stage.")]


def load(recipe: str, set_: list[str], unset: list[str]) -> Loaded:
    from rlhf_recipes.recipe.load import find_recipe, load_recipe

    return load_recipe(find_recipe(recipe), set=set_, unset=unset)


def find(run: str, runs: Path) -> Path:
    from rlhf_recipes.store.layout import find_run

    return find_run(run, runs)


def say(said: str, **words: Any) -> None:
    stream: Any = words.get("file", sys.stdout)
    said = printable(text.masked(said))
    if stream.isatty():
        colours = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        said = text.dressed(said, shutil.get_terminal_size().columns, colours)
    print(text.writable(said, stream.encoding or "utf-8"), **words)


def say_json(value: dict[str, Any]) -> None:
    from rlhf_recipes.store.files import FORMAT, to_json

    print(text.masked(to_json({"format": FORMAT, **value}, indent=2)))


def printable(said: str) -> str:
    """`said` without what would command a terminal: it may quote a stranger's file."""
    return "".join(sign for sign in said if sign == "\n" or sign.isprintable())


def show(outcome: RunOutcome, recipe: str) -> None:
    """What became of a run, and what can be done next."""
    from rlhf_recipes.store.layout import REPORT

    rows = [["stage", "", "time", "result"]]
    for done in outcome.stages:
        time = text.duration(done.record["seconds"])
        rows.append([done.stage.name, done.did, time, done.record["summary"]])
    say(f"\n{text.table(rows, right=(2,))}\n")
    if outcome.verdict:
        say(findings.shown(outcome.verdict), end="\n\n")
    say(f"results  {outcome.run_folder / 'results.json'}")
    say(f"report   {outcome.run_folder / REPORT}")
    if outcome.model:
        say(f"model    {outcome.model}")
        say(f"next     rlhf-recipes chat {outcome.run_folder}")
    say(f"{'' if outcome.model else 'next':<9}rlhf-recipes fork {recipe} my-recipe.toml")
