"""Whether stages fit the memory there is, by the rule of `footprint`, and what makes them fit."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_recipes import memory, models, rehearsal, show
from rlhf_recipes.errors import MachineError, ModelError, RecipeError
from rlhf_recipes.footprint import Asked, footprint, lengths_of
from rlhf_recipes.plan import Plan, PlannedStage
from rlhf_recipes.progress import Screen, duration
from rlhf_recipes.recipe import Recipe, changed
from rlhf_recipes.shared import Shared
from rlhf_recipes.tables import BEST_OF, EVALUATION, JUDGE
from rlhf_recipes.work import own_data

CONTEXT = 0.7e9  # of a card: what the driver and the libraries take of it
LOOSE = 1.04  # an allocator holds a little more than it hands out
LIBRARIES = 0.4e9  # of a process, that are loaded only as it trains; and what malloc keeps
# oneDNN keeps the code of the last 1,024 products that it made, each length of rows another: in 16
# bit 0.7 to 1 MB each, in 32 bit nothing.
KERNELS = 0.9e9
# Operations a second: of a core, in 16 bit and in 32; of a card's unit at a clock's tick, by its
# generation; and the share of a card's that training sees.
CORE, CORE_32, TICK, SHARE = 1.7e11, 6e10, {7: 1024, 8: 1024, 9: 4096}, 0.3


class Room:
    """The memory that there is: of this machine's device, or of one that is named."""

    def __init__(self, recipe: Recipe, given: float | None = None) -> None:
        self.card = given is not None or torch.cuda.is_available()
        self.here = given is None
        self.wide = models.compute_dtype(recipe.model.dtype) == torch.float32
        if given is not None:
            self.bytes, self.name = given - CONTEXT, f"a card with {show.size(given)}"
        elif self.card:
            self.bytes, self.name = torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
        else:
            self.held = memory.now()
            self.bytes, self.name = self.held + memory.free(), "this machine"

    def holds(self, need: Counter[str]) -> bool:
        return self.beside(need) <= self.bytes

    def beside(self, need: Counter[str]) -> float:
        """Bytes of a stage's tensors, with what comes on top of them."""
        if self.card:
            return need.total() * LOOSE
        return need.total() + self.held + LIBRARIES + (0.0 if self.wide else KERNELS)

    def speed(self) -> float | None:
        """Operations a second in training, roughly; None of a card that is not here."""
        if not self.card:
            slow = self.wide or not torch.cpu._is_avx512_bf16_supported()
            return (CORE_32 if slow else CORE) * (os.cpu_count() or 1)
        if not self.here:
            return None
        card = torch.cuda.get_device_properties(0)
        ticks = getattr(card, "clock_rate", 1_700_000) * 1e3
        return card.multi_processor_count * ticks * TICK.get(card.major, 4096) * SHARE


def architecture(folder: Path) -> Any:
    """What config.json says of a model. Raises ModelError where it does not say enough."""
    config = models.load_config(folder)
    if not config.architectures:
        raise ModelError("config.json names no architecture", "see that its folder is whole")
    return config


def needs(
    recipe: Recipe, stages: Sequence[PlannedStage], config: Any, shared: Shared | None, card: bool
) -> dict[str, Counter[str]]:
    """The bytes that each stage's tensors take when they are most, by role.

    Where there are no rows yet, or nothing is `shared`, the recipe's limits stand for them.
    """
    return {stage.name: _need(recipe, stage, config, shared, card) for stage in stages}


def _need(
    recipe: Recipe, stage: PlannedStage, config: Any, shared: Shared | None, card: bool
) -> Counter[str]:
    data = None
    with contextlib.suppress(Exception):  # whatever it is, the stage says it better
        data = shared and shared.data(own_data(recipe, stage))
    most = lengths_of(recipe, stage.kind, data)
    asked = Asked(recipe, stage.name, stage.kind, frozenset(stage.inputs), most, card)
    return footprint(asked, config)


def ahead(
    plan: Plan,
    pending: Sequence[PlannedStage],
    shared: Shared,
    screen: Screen,
    failing: rehearsal.Failing,
    held: dict[str, Counter[str]],
) -> None:
    """Of stages that are to run: refuse what does not fit, and rehearse them, unless all is short.

    What they need goes into `held`, by stage.
    """
    whole, part = rehearsal.cost(plan, pending, shared, failing)
    _positions(plan.recipe, pending, shared, failing)
    if whole < rehearsal.SHORT:
        return
    refuse(plan, pending, shared, screen, failing, held)
    if part > rehearsal.SHARE * whole:
        return
    screen.line("Rehearsal · a step of each stage, on its longest rows", "bold")
    seconds = 0.0
    for took in rehearsal.rehearse(plan, pending, shared, failing):
        seconds += took.seconds
        screen.line(f"  {show.rehearsed(took)}")
    screen.line(f"  in all about {duration(seconds)}")


