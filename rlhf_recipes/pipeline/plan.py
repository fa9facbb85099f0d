"""Recipe → planned stages, in order: each with its key, its folder, and why it runs or does not."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.errors import UsageError
from rlhf_recipes.feedback.choose import RANDOM, part_at_random
from rlhf_recipes.feedback.items import ANSWERS, ROWS, ids_of
from rlhf_recipes.feedback.store import NAME, Store, snapshot
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.sources.resolve import identify, remembered
from rlhf_recipes.stages import contract
from rlhf_recipes.stages.contract import Progress, StageContext, StageResult
from rlhf_recipes.stages.session import Session
from rlhf_recipes.store import layout
from rlhf_recipes.store.digests import digest
from rlhf_recipes.store.fingerprint import Identities, differences, fingerprints
from rlhf_recipes.store.history import read_manifest

if TYPE_CHECKING:
    from rlhf_recipes.stats import Share

# Stages of one name in two recipes need not be akin: past so many differences, it is just new.
MOST_DIFFERENCES = 4
SHOWN_DIFFERENCES = 3
# In the payload of a stage in which people judge, or whose pairs depend on how steadily they do.
JUDGED = "judgements"


@dataclass(frozen=True)
class PlannedStage:
    name: str
    kind: str
    index: int  # from 0
    key: str  # 64 hex digits: the digest of `payload`
    folder: Path  # <runs>/.stages/<kind>-<key12>
    payload: dict[str, Any]  # what determines the result
    inputs: dict[str, str]  # role -> the stage that serves it
    reasons: tuple[str, ...] = ()  # "learning_rate 1e-05 → 2e-05", "input sft changed", "new", …
    done: bool = False

    @property
    def reason(self) -> str:
        """The first reasons, for a line."""
        more = len(self.reasons) - SHOWN_DIFFERENCES
        shown = self.reasons[:SHOWN_DIFFERENCES] + ((f"{more} more",) if more > 0 else ())
        return ", ".join(shown)

    def run(
        self, session: Session, folder: Path, outputs: Mapping[str, Path], progress: Progress
    ) -> StageResult:
        """Do its work in `folder`, from the outputs of the stages that it needs."""
        inputs = {role: outputs[source] for role, source in self.inputs.items()}
        on = session.of(self.name)
        about = (self.name, self.kind, on.recipe, folder, inputs)
        if on is not session:  # one base at a time
            session.release()
        context = StageContext(*about, progress, on, self.key, self.payload.get(JUDGED, {}))
        result = contract.module_of(self.kind).run(context)
        if on is not session:
            on.release()
        return result


@dataclass(frozen=True, repr=False)
class Plan:
    recipe: Recipe
    model: dict[str, str]  # what the base model is, and by that where it comes from
    runs: Path
    run_folder: Path
    stages: tuple[PlannedStage, ...]

    def __repr__(self) -> str:
        stages = ", ".join(f"{s.name} {'cached' if s.done else 'runs'}" for s in self.stages)
        return f"<Plan of {self.run_folder}: {stages}>"

    @property
    def outputs(self) -> dict[str, Path]:
        return {stage.name: stage.folder / "output" for stage in self.stages}

    @property
    def judged(self) -> dict[str, list[Path]]:
        """By stage: the files of judgements that it learns from."""
        outputs = self.outputs
        return {
            one.name: [
                outputs[n] / ROWS for role, n in one.inputs.items() if role.startswith("label:")
            ]
            for one in self.stages
        }

    @property
    def label_command(self) -> str:
        """What a person types to judge on a page, and to go on with this very run."""
        recipe = self.recipe
        words = ["rlhf-recipes", "label", str(recipe.path)]
        for word in recipe.overrides:
            unset, _, key = word.partition("unset ")
            words += ["--unset", key] if not unset and key else ["--set", word]
        if self.run_folder.name != run_name(recipe, None):
            words += ["--name", self.run_folder.name]
        if self.runs != layout.runs_folder():
            words += ["--runs", str(self.runs)]
        return shlex.join(words)

    @property
    def mirrored(self) -> str | None:
        """Where the base model comes from, if it is not from where the recipe's name says."""
        if "mirror" not in self.model:
            return None
        mirror = self.recipe.model.mirror
        return f"{self.recipe.model.name}, from its mirror: {mirror.file} in {mirror.wheel} (PyPI)"


def make_plan(
    recipe: Recipe,
    identities: Identities,
    runs: Path,
    *,
    name: str | None = None,
    judged: Callable[[Path], dict[str, Any]] = lambda folder: {},
    agreed: Callable[[Sequence[Path]], Share | None] = lambda folders: None,
) -> Plan:
    """Every stage of the recipe with its key and its folder; it reads no file.

    `judged` says what people said of the answers in a `sample` stage's folder, `agreed` how often
    they agree with themselves on those of several. Raises UsageError for a run name that is not a
    folder name.
    """
    stages: dict[str, PlannedStage] = {}
    people: list[Path] = []  # the folders of the answers that they judged
    for index, (stage, payload) in enumerate(fingerprints(recipe, identities)):
        inputs = payload["inputs"]
        payload["inputs"] = {role: stages[source].key for role, source in inputs.items()}
        extras = recipe.table(stage).extras if stage in recipe.tables else {}
        if extras.get("by") == "people":
            people.append(stages[inputs["answers"]].folder)
            payload[JUDGED] = judged(people[-1])
        elif extras.get("choose") == "unsure":
            # Of the stages before alone: what is said of its own pairs does not choose others.
            payload[JUDGED] = {RANDOM: part_at_random(agreed(people))}
        key = digest(payload)
        folder = layout.stage_folder(runs, payload["kind"], key)
        stages[stage] = PlannedStage(stage, payload["kind"], index, key, folder, payload, inputs)
    run_folder = runs / run_name(recipe, name)
    return Plan(recipe, identities.base, runs, run_folder, tuple(stages.values()))


