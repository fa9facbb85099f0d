"""One process of a group that computes a stage: `python -m rlhf_recipes.pipeline.worker SPEC`.

See `launch.py`, which writes SPEC and reads what the processes say of how they ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes import errors, group, signals
from rlhf_recipes.pipeline import memory
from rlhf_recipes.pipeline.launch import REPORT, RESULT, ROOM, end_with_parent
from rlhf_recipes.pipeline.plan import PlannedStage
from rlhf_recipes.recipe.load import loads, smaller_layout
from rlhf_recipes.screen import Screen, StageProgress
from rlhf_recipes.stages.contract import Progress, StageResult
from rlhf_recipes.stages.session import Session
from rlhf_recipes.store import files

BROKEN = ("gloo", "Connection closed", "Connection reset", "NCCL", "Broken pipe")


class Silent:
    """`Progress` of a process that is not the first."""

    def update(self, done: int, total: int, **numbers: float) -> None: ...
    def resume(self, done: int) -> None: ...
    def sample(self, prompt: str, answer: str, **numbers: float) -> None: ...
    def note(self, text: str) -> None: ...


class Report:
    """How this process ended, in a file that is there from the first: it may die without a word."""

    def __init__(self, folder: Path, rank: int, of: int) -> None:
        self.file = folder / REPORT.format(rank)
        self.said = {"format": files.FORMAT, "rank": rank, "of": of, "pid": os.getpid()}
        self.say("")

    def say(self, kind: str, message: str = "", hint: str = "", broken: bool = False) -> None:
        words = {"type": kind, "message": message, "hint": hint, "broken": broken}
        text = json.dumps({**self.said, **words}).encode()
        descriptor = os.open(self.file, os.O_WRONLY | os.O_CREAT)  # in place: its room is taken
        os.write(descriptor, text.ljust(ROOM))
        os.close(descriptor)


def main(file: Path) -> int:
    end_with_parent()
    spec = json.loads(file.read_text())
    rank, of = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    report = Report(file.parent, rank, of)
    with signals.at_once():
        try:
            with _place(spec, rank) as (folder, progress):
                signals.tell = progress.note
                found = compute(spec, folder, progress)
            if rank == 0:
                files.write_json(file.with_name(RESULT), found)
            report.file.unlink()
        except BaseException as error:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, while this is told
            with contextlib.suppress(OSError):
                traceback.print_exc()
            report.say(*_told(error, spec, rank))
            with contextlib.suppress(OSError):
                sys.stderr.flush()
            # Not `sys.exit`: what leaves a broken group in order waits for those that are gone.
            os._exit(143 if isinstance(error, KeyboardInterrupt) else 1)
    return 0


def _told(error: BaseException, spec: dict[str, Any], rank: int) -> tuple[str, str, str, bool]:
    """Kind, message and hint of an error, and whether it says no more than that another is gone."""
    if isinstance(error, errors.RlhfRecipesError):
        return type(error).__name__, error.message, error.hint, False
    name, broken = spec["stage"]["name"], any(word in str(error) for word in BROKEN)
    recipe = loads(spec["recipe"]["text"], Path(spec["recipe"]["path"]))
    where, smaller = f"stage {name}, process {rank}", smaller_layout(recipe, name, spec["run"])
    if not broken and (lacks := errors.machine_error(error, where, smaller)):
        return type(lacks).__name__, lacks.message, lacks.hint, False
    return type(error).__name__, str(error).strip().partition("\n")[0], "", broken


@contextlib.contextmanager
def _place(spec: dict[str, Any], rank: int) -> Iterator[tuple[Path, Progress]]:
    """Where this process writes, and whom it tells: the stage's folder and a person, if first."""
    if rank == 0:
        os.dup2(1, 2)  # the launcher's own words go to the log
        folder = Path(spec["folder"])
        with Screen(Path(spec["log"])) as screen, screen.quiet():
            with StageProgress(screen, folder) as progress:
                yield folder, progress
        return
    os.dup2(2, 1)
    with tempfile.TemporaryDirectory(prefix="process-") as own:
        folder = Path(own)
        (folder / "work").mkdir(), (folder / "output").mkdir()
        yield folder, Silent()


def compute(spec: dict[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """The stage's result, with the most memory that a process took."""
    group.join()
    from rlhf_recipes.stages.order import share_out

    recipe = loads(spec["recipe"]["text"], Path(spec["recipe"]["path"]))
    own, outputs = spec["stage"], {name: Path(output) for name, output in spec["outputs"].items()}
    stage = PlannedStage(**own, folder=Path(spec["folder"]))
    share_out(recipe, stage.name, group.size())  # what cannot be is refused before a model is read
    progress.note(f"{group.size()} processes" if group.size() > 1 else "one process")
    session = Session(recipe, spec["model"], Path(spec["runs"]))
    session.judged = {name: [Path(one) for one in some] for name, some in spec["judged"].items()}
    memory.begin()
    result: StageResult = stage.run(session, folder, outputs, progress)
    peaks = group.everyone(memory.peak())
    group.leave()
    return {
        "metrics": result.metrics,
        "summary": result.summary,
        "memory": {what: max(peak[what] for peak in peaks) for what in peaks[0]},
        "processes": len(peaks),
    }


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
