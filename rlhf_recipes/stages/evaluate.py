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
from rlhf_recipes.data import Example, unique_prompts
from rlhf_recipes.identity import derive_seed
from rlhf_recipes.judge import Judge, load_judge
from rlhf_recipes.passes import logits, logprobs
from rlhf_recipes.rewards import open_foreign, open_reward
from rlhf_recipes.sequences import join, sample, score_ids
from rlhf_recipes.shared import Shared
from rlhf_recipes.stages import StageContext, StageResult
from rlhf_recipes.stages.common import load_rows, need

BATCH = 16  # sequences a forward
LOGITS = 2**27  # of two policies at once, in float32 with what is made of them: 24 bytes each
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
    texts: list[str]
    scores: torch.Tensor | None  # [prompts], in units of the reward
    judged: torch.Tensor | None  # [prompts], the judge's


def run(context: StageContext) -> StageResult:
    recipe, shared = context.recipe, context.shared
    data = load_rows(context)
    test = need(data.test, "prompts on the test side", context)
    examples = unique_prompts(test)[: recipe.evaluation.prompts]
    setting = _setting(context)
    base, tokens = shared.base, shared.tokens
    metrics: dict[str, float | int] = {}
    judge = load_judge(recipe.evaluation.judges.get("judge", "none"), recipe.model.base)

    # ---- reward model
    reward = _reward_model(context)

    # ---- policies
    policies = {"base": None} | {
        role.removeprefix("policy:"): folder
        for role, folder in context.inputs.items()
        if role.startswith("policy:")
    }
    given: dict[str, Answers] = {}
    for done, (name, folder) in enumerate(policies.items(), 1):
        policy = base.open("policy", folder, seed=0)
        given[name] = _answer(policy, reward, judge, examples, setting, shared)
        metrics |= _own(name, given[name], tokens.eos_id)
        bare = base.open("bare", None, seed=0)
        metrics[f"{name}.nats_under_base"] = nats_a_token(bare, examples, given[name].ids)
        base.close(bare)
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
    _write_answers(context.folder / "output" / "answers.jsonl", examples, given)
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


def _reward_model(context: StageContext) -> Role | None:
    """What the last PPO stage was scored by, else the first reward stage."""
    recipe, shared = context.recipe, context.shared
    tables = [recipe.table(stage) for stage in recipe.stages]
    named = [table.reward_model for table in tables if table.reward_model]
    trained = [table.name for table in tables if table.kind == "reward"]
    name = named[-1] if named else next(iter(trained), "")
    if "reward_model" in context.inputs:
        return open_reward(shared.base, context.inputs["reward_model"])
    if not name:
        return None
    return open_foreign(sources.model_folder(name, recipe), shared.base, shared.tokens)


def _start_of(name: str, policies: Mapping[str, Path | None], recipe) -> str | None:
    """The policy that stage `name` started from; None for the base."""
    if name == "base":
        return None
    order = list(policies)
    return recipe.table(name).policy or order[order.index(name) - 1]


def _answer(
    policy: Role,
    reward: Role | None,
    judge: Judge | None,
    examples: list[Example],
    setting: Setting,
    shared: Shared,
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
    texts, judged = [tokens.decode(answer) for answer in ids], None
    if judge is not None:
        asked = zip(examples, texts, strict=True)
        judged = torch.tensor([judge(e.prompt, text) for e, text in asked])
    return Answers(ids, texts, scores, judged)


def _own(name: str, answers: Answers, eos: int) -> dict[str, float]:
    count = len(answers.ids)
    numbers = {
        f"{name}.length": sum(len(ids) for ids in answers.ids) / count,
        f"{name}.ended": sum(ids[-1] == eos for ids in answers.ids) / count,
        # Words that an answer says again, and word pairs that no other answer has said.
        f"{name}.repetition": sum(1 - distinct([ids], 3) for ids in answers.ids) / count,
        f"{name}.distinct_2": distinct(answers.ids, 2),
    }
    if answers.scores is not None:
        numbers[f"{name}.score"] = answers.scores.mean().item()
    if answers.judged is not None:
        numbers[f"{name}.judge_score"] = answers.judged.mean().item()
    return numbers


def n_grams(ids: list[int], n: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[start:] for start in range(n)), strict=False))


def distinct(answers: list[list[int]], n: int) -> float:
    """Share of the n-grams of all answers that stand for the first time; 1 where there are none."""
    grams = [gram for ids in answers for gram in n_grams(ids, n)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _against(name: str, now: Answers, before: Answers) -> dict[str, float]:
    """Win rate with ties as ½, gain in units of the reward, and share of answers unchanged."""
    same = [a == b for a, b in zip(now.ids, before.ids, strict=True)]
    numbers = {f"{name}.unchanged": sum(same) / len(same)}
    if now.scores is not None:
        gain = (now.scores - before.scores).double()
        numbers[f"{name}.score_gain"] = gain.mean().item()
        numbers[f"{name}.win_rate"] = _wins(gain)
    if now.judged is not None:
        numbers[f"{name}.judge_win_rate"] = _wins(now.judged - before.judged)
    return numbers


def _wins(gain: torch.Tensor) -> float:
    """Share of the prompts with a gain, a tie counting half."""
    return ((gain > 0) + 0.5 * (gain == 0)).mean().item()


@torch.no_grad()
def exact_kl(
    policy: Role, start: Role, examples: list[Example], answers: list[list[int]], setting: Setting
) -> float:
    """KL(policy ‖ start) over the whole vocabulary, summed over an answer, in nats; mean."""
    total, width = 0.0, setting.length * policy.config.get_text_config().vocab_size
    size = min(BATCH, max(1, LOGITS // width))
    for first in range(0, len(answers), size):
        part = slice(first, first + size)
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


@torch.no_grad()
def nats_a_token(base: Role, examples: list[Example], answers: list[list[int]]) -> float:
    """Minus the mean log-probability of the answers' tokens under `base`, at temperature 1."""
    total = 0.0
    for first in range(0, len(answers), BATCH):
        part = slice(first, first + BATCH)
        rows = join([e.prompt_ids for e in examples[part]], answers[part], 0, base.lm.device)
        with base.active():
            picked, _ = logprobs(base, rows.ids, rows.mask, rows.answer, 1.0)
        total -= (picked * rows.mask[:, -rows.answer :]).sum().item()
    return total / sum(map(len, answers))


def _write_answers(file: Path, examples: list[Example], given: dict[str, Answers]) -> None:
    with file.open("w") as out:
        for i, example in enumerate(examples):
            row = {"prompt": example.prompt, "answers": {}, "scores": {}}
            for name, answers in given.items():
                row["answers"][name] = answers.texts[i]
                if answers.scores is not None:
                    row["scores"][name] = round(answers.scores[i].item(), 4)
                if answers.judged is not None:
                    row.setdefault("judged", {})[name] = answers.judged[i].item()
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _summary(metrics: dict[str, float], policies: list[str], recipe) -> str:
    last = policies[-1]
    if f"{last}.win_rate" not in metrics:
        return f"{metrics['evaluation.prompts']} test prompts"
    before = _start_of(last, dict.fromkeys(policies), recipe)
    judge = ""
    if f"{last}.judge_win_rate" in metrics:
        judge = f" (by the judge {metrics[f'{last}.judge_win_rate']:.0%})"
    return (
        f"{last} over {before}: win rate {metrics[f'{last}.win_rate']:.0%}{judge}, "
        f"gain {metrics[f'{last}.score_gain']:+.2f}, KL {metrics[f'{last}.kl']:.2f} nats"
    )
