"""What stages need of memory, by rule; whether they fit the memory there is, and what makes them.

By rule: a stage's step on tensors that have a shape and no content. The roles are those of the
stage and the passes are its own (`memory` in the stage's module), on a model built from
`config.json`. Every live tensor counts, under its purpose, and the moment with the most bytes is
the answer. The step runs on a few of the model's layers, twice: each further layer adds as much as
the last one did.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rlhf_recipes.data.dataset import Data
from rlhf_recipes.data.rows import sequences
from rlhf_recipes.errors import MachineError, ModelError, RecipeError
from rlhf_recipes.models import load as models
from rlhf_recipes.models.fake_model import Held, Lengths, Sim
from rlhf_recipes.pipeline import memory, rehearsal
from rlhf_recipes.pipeline.plan import Plan, PlannedStage
from rlhf_recipes.pipeline.rehearsal import Ahead
from rlhf_recipes.recipe.kinds import EVALUATION, JUDGE
from rlhf_recipes.recipe.load import Recipe, changed
from rlhf_recipes.recipe.toml import parse
from rlhf_recipes.screen import Screen
from rlhf_recipes.sources.resolve import config_folder
from rlhf_recipes.stages.answers import scoring_memory
from rlhf_recipes.stages.contract import Work, module_of
from rlhf_recipes.stages.ppo.stage import VALIDATION_PROMPTS
from rlhf_recipes.stages.session import Session
from rlhf_recipes.text import duration, size

KNOWN = "not repeated: the same layout was rehearsed on this machine, with these figures"
SHALLOW, DEEP = 2, 4  # layers
CONTEXT = 0.7e9  # of a card: what the driver and the libraries take of it
ROOMY = 0.7  # of the memory there is, that a stage may need for what only makes it faster
CHECKPOINTS = "gradient_checkpointing"
LOOSE = 1.04  # an allocator holds a little more than it hands out
LIBRARIES = 0.4e9  # of a process, that are loaded only as it trains; and what malloc keeps
# oneDNN keeps the code of the last 1,024 products that it made, each length of rows another: in 16
# bit 0.7 to 1 MB each, in 32 bit nothing.
KERNELS = 0.9e9
# Operations a second: of a core, in 16 bit and in 32; of a card's unit at a clock's tick, by its
# generation; and the share of a card's that training sees.
CORE, CORE_32, TICK, SHARE = 1.7e11, 6e10, {7: 1024, 8: 1024, 9: 4096}, 0.3

# Sampling is bound by launches: on an H200 71, 48 and 55 ms a step for 16, 64 and 256 rows of a
# 1.5B model with 28 layers and LoRA unmerged (benchmarks/results/gpu.json; LOG.md, 2026-11-27).
LAUNCHES = 2e-3  # seconds a layer
COPY = 0.85  # of a card's nominal bandwidth, that a copy has: 4.17 of 4.9 TB/s on the H200


def lengths_of(recipe: Recipe, stage: PlannedStage, data: Data | None) -> Lengths:
    """Of a stage's longest rows; without any, of the longest that the recipe lets in."""
    prompt, answer = recipe.dataset.max_prompt_tokens, recipe.dataset.max_answer_tokens
    kind, row, looked_at = recipe.kind(stage.name), prompt + answer, VALIDATION_PROMPTS
    if data and (found := data.learned(kind.learns_from)):
        prompt = max(example.count("prompt_ids") for example in found)
        answer = max(example.count("chosen_ids") for example in found)
        row = max(max(sequences(example, kind.learns_from)) for example in found)
        looked_at = min(VALIDATION_PROMPTS, len(data.validation))
    if kind.samples:
        answer = module_of(stage.kind).answer_length(recipe, stage.name)
        row = prompt + answer
    return Lengths(prompt, row, answer, looked_at)


Parts = Callable[[Sim], Iterator[Held]]


def footprint(sim: Sim, parts: Parts | None = None) -> Held:
    """The bytes that a stage needs when it needs most, by role; without those of the libraries.

    Of some `parts` of it, else of all.
    """
    parts = parts or module_of(sim.recipe.kind(sim.name).name).memory
    layers = sim.config.get_text_config().num_hidden_layers
    if layers <= DEEP:
        phases = _phases(sim, layers, parts)
    else:
        few, more = (_phases(sim, n, parts) for n in (SHALLOW, DEEP))
        phases = [
            Counter({r: m[r] + (m[r] - f[r]) * (layers - DEEP) / (DEEP - SHALLOW) for r in m})
            for f, m in zip(few, more, strict=True)
        ]
    most = max(phases, key=Counter.total)
    return Counter({role: round(count) for role, count in most.items() if count > 0})


