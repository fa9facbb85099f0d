"""The closing stage: every policy on the same test prompts under the same seeds.

Each policy is compared with the one it started from: PPO with SFT, SFT with the base. Nothing was
trained or selected on these prompts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf_recipes import sources
from rlhf_recipes.adapters import Role
from rlhf_recipes.data import Example, pairs, unique_prompts
from rlhf_recipes.identity import derive_seed
from rlhf_recipes.passes import logits
from rlhf_recipes.rewards import open_foreign, open_reward
from rlhf_recipes.sequences import join, sample, score_ids
from rlhf_recipes.stages import StageContext, StageResult
from rlhf_recipes.stages.common import load_rows, need
from rlhf_recipes.stages.reward import preference

BATCH = 16  # sequences a forward, whose logits may be large
SAMPLED = 64  # answers at a time: a step of sampling takes little longer for 64 than for 16


@dataclass(frozen=True)
class Setting:
    """How every policy of the run is asked."""

    length: int  # most new tokens
    temperature: float
    seed: int


@dataclass(frozen=True)
class Answers:
    """One policy's answers to the test prompts."""

    ids: list[list[int]]
    scores: torch.Tensor | None  # [prompts], in units of the reward


def run(context: StageContext) -> StageResult:
    recipe, shared = context.recipe, context.shared
    data = load_rows(context)
    test = need(data.test, "prompts on the test side", context)
    examples = unique_prompts(test)[: recipe.evaluation.prompts]
    setting = _setting(context)
    base, tokens = shared.base, shared.tokens
    metrics: dict[str, float | int] = {}

    # ---- reward model
    reward, name = _reward_model(context)
    if reward is not None:
        metrics |= _reward_metrics(reward, pairs(test), tokens.pad_id, name)

    # ---- policies
    policies = {"base": None} | {
        role.removeprefix("policy:"): folder
        for role, folder in context.inputs.items()
        if role.startswith("policy:")
    }
    given: dict[str, Answers] = {}
    for done, (name, folder) in enumerate(policies.items(), 1):
        policy = base.open("policy", folder, seed=0)
        given[name] = _answer(policy, reward, examples, setting, shared)
        metrics |= _own(name, given[name], tokens.eos_id)
        before = _start_of(name, policies, recipe)
        if before is not None:
            start = base.open("start", policies[before], seed=0)
            metrics |= _against(name, given[name], given[before])
            metrics[f"{name}.kl"] = exact_kl(policy, start, examples, given[name].ids, setting)
            base.close(start)
        base.close(policy)
        context.progress.update(done, len(policies))
    if reward is not None:
        base.close(reward)

    # ---- output
    _write_answers(context.folder / "output" / "answers.jsonl", examples, given, tokens.decode)
    metrics["evaluation.prompts"] = len(examples)
    return StageResult(metrics, _summary(metrics, list(policies), recipe))


def _setting(context: StageContext) -> Setting:
    """The evaluation's own words, else those that the last PPO stage samples with."""
    recipe, asked = context.recipe, context.recipe.evaluation
    ppo = [n for n in recipe.stages if recipe.table(n).kind == "ppo"]
    trained = recipe.table(ppo[-1]).options if ppo else {}
    length = asked.response_length or trained.get("response_length")
    temperature = asked.temperature or trained.get("temperature")
    return Setting(
        length=length or recipe.dataset.max_answer_tokens,
        temperature=temperature or 0.7,
        seed=derive_seed(recipe.seed, context.name),
    )


def _reward_model(context: StageContext) -> tuple[Role | None, str]:
    """What the last PPO stage was scored by, else the first reward stage; and its name."""
    recipe, shared = context.recipe, context.shared
    tables = [recipe.table(stage) for stage in recipe.stages]
    named = [table.reward_model for table in tables if table.reward_model]
    trained = [table.name for table in tables if table.kind == "reward"]
    name = named[-1] if named else next(iter(trained), "")
    if "reward_model" in context.inputs:
        return open_reward(shared.base, context.inputs["reward_model"]), name
    if not name:
        return None, name
    return open_foreign(sources.local_path(name, recipe), shared.base, shared.tokens), "reward"


def _start_of(name: str, policies: Mapping[str, Path | None], recipe) -> str | None:
    """The policy that stage `name` started from; None for the base."""
    if name == "base":
        return None
    order = list(policies)
    return recipe.table(name).policy or order[order.index(name) - 1]