def _positions(
    recipe: Recipe,
    pending: Sequence[PlannedStage],
    shared: Shared,
    failing: rehearsal.Failing,
) -> None:
    """Raise ModelError where a stage's longest sequence is longer than the model was made for."""
    config = models.load_config(shared.model_folder, recipe.model.trust_remote_code)
    there = getattr(config.get_text_config(), "max_position_embeddings", None)
    for stage in pending:
        most = lengths_of(recipe, stage.kind, shared.data(own_data(recipe, stage)))
        longest = most.row
        if stage.kind in ("ppo", EVALUATION, BEST_OF):
            own = stage.kind == "ppo" and recipe.table(stage.name).options["response_length"]
            longest = most.prompt + (own or most.answer)
        if there and longest > there:
            with failing(stage):
                message = f"its longest sequence has {longest} tokens, the model {there} positions"
                hint = "lower dataset.max_prompt_tokens, max_answer_tokens, or response_length"
                raise ModelError(message, hint)


def refuse(
    plan: Plan,
    pending: Sequence[PlannedStage],
    shared: Shared,
    screen: Screen,
    failing: rehearsal.Failing,
    held: dict[str, Counter[str]],
) -> None:
    """What does not fit by the rule is not begun; a model that the rule cannot read is."""
    room = Room(plan.recipe)
    try:
        config = architecture(shared.model_folder)
        held |= needs(plan.recipe, pending, config, shared, room.card)
    except Exception:
        screen.log_traceback()
        return
    wrong = [stage for stage in pending if not room.holds(held[stage.name])]
    if not wrong:
        return
    need = held[wrong[0].name]
    role, most = need.most_common(1)[0]
    whole, there = show.size(room.beside(need)), f"{room.name} has {show.size(room.bytes)}"
    message = f"stage {wrong[0].name} needs {whole}, most of it for {role} ({show.size(most)})"
    smaller = words(plan.recipe, wrong, config, shared, room)
    with failing(wrong[0]):
        hint = f"add {smaller}; --no-rehearsal tries it all the same"
        raise MachineError(f"{message}: {there}", hint)


def words(
    recipe: Recipe, stages: Sequence[PlannedStage], config: Any, shared: Shared | None, room: Room
) -> str:
    """`--set` words with which these stages fit, the least harmful that help; else what is left."""
    said: list[str] = []
    for stage in stages:
        need = _need(recipe, stage, config, shared, room.card)
        for change in _changes(recipe, stage):
            if room.holds(need):
                break
            try:
                other = changed(recipe, change)
            except RecipeError:  # two keys that do not go together
                continue
            less = _need(other, stage, config, shared, room.card)
            if less.total() < 0.99 * need.total():
                recipe, need = other, less
                said += change
        if not room.holds(need):
            return "a smaller model: no setting makes this one fit"
    last = {word.partition("=")[0]: word for word in said}
    return " ".join(f"--set {word}" for word in last.values())


def _changes(recipe: Recipe, stage: PlannedStage) -> Iterator[list[str]]:
    """What may help, the least harmful first: the same result, then slower, then another result."""
    name = stage.name
    if name == JUDGE:  # its settings are the last reward stage's
        name = [s for s in recipe.stages if recipe.table(s).kind == "reward"][-1]
    if name in recipe.tables:
        options = recipe.tables[name].options
        rows, micros = (
            options[f"{key}"]
            for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
        )
        for part in [n for n in range(2, rows + 1) if rows % n == 0]:
            yield [
                f"{name}.per_device_train_batch_size={rows // part}",
                f"{name}.gradient_accumulation_steps={micros * part}",
            ]
        if not options["gradient_checkpointing"]:
            yield [f"{name}.gradient_checkpointing=true"]
        for key in ("local_rollout_forward_batch_size", "per_device_eval_batch_size"):
            count = options.get(key) or 1
            while count > 1:
                count //= 2
                yield [f"{name}.{key}={count}"]
    if recipe.model.quantization == "none" and recipe.lora is not None:
        yield ["model.quantization=4bit"]
    if stage.name == "evaluation":
        for count in (32, 16, 8, 4):
            if count < recipe.evaluation.prompts:
                yield [f"evaluation.prompts={count}"]
    for divisor in (2, 4):
        for key in ("max_prompt_tokens", "max_answer_tokens"):
            yield [f"dataset.{key}={max(1, getattr(recipe.dataset, key) // divisor)}"]
