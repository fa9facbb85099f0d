"""The command `ui`: the pages of a runs folder, in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

from rlhf_recipes.cli_options import NO_FILES, RUNS, Runs
from rlhf_recipes.errors import UsageError

app = typer.Typer()

Files = Annotated[
    list[Path], Argument(metavar="FILE...", help="Files of answers, to be judged there.")
]
Port = Annotated[int, Option(metavar="N", help="Of the page; 0 takes any.")]


@app.command()
def ui(files: Files = NO_FILES, port: Port = 8018, runs: Runs = RUNS) -> None:
    """Watch, read, compare, label and chat with runs, in the browser."""
    try:
        from rlhf_recipes.ui.app import serve
    except ModuleNotFoundError as error:
        what = f"the page needs {error.name}, which is not installed"
        raise UsageError(what, "pip install 'rlhf-recipes[ui]'") from None

    serve(runs, port, files)
