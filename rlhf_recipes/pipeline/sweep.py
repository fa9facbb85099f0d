"""Many runs of one recipe: every combination of the values of its keys, each a `run` of its own.

Each run is a process. Runs find each other's stages by their keys, and wait for each other by the
stages' locks: nothing here knows what they share. A run that fails does not stop the others. A run
that is finished is not started again, so the same command goes on where a sweep ended.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rlhf_recipes import signals
from rlhf_recipes.errors import (
    Interrupted,
    PeopleNeeded,
    Problem,
    RecipeError,
    RlhfRecipesError,
    UsageError,
)
from rlhf_recipes.pipeline.data_lint import found_wrong
from rlhf_recipes.pipeline.plan import Plan, plan_run
from rlhf_recipes.recipe.load import Recipe, find_recipe, load_recipe
from rlhf_recipes.store.digests import digest
from rlhf_recipes.store.history import read_manifest
from rlhf_recipes.store.layout import runs_folder
from rlhf_recipes.store.provenance import hardware
from rlhf_recipes.text import duration, plain

PROGRAM = (sys.executable, "-m", "rlhf_recipes")
LONGEST = 100  # characters of a run's name; a file system takes 255 bytes
PAUSE = 0.1  # seconds between looks at the runs
SEED = "seed"
MOST = 500  # runs

Say = Callable[[str], None]


# ---- which runs


@dataclass(frozen=True)
class Trial:
    """A run to be: a value for each key of the sweep."""

    name: str
    setting: str  # the values, without the seed's
    seed: str
    words: tuple[str, ...]  # of `--set`
    recipe: Recipe

    def plan(self, runs: Path) -> Plan | None:
        """None where its model or data are not here yet."""
        with contextlib.suppress(RlhfRecipesError):
            return plan_run(self.recipe, runs, name=self.name)
        return None


def values(raw: str) -> list[str]:
    """The values of `0.05,0.1`: no comma within quotes, brackets or braces separates two."""
    cuts, depth, quote = [-1], 0, ""
    for at, sign in enumerate(raw):
        if quote:
            quote = "" if sign == quote and raw[at - 1] != "\\" else quote
        elif sign in "\"'" and (depth or not raw[cuts[-1] + 1 : at].strip()):  # not that of don't
            quote = sign
        elif sign == "," and not depth:
            cuts.append(at)
        else:
            depth += (sign in "[{") - (sign in "]}")
    return [raw[a + 1 : b].strip() for a, b in itertools.pairwise([*cuts, len(raw)])]


def trials(
    word: str, set: Sequence[str], unset: Sequence[str] = (), name: str | None = None
) -> list[Trial]:
    """Every run of a sweep over the recipe `word`, checked; the seed varies fastest.

    So runs that are made at once have different seeds, and do not wait for each other's stages.
    Raises UsageError for a call that is wrong, RecipeError with every problem of every run, and
    what a run would raise for rows and models that cannot be used.
    """
    given = _given(set)
    varied = sorted((key for key, found in given.items() if len(found) > 1), key=SEED.__eq__)
    if not varied:
        raise UsageError("a sweep needs a key with several values", "as in --set seed=1,2,3")
    if (count := math.prod(len(given[key]) for key in varied)) > MOST:
        raise UsageError(f"{count:,} runs are too many for one sweep", f"{MOST} at most")
    file, prefix = find_recipe(word), _prefix(word, given, unset, name)
    made, problems = list[Trial](), dict[str, Problem]()
    for chosen in itertools.product(*(given[key] for key in varied)):
        now = {key: found[0] for key, found in given.items()}
        now |= zip(varied, chosen, strict=True)
        words = tuple(f"{key}={value}" for key, value in now.items())
        try:
            recipe = load_recipe(file, set=words, unset=unset)
        except RecipeError as error:
            problems |= {str(problem): problem for problem in error.problems}
            continue
        told = [f"{key}={now[key]}" for key in varied]
        setting = " ".join(one for one in told if not one.startswith(f"{SEED}="))
        called = _called("-".join([prefix, *told]))
        made.append(Trial(called, setting or "as it is", str(recipe.seed), words, recipe))
    if problems:
        raise RecipeError([*problems.values()])
    _alike(made)
    _look(made)
    return made


def page_name(word: str, set: Sequence[str], unset: Sequence[str], name: str | None) -> str:
    """The file of a sweep's page: another sweep of the recipe has another."""
    given = _given(set)
    varied = [key for key, found in given.items() if len(found) > 1]
    return _called("-".join([_prefix(word, given, unset, name), "by", *varied])) + ".html"


