"""Breaks a run of a group of processes where it is told to, runs it again, and says how it ended.

    python -m tests.helpers.group_kills RECIPE FOLDER POINTS [STAGE | EVENT ...]

One process imports what a run needs and forks for each. POINTS is how many to a stage and event.
Where stages or events are named, only these are tried. Prints a JSON line for each: the stage, the
event, the point, the seconds until no process was left, what it said, and what is wrong.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_recipes.store import layout, locks
from tests.helpers.groups import forking
from tests.helpers.killing import left, spread

HANG = 60.0  # seconds after which what was broken must be over
EVENTS = ("rank 0", "rank 1", "launcher", "runner", "SIGINT", "SIGTERM", "disk")


def fault_of(event: str, point: int, counts: Path | None, mark: Path) -> Callable[[int], None]:
    """What a process does at its `point`th step: break in the way of `event`. Else it counts.

    When it breaks is written to `mark`.
    """
    runner = os.getpid()

    def act() -> None:
        mark.write_text(str(time.time()))
        if event.startswith("rank"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif event == "launcher":
            os.kill(os.getppid(), signal.SIGKILL)
        elif event == "disk":
            sync = os.fsync

            def full(descriptor: int) -> None:
                os.fsync = sync
                raise OSError(errno.ENOSPC, "No space left on device")

            os.fsync = full  # the next file that is to be whole
        else:
            os.kill(runner, getattr(signal, "SIGKILL" if event == "runner" else event))

    def fault(rank: int) -> None:
        from rlhf_recipes.pipeline.worker import Silent
        from rlhf_recipes.screen import StageProgress

        if rank != (1 if event == "rank 1" else 0):
            return
        kind, seen = (Silent if rank else StageProgress), 0
        update = kind.update

        def updating(*args: Any, **words: Any) -> None:
            nonlocal seen
            update(*args, **words)
            seen += 1
            if counts is not None:
                counts.write_text(str(seen))
            elif seen == point:
                act()

        kind.update = updating

    return fault


def ended(recipe: Path, runs: Path, until: str, event: str, point: int, counts: Path | None) -> str:
    """Run the recipe in a child, as a group of two; what it said at its end, "" if all is well."""
    said = runs.with_suffix(".said")
    said.write_text("died")
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return said.read_text()
    try:
        os.setsid()
        with runs.with_suffix(".log").open("a") as stream:
            os.dup2(stream.fileno(), 1), os.dup2(stream.fileno(), 2)
        from rlhf_recipes.pipeline.runner import run
        from rlhf_recipes.recipe.load import load_recipe

        signal.signal(signal.SIGINT, signal.default_int_handler)
        with forking(fault=fault_of(event, point, counts, runs.with_suffix(".mark"))) as launch:
            run(load_recipe(recipe), runs=runs, until=until, launch=launch, model=False)
        said.write_text("")
    except BaseException as error:
        said.write_text(f"{type(error).__name__}: {error}")
        traceback.print_exc()
    os._exit(0)


def free(runs: Path, stage: str) -> bool:
    """Whether no process holds the stage any more: each of a group has its lock."""
    return not any(locks.held(folder) for folder in (runs / ".stages").glob(f"{stage}-*"))


def case(
    recipe: Path, before: Path, whole: Path, stage: str, event: str, point: int
) -> dict[str, Any]:
    runs, wrong = before.with_name("broken"), []
    shutil.copytree(before, runs)
    said = ended(recipe, runs, stage, event, point, None)
    broke = float(runs.with_suffix(".mark").read_text())
    while not free(runs, stage) and time.time() - broke < HANG:
        time.sleep(0.1)
    took = time.time() - broke
    if took > HANG:
        wrong.append("a process is left")
    if said == "":
        wrong.append("it was not broken")
    named = {"rank 0": "process 0 of 2 died", "rank 1": "process 1 of 2 died"}
    named |= {"launcher": "the launcher was ended by SIGKILL", "disk": "No space left"}
    if (words := named.get(event, "")) not in said:
        wrong.append(f"it does not say {words!r}")
    steps = [layout.step_of(f) for f in (runs / ".stages").glob(f"{stage}-*/work/checkpoint-*")]
    if again := ended(recipe, runs, stage, "", 0, None):
        wrong.append(f"it did not end well: {again}")
    else:
        wanted, found = left(whole, stage), left(runs, stage)
        wrong += [key for key in wanted | found if wanted.get(key) != found.get(key)]
    shutil.rmtree(runs)
    return {
        "stage": stage,
        "event": event,
        "point": point,
        "seconds": round(took, 1),
        "kept": max(steps, default=0),
        "said": said,
        "wrong": wrong,
    }


def main(recipe: Path, folder: Path, points: int, named: list[str]) -> None:
    import rlhf_recipes.pipeline.worker
    import rlhf_recipes.stages.ppo.trainer
    import rlhf_recipes.stages.reward
    import rlhf_recipes.stages.sft  # noqa: F401 - once, for all children
    from rlhf_recipes.recipe.load import load_recipe

    folder.mkdir(parents=True, exist_ok=True)
    before = folder / "before"
    before.mkdir(exist_ok=True)
    every = load_recipe(recipe).all_stages
    events = [event for event in EVENTS if event in named] or EVENTS
    stages = [stage for stage in every if stage in named] or every
    for stage in every:
        whole, counts = folder / f"{stage}-whole", folder / f"{stage}.count"
        shutil.copytree(before, whole)
        if said := ended(recipe, whole, stage, "", 0, counts):
            raise SystemExit(f"{said}\n{whole.with_suffix('.log').read_text()}")
        for event in events if stage in stages else ():
            for point in spread(int(counts.read_text()), points):
                line = case(recipe, before, whole, stage, event, point)
                print(json.dumps(line), flush=True)
        shutil.rmtree(before)
        whole.rename(before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
