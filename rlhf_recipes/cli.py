"""The command line: parse, call one function, print.

Findings and results go to stdout, progress and errors to stderr. What a command needs is imported
inside it: `--help` loads typer alone, and nothing here loads torch before a stage has to run.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer import Argument, Exit, Option

from rlhf_recipes import cli_feedback, cli_tables, cli_ui, errors, findings, text
from rlhf_recipes.cli_options import (
    NONE,
    RUNS,
    Json,
    Name,
    NoRehearsal,
    Recipe,
    Run,
    Runs,
    Set,
    Stage,
    Unset,
    show,
)
from rlhf_recipes.cli_options import find as _find
from rlhf_recipes.cli_options import load as _load
from rlhf_recipes.cli_options import say as _print
from rlhf_recipes.errors import UsageError, machine_error

if TYPE_CHECKING:
    from rlhf_recipes.store.clean import Spare

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
Measure = Annotated[bool, Option("--measure", help="Measure memory and time: a rehearsal.")]
Recipes = Annotated[list[str], Argument(metavar="RECIPE...", help="Files or names.")]
Resolved = Annotated[bool, Option("--resolved", help="Print it with all defaults filled in.")]
New = Annotated[Path, Argument(metavar="NEW", help="The file to write.")]
Rows = Annotated[Path, Argument(metavar="FILE", help="Rows: .csv, .tsv, .jsonl, .json, .parquet.")]
NewRecipe = Annotated[Path | None, Argument(metavar="NEW", help="The recipe. [FILE's name.toml]")]
SomeRuns = Annotated[list[str], Argument(metavar="RUN...", help="Folders or names.")]
Page = Annotated[Path | None, Option(metavar="FILE", help="Write it as an HTML page, too.")]
HeadToHead = Annotated[
    bool, Option("--head-to-head", help="Ask both last policies the same, before one judge.")
]
Open = Annotated[bool, Option("--open", help="Show it in a browser.")]
Yes = Annotated[bool, Option("--yes", help="Remove without asking.")]
All = Annotated[bool, Option("--all", help="The base and every policy, one after another.")]
Folder = Annotated[Path, Argument(metavar="DIR", help="The folder to write.")]
Form = Annotated[str, Option(metavar="merged|adapter|gguf", help="What to write.")]
Type = Annotated[
    str | None, Option("--type", metavar="f16|q8_0", help="How a GGUF stores weights. [f16]")
]
Push = Annotated[
    str | None, Option(metavar="USER/NAME", help="Upload it to the hub, too, as a private model.")
]


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
    runs: Runs = RUNS,
) -> None:
    """Run what is not yet done of a recipe."""
    from rlhf_recipes.pipeline.runner import run as run_recipe

    loaded = _load(recipe, set_, unset)
    for note in loaded.notes:
        _print(f"{loaded.path}: {note}", file=sys.stderr)
    outcome = run_recipe(
        loaded, runs=runs, until=until, fresh=fresh, name=name, wait=wait, rehearse=not no_rehearsal
    )
    show(outcome, recipe)
    if strict and any(line.level == "fault" for line in outcome.verdict):
        raise Exit(STRICT)


def _print_json(value: dict[str, Any]) -> None:
    from rlhf_recipes.store.files import FORMAT, to_json

    print(text.masked(to_json({"format": FORMAT, **value}, indent=2)))


@app.command()
def plan(
    recipe: Recipe,
    set_: Set = NONE,
    unset: Unset = NONE,
    device: Device = "",
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
        return _print_json({"run": str(made.run_folder), "model": made.model, "stages": stages})
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
    from rlhf_recipes.data.dataset import check_rows
    from rlhf_recipes.screen import begin, quietly
    from rlhf_recipes.stages.session import check_models

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
            wrong = []
            begin(f"Looking at the rows and the model of {file}")
            for about, look in (("rows", check_rows), ("model", check_models)):
                try:
                    with quietly():
                        look(loaded)
                except errors.RlhfRecipesError as error:
                    entry[about] = str(error)
                    wrong.append(f"{file}: {about}: {error}")
            said[-1:] = wrong or [verdict]
        if not json:
            _print("\n".join(said))
    if json:
        _print_json({"recipes": found})
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
        return _print_json({"recipes": listed})
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


@app.command("runs")
def runs_(runs: Runs = RUNS, json: Json = False) -> None:
    """List what was run, the newest last."""
    from rlhf_recipes.store.history import list_runs

    found = list_runs(runs)
    _print_json(found) if json else _print(cli_tables.runs(found, runs))


@app.command()
def compare(
    run: SomeRuns,
    page: Page = None,
    head_to_head: HeadToHead = False,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """Say what differs between runs, in their recipes and in their results."""
    from rlhf_recipes.report import compare as comparison

    if len(run) < 2:
        raise UsageError("one run differs from nothing", "name another")
    folders = [_find(word, runs) for word in run]
    if head_to_head:
        if page or len(run) > 2:
            raise UsageError("--head-to-head takes two runs and no --page", "leave out the rest")
        return _head_to_head(folders[0], folders[1], json)
    parts, rulers = comparison.compare(folders), comparison.rulers(folders)
    if page:
        comparison.write(folders, page)
    if json:
        said = {"runs": [str(folder) for folder in folders], "not_comparable": rulers}
        return _print_json(said | parts)
    if rulers:
        _print(f"not comparable: {', '.join(rulers)}")
        _print(f"  → rlhf-recipes compare {run[0]} {run[1]} --head-to-head\n")
    _print(cli_tables.comparison([folder.name for folder in folders], parts))
    if page:
        _print(f"\npage  {page}")


def _head_to_head(first: Path, second: Path, json: bool) -> None:
    """Ask two runs' last policies the same, and print whom the first run's judge prefers."""
    from rlhf_recipes.screen import Screen, begin

    begin("Loading two policies and a judge")
    with Screen(first / "log.txt") as screen, screen.quiet():
        from rlhf_recipes.pipeline.head_to_head import head_to_head as ask

        found = ask(first, second, screen)
    if not json:
        return _print(str(found))
    shares = {who: share._asdict() for who, share in found.shares.items()}
    _print_json({"policies": found.policies, "win_rates": shares})


@app.command()
def report(run: Run, open_: Open = False, runs: Runs = RUNS) -> None:
    """Write a run's report again: the evidence, in one HTML file."""
    from rlhf_recipes.feedback import winrate
    from rlhf_recipes.report import run_page
    from rlhf_recipes.store.layout import REPORT

    folder = _find(run, runs)
    try:
        winrate.write(folder)
    except UsageError as error:
        _print(str(error), file=sys.stderr)
    _print(findings.shown(run_page.write(folder)))
    _print(f"\nreport   {folder / REPORT}")
    if open_:
        import webbrowser

        webbrowser.open((folder / REPORT).resolve().as_uri())


