"""`rlhf-recipes sweep`: check every run, start what is not finished, and show them side by side."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Exit, Option

from rlhf_recipes.cli_options import (
    NONE,
    RUNS,
    Json,
    NoRehearsal,
    Recipe,
    Runs,
    Unset,
    say,
    say_json,
)
from rlhf_recipes.errors import PeopleNeeded
from rlhf_recipes.text import table

if TYPE_CHECKING:
    from rlhf_recipes.report.sweep import Sweep

app = typer.Typer()

Values = Annotated[
    list[str], Option("--set", metavar="KEY=A,B", help="The values of a key, a run each.")
]
Jobs = Annotated[
    int, Option(min=0, metavar="N", show_default=False, help="Runs at once; 0 starts none. [1]")
]
Start = Annotated[str | None, Option(help="How run names begin. [the recipe's]")]
Page = Annotated[Path | None, Option(metavar="FILE", help="The page to write. [in --runs]")]
Dry = Annotated[bool, Option("--dry", help="Print the commands, run none.")]


@app.command()
def sweep(
    recipe: Recipe,
    set_: Values = NONE,
    unset: Unset = NONE,
    jobs: Jobs = 1,
    name: Start = None,
    page: Page = None,
    dry: Dry = False,
    no_rehearsal: NoRehearsal = False,
    runs: Runs = RUNS,
    json: Json = False,
) -> None:
    """Run a recipe once for each value of some keys, and show means over seeds."""
    from rlhf_recipes.pipeline import sweep as many
    from rlhf_recipes.screen import begin

    begin("Checking every run")
    made = many.trials(recipe, set_, unset, name)
    commands = {one.name: many.command(recipe, one, unset, runs, not no_rehearsal) for one in made}
    if dry:
        for words in commands.values():
            say(many.typed(words))
        return
    plans = [one.plan(runs) for one in made]
    todo = [
        (one, commands[one.name])
        for one, plan in zip(made, plans, strict=True)
        if not many.is_done(plan)
    ]
    ended = {}
    if todo and jobs:
        at_once = f", {jobs} at once" if jobs > 1 else ""
        say(f"{len(todo)} of {len(made)} runs to do{at_once}: {many.ahead(plans)}", file=sys.stderr)
        ended = many.go(todo, jobs, lambda line: say(line, file=sys.stderr))

    from rlhf_recipes.report import sweep as report

    file = page or runs / many.page_name(recipe, set_, unset, name)
    listed = [report.Trial(one.setting, one.seed, runs / one.name) for one in made]
    found = report.write(listed, made[0].recipe.title, file)
    if json:
        say_json({"page": str(file), "method": report.METHOD, **found.told()})
    else:
        _show(found, f"{report.METHOD}; {found.shared()}")
        say(f"\npage  {file}")
    if codes := {end.code for end in ended.values()} - {0}:
        raise Exit(PeopleNeeded.exit_code if codes == {PeopleNeeded.exit_code} else 1)


def _show(found: Sweep, method: str) -> None:
    """The table, and a line for each run without a success."""
    say(f"\n{table(found.rows())}\n\n{method}")
    if rulers := found.rulers():
        say(f"not comparable between settings: {', '.join(rulers)}")
    for trial in found.trials:
        if trial.state != "✓":
            mark = trial.state if trial.done else "✗"
            said = trial.found[0].text if trial.found else trial.state
            say(f"{mark} {trial.folder.name}: {said}")
