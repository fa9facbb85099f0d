"""The closing stage: every policy on the same test prompts under the same seeds.

Each policy is compared with the one it started from: PPO with SFT, SFT with the base. Nothing was
trained or selected on these prompts. Intervals are of 95 %, over prompts drawn again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from rlhf_recipes import group, stats
from rlhf_recipes.data.dataset import Data
from rlhf_recipes.data.rows import Example
from rlhf_recipes.models.fake_model import Held, Sim, ids_of
from rlhf_recipes.models.load import empty
from rlhf_recipes.models.role import Role, logits, logprobs
from rlhf_recipes.models.sampling import join
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.rewards import PART
from rlhf_recipes.recipe.tables import BASE
from rlhf_recipes.recipe.wiring import wiring
from rlhf_recipes.stages.answers import (
    BATCH,
    Setting,
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

__all__ = ["answer_length", "memory", "run", "trial", "work"]  # see contract.StageModule

LOGITS = 2**27  # of two policies at once, in float32 with what is made of them: 24 bytes each


@dataclass(frozen=True)
class Answers:
    """One policy's answers to the test prompts."""

    ids: list[list[int]]
    eos: int
    said: dict[str, list[float]]  # as `answers.score` has it; models', in units of the reward

    @property
    def ended(self) -> list[bool]:
        return [ids[-1] == self.eos for ids in self.ids]


def run(context: StageContext) -> StageResult:
    recipe, eos = context.recipe, context.session.tokens.eos_id
    examples, setting = asked(context)
    policies = {BASE: None} | {
        role.removeprefix("policy:"): folder
        for role, folder in context.inputs.items()
        if role.startswith("policy:")
    }

    # ---- what each answers, as exported
    ids: dict[str, list[list[int]]] = {}
    home = next(filter(None, policies.values()), None)  # its stage's key holds the base, too
    for done, (name, folder) in enumerate(policies.items(), 1):
        [ids[name]] = answers_of(context, folder, examples, setting, [setting.seed], home)
        context.progress.update(done, len(policies) + 2)

    # ---- how far it went, and what is said of it
    numbers = _distances(context, policies, examples, ids, setting)
    context.progress.update(len(policies) + 1, len(policies) + 2)
    said = score(context, [list(zip(examples, ids[name], strict=True)) for name in ids])
    given: dict[str, Answers] = {}
    for place, name in enumerate(policies):
        part = slice(place * len(examples), (place + 1) * len(examples))
        given[name] = Answers(ids[name], eos, {who: said[who][part] for who in said})
        numbers[name] |= _own(given[name])
        if name != BASE:
            before = recipe.table(name).policy or BASE
            numbers[name] |= _against(given[name], given[before], setting.seed)
            if before != BASE:
                whole = _against(given[name], given[BASE], setting.seed)
                kept = [key for key in whole if key.endswith(("win_rate", "rate_low", "rate_high"))]
                over = {key.replace("win_rate", "win_rate_over_base"): whole[key] for key in kept}
                numbers[name] |= over
    context.progress.update(len(policies) + 2, len(policies) + 2)

    # ---- output
    _write_answers(context, examples, given)
    metrics = {f"{name}.{key}": n for name in numbers for key, n in numbers[name].items()}
    metrics["evaluation.prompts"] = len(examples)
    return StageResult(metrics, _summary(metrics, list(policies)[-1], recipe))


def _own(answers: Answers) -> dict[str, float]:
    numbers = {
        "length": fmean(map(len, answers.ids)),
        "ended": fmean(answers.ended),
        # Words that an answer says again, and word pairs that no other answer has said.
        "repetition": fmean(1 - distinct([ids], 3) for ids in answers.ids),
        "distinct_2": distinct(answers.ids, 2),
    }
    return numbers | {f"{who}score": fmean(said) for who, said in answers.said.items()}


def distinct(answers: list[list[int]], n: int) -> float:
    """Share of the n-grams of all answers that stand for the first time; 1 where there are none."""
    starts = [[ids[start:] for start in range(n)] for ids in answers]
    grams = [gram for shifted in starts for gram in zip(*shifted, strict=False)]
    return len(set(grams)) / len(grams) if grams else 1.0


def _against(now: Answers, before: Answers, seed: int) -> dict[str, float]:
    """Win rates with ties as ½, gains, and the share of answers unchanged, prompt by prompt."""
    both = list(zip(now.ids, before.ids, strict=True))
    alike = {  # who wins by length, or over what was cut off, does not win among these
        "ended": [a and b for a, b in zip(now.ended, before.ended, strict=True)],
        "like_length": [10 * abs(len(a) - len(b)) <= max(len(a), len(b)) for a, b in both],
    }
    numbers = {"unchanged": fmean(a == b for a, b in both)}
    numbers |= {f"{what}_pairs": sum(chosen) for what, chosen in alike.items()}
    for who in now.said:
        gains = [a - b for a, b in zip(now.said[who], before.said[who], strict=True)]
        if who.startswith(PART):
            numbers |= stats.measured(f"{who}gain", gains, seed)
            continue
        wins = [(gain > 0) + 0.5 * (gain == 0) for gain in gains]
        for key, values in ((f"{who}win_rate", wins), (f"{who or 'score_'}gain", gains)):
            numbers |= stats.measured(key, values, seed)
        for what, chosen in alike.items():
            if any(chosen):
                some = [win for win, counts in zip(wins, chosen, strict=True) if counts]
                numbers[f"{who}win_rate_{what}"] = fmean(some)
    return numbers