@app.command()
def doctor(runs: Runs = RUNS, json: Json = False) -> None:
    """Say what this machine has and lacks, and what to do about it."""
    from rlhf_recipes.pipeline.doctor import doctor as ask
    from rlhf_recipes.screen import begin, quietly

    begin("Looking at the device, the libraries and the hub")
    with quietly():
        found = ask(runs)
    said = {"lines": [asdict(line) for line in found]}
    _print_json(said) if json else _print("\n".join(map(str, found)))
    if any(line.level == "fault" for line in found):
        raise Exit(1)


@app.command()
def clean(yes: Yes = False, runs: Runs = RUNS) -> None:
    """Remove stages that no run refers to, and what killed processes left."""
    from rlhf_recipes.store.clean import unused

    found, doubts = unused(runs)
    for doubt in doubts:
        _print(f"no stage is removed: {doubt}", file=sys.stderr)
    _remove(found, runs, yes)
    if doubts:
        raise Exit(1)


def _remove(found: list[Spare], runs: Path, yes: bool) -> None:
    """Shows what can go and, once that is agreed to, removes it."""
    from rlhf_recipes.store.clean import remove
    from rlhf_recipes.store.history import size

    if not found:
        return _print(f"nothing to remove in {runs}")
    sizes = [size(path) for path, _, _ in found]
    rows = [[text.size(n), str(path), why] for n, (path, why, _) in zip(sizes, found, strict=True)]
    rows = [["size", "what", "why"], *rows, [text.size(sum(sizes)), "in all", ""]]
    _print(text.table(rows, right=(0,)))
    if not yes and not sys.stdin.isatty():
        return _print("nothing was removed: there is no terminal to ask at; --yes removes")
    if not yes and not typer.confirm("Remove all of it?"):
        return _print("nothing was removed")
    for spare in found:
        _print(f"{'removed' if remove(spare, runs) else 'in use by now, kept:'} {spare[0]}")


@app.command()
def chat(run: Run, stage: Stage = None, all_: All = False, runs: Runs = RUNS) -> None:
    """Talk to the model that a run made."""
    from rlhf_recipes.screen import Screen, begin

    if all_ and stage:
        raise UsageError("--all and --stage exclude each other", "--all takes every policy")
    folder = _find(run, runs)
    begin("Loading the model")
    with Screen(folder / "log.txt") as screen:
        with screen.quiet():
            from rlhf_recipes.chat import chat as chat_with
        chat_with(run_folder=folder, stage=stage, everyone=all_, screen=screen)


@app.command()
def export(
    run: Run,
    folder: Folder,
    stage: Stage = None,
    form: Form = "merged",
    type_: Type = None,
    push: Push = None,
    runs: Runs = RUNS,
) -> None:
    """Write a stage's model and its card, for transformers and vLLM, llama.cpp and Ollama."""
    from rlhf_recipes.pipeline.to_gguf import KINDS
    from rlhf_recipes.screen import Screen, begin

    if form not in ("merged", "adapter", "gguf"):
        raise UsageError(f"no form {form!r}", "--form is merged, adapter or gguf")
    if type_ not in (None, *KINDS):
        raise UsageError(f"no type {type_!r}", f"--type is {' or '.join(KINDS)}")
    run_folder = _find(run, runs)
    begin("Loading the model")
    with Screen(run_folder / "log.txt") as screen, screen.quiet():
        from rlhf_recipes.pipeline.export import export as export_model

        said = export_model(
            run_folder=run_folder, folder=folder, stage=stage, form=form, kind=type_, push=push
        )
    _print(said)


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
