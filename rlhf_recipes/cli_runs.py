"""The commands that look at what was run, and `doctor`, which looks at the machine."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Exit, Option

from rlhf_recipes import cli_tables, findings, text
from rlhf_recipes.cli_options import RUNS, Json, Run, Runs, Stage, find, say, say_json
from rlhf_recipes.errors import UsageError

if TYPE_CHECKING:
    from rlhf_recipes.store.clean import Spare

app = typer.Typer()

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


@app.command("runs")
def runs_(runs: Runs = RUNS, json: Json = False) -> None:
    """List what was run, the newest last."""
    from rlhf_recipes.store.history import list_runs

    found = list_runs(runs)
    say_json(found) if json else say(cli_tables.runs(found, runs))


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
    folders = [find(word, runs) for word in run]
    if head_to_head:
        if page or len(run) > 2:
            raise UsageError("--head-to-head takes two runs and no --page", "leave out the rest")
        return _head_to_head(folders[0], folders[1], json)
    parts, rulers = comparison.compare(folders), comparison.rulers(folders)
    if page:
        comparison.write(folders, page)
    if json:
        said = {"runs": [str(folder) for folder in folders], "not_comparable": rulers}
        return say_json(said | parts)
    if rulers:
        say(f"not comparable: {', '.join(rulers)}")
        say(f"  → rlhf-recipes compare {run[0]} {run[1]} --head-to-head\n")
    say(cli_tables.comparison([folder.name for folder in folders], parts))
    if page:
        say(f"\npage  {page}")


def _head_to_head(first: Path, second: Path, json: bool) -> None:
    """Ask two runs' last policies the same, and print whom the first run's judge prefers."""
    from rlhf_recipes.screen import Screen, begin

    begin("Loading two policies and a judge")
    with Screen(first / "log.txt") as screen, screen.quiet():
        from rlhf_recipes.pipeline.head_to_head import head_to_head as ask

        found = ask(first, second, screen)
    if not json:
        return say(str(found))
    shares = {who: share._asdict() for who, share in found.shares.items()}
    say_json({"policies": found.policies, "win_rates": shares})


@app.command()
def report(run: Run, open_: Open = False, runs: Runs = RUNS) -> None:
    """Write a run's report again: the evidence, in one HTML file."""
    from rlhf_recipes.feedback import winrate
    from rlhf_recipes.report import run_page
    from rlhf_recipes.store.layout import REPORT

    folder = find(run, runs)
    try:
        winrate.write(folder)
    except UsageError as error:
        say(str(error), file=sys.stderr)
    say(findings.shown(run_page.write(folder)))
    say(f"\nreport   {folder / REPORT}")
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
    say_json(said) if json else say("\n".join(map(str, found)))
    if any(line.level == "fault" for line in found):
        raise Exit(1)


@app.command()
def clean(yes: Yes = False, runs: Runs = RUNS) -> None:
    """Remove stages that no run refers to, and what killed processes left."""
    from rlhf_recipes.store.clean import unused

    found, doubts = unused(runs)
    for doubt in doubts:
        say(f"no stage is removed: {doubt}", file=sys.stderr)
    _remove(found, runs, yes)
    if doubts:
        raise Exit(1)


def _remove(found: list[Spare], runs: Path, yes: bool) -> None:
    """Shows what can go and, once that is agreed to, removes it."""
    from rlhf_recipes.store.clean import remove
    from rlhf_recipes.store.history import size

    if not found:
        return say(f"nothing to remove in {runs}")
    sizes = [size(path) for path, _, _ in found]
    rows = [[text.size(n), str(path), why] for n, (path, why, _) in zip(sizes, found, strict=True)]
    rows = [["size", "what", "why"], *rows, [text.size(sum(sizes)), "in all", ""]]
    say(text.table(rows, right=(0,)))
    if not yes and not sys.stdin.isatty():
        return say("nothing was removed: there is no terminal to ask at; --yes removes")
    if not yes and not typer.confirm("Remove all of it?"):
        return say("nothing was removed")
    for spare in found:
        say(f"{'removed' if remove(spare, runs) else 'in use by now, kept:'} {spare[0]}")


@app.command()
def chat(run: Run, stage: Stage = None, all_: All = False, runs: Runs = RUNS) -> None:
    """Talk to the model that a run made."""
    from rlhf_recipes.screen import Screen, begin

    if all_ and stage:
        raise UsageError("--all and --stage exclude each other", "--all takes every policy")
    folder = find(run, runs)
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
    run_folder = find(run, runs)
    begin("Loading the model")
    with Screen(run_folder / "log.txt") as screen, screen.quiet():
        from rlhf_recipes.pipeline.export import export as export_model

        said = export_model(
            run_folder=run_folder, folder=folder, stage=stage, form=form, kind=type_, push=push
        )
    say(said)
