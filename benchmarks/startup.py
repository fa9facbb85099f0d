"""How long the command line takes to answer, against the import of the library it is made with.

Sides, in turn: `--help`, `check smoke`, `run smoke` where all is done already, and as the unit
`python -c "import typer"`, all in the same Python, each a fresh process; one round before the timed
ones fills the caches of files and bytecode. Fair in: nothing loads faster than the library alone,
so each ratio says what is added to it. `typer_app`, an app of one argument that does nothing, shows
how much of that the library adds itself when it parses a command.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks import common
from benchmarks.common import Measured, child, module

SHORT = ("sft.max_steps=1", "reward.max_steps=1", "ppo.total_episodes=64", "evaluation.prompts=2")
TYPER_APP = "import typer\ndef main(name: str) -> None: ...\ntyper.run(main)"
TARGETS = {"help": 1.5, "check": 2.5, "nothing_to_do": 4.0}


def main() -> None:
    parser = common.parser(__doc__, pairs=21)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as runs:
        run = module("rlhf_recipes", "run", "smoke", "--runs", Path(runs))
        run += [f"--set={word}" for word in SHORT]
        child(run)
        commands = {
            "typer": [sys.executable, "-c", "import typer"],
            "typer_app": [sys.executable, "-c", TYPER_APP, "smoke"],
            "help": module("rlhf_recipes", "--help"),
            "check": module("rlhf_recipes", "check", "smoke"),
            "nothing_to_do": run,
        }
        sides = {name: partial(timed, command) for name, command in commands.items()}
        common.in_turn(sides, 1)
        found = common.in_turn(sides, 2 if args.quick else args.pairs)
    seconds = {name: [run["seconds"] for run in runs] for name, runs in found.items()}
    compared = {name: common.ratios(seconds[name], seconds["typer"]) for name in list(commands)[1:]}
    targets = {name: common.at_most(most, compared[name]) for name, most in TARGETS.items()}
    medians = {name: common.spread(numbers) for name, numbers in seconds.items()}
    report = {"ratios": compared, "targets": targets, "seconds": medians, "runs": seconds}
    common.report("startup", args, report)


def timed(command: list[str | Path]) -> Measured:
    return {"seconds": child(command)}


if __name__ == "__main__":
    main()
