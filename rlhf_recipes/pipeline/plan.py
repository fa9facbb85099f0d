"""Recipe → planned stages, in order: each with its key, its folder, and why it runs or does not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_recipes.errors import UsageError
from rlhf_recipes.recipe.load import Recipe, identity_settings
from rlhf_recipes.recipe.tables import (
    BEST_OF,
    EVALUATION,
    INDEPENDENT,
    JUDGE,
    POLICY_KINDS,
    ROLES,
    SHARED_DATA_KEYS,
    DatasetTable,
    located,
    python_judge,
)
from rlhf_recipes.sources import resolve as sources
from rlhf_recipes.stages import contract
from rlhf_recipes.stages.contract import KINDS, StageResult
from rlhf_recipes.stages.session import Shared
from rlhf_recipes.store import layout
from rlhf_recipes.store.fingerprint import difference, digest
from rlhf_recipes.store.history import read_manifest

# Stages of one name in two recipes need not be akin: past so many differences, it is just new.
MOST_DIFFERENCES = 4
SHOWN_DIFFERENCES = 3


@dataclass(frozen=True)
class PlannedStage:
    name: str
    kind: str
    index: int  # from 0
    key: str  # 64 hex digits: the digest of `payload`
    folder: Path  # <runs>/.stages/<kind>-<key12>
    payload: dict[str, Any]  # what determines the result
    inputs: dict[str, str]  # role -> the stage that serves it
    reasons: tuple[str, ...]  # "learning_rate 1e-05 → 2e-05", "input sft changed", "new", …
    done: bool

    @property
    def reason(self) -> str:
        """The first reasons, for a line."""
        more = len(self.reasons) - SHOWN_DIFFERENCES
        shown = self.reasons[:SHOWN_DIFFERENCES] + ((f"{more} more",) if more > 0 else ())
        return ", ".join(shown)

    def run(
        self, shared: Shared, folder: Path, outputs: Mapping[str, Path], progress: Any
    ) -> StageResult:
        """Do its work in `folder`, from the outputs of the stages that it needs."""
        inputs = {role: outputs[source] for role, source in self.inputs.items()}
        words = (self.name, self.kind, shared.recipe, folder, inputs, progress, shared, self.key)
        return contract.load(self.kind)(contract.StageContext(*words))


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    model: dict[str, str]  # what the base model is, and by that where it comes from
    runs: Path
    run_folder: Path
    stages: tuple[PlannedStage, ...]

    @property
    def outputs(self) -> dict[str, Path]:
        return {stage.name: stage.folder / "output" for stage in self.stages}

    @property
    def mirrored(self) -> str | None:
        """Where the base model comes from, if it is not from where the recipe's name says."""
        if "mirror" not in self.model:
            return None
        mirror = self.recipe.model.mirror
        return f"{self.recipe.model.name}, from its mirror: {mirror.file} in {mirror.wheel} (PyPI)"


def make_plan(recipe: Recipe, runs: Path, *, name: str | None = None, fresh: bool = False) -> Plan:
    """Plan every stage of the recipe; `fresh` takes none as done.

    Reads the model's and the data's files for their digests. Raises UsageError for a run name that
    is no folder name, DataError and ModelError where a source is not to be had.
    """
    run_folder = runs / run_name(recipe, name)
    model = sources.identify_base(recipe, runs)
    model |= {"dtype": recipe.model.dtype, "quantization": recipe.model.quantization}
    if recipe.model.chat_template != "own":
        model["chat_template"] = recipe.model.chat_template
    if recipe.model.trust_remote_code:
        model["trust_remote_code"] = True
    stages: dict[str, PlannedStage] = {}
    for index, (stage, kind, roles, settings, dataset) in enumerate(_wiring(recipe, runs)):
        inputs = {role: source for role, source in roles.items() if source in stages}
        foreign = {
            role: sources.identify_model(source, recipe, runs)
            for role, source in roles.items()
            if source not in stages
        }
        payload = {
            "kind": kind,
            "name": stage,  # its randomness is a function of the seed and of this
            "version": KINDS[kind][1],
            "settings": settings,
            "model": model,
            "lora": recipe.lora,
            "dataset": _stage_data(dataset, recipe.dataset, kind, runs),
            "seed": recipe.seed,
            "inputs": {role: stages[source].key for role, source in inputs.items()},
            **foreign,
        }
        key = digest(payload)
        folder = layout.stage_folder(runs, kind, key)
        done = not fresh and (layout.read_record(folder) or {}).get("key") == key
        if done or fresh:
            reasons = ["cached" if done else "computed afresh"]
        else:
            reasons = _reasons(stage, folder, payload, inputs, run_folder)
        stages[stage] = PlannedStage(
            stage, kind, index, key, folder, payload, inputs, tuple(reasons), done
        )
    return Plan(recipe, model, runs, run_folder, tuple(stages.values()))


def run_name(recipe: Recipe, name: str | None) -> str:
    if name is None:
        name = recipe.path.stem
        if recipe.overrides:
            name += f"-{digest(sorted(recipe.overrides))[:6]}"
    if not name or name != Path(name).name or name.startswith(".") or not name.isprintable():
        raise UsageError(f"{name!r} is no name for a run", "pass --name with a plain folder name")
    return name


# A stage's name and kind, what serves each of its roles (a stage, or a foreign model), the settings
# that determine its result, and its data.
Wired = tuple[str, str, dict[str, str], dict[str, Any], DatasetTable]


