"""The command line: parse, call one function, print.

Findings and results go to stdout, progress and errors to stderr. What a command needs is imported
inside it: `--help` loads typer alone, and nothing here loads torch before a stage has to run.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer import Argument, Exit, Option

from rlhf_recipes import cli_feedback, cli_runs, cli_sweep, cli_tables, cli_ui, errors
from rlhf_recipes.cli_options import (
    NONE,
    RUNS,
    Json,
    Name,
    NoRehearsal,
    Recipe,
    Runs,
    Set,
    Unset,
    say_json,
    show,
)
from rlhf_recipes.cli_options import load as _load
from rlhf_recipes.cli_options import say as _print
from rlhf_recipes.errors import UsageError, machine_error

app = typer.Typer(
    name="rlhf-recipes",
    help="One recipe, one command: SFT → reward → PPO, with the evidence that it worked.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

STRICT = 5  # the exit code of a run that worked, whose verdict has a fault

# Of one command each.
Device = Annotated[
    str, Option(metavar="SIZE", help="Memory of the card to plan for: 24GB. [this one]")
]
Devices = Annotated[
    str,
    Option(
        "--devices",
        "--device",
        metavar="[Nx]SIZE",
        help="Memory of the card, or of each of N cards, to plan for: 24GB, 4x24GB. [this one]",
    ),
]
Measure = Annotated[bool, Option("--measure", help="Measure memory and time: a rehearsal.")]
Recipes = Annotated[list[str], Argument(metavar="RECIPE...", help="Files or names.")]
Resolved = Annotated[bool, Option("--resolved", help="Print it with all defaults filled in.")]
New = Annotated[Path, Argument(metavar="NEW", help="The file to write.")]
Rows = Annotated[Path, Argument(metavar="FILE", help="Rows: .csv, .tsv, .jsonl, .json, .parquet.")]
NewRecipe = Annotated[Path | None, Argument(metavar="NEW", help="The recipe. [FILE's name.toml]")]


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[bool, Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        _print(f"rlhf-recipes {version_of('rlhf-recipes')}")
    elif context.invoked_subcommand is None:
        _print(context.get_help())


@app.command()
def init(
    file: Rows,
    new: NewRecipe = None,
    model: Annotated[str, Option(metavar="NAME", help="A model on the hub, or a folder.")] = "",
    method: Annotated[str, Option(help="ppo, rloo, grpo, dpo, kto or sft. [by the rows]")] = "",
    device: Device = "",
    set_: Set = NONE,
    unset: Unset = NONE,
    runs: Runs = RUNS,
) -> None:
    """Write a recipe for your own file of rows."""
    from rlhf_recipes.cli_init import init as write

    write(file, new, model, method, device, set_, unset, runs, _print)


@app.command()
def run(
    recipe: Recipe,
    set_: Set = NONE,
    unset: Unset = NONE,
    until: Annotated[str | None, Option(metavar="STAGE", help="Stop after it.")] = None,
    fresh: Annotated[bool, Option("--fresh", help="Take no stage as done.")] = False,
    name: Name = None,
    wait: Annotated[bool, Option("--wait", help="Wait for another process's run.")] = False,
    strict: Annotated[bool, Option("--strict", help="End with 5 if the verdict has a ✗.")] = False,
    no_rehearsal: NoRehearsal = False,
    launch: Annotated[
        str,
        Option(
            metavar="COMMAND",
            envvar="RLHF_RECIPES_LAUNCH",
            help="Start each stage as several processes, by torchrun or another launcher.",
            show_default=False,
            show_envvar=False,
        ),
    ] = "",
    runs: Runs = RUNS,
) -> None:
    """Run what is not yet done of a recipe."""
    from rlhf_recipes.pipeline.launch import around
    from rlhf_recipes.pipeline.runner import run as run_recipe

    if (outer := around(os.environ)) == "":
        return
    loaded = _load(recipe, set_, unset)
    for note in loaded.notes:
        _print(f"{loaded.path}: {note}", file=sys.stderr)
    how: dict[str, Any] = {"until": until, "fresh": fresh, "name": name, "wait": wait}
    how |= {"rehearse": not no_rehearsal, "launch": launch or outer or ""}
    outcome = run_recipe(loaded, runs=runs, **how)
    show(outcome, recipe)
    if strict and any(line.level == "fault" for line in outcome.verdict):
        raise Exit(STRICT)


@app.command()
def plan(
    recipe: Recipe,
    set_: Set = NONE,
    unset: Unset = NONE,
    device: Devices = "",
    measure: Measure = False,
    name: Name = None,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """Say of each stage whether it would run, and why; and what memory and time it takes."""
    from rlhf_recipes.pipeline.data_lint import data_lint, provable
    from rlhf_recipes.pipeline.plan import plan_run
    from rlhf_recipes.screen import begin, quietly
    from rlhf_recipes.stages.session import Session

    made = plan_run(_load(recipe, set_, unset), runs, name=name)
    if json:
        stages = [{**asdict(stage), "folder": str(stage.folder)} for stage in made.stages]
        return say_json({"run": str(made.run_folder), "model": made.model, "stages": stages})
    _print(cli_tables.plan(made))
    if made.mirrored:
        _print(f"\nthe model: {made.mirrored}")
    begin("Reading and encoding the rows")
    with quietly():
        session = Session(made.recipe, made.model, made.runs)
        found = data_lint(made, session)
        if not any(line.level == "fault" for line in found):
            found += provable(made, session)
    _print("\n".join(["", *map(str, found)]))
    if pending := [stage for stage in made.stages if not stage.done]:
        from rlhf_recipes.pipeline.estimate import reckoning

        begin("Rehearsing every stage" if measure else "Estimating memory and time")
        _print(f"\n{reckoning(made, pending, session, device, measure)}")
    if any(line.level == "fault" for line in found):
        raise Exit(1)


@app.command()
def check(
    recipes: Recipes,
    set_: Set = NONE,
    unset: Unset = NONE,
    resolved: Resolved = False,
    json: Json = False,
) -> None:
    """Check recipes: every problem at once, with file and line."""
    from rlhf_recipes.pipeline.data_lint import found_wrong
    from rlhf_recipes.screen import begin

    found = []
    for word in recipes:
        entry: dict[str, Any] = {"file": word, "problems": [], "notes": []}
        found.append(entry)
        try:
            loaded = _load(word, set_, unset)
        except (errors.RecipeError, UsageError) as error:
            problems = getattr(error, "problems", [errors.Problem(word, None, "", str(error))])
            entry["problems"] = [asdict(problem) for problem in problems]
            said = [str(error)]
        else:
            entry["notes"] = list(loaded.notes)
            stages, file = loaded.all_stages, loaded.path
            verdict = f"{file}: ok ({len(stages)} stages: {' → '.join(stages)})"
            if resolved:
                import tomlkit

                verdict = tomlkit.dumps(loaded.resolved()).removesuffix("\n")
            said = [*(f"{file}: note: {note}" for note in loaded.notes), verdict]
            begin(f"Looking at the rows and the model of {file}")
            wrong = {about: str(error) for about, error in found_wrong(loaded).items()}
            entry |= wrong
            said[-1:] = [f"{file}: {about}: {one}" for about, one in wrong.items()] or [verdict]
        if not json:
            _print("\n".join(said))
    if json:
        say_json({"recipes": found})
    if any(entry["problems"] for entry in found):
        raise Exit(2)
    if any({"rows", "model"} & entry.keys() for entry in found):
        raise Exit(1)


@app.command()
def fork(recipe: Recipe, new: New, set_: Set = NONE, unset: Unset = NONE) -> None:
    """Write a copy of a recipe to change, comments kept and paths re-based."""
    from rlhf_recipes.recipe.load import find_recipe, fork_recipe

    file = fork_recipe(find_recipe(recipe), new, set=set_, unset=unset)
    _print(f"{file} written; run it with: rlhf-recipes run {file}")


@app.command()
def fetch(recipe: Recipe, set_: Set = NONE, unset: Unset = NONE) -> None:
    """Bring a recipe's model and data to this machine, to run it with no network."""
    from rlhf_recipes.sources.fetch import fetch as fetch_recipe

    fetch_recipe(_load(recipe, set_, unset), _print)
    _print("all that it loads is on this machine")


