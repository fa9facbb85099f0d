"""The commands of feedback: to judge on a page, and to read, write and measure what was said."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Exit, Option

from rlhf_recipes import text
from rlhf_recipes.cli_options import (
    NO_FILES,
    NONE,
    RUNS,
    Name,
    NoRehearsal,
    Run,
    Runs,
    Set,
    Unset,
    find,
    load,
    say,
    show,
)
from rlhf_recipes.errors import UsageError

app = typer.Typer()

Source = Annotated[
    str, Argument(metavar="SOURCE", help="A recipe, a run with --evaluate, or a file of answers.")
]
People = Annotated[
    list[str], Option("--person", metavar="NAME", help="Who judges; again for each. [you]")
]
Votes = Annotated[int | None, Option(metavar="N", help="People who judge each.")]
Guideline = Annotated[Path | None, Option(metavar="FILE", help="What is better, in Markdown.")]
Strength = Annotated[bool, Option("--strength", help="Ask how much better, too.")]
Port = Annotated[int, Option(metavar="N", help="Of the page; 0 takes any.")]
Evaluate = Annotated[bool, Option("--evaluate", help="A run's last policy against its start.")]
Pairs = Annotated[int, Option(metavar="N", help="Of --evaluate: pairs that are asked.")]


@app.command()
def label(
    source: Source,
    set_: Set = NONE,
    unset: Unset = NONE,
    person: People = NONE,
    votes: Votes = None,
    guideline: Guideline = None,
    strength: Strength = False,
    evaluate: Evaluate = False,
    pairs: Pairs = 40,
    port: Port = 8017,
    name: Name = None,
    no_rehearsal: NoRehearsal = False,
    runs: Runs = RUNS,
) -> None:
    """Judge answers on a page in the browser; of a recipe, then go on with the run."""
    from rlhf_recipes.pipeline import labelling

    people = labelling.People(person or ["you"], votes, guideline, strength, port, say)
    if evaluate:
        return say(labelling.evaluated(find(source, runs), people, pairs))
    if labelling.is_rows(source):
        return say(labelling.rows(Path(source), people, runs))
    recipe = load(source, set_, unset)
    outcome = labelling.run(recipe, people, runs, name=name, rehearse=not no_rehearsal)
    if outcome is None:
        raise Exit(4)
    show(outcome, source)


@app.command()
def sample(
    run: Run,
    stage: Annotated[
        list[str], Option(metavar="STAGE", help="A policy, or two. [the last]")
    ] = NONE,
    prompts: Annotated[
        int | None, Option(metavar="N", help="Prompts that are asked. [400]")
    ] = None,
    answers: Annotated[int | None, Option(metavar="N", help="1: single answers. [2]")] = None,
    out: Annotated[
        Path | None, Option("-o", "--out", metavar="FILE", help="Add them there.")
    ] = None,
    runs: Runs = RUNS,
) -> None:
    """Ask a run's policy for answers that are to be judged."""
    from rlhf_recipes.pipeline import labelling

    if len(stage) > 2:
        raise UsageError("answers of two policies make a pair", "name one or two with --stage")
    given = {"prompts": prompts, "answers": answers}
    words = [f"{key}={value}" for key, value in given.items() if value is not None]
    lines, count = labelling.sampled(find(run, runs), stage, out, words)
    say(f"{count} items written to {out}" if out else lines)


@app.command()
def feedback(
    source: Annotated[
        str | None,
        Argument(metavar="[SOURCE]", help="A file of answers, or a run. [all that was judged]"),
    ] = None,
    out: Annotated[
        Path | None, Option("-o", "--out", metavar="FILE", help="Write the judgements there.")
    ] = None,
    as_: Annotated[
        str,
        Option(
            "--as",
            metavar="FORM",
            help="pairs, arena, thumbs, judgements, csv, label-studio or argilla.",
        ),
    ] = "pairs",
    add: Annotated[
        list[Path], Option(metavar="FILE", help="Read judgements from there, first.")
    ] = NO_FILES,
    without: Annotated[list[str], Option(metavar="NAME", help="Leave a person out.")] = NONE,
    runs: Runs = RUNS,
) -> None:
    """Say how far people agree; write what they judged to a file, or read it from one."""
    from rlhf_recipes.feedback import agreement, exchange, imports
    from rlhf_recipes.feedback.store import Store

    items = exchange.items_named(source, runs, say) if source else None
    store = Store(runs)
    store.put(items or [])
    for file in add:
        say(f"{file}: {imports.add(store, file)}")
    ids = store.ids() if items is None else [one.id for one in items]
    if out:
        return say(exchange.export(store, ids, as_, out, without))
    say(text.table(agreement.lines(store, ids, without=without)))