def _prefix(
    word: str, given: Mapping[str, Sequence[str]], unset: Sequence[str], name: str | None
) -> str:
    """How all names of a sweep begin: as `plan.run_name` has it, with what is the same in all."""
    same = [f"{key}={found[0]}" for key, found in given.items() if len(found) == 1]
    same += [f"unset {key}" for key in unset]
    return name or find_recipe(word).stem + (f"-{digest(sorted(same))[:6]}" if same else "")


def _given(set: Sequence[str]) -> dict[str, list[str]]:
    """The values of each key."""
    given: dict[str, list[str]] = {}
    for word in set:
        key, equals, raw = word.partition("=")
        key = ".".join(part.strip() for part in key.split("."))
        if key in given:
            raise UsageError(f"{plain(key)} is set twice", f"once, as in --set {plain(key)}=A,B")
        given[key] = found = values(raw) if equals else [raw]
        if len(found) > 1 and not all(found):
            raise UsageError(f"--set {plain(word)}: an empty value", "leave out a comma")
    return given


def _called(said: str) -> str:
    """A name for a folder; what is lost of `said` is in a digest."""
    name = re.sub(r"[^\w.=+-]+", "_", said)
    return name if name == said and len(name) <= LONGEST else f"{name[:LONGEST]}-{digest(said)[:6]}"


def _alike(made: Sequence[Trial]) -> None:
    """Raise UsageError where two runs would be one."""
    known: dict[str, Trial] = {}
    for trial in made:
        twin = known.setdefault(repr(trial.recipe.resolved()), trial)
        if twin is not trial:
            what = f"{twin.name} and {trial.name} would be one run"
            raise UsageError(what, "a value is there twice: leave one out")


def _look(made: Sequence[Trial]) -> None:
    """Raise what `check` finds wrong with rows and models; a seed changes neither."""
    seen: dict[str, Trial] = {}
    for trial in made:
        seen.setdefault(repr(trial.recipe.resolved() | {SEED: 0}), trial)
    for trial in seen.values():
        for error in found_wrong(trial.recipe).values():
            raise type(error)(f"{trial.name}: {error.message}", error.hint)


def command(word: str, trial: Trial, unset: Sequence[str], runs: Path, rehearse: bool) -> list[str]:
    """What `rlhf-recipes` is called with for a run."""
    words = ["run", word]
    for one in trial.words:
        words += ["--set", one]
    for key in unset:
        words += ["--unset", key]
    words += ["--name", trial.name, "--wait"]
    words += ["--runs", str(runs)] if runs != runs_folder() else []
    return words if rehearse else [*words, "--no-rehearsal"]


def typed(words: Sequence[str]) -> str:
    return shlex.join(["rlhf-recipes", *words])


# ---- what they share


def is_done(plan: Plan | None) -> bool:
    """Whether a run is finished that is of these very stages."""
    manifest = plan and read_manifest(plan.run_folder)
    if not plan or not manifest or manifest["outcome"] != "finished":
        return False
    keys = [entry.get("key") for entry in manifest["stages"]]
    return keys == [one.key for one in plan.stages] and all(one.done for one in plan.stages)


def ahead(plans: Sequence[Plan | None]) -> str:
    """How many stages there are to compute, each once."""
    every = [stage for plan in plans if plan for stage in plan.stages]
    pending = {stage.key for stage in every if not stage.done}
    if None in plans:
        return "its model or data are not here yet"
    return f"{len(every)} stages, {len(pending)} to compute"