def _reward_metrics(reward: Role, rows: list[Example], pad: int, name: str) -> dict[str, float]:
    if not rows:
        return {}
    accuracy, margin = preference(reward, rows, pad, BATCH)
    shorter = [len(e.chosen_ids) - len(e.rejected_ids) for e in rows]
    longer_wins = sum((d > 0) + 0.5 * (d == 0) for d in shorter) / len(shorter)
    return {
        f"{name}.accuracy": accuracy,
        f"{name}.margin": margin,  # the head is in units already
        f"{name}.test_pairs": len(rows),
        f"{name}.length_accuracy": max(longer_wins, 1 - longer_wins),
    }


def _answer(
    policy: Role, reward: Role | None, examples: list[Example], setting: Setting, shared
) -> Answers:
    tokens = shared.tokens
    prompts = [e.prompt_ids for e in examples]
    ids = sample(
        policy,
        prompts,
        length=setting.length,
        temperature=setting.temperature,
        eos=tokens.eos_id,
        pad=tokens.pad_id,
        batch=SAMPLED,
        seed=setting.seed,
    )
    scores = None
    if reward is not None:
        scores = score_ids(reward, list(zip(prompts, ids, strict=True)), tokens.pad_id, BATCH)
    return Answers(ids, scores)


def _own(name: str, answers: Answers, eos: int) -> dict[str, float]:
    count = len(answers.ids)
    numbers = {
        f"{name}.length": sum(len(ids) for ids in answers.ids) / count,
        f"{name}.ended": sum(ids[-1] == eos for ids in answers.ids) / count,
    }
    if answers.scores is not None:
        numbers[f"{name}.score"] = answers.scores.mean().item()
    return numbers


def _against(name: str, now: Answers, before: Answers) -> dict[str, float]:
    """Win rate with ties as ½, gain in units of the reward, and share of answers unchanged."""
    same = [a == b for a, b in zip(now.ids, before.ids, strict=True)]
    numbers = {f"{name}.unchanged": sum(same) / len(same)}
    if now.scores is not None and before.scores is not None:
        gain = (now.scores - before.scores).double()
        wins = (gain > 0).double() + 0.5 * (gain == 0).double()
        numbers[f"{name}.score_gain"] = gain.mean().item()
        numbers[f"{name}.win_rate"] = wins.mean().item()
    return numbers


@torch.no_grad()
def exact_kl(
    policy: Role, start: Role, examples: list[Example], answers: list[list[int]], setting: Setting
) -> float:
    """KL(policy ‖ start) over the whole vocabulary, summed over an answer, in nats; mean."""
    total = 0.0
    for first in range(0, len(answers), BATCH):
        part = slice(first, first + BATCH)
        prompts = [e.prompt_ids for e in examples[part]]
        rows = join(prompts, answers[part], 0, policy.lm.device)
        both = []
        for role in (policy, start):
            with role.active():
                out = logits(role, rows.ids, rows.mask, rows.answer, setting.temperature)
            both.append(torch.log_softmax(out, dim=-1))
        kl = (both[0].exp() * (both[0] - both[1])).sum(-1)
        total += (kl * rows.mask[:, -rows.answer :]).sum().item()
    return total / len(answers)


def _write_answers(file: Path, examples: list[Example], given: dict[str, Answers], decode) -> None:
    with file.open("w") as out:
        for i, example in enumerate(examples):
            row = {"prompt": example.prompt, "answers": {}, "scores": {}}
            for name, answers in given.items():
                row["answers"][name] = decode(answers.ids[i])
                if answers.scores is not None:
                    row["scores"][name] = round(answers.scores[i].item(), 4)
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _summary(metrics: dict[str, float], policies: list[str], recipe) -> str:
    last = policies[-1]
    if f"{last}.win_rate" not in metrics:
        return f"{metrics['evaluation.prompts']} test prompts"
    before = _start_of(last, dict.fromkeys(policies), recipe)
    return (
        f"{last} over {before}: win rate {metrics[f'{last}.win_rate']:.0%}, "
        f"gain {metrics[f'{last}.score_gain']:+.2f}, KL {metrics[f'{last}.kl']:.2f} nats"
    )