def _distances(
    context: StageContext,
    policies: Mapping[str, Path | None],
    examples: list[Example],
    ids: dict[str, list[list[int]]],
    setting: Setting,
) -> dict[str, dict[str, float]]:
    """Each policy's, from the base and from its start: adapters on one base in 16 or 32 bit.

    But for the merge's rounding these are the exported policies, in the memory of one.
    """
    session, quantized = context.session, context.recipe.model.quantization != "none"
    base, found = session.load_base("none") if quantized else session.base, {}
    bare = base.open("bare", None, seed=0)
    for name, folder in policies.items():
        found[name] = {"nats_under_base": nats_a_token(bare, examples, ids[name])}
        if name != BASE:
            before = context.recipe.table(name).policy or BASE
            policy = base.open("policy", folder, seed=0)
            start = base.open("start", policies[before], seed=0)
            found[name]["kl"] = exact_kl(policy, start, examples, ids[name], setting)
            base.close(policy, start)
    base.close(bare)
    if quantized:
        empty(base.lm)
    return found


@torch.no_grad()
def exact_kl(
    policy: Role, start: Role, examples: list[Example], answers: list[list[int]], setting: Setting
) -> float:
    """KL(policy ‖ start) over the whole vocabulary, summed over an answer, in nats; mean."""
    total, width = 0.0, setting.length * policy.config.get_text_config().vocab_size
    size = group.at_once(min(BATCH, max(1, LOGITS // width)), len(answers))
    for first in group.share(range(0, len(answers), size)):
        part = slice(first, first + size)
        prompts = [e.prompt_ids for e in examples[part]]
        rows = join(prompts, answers[part], 0, policy.lm.device)
        kl = _kl((policy, start), rows.ids, rows.mask, rows.answer, setting.temperature)
        total += (kl * rows.mask[:, -rows.answer :]).sum().item()
    return sum(group.everyone(total)) / len(answers)


def _kl(roles: Sequence[Role], *given: Any) -> torch.Tensor:
    """KL of the first of two roles to the second [batch, answer]; `given` is as for `logits`."""
    both = []
    for role in roles:
        with role.active():
            out = logits(role, *given)
        both.append(torch.log_softmax(out, dim=-1))
    return (both[0].exp() * (both[0] - both[1])).sum(-1)


@torch.no_grad()
def nats_a_token(base: Role, examples: list[Example], answers: list[list[int]]) -> float:
    """Minus the mean log-probability of the answers' tokens under `base`, at temperature 1."""
    total, size = 0.0, group.at_once(BATCH, len(answers))
    for first in group.share(range(0, len(answers), size)):
        part = slice(first, first + size)
        rows = join([e.prompt_ids for e in examples[part]], answers[part], 0, base.lm.device)
        with base.active():
            picked, _ = logprobs(base, rows.ids, rows.mask, rows.answer, 1.0)
        total -= (picked * rows.mask[:, -rows.answer :]).sum().item()
    return sum(group.everyone(total)) / sum(map(len, answers))


def _write_answers(
    context: StageContext, examples: list[Example], given: dict[str, Answers]
) -> None:
    decode = context.session.tokens.decode
    with (context.folder / "output" / "answers.jsonl").open("w") as out:
        for i, example in enumerate(examples):
            row: dict[str, Any] = {"prompt": example.prompt}
            if len(example.turns) > 1:  # `prompt` is the last one
                row["turns"] = example.turns
            row["answers"] = {name: decode(a.ids[i]) for name, a in given.items()}
            for who in dict.fromkeys(["", *given[BASE].said]):
                said = {name: a.said[who][i] for name, a in given.items() if who in a.said}
                row[column_of(who)] = said
            row["tokens"] = {name: len(a.ids[i]) for name, a in given.items()}
            row["ended"] = {name: a.ended[i] for name, a in given.items()}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def _summary(metrics: dict[str, float], last: str, recipe: Recipe) -> str:
    prompts = f"{metrics['evaluation.prompts']} test prompts"
    rate, judged = (metrics.get(f"{last}.{by}win_rate") for by in ("", "judge_"))
    if rate is None and judged is None:
        return prompts
    start, far = recipe.table(last).policy or BASE, f"KL {metrics[f'{last}.kl']:.2f} nats"
    if rate is None:
        return f"{last} over {start}: win rate by the judge {judged:.0%} of {prompts}, {far}"
    judge = "" if judged is None else f" (by the judge {judged:.0%})"
    return (
        f"{last} over {start}: win rate {rate:.0%}{judge}, "
        f"gain {metrics[f'{last}.score_gain']:+.2f}, {far}"
    )


# ---- what its memory and its work are counted from


def work(recipe: Recipe, name: str, data: Data) -> Work:
    policies = 1 + sum(role.startswith("policy:") for role in wiring(recipe)[name])
    return asked_work(recipe, name, data, answers=policies, passes=3)


def memory(sim: Sim) -> Iterator[Held]:
    """The sampling, the exact KL of two policies, and the scoring."""
    yield from sampling_memory(sim)
    lengths, prompts = sim.lengths, sim.recipe.evaluation.prompts
    rows = min(BATCH, prompts, max(1, LOGITS // (lengths.answer * sim.vocabulary)))
    with sim.model("policy", "start", quantized=False) as (tracker, both), torch.no_grad():
        _kl(both, *ids_of(rows, lengths.row), lengths.answer, 1.0)
        yield tracker.most
    yield from scoring_memory(sim)
