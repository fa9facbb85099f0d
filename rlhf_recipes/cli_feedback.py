"""The commands of feedback: to judge on a page, and to read, write and measure what was said."""

from __future__ import annotations

import sys
from functools import partial
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

# Of `judge`.
Judged = Annotated[Path, Argument(metavar="FILE", help="Pairs of answers, to be judged.")]
Judge = Annotated[
    str, Option("--model", metavar="NAME", help="A folder, hub id, or server's name.")
]
Url = Annotated[str, Option(metavar="URL", help="An OpenAI-compatible server. [runs it here]")]
Principles = Annotated[
    Path | None, Option(metavar="FILE", help="What to judge by: a principle a paragraph.")
]
Reasons = Annotated[bool, Option("--reasons", help="Have it give reasons first.")]
Limit = Annotated[int | None, Option(metavar="N", min=1, help="Judge the first so many pairs.")]
Show = Annotated[bool, Option("--show", help="Print each pair with its verdict.")]
Budget = Annotated[
    float | None, Option(metavar="X", min=0, help="Dollars at --price, else calls, at most.")
]
Price = Annotated[
    list[float],
    Option(metavar="IN --price OUT", min=0, help="Dollars per million tokens, in and out."),
]
NO_PRICE: list[float] = []  # never changed
Kept = Annotated[Path | None, Option("-o", metavar="FILE", help="Write the pairs that are kept.")]


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


@app.command()
def judge(
    file: Judged,
    model: Judge,
    url: Url = "",
    principles: Principles = None,
    reasons: Reasons = False,
    limit: Limit = None,
    show_: Show = False,
    budget: Budget = None,
    price: Price = NO_PRICE,
    output: Kept = None,
    runs: Runs = RUNS,
) -> None:
    """Have a model say which answer of each pair is better, in both orders."""
    from rlhf_recipes import cli_tables
    from rlhf_recipes.feedback.judge_file import judge_file, shown
    from rlhf_recipes.feedback.judging import JudgeSettings
    from rlhf_recipes.screen import quietly

    if len(price) not in (0, 2):
        raise UsageError("a price is of tokens in and of tokens out", "--price 0.15 --price 0.60")
    settings = JudgeSettings(
        model=model,
        url=url,
        principles=principles.read_text(encoding="utf-8") if principles else "",
        reasons=reasons,
        budget=budget,
        price=(price[0], price[1]) if price else None,
    )
    person = sys.stderr
    with quietly():
        tell = partial(say, file=person)
        items, found = judge_file(file, settings, runs, tell, limit=limit, output=output)
    if show_:
        say(shown(items, found))
    say(cli_tables.judged(found.metrics))
    if output:
        say(f"\n{found.metrics['kept']} pairs  {output}")