def _phases(sim: Sim, layers: int, parts: Parts) -> list[Held]:
    """The most of each part of the stage, on a model of so many layers."""
    config = copy.deepcopy(sim.config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return list(parts(replace(sim, config=config)))


class Room:
    """The memory that there is, of this machine's device or of one that is named; what needs it.

    Where there are no rows yet, or no session, the recipe's limits stand for them. `judge` is the
    config of the judge's base where it has one of its own.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: Any,
        session: Session | None,
        given: float | None = None,
        judge: Any = None,
    ) -> None:
        self.recipe, self.config, self.session, self.judge = recipe, config, session, judge
        self.card = given is not None or torch.cuda.is_available()
        self.here = given is None
        self.wide = models.compute_dtype(recipe.model.dtype) == torch.float32
        if given is not None:
            self.bytes, self.name = max(0.0, given - CONTEXT), f"a card with {size(given)}"
        elif self.card:
            self.bytes, self.name = torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
        else:
            self.held = memory.now()
            self.bytes, self.name = self.held + memory.free(), "this machine"

    def need(self, stage: PlannedStage, recipe: Recipe | None = None) -> Counter[str]:
        """The bytes that a stage's tensors take when they are most, by role."""
        recipe, data = recipe or self.recipe, None
        with contextlib.suppress(Exception):  # whatever it is, the stage says it better
            data = self.session and self.session.data_of(stage.name)
        most = lengths_of(recipe, stage, data)
        role = "reward_model"
        table = recipe.tables.get(stage.name)
        foreign = bool(table and table.reward_model) and role not in stage.inputs
        sim = Sim(recipe, stage.name, foreign, most, self.card, self.config)
        if self.judge is None or JUDGE not in (stage.name, stage.inputs.get(JUDGE)):
            return footprint(sim)
        judging = replace(sim, config=self.judge)
        if stage.name == JUDGE:
            return footprint(judging)
        # Each in turn: the policy's base is let go of before the judge's is read.
        return max(footprint(sim), footprint(judging, scoring_memory), key=Counter.total)

    def holds(self, need: Counter[str]) -> bool:
        return self.beside(need) <= self.bytes

    def settled(self, stages: Sequence[PlannedStage]) -> tuple[Recipe, list[str]]:
        """The recipe with what it leaves to the memory there is, and a line for each choice.

        Where ROOMY of the memory is enough, on a card a policy that learns is sampled from a merged
        copy, and a stage keeps its activations. What a recipe says itself stays.
        """
        recipe, said, written = self.recipe, list[str](), parse(self.recipe.text)
        roomy = [stage for stage in stages if recipe.kind(stage.name).explores]
        if self.card and recipe.model.sampler == "auto" and roomy:
            other = replace(recipe, model=replace(recipe.model, sampler="merged"))
            if all(self._is_roomy(stage, other) for stage in roomy):
                recipe = other
                said.append('answers come from a merged copy (model.sampler = "adapters": none)')
        for stage in stages:
            name, table = stage.name, recipe.tables.get(stage.name)
            own = written.get(recipe.written_as(name))
            if not table or not table.options.get(CHECKPOINTS) or CHECKPOINTS in (own or {}):
                continue
            less = replace(table, options=table.options | {CHECKPOINTS: False})
            other = replace(recipe, tables=recipe.tables | {name: less})
            if self._is_roomy(stage, other):
                recipe = other
                said.append(f"{name} keeps its activations: {CHECKPOINTS} = false")
        return recipe, said

    def _is_roomy(self, stage: PlannedStage, recipe: Recipe) -> bool:
        return self.beside(self.need(stage, recipe)) <= ROOMY * self.bytes

    def beside(self, need: Counter[str]) -> float:
        """Bytes of a stage's tensors, with what comes on top of them."""
        if self.card:
            return need.total() * LOOSE
        return need.total() + self.held + LIBRARIES + (0.0 if self.wide else KERNELS)

    def words(self, stages: Sequence[PlannedStage]) -> str:
        """`--set` words with which they fit; else what is left."""
        changes = self.changes(stages)
        if changes is None:
            return "a smaller model: no setting makes this one fit"
        return " ".join(f"--set {key}={value}" for key, value in changes.items())

    def changes(self, stages: Sequence[PlannedStage]) -> dict[str, Any] | None:
        """Settings with which they fit, the least harmful that help; None where none do."""
        recipe, said = self.recipe, dict[str, Any]()
        for stage in stages:
            need = self.need(stage, recipe)
            for change in _changes(recipe, stage):
                if self.holds(need):
                    break
                try:
                    other = changed(recipe, [f"{key}={value}" for key, value in change.items()])
                except RecipeError:  # two keys that do not go together
                    continue
                less = self.need(stage, other)
                if less.total() < 0.99 * need.total():
                    recipe, need = other, less
                    said |= change
            if not self.holds(need):
                return None
        return said

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

    def seconds(self, work: Work, weights: float) -> float | None:
        """What the work takes, roughly; None of a card that is not here.

        On a card each token that is sampled costs a pass: its launches, and the weights read once.
        """
        if (speed := self.speed()) is None:
            return None
        token = 0.0
        if self.card:
            card = torch.cuda.get_device_properties(0)
            clock, bits = (
                getattr(card, name, usual)  # else those of an RTX 3090
                for name, usual in (("memory_clock_rate", 9_751_000), ("memory_bus_width", 384))
            )
            bandwidth = COPY * 2 * clock * 1e3 * bits / 8
            layers = self.config.get_text_config().num_hidden_layers
            token = LAUNCHES * layers + 2 * weights / bandwidth
        return work.total * weights / speed + work.tokens * token


def judging(plan: Plan) -> Any:
    """The config of the judge's own base; None where it has none."""
    model = plan.recipe.model_of(JUDGE)
    if model is plan.recipe.model:
        return None
    [stage] = [stage for stage in plan.stages if stage.name == JUDGE]
    return architecture(config_folder(replace(plan.recipe, model=model), stage.payload["model"]))


def architecture(folder: Path) -> Any:
    """What config.json says of a model. Raises ModelError where it does not say enough."""
    config = models.load_config(folder)
    if not config.architectures:
        raise ModelError("config.json names no architecture", "see that its folder is whole")
    return config


def check(ahead: Ahead, screen: Screen, resumed: bool = False) -> None:
    """Refuse stages that do not fit, and rehearse them, unless all is short.

    What they need goes into `ahead.needs`, and the session gets the recipe as `Room.settled` has
    it. Where a stage is `resumed`, that is all.
    """
    ahead.session.check_foreign()
    whole, part = rehearsal.cost(ahead)
    _positions(ahead)
    if whole < rehearsal.SHORT:
        return
    refuse(ahead, screen, resumed)
    if resumed or part > rehearsal.SHARE * whole:
        return
    known, seconds = rehearsal.remembered(ahead), 0.0
    what = "a step of each stage, on its longest rows" if known is None else KNOWN
    screen.line(f"Rehearsal · {what}", "bold")
    for took in rehearsal.rehearse(ahead) if known is None else known:
        seconds += took.seconds
        screen.line(f"  {took.line()}")
    screen.line(f"  in all about {duration(seconds)}")


def _positions(ahead: Ahead) -> None:
    """Raise ModelError where a stage's longest sequence is longer than the model was made for."""
    recipe = ahead.plan.recipe
    for stage in ahead.stages:
        trusted, folder = recipe.model_of(stage.name).trust_remote_code, ahead.folder(stage)
        config = models.load_config(folder, trusted).get_text_config()
        there = getattr(config, "max_position_embeddings", None)
        longest = lengths_of(recipe, stage, ahead.data(stage)).row
        if there and longest > there:
            with ahead.failing(stage):
                message = f"its longest sequence has {longest} tokens, the model {there} positions"
                hint = "lower dataset.max_prompt_tokens, max_answer_tokens, or response_length"
                raise ModelError(message, hint)


def settle(ahead: Ahead, screen: Screen) -> Room | None:
    """Settle the session's recipe by the memory there is; None of a model that cannot be read."""
    try:
        config = architecture(ahead.session.model_folder)
        own = judging(ahead.plan)
        room = Room(ahead.plan.recipe, config, ahead.session, judge=own)
        recipe, said = room.settled(ahead.stages)
        ahead.needs.update({stage.name: room.need(stage, recipe) for stage in ahead.stages})
    except Exception:
        screen.log_traceback()
        return None
    ahead.session.recipe = recipe
    for line in said:
        screen.line(f"  {line}", "dim")
    return room


def refuse(ahead: Ahead, screen: Screen, resumed: bool = False) -> None:
    """What does not fit by the rule is not begun; a model that the rule cannot read is."""
    if (room := settle(ahead, screen)) is None or resumed:
        return
    wrong = [stage for stage in ahead.stages if not room.holds(ahead.needs[stage.name])]
    if wrong:
        need, first = ahead.needs[wrong[0].name], wrong[0]
        [(role, most)] = need.most_common(1)
        whole, there = size(room.beside(need)), f"{room.name} has {size(room.bytes)}"
        message = f"stage {first.name} needs {whole}, most of it for {role} ({size(most)})"
        hint = f"add {room.words(wrong)}; --no-rehearsal tries it all the same"
        with ahead.failing(first):
            raise MachineError(f"{message}: {there}", hint)


def _changes(recipe: Recipe, stage: PlannedStage) -> Iterator[dict[str, Any]]:
    """What may help, the least harmful first: the same result, then slower, then another result."""
    name = recipe.written_as(stage.name)
    size, micro = "per_device_train_batch_size", "gradient_accumulation_steps"
    options = recipe.tables[stage.name].options if name else {}
    if size in options:
        rows, micros = options[size], options[micro]
        for part in range(2, rows + 1):
            if rows % part == 0:
                yield {f"{name}.{size}": rows // part, f"{name}.{micro}": micros * part}
        if not options["gradient_checkpointing"]:
            yield {f"{name}.gradient_checkpointing": "true"}
        for key in ("local_rollout_forward_batch_size", "per_device_eval_batch_size"):
            count = options.get(key) or 1
            while count > 1:
                count //= 2
                yield {f"{name}.{key}": count}
    if recipe.model.quantization == "none" and recipe.lora is not None:
        yield {"model.quantization": "4bit"}
    if stage.name == EVALUATION:
        for count in (32, 16, 8, 4):
            if count < recipe.evaluation.prompts:
                yield {"evaluation.prompts": count}
    for divisor in (2, 4):
        for key in ("max_prompt_tokens", "max_answer_tokens"):
            yield {f"dataset.{key}": max(1, getattr(recipe.dataset, key) // divisor)}