# ---- running them


@dataclass
class Job:
    """A run under way."""

    trial: Trial
    place: int  # among those at once
    process: subprocess.Popen[bytes]
    said: IO[bytes]
    began: float = field(default_factory=time.monotonic)

    def last_line(self) -> str:
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return plain(lines[-1]) if lines else "it said nothing"


@dataclass(frozen=True)
class Ended:
    code: int
    line: str  # the last that it said


def go(
    todo: Sequence[tuple[Trial, Sequence[str]]],
    jobs: int,
    say: Say,
    program: Sequence[str] = PROGRAM,
) -> dict[str, Ended]:
    """Run all, so many at once; how each ended, by its name.

    At Ctrl-C and SIGTERM each run is told once: it ends its step and saves. Raises Interrupted.
    """
    waiting, running, ended = deque(todo), list[Job](), dict[str, Ended]()
    of = len(todo)
    with signals.at_once():
        try:
            with signals.deferred():  # so that no run is begun and not known
                while (waiting or running) and not signals.requested():
                    while waiting and len(running) < jobs:
                        free = {*range(jobs)} - {job.place for job in running}
                        running.append(_start(*waiting.popleft(), min(free), jobs, program))
                        say(f"▸ {of - len(waiting)} of {of}  {running[-1].trial.name}")
                    time.sleep(PAUSE)
                    for job in [one for one in running if one.process.poll() is not None]:
                        running.remove(job)
                        ended[job.trial.name] = _ended(job, say)
        except BaseException as error:
            _stop(running, error, say)
            if not isinstance(error, KeyboardInterrupt):
                raise
            code = 143 if isinstance(error, signals.Terminated) else 130
            said = f"the sweep was interrupted: {len(ended)} of {of} runs ended before"
            hint = "the same command goes on from what is finished and saved"
            raise Interrupted(said, hint, exit_code=code) from None
    return ended


def _start(
    trial: Trial, words: Sequence[str], place: int, jobs: int, program: Sequence[str]
) -> Job:
    """In a process group of its own: Ctrl-C at a terminal reaches the sweep alone."""
    said = tempfile.TemporaryFile()
    process = subprocess.Popen(
        [*program, *words],
        stdin=subprocess.DEVNULL,
        stdout=said,
        stderr=subprocess.STDOUT,
        env={**os.environ, **card_of(place, jobs)},
        process_group=0,
    )
    return Job(trial, place, process, said)


def card_of(place: int, jobs: int) -> Mapping[str, str]:
    """A card each for runs at once, in turn, where there are several; a launcher's run has all."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = [str(n) for n in range(len(hardware()["gpus"]))]
    if given is not None:
        cards = [one.strip() for one in given.split(",") if one.strip()]
    if jobs == 1 or len(cards) < 2 or os.environ.get("RLHF_RECIPES_LAUNCH"):
        return {}
    return {"CUDA_VISIBLE_DEVICES": cards[place % len(cards)]}


def _ended(job: Job, say: Say) -> Ended:
    code, took = job.process.returncode, duration(time.monotonic() - job.began)
    line = job.last_line()
    job.said.close()
    if code == 0:
        say(f"✓ {job.trial.name}: done in {took}")
    elif code == PeopleNeeded.exit_code:
        say(f"? {job.trial.name}: waits for people: {line}")
    else:
        line = f"killed by signal {-code}" if code < 0 else line
        say(f"✗ {job.trial.name}: failed after {took}: {line}")
    return Ended(code, line)


def _stop(running: Sequence[Job], error: BaseException, say: Say) -> None:
    """Tell each run once, and wait for it; told again, tell it again."""
    signum = signal.SIGTERM if isinstance(error, signals.Terminated) else signal.SIGINT
    say(f"stopping {len(running)} runs after their step; once more stops at once")
    while left := [job for job in running if job.process.poll() is None]:
        for job in left:
            job.process.send_signal(signum)
        with contextlib.suppress(KeyboardInterrupt):
            for job in left:
                job.process.wait()
    for job in running:
        job.said.close()
