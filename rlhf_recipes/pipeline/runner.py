"""For each planned stage: take it as done, or run it and write its record; then the model.

The runner knows no stage's work: it hands each a `StageContext` and keeps what comes back. A stage
that was killed has no record. `layout.clear_stage` leaves its checkpoints, metrics and samples, and
its trainer goes on from `Resumable.newest` (stages/checkpoints.py), or starts over without one.

`fresh` takes no stage as done that was begun before. What is complete stays so until another is
that takes its place. A pass that was cut off goes on when `fresh` is asked for again, with the
stages and checkpoints that it made; once any run of that name has finished, the next pass is new.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import itertools
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import tomlkit

from rlhf_recipes import errors, signals, text
from rlhf_recipes.findings import MARKS, Finding
from rlhf_recipes.pipeline import doctor, memory
from rlhf_recipes.pipeline.launch import Launched, launched
from rlhf_recipes.pipeline.plan import Plan, PlannedStage, plan_run, run_name
from rlhf_recipes.recipe.kinds import makes
from rlhf_recipes.recipe.load import Recipe, layout_settings, smaller_layout
from rlhf_recipes.screen import Screen, StageProgress, begin
from rlhf_recipes.sources.fetch import bring
from rlhf_recipes.stages.session import Session
from rlhf_recipes.store import files, layout, locks, provenance
from rlhf_recipes.store.fingerprint import difference
from rlhf_recipes.text import duration, masked, plain

if TYPE_CHECKING:
    from rlhf_recipes.pipeline.rehearsal import Ahead, Rehearsed

BUSY = 25.0  # percent of all cores that others take
MODEL_SOURCE = "source.json"  # inside model/: which stage it was written from


@dataclass(frozen=True)
class StageOutcome:
    """A finished stage of this run."""

    stage: PlannedStage
    did: str  # "ran" or "cached"
    record: dict[str, Any]  # its stage.json: metrics, summary, seconds, versions, …


@dataclass(frozen=True, repr=False)
class RunOutcome:
    """What a run made. In a notebook, it shows its verdict and its stages."""

    run_folder: Path
    stages: tuple[StageOutcome, ...]
    results: dict[str, float | int | str]  # "<stage>.<metric>"
    model: Path | None  # None where no policy was trained
    verdict: tuple[Finding, ...] = ()

    @property
    def report(self) -> Path:
        return self.run_folder / layout.REPORT

    def __repr__(self) -> str:
        said = f": {plain(self.verdict[0].text)}" if self.verdict else ""
        return f"<RunOutcome of {self.run_folder}{said}>"

    def _repr_html_(self) -> str:
        found = [f"{MARKS[one.level]} {one.text}" for one in self.verdict]
        rows = [(done.stage.name, done.did, done.record["summary"]) for done in self.stages]
        cells = ("".join(f"<td>{escape(plain(cell))}</td>" for cell in row) for row in rows)
        verdict = "".join(f"<li>{escape(masked(plain(one)))}</li>" for one in found)
        link = escape(str(self.report))
        return (
            f"<ul>{verdict}</ul><table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
            f"<p><a href='{link}'>{link}</a></p>"
        )


def run(
    recipe: Recipe,
    *,
    runs: Path | None = None,
    until: str | None = None,
    fresh: bool = False,
    name: str | None = None,
    wait: bool = False,
    rehearse: bool = True,
    model: bool = True,
    launch: str = "",
) -> RunOutcome:
    """Run what is not done yet of a recipe, and write the run's folder, with its `model`.

    It is rehearsed first (see `rehearsal`), unless that would take as long as the run, or the stage
    at hand goes on from a checkpoint. With `launch`, a launcher's command, each stage runs as a
    group of processes, and nothing is rehearsed.

    Raises UsageError where a launcher started several processes; BusyError where another process
    holds the run or a stage of it, unless it is to `wait`;
    Interrupted on Ctrl-C and SIGTERM; MachineError where disk or memory give out; StageError (or
    the stage's own DataError, ModelError) where a stage fails.
    """
    _alone()
    runs, name = layout.runs_folder(runs), run_name(recipe, name)
    folder, wanted = runs / name, _names_until(until, recipe)
    waiting = functools.partial(print, file=sys.stderr) if wait else None
    try:
        lock = locks.lock(folder, f"run {name}", waiting)
        with _nothing_for_others_to_write(), signals.at_once(), lock:
            folder.mkdir(exist_ok=True)
            with Screen(folder / "log.txt") as screen:
                screen.line(f"{plain(recipe.title)} · {plain(str(folder))}", "bold")
                plan = plan_run(recipe, runs, name=name, fresh=fresh)
                files.write_text(folder / "recipe.toml", recipe.text)
                files.write_text(folder / "resolved.toml", tomlkit.dumps(recipe.resolved()))
                if plan.mirrored:
                    screen.line(f"  the model: {plan.mirrored}")
                made = _Run(plan, screen, fresh, wait, launch)
                return made.go(wanted, rehearse and not launch, model)
    except KeyboardInterrupt as signalled:
        raise errors.Interrupted(
            f"run {name} was interrupted",
            "the same command goes on from what is finished and saved",
            exit_code=143 if isinstance(signalled, signals.Terminated) else 130,
        ) from None
    except OSError as error:
        if found := errors.machine_error(error):
            raise found from error
        raise


class _Run:
    """One pass over the planned stages."""

    def __init__(
        self, plan: Plan, screen: Screen, fresh: bool, wait: bool, launch: str = ""
    ) -> None:
        self.plan = plan
        self.screen = screen
        self.waiting = screen.line if wait else None
        self.launch = launch
        self.since = layout.begun(plan.run_folder) if fresh else ""
        self.session = Session(plan.recipe, plan.model, plan.runs)
        self.done: dict[str, StageOutcome] = {}
        self.started = provenance.now()
        self.needs: dict[str, Counter[str]] = {}  # by stage: bytes by role, by the rule
        self.at = ""  # the stage that is at it, in its rehearsal too

    def go(self, wanted: list[str], rehearse: bool, export: bool) -> RunOutcome:
        self.wanted, self.rehearses = wanted, rehearse
        try:
            self._write("unfinished")  # from here on, the run refers to its stages
            for place in range(len(self.plan.stages)):
                stage = self._planned(place)
                if stage.name not in wanted and not stage.done:
                    break  # what is done after `until` is no less done
                self.done[stage.name] = self._stage(stage)
                self.at = ""
                if self.done[stage.name].did == "ran":
                    self._write("unfinished")
            model = self._write_model() if export else None
        except BaseException as error:
            with contextlib.suppress(OSError):  # it would hide what came first
                self._write(_outcome(error), error)
                if self._report():
                    file = self.plan.run_folder / layout.REPORT
                    self.screen.line(f"  report: {plain(str(file))}")
            raise
        results, verdict = self._write("finished"), tuple(self._report())
        files.remove(self.plan.run_folder / layout.FRESH)
        stages = tuple(self.done.values())
        return RunOutcome(self.plan.run_folder, stages, results, model, verdict)

    # ---- one stage ------------------------------------------------------------------------------

    def _planned(self, place: int) -> PlannedStage:
        """The stage at a place: planned anew where people judge, for they may have gone on."""
        known = self.plan
        if makes(known.stages[place].kind, "judgements"):
            fresh, name = bool(self.since), known.run_folder.name
            self.plan = plan_run(known.recipe, known.runs, name=name, fresh=fresh)
        self.session.judged = self.plan.judged
        return self.plan.stages[place]

    def _stage(self, stage: PlannedStage) -> StageOutcome:
        record = self._record(stage) if stage.done else None
        if record is None:
            with locks.lock(stage.folder, f"stage {stage.name}", self.waiting) as lock:
                layout.settle(stage.folder)
                record = self._record(stage)  # another process may have finished it meanwhile
                if record is None:
                    self._prepare(stage)
                    self._heading(stage, stage.reason)
                    return StageOutcome(stage, "ran", self._compute(stage, lock))
        layout.tidy(stage.folder)  # a kill may have come before it
        self._heading(stage, f"cached ({duration(record['seconds'])} when it ran)")
        changed = difference(record["versions"], provenance.versions())
        if changed:
            self.screen.line(f"  computed with other versions: {', '.join(changed)}", "yellow")
        return StageOutcome(stage, "cached", record)

    def _record(self, stage: PlannedStage) -> dict[str, Any] | None:
        """The stage's record, where it is complete: of this very key, and of this pass."""
        record = layout.read_record(stage.folder)
        if record is None or record["key"] != stage.key:
            return None
        return record if self.since in ("", record.get("begun")) else None

    def _heading(self, stage: PlannedStage, reason: str) -> None:
        place = f"Stage {stage.index + 1} of {len(self.plan.stages)}"
        self.screen.line(f"{place} · {stage.name} — {reason}", "bold")

    def _prepare(self, stage: PlannedStage) -> None:
        """Before the first stage that has to run: what is here, what the hub has, the rehearsal.

        The stages after a `label` stage are rehearsed once it has their rows.
        """
        done = [*self.done.values()]
        if not any(one.did == "ran" for one in done):
            _share_cores()
            # What the hub sends, it shows itself; converting a mirror only makes noise.
            with self.screen.quiet() if self.plan.mirrored else contextlib.nullcontext():
                bring(self.plan.recipe, self.plan.model)
            begin("  Loading PyTorch")
            with self.screen.quiet():
                for line in doctor.short(self.plan.runs):
                    self.screen.line(f"  {line}", "dim")
                if any(self.plan.recipe.kind(name).samples for name in self.wanted):
                    self.session.engine(None, self.screen.line)  # now, not after hours of training
        elif not makes(done[-1].stage.kind, "judgements"):
            return
        if pending := self._pending(stage):
            self._rehearse(pending, any((stage.folder / "work").glob(layout.CHECKPOINTS)))

    def _pending(self, stage: PlannedStage) -> list[PlannedStage]:
        """What is to be rehearsed from a stage on: up to the next one whose rows are not there."""
        rest = self.plan.stages[stage.index :] if self.rehearses else ()
        known = itertools.takewhile(lambda one: not makes(one.kind, "judgements"), rest)
        return [one for one in known if one.name in self.wanted and self._record(one) is None]

    def _rehearse(self, pending: list[PlannedStage], resumed: bool) -> None:
        begin("  Encoding the rows and estimating memory")
        with self.screen.quiet():
            from rlhf_recipes.pipeline import fit

            fit.check(self.ahead(pending), self.screen, resumed)

    def ahead(self, stages: Sequence[PlannedStage]) -> Ahead:
        from rlhf_recipes.pipeline.rehearsal import Ahead

        return Ahead(self.plan, stages, self.session, self._failing, self.needs)

    def _failing(self, stage: PlannedStage, during: str = "") -> AbstractContextManager[None]:
        self.at = stage.name
        smaller = smaller_layout(self.session.recipe, stage.name, self.plan.run_folder.name)
        return self._failing_as(f"{during}stage {stage.name}", smaller)

    def _compute(self, stage: PlannedStage, lock: int) -> dict[str, Any]:
        """Run the stage in its folder; beside it, where a complete one must stay until then."""
        folder = stage.folder
        if (folder / layout.RECORD).exists():
            folder = layout.beside(folder, "fresh")
        layout.clear_stage(folder, begun=self.since)
        started, clock = provenance.now(), time.monotonic()
        with self._failing(stage), self.screen.quiet():
            result, took, processes = self._computed(stage, folder, lock)
        record = {
            "kind": stage.kind,
            "name": stage.name,
            "key": stage.key,
            "run": self.plan.run_folder.name,
            "begun": self.since,  # the pass of `--fresh`, if it was made in one
            "started": started,
            "seconds": round(time.monotonic() - clock, 3),
            "memory": took,
            "summary": result.summary,
            "metrics": result.metrics,
            "payload": stage.payload,
            "layout": layout_settings(self.session.recipe, stage.name)
            | ({"processes": processes} if processes > 1 else {}),
            "versions": provenance.versions(),
        }
        layout.write_record(folder, record)
        if folder != stage.folder:
            layout.swap(folder, stage.folder)
        layout.tidy(stage.folder)
        return record

    def _computed(self, stage: PlannedStage, folder: Path, lock: int) -> Launched:
        """In this process, or in a group. People and judges are asked by this one."""
        if self.launch and not makes(stage.kind, "judgements"):
            return launched(self.launch, self.plan, stage, folder, self.screen, lock)
        memory.begin()
        with StageProgress(self.screen, folder) as progress:
            signals.tell = progress.note
            result = stage.run(self.session, folder, self.plan.outputs, progress)
        return Launched(result, memory.peak(), 1)

    @contextlib.contextmanager
    def _failing_as(self, what: str, smaller: str = "") -> Iterator[None]:
        """Name the place and the log in whatever fails; the traceback goes to the log alone.

        Where memory ran out, name what needs most of it, too.
        """
        where = f"log: {plain(str(self.screen.log_path))}"
        try:
            yield
        except errors.PeopleNeeded as error:  # nothing failed
            words = f"{what}: {error.message}", self.plan.label_command
            raise errors.PeopleNeeded(*words) from error
        except Exception as error:
            with contextlib.suppress(OSError):
                self.screen.log_traceback()
            if isinstance(error, errors.MachineError):
                raise
            if isinstance(error, (errors.DataError, errors.ModelError, errors.StageError)):
                failed = type(error)(f"{what}: {error.message}", error.hint)
            else:
                reason = plain(str(error).strip().partition("\n")[0])
                failed = errors.StageError(f"{what} failed: {type(error).__name__}: {reason}")
            if isinstance(failed, errors.StageError):
                failed = errors.machine_error(error, what, smaller) or failed
            message = failed.message
            if message.endswith("out of memory") and self.at in self.needs:
                [(role, most)] = self.needs[self.at].most_common(1)
                message += f", most of it for {role} ({text.size(most)} by rule)"
            hint = f"{failed.hint}; {where}" if failed.hint else where
            raise type(failed)(message, hint) from error

    # ---- the run's own files --------------------------------------------------------------------

    def _write_model(self) -> Path | None:
        """model/, of the last policy: built aside, and left alone where it is that already."""
        policies = [done for done in self.done.values() if makes(done.stage.kind, "policy")]
        if not policies:
            return None
        last = policies[-1]
        folder = self.plan.run_folder / "model"
        # With "started", for `--fresh` makes another of the same key.
        source = {"stage": last.stage.name, "key": last.stage.key}
        source["started"] = last.record["started"]
        if files.read_json(folder / MODEL_SOURCE) == {"format": files.FORMAT, **source}:
            layout.tidy(folder)
            return folder
        aside = layout.beside(folder, "fresh")
        files.remove(aside)
        # Lets go of the base: merging loads it whole.
        self.session = Session(self.plan.recipe, self.plan.model, self.plan.runs)
        with self._failing_as("writing the model"), self.screen.quiet():
            from rlhf_recipes.pipeline.export import write_model

            write_model(self.session, last.stage.folder / "output", aside, form="merged")
        files.sync_all(aside)
        files.write_json(aside / MODEL_SOURCE, source)
        layout.swap(aside, folder)
        return folder

    def _report(self) -> list[Finding]:
        """The report and the model's card, from files alone; where it cannot, a line says so."""
        try:
            with self.screen.quiet():
                from rlhf_recipes.report import run_page

                return run_page.write(self.plan.run_folder, again=False)
        except Exception as error:
            with contextlib.suppress(OSError):  # the log's disk may be what is full
                self.screen.log_traceback()
                told = plain(f"{type(error).__name__}: {error}")
                self.screen.line(f"  no report: {told}", "yellow")
            return []

    def _write(
        self, outcome: str, error: BaseException | None = None
    ) -> dict[str, float | int | str]:
        """manifest.json and results.json, as far as the run has come; returns the results."""
        results = {}
        for name, done in self.done.items():
            for metric, value in done.record["metrics"].items():
                # The evaluation says itself which stage a number is about: "ppo.win_rate".
                results[metric if "." in metric else f"{name}.{metric}"] = value
        files.write_json(self.plan.run_folder / "results.json", results)
        recipe, last = self.plan.recipe, self.plan.stages[-1]
        manifest = {
            "title": recipe.title,
            "recipe": str(recipe.path.resolve()),
            "overrides": recipe.overrides,
            "command": [text.masked(word) for word in sys.argv],
            "started": self.started,
            "ended": provenance.now(),
            "outcome": outcome,
            "error": self._error(error),
            "stages": [self._entry(stage) for stage in self.plan.stages],
            "seed": recipe.seed,
            "model": last.payload["model"],
            "mirror": self.plan.mirrored,
            "dataset": last.payload["dataset"],
            "versions": provenance.versions(),
            "hardware": provenance.hardware(),
        }
        files.write_json(self.plan.run_folder / layout.MANIFEST, manifest)
        return results

    def _error(self, error: BaseException | None) -> dict[str, str] | None:
        """What ended the run early, and in which stage."""
        if not isinstance(error, Exception):
            return None
        rest = [stage.name for stage in self.plan.stages if stage.name not in self.done]
        told = errors.machine_error(error) or error
        message = text.masked(getattr(told, "message", "") or f"{type(told).__name__}: {told}")
        said = {"message": plain(message), "hint": plain(getattr(told, "hint", ""))}
        return {"stage": self.at or next(iter(rest), ""), **said}

    def _entry(self, stage: PlannedStage) -> dict[str, Any]:
        done = self.done.get(stage.name)
        return {
            "name": stage.name,
            "kind": stage.kind,
            "key": stage.key,
            "folder": stage.folder.relative_to(self.plan.runs).as_posix(),
            "outcome": done.did if done else "not run",
            "reason": (done.stage if done else stage).reason,  # it may be planned anew since
            "seconds": done.record["seconds"] if done else None,
            "versions": done.record["versions"] if done else None,
            "payload": stage.payload,  # all that determines its result, digests of what it reads
        }


def _outcome(error: BaseException) -> str:
    """How a run that ended early ended, for its manifest."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "waiting" if isinstance(error, errors.PeopleNeeded) else "failed"


def _alone() -> None:
    """Raise UsageError in one of a launcher's processes: accelerate would wait for the others."""
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"):
        if os.environ.get(name, "1") not in ("", "0", "1"):
            message = f"{name} is {os.environ[name]}: a run is one process"
            hint = "name the launcher as --launch, such as torchrun, or unset that variable"
            raise errors.UsageError(message, hint)


def _share_cores() -> None:
    """Where other processes are busy, let threads that wait sleep: to be called before torch loads.

    GNU OpenMP's threads spin as they wait. Beside four busy processes on two cores, the smoke
    recipe's SFT took over 150 s with spinning and 49 s without; on idle cores, chat's SFT took 33
    and 49 s. So it is looked at, and a person's own OMP_WAIT_POLICY wins.
    """
    if "torch" not in sys.modules and psutil.cpu_percent(0.2) > BUSY:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def rehearsed(plan: Plan, stages: Sequence[PlannedStage], screen: Screen) -> list[Rehearsed]:
    """What each of these stages took in a rehearsal."""
    _alone()
    run = _Run(plan, screen, fresh=False, wait=False)
    with screen.quiet():
        from rlhf_recipes.pipeline import fit, rehearsal

        ahead = run.ahead(stages)
        if rehearsal.cost(ahead)[0] >= rehearsal.SHORT:  # as `fit.check` does
            fit.settle(ahead, screen)
        return list(rehearsal.rehearse(ahead))


def _names_until(until: str | None, recipe: Recipe) -> list[str]:
    """The recipe's stages up to `until`. Raises UsageError where it has none of that name."""
    names = recipe.all_stages
    if until is None:
        return names
    if until not in names:
        near = difflib.get_close_matches(until, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"its stages: {', '.join(names)}"
        raise errors.UsageError(f"the recipe has no stage {until!r}", hint)
    return names[: names.index(until) + 1]


@contextlib.contextmanager
def _nothing_for_others_to_write() -> Iterator[None]:
    """No file or folder made here is writable by others, whatever this process's umask."""
    before = os.umask(0o022)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)
