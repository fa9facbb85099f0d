"""What `plan` says of memory and time: by rule, or measured in a rehearsal."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_recipes import signals
from rlhf_recipes.errors import RlhfRecipesError
from rlhf_recipes.pipeline import runner
from rlhf_recipes.pipeline.data_lint import away
from rlhf_recipes.pipeline.memory import read_cards
from rlhf_recipes.pipeline.plan import Plan, PlannedStage
from rlhf_recipes.screen import Screen
from rlhf_recipes.sources import resolve as sources
from rlhf_recipes.sources.fetch import bring
from rlhf_recipes.stages.session import Session
from rlhf_recipes.store import locks
from rlhf_recipes.text import duration, plain, size, table


def reckoning(
    plan: Plan, stages: Sequence[PlannedStage], session: Session, device: str, measured: bool
) -> str:
    """Of these stages; `device` is the size of a card, "4x24GB" of four, or "" for this machine."""
    cards, given = read_cards(device) if device else (1, None)
    with Screen(Path(os.devnull)) as screen:
        if measured:
            return _measured(plan, stages, screen)
        with screen.quiet():
            try:
                return _by_rule(plan, stages, None if away(plan) else session, given, cards)
            except Exception as error:
                said = str(error).partition("\n")[0]
                return f"no memory by rule: {type(error).__name__}: {plain(said)}"


def _by_rule(
    plan: Plan,
    stages: Sequence[PlannedStage],
    session: Session | None,
    given: float | None,
    cards: int,
) -> str:
    """Without a session, the recipe's limits stand for its rows."""
    from rlhf_recipes.pipeline import fit
    from rlhf_recipes.pipeline.rehearsal import weights, work_of

    recipe, took = plan.recipe, {}
    config = fit.architecture(sources.config_folder(recipe, plan.model))
    room = fit.Room(recipe, config, session, given, fit.judging(plan))
    if cards > 1:
        from rlhf_recipes.pipeline.cards import needs as needs_of_each

        return needs_of_each(room, stages, cards)
    recipe, said = room.settled(stages)
    held = {stage.name: room.need(stage, recipe) for stage in stages}
    if session and room.speed():
        with contextlib.suppress(RlhfRecipesError):  # rows that cannot be used: the lint says why
            for stage in stages:
                count = weights(session.of(stage.name).model_folder)
                amount = work_of(recipe, stage, session.data_of(stage.name))
                took[stage.name] = room.seconds(amount, count) or 0.0
    there = f"by rule{'' if session else ', at the longest rows that the recipe lets in'}"
    there += f"; {room.name} has {size(room.bytes)}"
    shown = "\n".join([needs(held, room.beside, took), "", *said, there])
    if wrong := [stage for stage in stages if not room.holds(held[stage.name])]:
        shown += f"; {wrong[0].name} does not fit: {room.words(wrong)}"
    return shown


def _measured(plan: Plan, stages: Sequence[PlannedStage], screen: Screen) -> str:
    with signals.at_once(), locks.lock(plan.run_folder, f"run {plan.run_folder.name}"):
        bring(plan.recipe, plan.model)
        found = runner.rehearsed(plan, stages, screen)
    return "\n".join([*(took.line() for took in found), "measured, by a rehearsal"])


def needs(
    held: dict[str, Counter[str]], beside: Callable[[Counter[str]], float], took: dict[str, float]
) -> str:
    """A stage a line: the most memory, its time, and what the memory is for, the most first."""
    rows = [["stage", "memory", "time", "of which"]]
    for name, roles in held.items():
        named = [f"{role} {size(count)}" for role, count in roles.most_common() if count > 1e5]
        time = f"about {duration(took[name])}" if name in took else ""
        rows.append([name, size(beside(roles)), time, ", ".join(named)])
    return table(rows, right=(1,))
