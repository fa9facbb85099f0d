"""A kind of stage in one file: SFT that leaves a number of its own."""

from __future__ import annotations

from rlhf_recipes.stages import sft
from rlhf_recipes.stages.contract import StageContext, StageResult
from rlhf_recipes.stages.sft import memory, trial, work

__all__ = ["memory", "run", "trial", "work"]


def run(context: StageContext) -> StageResult:
    result = sft.run(context)
    return StageResult(result.metrics | {"echoes": 7}, f"echoed, {result.summary}")