def _wiring(recipe: Recipe, runs: Path) -> Iterator[Wired]:
    """The recipe's stages, and those that [evaluation] asks for."""
    policies: dict[str, str] = {}
    scorer: dict[str, str] = {}  # the evaluation's reward model: what was optimised last
    for stage in recipe.stages:
        table = recipe.table(stage)
        roles = {role: getattr(table, role) for role in ROLES if getattr(table, role)}
        settings = identity_settings(recipe, stage)
        yield stage, table.kind, roles, settings, table.dataset or recipe.dataset
        if table.kind in POLICY_KINDS:
            policies[f"policy:{stage}"] = stage
            scorer = {"reward_model": roles["reward_model"]} if "reward_model" in roles else scorer
        elif not scorer:
            scorer = {"reward_model": stage}
    asked = recipe.evaluation
    if asked is None:
        return
    settings, judges = {"prompts": asked.prompts}, {}
    for role, judge in asked.judges.items():
        if function := python_judge(judge):
            content = sources.content_digest(located(function[0], recipe.model.base), runs)
            settings[role] = {"function": function[1], "content": content}
        else:
            judges[role] = JUDGE if judge == INDEPENDENT else judge
    if JUDGE in recipe.tables:
        own = recipe.table(JUDGE).dataset or recipe.dataset
        yield JUDGE, JUDGE, {}, identity_settings(recipe, JUDGE), own
    draws = {"response_length": asked.response_length, "temperature": asked.temperature}
    roles = policies | scorer | judges
    yield EVALUATION, EVALUATION, roles, settings | draws, recipe.dataset
    if asked.best_of:
        ppo = [table for name in recipe.stages if (table := recipe.table(name)).kind == "ppo"][-1]
        draws = {key: value or ppo.options[key] for key, value in draws.items()}
        draws |= {"n": asked.best_of, "missing_eos_penalty": ppo.options["missing_eos_penalty"]}
        roles = ({"policy": ppo.policy} if ppo.policy else {}) | scorer | judges
        yield BEST_OF, BEST_OF, roles, settings | draws, recipe.dataset


def _stage_data(table: DatasetTable, whole: DatasetTable, kind: str, runs: Path) -> dict[str, Any]:
    """A stage's rows; of its own dataset, less the prompts of the recipe's test splits."""
    found = _data(table, kind, runs)
    if table != whole:
        tests = [_test_of(one) for one in (whole, *whole.more) if one.test_split]
        if tests:
            found["held_out"] = [_data(test, kind, runs) for test in tests]
    return found


def _test_of(table: DatasetTable) -> DatasetTable:
    """What has a say in the prompts of a table's test split."""
    files, idle = table.data_files, dict.fromkeys(SHARED_DATA_KEYS, 0.0)
    if isinstance(files, dict) and table.test_split in files:
        files = {table.test_split: files[table.test_split]}
    return replace(table, data_files=files, split=None, max_rows=None, more=(), **idle)


def _data(table: DatasetTable, kind: str, runs: Path) -> dict[str, Any]:
    """The identity of a stage's rows: their files, and the settings that choose among them."""
    settings = asdict(table) | {"more": [_data(other, kind, runs) for other in table.more]}
    for place in ("path", "revision", "base"):
        del settings[place]  # the source's identity stands for them
    for later in ("columns", "weight", "more"):
        if not settings[later]:
            del settings[later]  # unset, it determines nothing
    if kind not in ("reward", "dpo", JUDGE):
        del settings["judge_fraction"]  # so that asking for the judge later redoes no SFT
    return sources.identify_dataset(table, runs) | settings


# ---- why ----------------------------------------------------------------------------------------


def _reasons(
    stage: str, folder: Path, payload: dict[str, Any], inputs: dict[str, str], run_folder: Path
) -> list[str]:
    """What differs from this stage of this run before, else from its nearest kin in any run."""
    work = folder / "work"
    if work.exists():
        steps = [layout.step_of(path) for path in work.glob(layout.CHECKPOINTS)]
        kept = f", has a checkpoint of step {max(steps)}" if steps else ""
        return [f"was not finished{kept}"]
    before = _last_of_run(stage, run_folder)
    if before is None:
        kin = [
            record["payload"]
            for path in folder.parent.glob(f"{payload['kind']}-*")
            if (record := layout.read_record(path)) is not None and record["name"] == stage
        ]
        before = min(kin, key=lambda one: len(_differences(one, payload, inputs)), default=None)
        if before is None or len(_differences(before, payload, inputs)) > MOST_DIFFERENCES:
            return ["new"]
    contents = sources.remembered(run_folder.parent)["contents"]
    return _differences(before, payload, inputs, contents) or ["new"]


def _last_of_run(stage: str, run_folder: Path) -> dict[str, Any] | None:
    """The payload that this stage of this run finished with last."""
    for entry in (read_manifest(run_folder) or {"stages": []})["stages"]:
        if entry["name"] == stage:
            record = layout.read_record(layout.entry_folder(run_folder.parent, entry))
            return record and record["payload"]
    return None


def _differences(
    old: dict[str, Any],
    new: dict[str, Any],
    inputs: dict[str, str],
    contents: Mapping[str, dict[str, str]] | None = None,
) -> list[str]:
    own = difference({**old, "inputs": None}, {**new, "inputs": None}, contents=contents)
    changed = []
    for role in dict.fromkeys([*new["inputs"], *old["inputs"]]):
        was, now = old["inputs"].get(role), new["inputs"].get(role)
        if was != now:
            did = "changed" if was and now else "added" if now else "taken out"
            changed.append(f"input {inputs.get(role, role.removeprefix('policy:'))} {did}")
    return [_said(phrase) for phrase in own] + list(dict.fromkeys(changed))


def _said(phrase: str) -> str:
    """A difference as a person says it: `train.jsonl changed`, `model config.json changed`."""
    place, of_files, file = phrase.removeprefix("settings.").partition(".content.")
    if of_files:
        return file if re.fullmatch(r"dataset(\.held_out.*)?", place) else f"{place} {file}"
    return place.replace(".content ", " ")
