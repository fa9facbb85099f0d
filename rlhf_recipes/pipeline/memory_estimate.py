"""What a stage needs of memory, by rule: its step on tensors that have a shape and no content.

The roles are those of the stage and the passes are its own (`memory` in the stage's module), on a
model built from `config.json`. Every live tensor counts, under its purpose, and the moment with the
most bytes is the answer. The step runs on a few of the model's layers, twice: each further layer
adds as much as the last one did.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

from rlhf_recipes.data.dataset import Data
from rlhf_recipes.data.rows import sequences
from rlhf_recipes.models.fake_model import Held, Lengths, Sim
from rlhf_recipes.pipeline.plan import PlannedStage
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.stages.contract import module_of
from rlhf_recipes.stages.ppo.stage import VALIDATION_PROMPTS

SHALLOW, DEEP = 2, 4  # layers


def lengths_of(recipe: Recipe, stage: PlannedStage, data: Data | None) -> Lengths:
    """Of a stage's longest rows; without any, of the longest that the recipe lets in."""
    prompt, answer = recipe.dataset.max_prompt_tokens, recipe.dataset.max_answer_tokens
    kind, row, looked_at = recipe.kind(stage.name), prompt + answer, VALIDATION_PROMPTS
    if data and (found := data.learned(kind.learns_from)):
        prompt = max(len(example.prompt_ids) for example in found)
        answer = max(len(example.chosen_ids or ()) for example in found)
        row = max(max(sequences(example, kind.learns_from)) for example in found)
        looked_at = min(VALIDATION_PROMPTS, len(data.validation))
    if kind.samples:
        answer = module_of(stage.kind).answer_length(recipe, stage.name)
        row = prompt + answer
    return Lengths(prompt, row, answer, looked_at)


def footprint(sim: Sim) -> Held:
    """The bytes that a stage needs when it needs most, by role; without those of the libraries."""
    layers = sim.config.get_text_config().num_hidden_layers
    if layers <= DEEP:
        phases = _phases(sim, layers)
    else:
        few, more = (_phases(sim, n) for n in (SHALLOW, DEEP))
        phases = [
            Counter({r: m[r] + (m[r] - f[r]) * (layers - DEEP) / (DEEP - SHALLOW) for r in m})
            for f, m in zip(few, more, strict=True)
        ]
    most = max(phases, key=Counter.total)
    return Counter({role: round(count) for role, count in most.items() if count > 0})


def _phases(sim: Sim, layers: int) -> list[Held]:
    """The most of each part of the stage, on a model of so many layers."""
    config = copy.deepcopy(sim.config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return list(module_of(sim.recipe.kind(sim.name).name).memory(replace(sim, config=config)))