def plan_run(
    recipe: Recipe, runs: Path | None = None, *, name: str | None = None, fresh: bool = False
) -> Plan:
    """`make_plan`, with what is done already; `fresh` takes no stage as done.

    Reads the model's and the data's files for their digests, and the records of stages. Raises
    UsageError for a run name that is not a folder name, DataError and ModelError where a source is
    not available.
    """
    runs = layout.runs_folder(runs)
    made = make_plan(
        recipe, identify(recipe, runs), runs, name=name, judged=_judged, agreed=_agreed
    )
    return replace(made, stages=tuple(_looked_up(stage, made, fresh) for stage in made.stages))


def _judged(folder: Path) -> dict[str, Any]:
    """What people said of the answers of a complete `sample` stage."""
    runs = folder.parents[1]
    if layout.read_record(folder) is None or not (runs / NAME).exists():
        return snapshot([])
    return snapshot(Store(runs).judged(ids_of(folder / "output" / ANSWERS)))


def _agreed(folders: Sequence[Path]) -> Share | None:
    """How often people agree with themselves on the answers of complete `sample` stages."""
    done = [folder for folder in folders if layout.read_record(folder) is not None]
    if not done:
        return None
    from rlhf_recipes.feedback.agreement import itself  # NumPy, which a plan does without

    ids = [one for folder in done for one in ids_of(folder / "output" / ANSWERS)]
    return itself(Store(done[0].parents[1]), ids)


def _looked_up(stage: PlannedStage, made: Plan, fresh: bool) -> PlannedStage:
    if fresh:
        return replace(stage, reasons=("computed afresh",))
    if (layout.read_record(stage.folder) or {}).get("key") == stage.key:
        return replace(stage, reasons=("cached",), done=True)
    return replace(stage, reasons=tuple(_reasons(stage, made.run_folder)))


def run_name(recipe: Recipe, name: str | None) -> str:
    if name is None:
        name = recipe.path.stem
        if recipe.overrides:
            name += f"-{digest(sorted(recipe.overrides))[:6]}"
    if not name or name != Path(name).name or name.startswith(".") or not name.isprintable():
        raise UsageError(f"{name!r} is no name for a run", "pass --name with a plain folder name")
    return name


# ---- why ----------------------------------------------------------------------------------------


def _reasons(stage: PlannedStage, run_folder: Path) -> list[str]:
    """What differs from this stage of this run before, else from its nearest kin in any run."""
    work = stage.folder / "work"
    if work.exists():
        steps = [layout.step_of(path) for path in work.glob(layout.CHECKPOINTS)]
        kept = f", has a checkpoint of step {max(steps)}" if steps else ""
        return [f"was not finished{kept}"]
    before = _last_of_run(stage.name, run_folder)
    if before is None:
        kin = [
            record["payload"]
            for path in stage.folder.parent.glob(f"{stage.kind}-*")
            if (record := layout.read_record(path)) is not None and record["name"] == stage.name
        ]
        before = min(kin, key=lambda one: len(_differences(one, stage)), default=None)
        if before is None or len(_differences(before, stage)) > MOST_DIFFERENCES:
            return ["new"]
    contents = remembered(run_folder.parent)["contents"]
    return _differences(before, stage, contents) or ["new"]


def _last_of_run(stage: str, run_folder: Path) -> dict[str, Any] | None:
    """The payload that this stage of this run finished with last."""
    for entry in (read_manifest(run_folder) or {"stages": []})["stages"]:
        if entry["name"] == stage:
            record = layout.read_record(layout.entry_folder(run_folder.parent, entry))
            return record and record["payload"]
    return None


def _differences(
    old: dict[str, Any], stage: PlannedStage, contents: Mapping[str, dict[str, str]] | None = None
) -> list[str]:
    new, changed = stage.payload, list[str]()
    if new["inputs"].get("answers") != old["inputs"].get("answers"):  # judgements of others
        old, new = {**old, JUDGED: None}, {**new, JUDGED: None}
    for role in dict.fromkeys([*new["inputs"], *old["inputs"]]):
        was, now = old["inputs"].get(role), new["inputs"].get(role)
        if was != now:
            did = "changed" if was and now else "added" if now else "taken out"
            changed.append(f"input {stage.inputs.get(role, role.removeprefix('policy:'))} {did}")
    own = differences(old, new, contents)
    return [_said(phrase) for phrase in own] + list(dict.fromkeys(changed))


def _said(phrase: str) -> str:
    """A difference as a person says it: `train.jsonl changed`, `model config.json changed`."""
    place, of_files, file = phrase.removeprefix("settings.").partition(".content.")
    if of_files:
        return file if re.fullmatch(r"dataset(\.held_out.*)?", place) else f"{place} {file}"
    return place.replace(".content ", " ")
