"""What `plan` says of memory and time: by rule, or measured in a rehearsal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from rlhf_recipes import rundir, runner, show, sources, stopping
from rlhf_recipes.errors import RlhfRecipesError
from rlhf_recipes.fetch import bring
from rlhf_recipes.lint import away
from rlhf_recipes.memory import read_size
from rlhf_recipes.plan import Plan, PlannedStage
from rlhf_recipes.progress import Screen, plain
from rlhf_recipes.shared import Shared


def reckoning(
    plan: Plan, stages: Sequence[PlannedStage], shared: Shared, device: str, measured: bool
) -> str:
    """Of these stages; `device` is the size of a card, or "" for this machine."""
    size = read_size(device) if device else None
    with Screen(Path(os.devnull)) as screen:
        if measured:
            return _measured(plan, stages, screen)
        with screen.quiet():
            try:
                return _by_rule(plan, stages, None if away(plan) else shared, size)
            except Exception as error:
                said = str(error).partition("\n")[0]
                return f"no memory by rule: {type(error).__name__}: {plain(said)}"


def _by_rule(
    plan: Plan, stages: Sequence[PlannedStage], shared: Shared | None, given: float | None
) -> str:
    """Where nothing is `shared`, the recipe's limits stand for its rows."""
    from rlhf_recipes import fit
    from rlhf_recipes.rehearsal import weights
    from rlhf_recipes.work import own_data, work

    recipe, took = plan.recipe, {}
    config = fit.architecture(sources.config_folder(recipe, plan.model))
    room = fit.Room(recipe, config, shared, given)
    held = {stage.name: room.need(stage) for stage in stages}
    if shared and (speed := room.speed()):
        count = weights(shared.model_folder)
        with contextlib.suppress(RlhfRecipesError):  # rows that cannot be used: the lint says why
            for stage in stages:
                amount = work(recipe, stage, shared.data(own_data(recipe, stage)))
                took[stage.name] = amount.total * count / speed
    there = f"by rule{'' if shared else ', at the longest rows that the recipe lets in'}"
    there += f"; {room.name} has {show.size(room.bytes)}"
    shown = f"{show.needs(held, room.beside, took)}\n\n{there}"
    if wrong := [stage for stage in stages if not room.holds(held[stage.name])]:
        shown += f"; {wrong[0].name} does not fit: {room.words(wrong)}"
    return shown


def _measured(plan: Plan, stages: Sequence[PlannedStage], screen: Screen) -> str:
    name = f"run {plan.run_folder.name}"
    with stopping.at_once(), rundir.lock(plan.run_folder, name):
        bring(plan.recipe, plan.model)
        found = runner.rehearsed(plan, stages, screen)
    return "\n".join([*map(show.rehearsed, found), "measured, by a rehearsal"])
