"""What each of several cards would need of memory, by rule: as copies of the base, and in parts.

Data parallel, each card holds the base, and its share of a batch. Sharded, the base's weights are
over the cards, and a layer and the head are whole on each while they compute. Adapters, their
gradients and their optimizer are whole on each card, in both. None of it was measured on cards.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM

from rlhf_recipes.errors import StageError
from rlhf_recipes.models.fake_model import WEIGHTS
from rlhf_recipes.models.load import compute_dtype
from rlhf_recipes.pipeline.fit import Room
from rlhf_recipes.pipeline.plan import PlannedStage
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.stages.order import share_out
from rlhf_recipes.text import size, table


def needs(room: Room, stages: Sequence[PlannedStage], cards: int) -> str:
    """A stage a line, and which way fits; `room` is that of one card."""
    reason, (weights, whole) = unsharded(room.recipe), base(room)
    notes, large = list[str](), {"data parallel": list[str](), "sharded": list[str]()}
    known = list[PlannedStage]()
    for stage in stages:
        try:
            room.recipe = shared(room.recipe, stage.name, cards)
        except StageError as error:
            notes.append(error.message)
            continue
        known.append(stage)
    settled, _ = room.settled(known)
    parts = replace(settled, model=replace(settled.model, sampler="adapters"))
    rows = [["stage", "data parallel", "sharded", "of which, data parallel"]]
    for stage in known:
        held = room.need(stage, settled)
        found = {"data parallel": held}
        if not reason:
            merged = settled.model.sampler == "merged" and settled.kind(stage.name).explores
            found["sharded"] = Counter(room.need(stage, parts) if merged else held)
            found["sharded"][WEIGHTS] += round(weights / cards + whole - weights)
        for way, need in found.items():
            large[way] += [] if room.holds(need) else [stage.name]
        told = [size(room.beside(need)) for need in found.values()]
        of = [f"{role} {size(count)}" for role, count in held.most_common() if count > 1e5]
        rows.append([stage.name, *told, *["—"] * (2 - len(told)), ", ".join(of)])
    notes += [f"not sharded: {reason}"] if reason else []
    for way, names in large.items():
        if way == "data parallel" or not reason:
            notes.append(f"{way}: " + (f"does not fit: {', '.join(names)}" if names else "fits"))
    there = f"a card's memory by rule, not measured; {cards} cards, {size(room.bytes)} on each"
    return "\n".join([table(rows, right=(1, 2)), "", *notes, there])


def shared(recipe: Recipe, stage: str, cards: int) -> Recipe:
    """The recipe with a card's share of a stage's batch. Raises as `share_out` does."""
    if (table := recipe.tables.get(stage)) is None:
        return recipe
    own = replace(table, options=table.options | share_out(recipe, stage, cards))
    return replace(recipe, tables=recipe.tables | {stage: own})


def unsharded(recipe: Recipe) -> str:
    """Why a base cannot be sharded; nothing where it can."""
    if recipe.model.quantization != "none":
        return f"a base in {recipe.model.quantization} is whole on each card"
    return "" if recipe.lora is not None else "with lora = false, all weights are trained"


def base(room: Room) -> tuple[float, float]:
    """Bytes of the base, and of the part of it that is whole on a card: a layer, and the head."""
    dtype = torch.bfloat16 if room.recipe.model.dtype == "auto" else None
    dtype = dtype or compute_dtype(room.recipe.model.dtype)
    counts = Counter[int]()
    layers = room.config.get_text_config().num_hidden_layers
    for depth in (1, 2):
        config = copy.deepcopy(room.config)
        text = config.get_text_config()
        text.num_hidden_layers = depth
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[:depth]
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
        counts[depth] = sum(weight.nbytes for weight in lm.parameters())
    layer = counts[2] - counts[1]
    head = sum(weight.nbytes for weight in lm.get_output_embeddings().parameters())
    return counts[1] + (layers - 1) * layer, layer + head
