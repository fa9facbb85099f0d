"""A stage as a group of processes: how the runner has a launcher start one, and what came of it.

The runner stays one process, which plans, locks, records and reports. A launcher is a command, such
as `torchrun --nproc-per-node 2`. It gets `-m rlhf_recipes.pipeline.worker SPEC`, and starts as many
processes. SPEC is a file that says all of the stage. The first process shows the progress
and writes the stage's folder. The others write to folders of their own, which are gone afterwards.

The lock of the stage is the group's standard input, so that it is held until the last process is
gone. On Linux a process ends with the one that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_recipes import errors
from rlhf_recipes.pipeline.plan import Plan, PlannedStage
from rlhf_recipes.screen import Screen
from rlhf_recipes.stages.contract import StageResult
from rlhf_recipes.store import files

WORKER = "rlhf_recipes.pipeline.worker"
REPORT, RESULT = "process-{}.json", "result.json"
ROOM = 4096  # bytes of a report, taken as it is begun: it is written even if the disk is full then
ENDING = 45.0  # seconds: torchrun kills after 30 what has not ended
LOST = ("Terminated", "KeyboardInterrupt", "DistBackendError")  # who says so is not who died
LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "ROLE_", "TORCHELASTIC_")
KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Launched(NamedTuple):
    result: StageResult
    memory: dict[str, int]  # the most that a process took
    processes: int


def launched(
    command: str, plan: Plan, stage: PlannedStage, folder: Path, screen: Screen, lock: int
) -> Launched:
    """Run a stage in a group of processes, in `folder`. `lock` is the descriptor of its lock.

    Raises what the process that failed first raised, or StageError with the process that died.
    """
    place = folder / "work" / "group"
    files.remove(place)
    place.mkdir()
    files.write_json(place / "spec.json", _spec(plan, stage, folder, screen.log_path))
    words = [*shlex.split(command), "-m", WORKER, str((place / "spec.json").resolve())]
    group = start(words, lock, screen.descriptor)
    code, found = _wait(group), files.read_json(place / RESULT)
    if code or found is None:
        raise _why(place, code)
    result = StageResult(found["metrics"], found["summary"])
    return Launched(result, found["memory"], found["processes"])


def start(words: list[str], lock: int, shown: int | None) -> subprocess.Popen[bytes]:
    """Start a launcher. What its first process shows goes to `shown`, and its own words to the log.

    Raises StageError where there is no such command.
    """
    held = os.dup(lock)  # filelock closes its own in a child
    try:
        return subprocess.Popen(
            words,
            stdin=held,
            stdout=shown,
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # no module from where it is typed
            start_new_session=True,  # Ctrl-C is the runner's, which asks the group once
            preexec_fn=end_with_parent,
        )
    except OSError as error:
        what = f"the launcher {words[0]!r} does not start: {error.strerror}"
        raise errors.StageError(what, "name a command as --launch, such as torchrun") from None
    finally:
        os.close(held)


def _spec(plan: Plan, stage: PlannedStage, folder: Path, log: Path) -> dict[str, Any]:
    """All that a process needs to compute a stage; its inputs are folders."""
    return {
        "recipe": {"text": plan.recipe.text, "path": str(plan.recipe.path.resolve())},
        "model": plan.model,
        "runs": str(plan.runs.resolve()),
        "run": plan.run_folder.name,
        "stage": {
            "name": stage.name,
            "kind": stage.kind,
            "index": stage.index,
            "key": stage.key,
            "payload": stage.payload,
            "inputs": stage.inputs,
        },
        "folder": str(folder.resolve()),
        "outputs": {name: str(output.resolve()) for name, output in plan.outputs.items()},
        "judged": {name: [str(f.resolve()) for f in some] for name, some in plan.judged.items()},
        "log": str(log.resolve()),
    }


def end_with_parent() -> None:
    """This process is killed once the one that started it is gone; on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(KILL_WITH_PARENT, signal.SIGKILL)


def _wait(group: subprocess.Popen[bytes]) -> int:
    """Its exit code. On Ctrl-C or SIGTERM, the group is asked to end in order first."""
    try:
        return group.wait()
    except KeyboardInterrupt:
        group.terminate()  # the launcher hands it on to each process
        with contextlib.suppress(subprocess.TimeoutExpired):
            group.wait(ENDING)
        raise
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group.pid, signal.SIGKILL)
        group.wait()


def _why(place: Path, code: int) -> errors.RlhfRecipesError:
    """What ended a group: the process that died without a word, else the first that said why.

    When one dies, the launcher ends the others, and their connections break: they say that.
    """
    log = sorted(place.glob(REPORT.format("*")), key=os.path.getmtime)
    told = [said for file in log if (said := files.read_json(file)) is not None]
    if code < 0:
        hint = "the same command goes on from what is finished and saved"
        name = signal.Signals(-code).name
        return errors.StageError(f"the launcher was ended by {name}", hint)
    if silent := sorted(said["rank"] for said in told if not said["type"]):
        who = " and ".join(map(str, silent))
        what = f"process {who} of {told[0]['of']} died without a word"
        hint = "where the system killed it, memory ran out; the same command goes on"
        return errors.StageError(what, hint)
    own = [said for said in told if said["type"] not in LOST and not said["broken"]]
    if not own:
        said = "and no process says why" if told else "before a process began"
        return errors.StageError(f"the launcher ended with {code}, {said}")
    error = own[0]
    if kind := getattr(errors, error["type"], None):
        return kind(error["message"], error["hint"])
    return errors.StageError(f"process {error['rank']}: {error['type']}: {error['message']}")


# ---- a launcher around the whole command


def around(environ: MutableMapping[str, str]) -> str | None:
    """What starts the group of a stage, where a launcher started the run itself; else None.

    Its first process is the runner, and starts as many anew for each stage; "" in the others, which
    have nothing to do. Raises UsageError for a launcher on several machines.
    """
    count, here = (int(environ.get(name) or 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if count < 2 or "LOCAL_WORLD_SIZE" not in environ:
        return None
    if environ.get("RANK", "0") != "0":
        return ""
    if count != here:
        what = f"the launcher started {count} processes on several machines"
        hint = "start the run once, with that launcher as --launch"
        raise errors.UsageError(what, hint)
    for name in [name for name in environ if name.startswith(LAUNCHED)]:
        del environ[name]
    end_with_parent()
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return shlex.join([*words, str(count)])
