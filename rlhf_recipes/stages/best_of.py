"""PPO's yardstick: the best of n answers by the reward that it trains on, from where it started.

No training is in it, and what it costs in nats is known. So many answers are drawn to each prompt;
the best of every n of them is reckoned, and its gain is over the mean of all. The best is chosen as
PPO is rewarded: by the reward model, with the floor and the penalty for answers that were cut off.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from statistics import fmean

import torch

from rlhf_recipes import stats
from rlhf_recipes.data.dataset import Data
from rlhf_recipes.models.fake_model import Held, Sim
from rlhf_recipes.models.reward_model import fined, floor_of, read_floor
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.rewards import PART
from rlhf_recipes.recipe.tables import BASE
from rlhf_recipes.stages.answers import (
    BATCH,
    answer_length,
    answers_of,
    asked,
    asked_work,
    column_of,
    sampling_memory,
    score,
    scoring_memory,
    trial,
)
from rlhf_recipes.stages.contract import StageContext, StageResult, Work
from rlhf_recipes.stages.rewards.mixed import Rewards
from rlhf_recipes.store.digests import derive_seed
from rlhf_recipes.store.files import write_json

__all__ = ["answer_length", "memory", "run", "trial", "work"]  # see contract.StageModule


def run(context: StageContext) -> StageResult:
    recipe, session = context.recipe, context.session
    examples, setting = asked(context)
    count = recipe.evaluation.best_of
    ppo = recipe.explorer
    start = ppo.policy or BASE
    done, total = 0, count * len(examples) * (2 + len(recipe.evaluation.judges))

    def tell(answers: int) -> None:
        nonlocal done
        done += answers
        context.progress.update(done, total)

    # ---- answers and what is said of them
    draws: list[list[list[int]]] = []
    seeds = [derive_seed(setting.seed, "draw", draw) for draw in range(count)]
    for answers in answers_of(context, context.inputs.get("policy"), examples, setting, seeds):
        draws.append(answers)
        tell(len(answers))
    drawn = [(e, answers[i]) for i, e in enumerate(examples) for answers in draws]
    said = score(context, [drawn], tell)
    context.progress.update(total, total)
    ended = [ids[-1] == session.tokens.eos_id for _, ids in drawn]
    scores, penalty = torch.tensor(said[""]).double(), ppo.said("missing_eos_penalty")
    about = (torch.tensor(ended), penalty, _floor(context))
    if listed := Rewards.of(context):
        own = said[f"{PART}{listed.model.name}_"] if listed.model else None
        scored = None if own is None else torch.tensor(own).double()
        rewards = listed.fined(scores, scored, *about).tolist()
    else:
        rewards = fined(scores, *about).tolist()
    rows = [slice(first, first + count) for first in range(0, len(drawn), count)]  # one a prompt

    # ---- gains
    curve = {"n": [2**power for power in range(count.bit_length())]}
    curve["kl"] = [stats.best_of_kl(n) for n in curve["n"]]
    metrics = {f"best_of.{n}.kl": nats for n, nats in zip(*curve.values(), strict=True) if n > 1}
    for who, values in said.items():
        key = f"{who or 'score_'}gain"
        curve[key] = []
        for n in curve["n"]:
            gains = [stats.best_of_gain(rewards[row], values[row], n) for row in rows]
            curve[key].append(fmean(gains))
            if n > 1:
                metrics |= stats.measured(f"best_of.{n}.{key}", gains, setting.seed)

    # ---- output
    output = context.folder / "output"
    with (output / "answers.jsonl").open("w") as out:
        for example, row in zip(examples, rows, strict=True):
            texts = [session.tokens.decode(ids) for _, ids in drawn[row]]
            found = {column_of(who): values[row] for who, values in said.items()}
            line = {"prompt": example.prompt, "answers": texts, "ended": ended[row], **found}
            out.write(json.dumps(line, ensure_ascii=False) + "\n")
    write_json(output / "best_of.json", {"policy": start, "against": ppo.name, **curve})
    gain, nats = (metrics[f"best_of.{count}.{key}"] for key in ("score_gain", "kl"))
    summary = f"the best of {count} of {start}: gain {gain:+.2f} at {nats:.2f} nats or less"
    return StageResult(metrics, summary)


def _floor(context: StageContext) -> float:
    """The most that an answer without EOS may score: the reward stage's, or a foreign model's."""
    if scorer := context.inputs.get("reward_model"):
        return read_floor(scorer)
    recipe, session = context.recipe, context.session
    if not recipe.explorer.reward_model:
        return math.inf
    foreign = session.foreign(recipe.explorer.reward_model)
    rows = session.data(recipe.dataset).rejected
    floor = floor_of(foreign, rows, session.tokens.pad_id, BATCH)
    session.base.close(foreign)
    return floor


# ---- what its memory and its work are counted from


def work(recipe: Recipe, name: str, data: Data) -> Work:
    return asked_work(recipe, name, data, answers=recipe.evaluation.best_of, passes=0)


def memory(sim: Sim) -> Iterator[Held]:
    yield from sampling_memory(sim)
    yield from scoring_memory(sim)
