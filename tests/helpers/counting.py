"""Stages that only count, on a model and data of a few bytes: what the runner is tested with.

In process: `Counting(monkeypatch)`. As a command of its own: `python counting.py run toy.toml`,
where COUNTING says what goes wrong ("fail:reward", "hang:ppo", "noise:sft"), or "steady".
"""

from __future__ import annotations

import logging
import os
import sys
import time
import types
import warnings
from pathlib import Path
from typing import Any

from rlhf_recipes import signals
from rlhf_recipes.errors import DataError, GateError
from rlhf_recipes.pipeline import runner
from rlhf_recipes.stages import contract
from rlhf_recipes.store import layout
from rlhf_recipes.store.digests import digest

STEPS = 3

RECIPE = """\
# a toy
title = "Toy"
stages = ["sft", "reward", "ppo"]

[model]
name = "./model"

[dataset]
path = "./pairs.jsonl"

[sft]
learning_rate = 1e-3

[reward]
learning_rate = 1e-5

[ppo]
total_episodes = 64
response_length = 16

[evaluation]
prompts = 8
"""


def toy(folder: Path, name: str = "toy", text: str = RECIPE) -> Path:
    """A recipe with its model and data beside it."""
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    (folder / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    file = folder / f"{name}.toml"
    file.write_text(text)
    return file


class Counting:
    """Stands in for every stage and for the export; `ran` lists the stages that were computed."""

    def __init__(self, patch: Any) -> None:
        self.ran: list[str] = []
        self.exported: list[str] = []
        self.fault: dict[str, Any] = {}  # stage -> called with its context
        patch.setattr(contract, "module_of", lambda kind: types.SimpleNamespace(run=self.stage))
        patch.setattr(runner._Run, "_rehearse", lambda *_: None)
        patch.setattr(runner.doctor, "short", lambda runs: [])  # it asks torch
        export = types.ModuleType("rlhf_recipes.pipeline.export")
        export.write_model = self.write_model
        patch.setitem(sys.modules, "rlhf_recipes.pipeline.export", export)

    def stage(self, context: contract.StageContext) -> contract.StageResult:
        self.ran.append(context.name)
        for role, output in context.inputs.items():
            assert (output / "weights").is_file(), f"{role} of {context.name}"
        (context.folder / "output" / "weights").write_text(f"{context.name} {len(self.ran)}")
        if context.name in self.fault:
            self.fault[context.name](context)
        context.progress.update(1, 2, loss=0.5, score=1.25)
        context.progress.sample("Where is Paris?", "In France.", score=1.5)
        context.progress.update(2, 2, loss=0.25, score=1.5)
        metrics = {"loss": 0.25, "steps": 2}
        if context.kind == "evaluation":
            metrics = {"ppo.win_rate": 0.75, "prompts": 8}
        return contract.StageResult(metrics, "loss 0.50 → 0.25")

    def write_model(self, session: Any, output: Path, folder: Path, *, form: str) -> None:
        assert form == "merged"
        self.exported.append(output.parent.name.partition("-")[0])
        folder.mkdir()
        (folder / "model.safetensors").write_text((output / "weights").read_text())


def steady(context: contract.StageContext) -> contract.StageResult:
    """A stage whose output follows from its inputs alone: STEPS steps, each of which it saves.

    Beside the recipe, each step is a line in `steps`, and none ends while there is a file `hold`.
    """
    from rlhf_recipes.stages import checkpoints

    work, output = context.folder / "work", context.folder / "output"
    read = [(source / "weights").read_text() for source in context.inputs.values()]
    start = digest([context.name, *read])
    kept = checkpoints.newest(work, start, context.progress.note)
    step = layout.step_of(kept) if kept else 0
    weights = (kept / "weights").read_text() if kept else start
    context.progress.resume(step)
    beside = context.recipe.path.parent
    with signals.deferred():
        while step < STEPS and not signals.requested():
            step, weights = step + 1, digest([weights])
            with (beside / "steps").open("a") as counted:
                counted.write(f"{context.name} {step}\n")
            while (beside / "hold").exists():
                time.sleep(0.01)
            context.progress.update(step, STEPS, loss=1 / step)
            with checkpoints.written(work, step, start, keep=2) as aside:
                (aside / "weights").write_text(weights)
    (output / "weights").write_text(weights)
    (output / "more").mkdir()
    (output / "more" / "weights").write_text(weights[::-1])
    metrics = {"loss": 1 / STEPS, "sum": int(weights[:8], 16)}
    return contract.StageResult(metrics, f"{STEPS} steps")


class _Patch:
    """What of pytest's monkeypatch is used above, for a process of its own."""

    def setattr(self, target: Any, name: str, value: Any) -> None:
        setattr(target, name, value)

    def setitem(self, target: Any, name: str, value: Any) -> None:
        target[name] = value


def noise(context: contract.StageContext) -> None:
    print("printed by a library")
    print("complained by a library", file=sys.stderr)
    os.system("echo echoed from C >&2")
    warnings.warn("warned by a library", stacklevel=1)
    logging.getLogger("transformers").warning("logged by a library")
    logging.getLogger("rlhf_recipes.stages").info("logged by us")


def hang(context: contract.StageContext) -> None:
    Path("hanging").write_text("")
    time.sleep(60)


def fail(context: contract.StageContext) -> None:
    raise ValueError("the loss is NaN\nand more of the same")


def refuse(context: contract.StageContext) -> None:
    raise DataError("no rows on the train side", "lower test_fraction")


def gate(context: contract.StageContext) -> None:
    raise GateError("it ranks 50.0% right", "try more pairs")


def main() -> None:
    counting = Counting(_Patch())
    fault, _, stage = os.environ.get("COUNTING", "").partition(":")
    if fault == "steady":
        contract.module_of = lambda kind: types.SimpleNamespace(run=steady)
    elif fault:
        counting.fault[stage] = globals()[fault]
    from rlhf_recipes.cli import main as command

    command()


if __name__ == "__main__":
    main()