@app.command()
def recipes(json: Json = False) -> None:
    """List the recipes that ship with this project."""
    from rlhf_recipes.recipe.load import load_recipe, shipped_recipes

    found = {file: load_recipe(file).title for file in shipped_recipes()}
    if json:
        listed = [{"name": f.stem, "title": title, "file": str(f)} for f, title in found.items()]
        return say_json({"recipes": listed})
    for file, title in found.items():
        _print(f"{file.stem:<15} {title}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a recipe, from which editors complete keys and values."""
    from rlhf_recipes.pipeline.schema import schema_json
    from rlhf_recipes.screen import begin, quietly

    begin("Reading the settings of every trainer")
    with quietly():
        schema = schema_json()
    print(schema, end="")


app.add_typer(cli_sweep.app)
app.add_typer(cli_runs.app)
app.add_typer(cli_feedback.app)
app.add_typer(cli_ui.app)


def main() -> NoReturn:
    """The console script: errors as one line, and the exit codes.

    Nothing that a command makes is for others to write, whatever this process's umask was.
    """
    os.umask(os.umask(0o077) | 0o022)
    # Wherever it is typed: a person adds it to the end of the line that failed.
    arguments = [word for word in sys.argv[1:] if word != "--debug"]
    # typer carries click inside; its UsageError is exported only as the base of BadParameter.
    call_errors: Any = typer.BadParameter.__base__
    try:
        code = app(arguments, prog_name="rlhf-recipes", standalone_mode=False)
    except errors.RlhfRecipesError as error:
        cure = error.hint and sys.stderr.isatty()  # on a line of its own
        shown = f"✗ {error.message}\n  → {error.hint}" if cure else str(error)
        code = _say(shown, error.exit_code)
    except call_errors as error:
        command = error.ctx.command_path if error.ctx else "rlhf-recipes"
        code = _say(f"{error.format_message()}\nfor help: {command} --help", 2)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        said = machine_error(error) or f"{type(error).__name__}: {reason} (--debug shows where)"
        code = _say(str(said), 1)
    sys.exit(code or 0)


def _say(message: str, code: int) -> int:
    if "--debug" in sys.argv:
        import traceback

        _print(traceback.format_exc(), file=sys.stderr)
    _print(message, file=sys.stderr)
    return code
