"""What the evaluation and best-of share: policies asked as exported, and who scores the answers.

A policy is sampled as `export` writes it and a user gets it: merged into the base in 16 or 32 bit,
whatever it was trained on. Reward models and judges score as they did in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_recipes.data.rows import Example, unique_prompts
from rlhf_recipes.models.load import empty
from rlhf_recipes.models.reward_model import open_foreign, open_reward
from rlhf_recipes.models.role import Role
from rlhf_recipes.models.sampling import sample, score_ids
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.sources import resolve as sources
from rlhf_recipes.stages.contract import StageContext
from rlhf_recipes.stages.judges import load_judge
from rlhf_recipes.stages.session import Shared
from rlhf_recipes.stages.training import load_rows, need
from rlhf_recipes.store.fingerprint import derive_seed

BATCH = 16  # sequences a forward
SAMPLED = 64  # answers at a time: a step of sampling takes little longer for 64 than for 16
TOKENS = 2**15  # of prompts and answers at a time: 4.3 GB of keys and values in an 8B model

# Who scores, by what their numbers are called: "win_rate", "judge_win_rate", "judge2_win_rate".
SCORERS = {"": "scores", "judge_": "judged", "judge2_": "judged2"}  # and in answers.jsonl


@dataclass(frozen=True)
class Setting:
    """How every policy of the run is asked."""

    length: int  # most new tokens
    temperature: float
    seed: int


def test_prompts(context: StageContext) -> list[Example]:
    """The first prompts of the test side."""
    test = need(load_rows(context).test, "prompts on the test side", context)
    return unique_prompts(test)[: context.recipe.evaluation.prompts]


def setting_of(context: StageContext) -> Setting:
    """The evaluation's own words, else those that the last PPO stage samples with."""
    recipe = context.recipe
    length = asked_with(recipe, "response_length") or recipe.dataset.max_answer_tokens
    temperature = asked_with(recipe, "temperature") or 0.7
    return Setting(length, temperature, derive_seed(recipe.seed, context.name))


def asked_with(recipe: Recipe, key: str) -> Any:
    """The evaluation's own word, else that of the last PPO stage, else None."""
    ppo = last_ppo(recipe)
    trained = recipe.table(ppo).options if ppo else {}
    return getattr(recipe.evaluation, key) or trained.get(key)


def last_ppo(recipe: Recipe) -> str | None:
    return next((n for n in reversed(recipe.stages) if recipe.table(n).kind == "ppo"), None)


def ask(
    shared: Shared,
    output: Path | None,
    examples: Sequence[Example],
    setting: Setting,
    seeds: Iterable[int],
) -> Iterator[list[list[int]]]:
    """For each seed an answer to each prompt, by the policy of a stage's `output` as exported.

    None is the base. While it is asked no other model is in memory, and then it is not either.
    """
    prompts = [example.prompt_ids for example in examples]
    longest = max(map(len, prompts)) + setting.length
    shared.release()
    policy = Role(shared.exported(output), None, torch.float32)  # no autocast: as it is stored
    for seed in seeds:
        yield sample(
            policy,
            prompts,
            length=setting.length,
            temperature=setting.temperature,
            eos=shared.tokens.eos_id,
            pad=shared.tokens.pad_id,
            batch=max(1, min(SAMPLED, TOKENS // longest)),
            seed=seed,
        )
    empty(policy.lm)


def score(
    context: StageContext,
    rows: Sequence[tuple[Example, list[int]]],
    tell: Callable[[int], object] = lambda count: None,
) -> dict[str, list[float]]:
    """What the reward model and each judge say of every answer, by SCORERS' keys.

    Equal answers to a prompt are scored once, so that they tie. Models score to four digits, which
    are all that answers.jsonl keeps: what is computed from them can be computed again. `tell` hears
    of so many more each time.
    """
    recipe, said = context.recipe, {}
    keys = [(tuple(example.prompt_ids), tuple(ids)) for example, ids in rows]
    once = dict(zip(keys, rows, strict=True))
    asked = {"reward_model": reward_model_name(recipe), **recipe.evaluation.judges}
    for prefix, role in zip(SCORERS, ("reward_model", "judge", "judge2"), strict=True):
        if asked.get(role):
            scores = _scores(context, role, asked[role], list(once.values()), tell)
            found = dict(zip(once, scores, strict=True))
            said[prefix] = [found[key] for key in keys]
    return said


def reward_model_name(recipe: Recipe) -> str:
    """What the last PPO stage was scored by, else the first reward stage; "" without either."""
    tables = [recipe.table(stage) for stage in recipe.stages]
    named = [table.reward_model for table in tables if table.reward_model]
    trained = [table.name for table in tables if table.kind == "reward"]
    return named[-1] if named else next(iter(trained), "")


def _scores(
    context: StageContext,
    role: str,
    name: str,
    rows: Sequence[tuple[Example, list[int]]],
    tell: Callable[[int], object],
) -> list[float]:
    """By the stage that serves `role`, else by the rule, folder or hub id that it names."""
    recipe, tokens = context.recipe, context.shared.tokens
    if judge := load_judge(name, recipe.model.base):
        tell(len(rows))
        return [judge(example.prompt, tokens.decode(ids)) for example, ids in rows]
    base = context.shared.base
    if role in context.inputs:
        model = open_reward(base, context.inputs[role])
    else:
        model = open_foreign(sources.model_folder(name, recipe), base, tokens)
    both = [(example.prompt_ids, ids) for example, ids in rows]
    scores = score_ids(model, both, tokens.pad_id, BATCH, tell)
    base.close(model)
    return [round(number, 4) for number in scores.tolist()]
