"""What the evaluation and best-of share: policies asked as exported, and who scores the answers.

A policy is sampled as `export` writes it and a user gets it: merged into the base in 16 or 32 bit,
whatever it was trained on. Reward models and judges score as they did in training.

What a policy answers is kept in its stage's folder, and what a stage's reward model or judge says
in that one's. A later evaluation of the same policy takes it from there: see `_about` for what
decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from rlhf_recipes import group
from rlhf_recipes.data.dataset import Data
from rlhf_recipes.data.rows import Example
from rlhf_recipes.models.fake_model import Held, Sim, ids_of, sampling
from rlhf_recipes.models.load import compute_dtype, empty, machine
from rlhf_recipes.models.retold import reread
from rlhf_recipes.models.reward_model import open_reward
from rlhf_recipes.models.role import Role
from rlhf_recipes.models.sampler import Sampler
from rlhf_recipes.models.sampling import (
    MOST,
    SAMPLED,
    held_at_once,
    rows_at_once,
    score_ids,
)
from rlhf_recipes.recipe.kinds import EVALUATION, JUDGE, kind_of
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.rewards import PART, Term
from rlhf_recipes.recipe.tables import INDEPENDENT, VLLM
from rlhf_recipes.recipe.wiring import wiring, written_rules
from rlhf_recipes.stages.contract import StageContext, Trial, Work
from rlhf_recipes.stages.rewards.mixed import Answered, Rewards, said_of
from rlhf_recipes.stages.rewards.rule import load_rule, told_over
from rlhf_recipes.stages.session import Session
from rlhf_recipes.stages.training import FORWARD, load_rows
from rlhf_recipes.store import layout, provenance
from rlhf_recipes.store.kept import keep, recall

BATCH = 16  # sequences a forward

# Who scores, by what their numbers are called: "win_rate", "judge_win_rate", "judge2_win_rate".
SCORERS = {"": "scores", "judge_": "judged", "judge2_": "judged2"}  # and in answers.jsonl
Tell = Callable[[int], object]  # of so many answers more that were scored


@dataclass(frozen=True)
class Setting:
    """How every policy of the run is asked."""

    length: int  # most new tokens
    temperature: float
    seed: int


def asked(context: StageContext) -> tuple[list[Example], Setting]:
    """The first prompts of the test side, and how they are asked."""
    recipe, (_, prompts) = context.recipe, load_rows(context)
    length, temperature = answer_length(recipe, context.name), recipe.asked_with("temperature")
    setting = Setting(length, temperature, context.seed())
    return prompts[: recipe.evaluation.prompts], setting


def answer_length(recipe: Recipe, name: str) -> int:
    """The most tokens of an answer."""
    return recipe.asked_with("response_length")


def ask(
    session: Session,
    output: Path | None,
    examples: Sequence[Example],
    setting: Setting,
    seeds: Iterable[int],
    tell: Callable[[str], object] = lambda text: None,
) -> Iterator[list[list[int]]]:
    """For each seed an answer to each prompt, by the policy of a stage's `output` as exported.

    None is the base. While it is asked no other model is in memory, and then it is not either.
    """
    prompts = [example.prompt_ids for example in examples]
    session.release()
    policy = Role(session.exported(output), None, torch.float32)  # no autocast: as it is stored
    longest, seeds = max(map(len, prompts)), [*seeds]
    rows = rows_at_once(policy, longest, setting.length, len(prompts))
    batches = len(seeds) * -(-len(prompts) // rows)
    steps = 0 if session.recipe.model.sampler == "adapters" else batches * setting.length
    engine = session.engine(output, tell)
    sampler = Sampler(policy, False, tell, longest, steps, engine)
    if sampler.static or engine:
        sizes = f"{rows} sampled together, " * sampler.static
        tell(f"answers: {sizes}{sampler.told}")
    for seed in seeds:
        yield sampler.sample(
            prompts,
            length=setting.length,
            temperature=setting.temperature,
            eos=session.tokens.eos_id,
            pad=session.tokens.pad_id,
            batch=rows,
            seed=seed,
        )
    if engine is not None:
        engine.close()
    empty(policy.lm)


def answers_of(
    context: StageContext,
    output: Path | None,
    examples: Sequence[Example],
    setting: Setting,
    seeds: Sequence[int],
    home: Path | None = None,
) -> Iterator[list[list[int]]]:
    """`ask`, but for answers that were kept.

    The base's own are kept with the stage of output `home`, which is on that base.
    """
    tokens, asked = context.session.tokens, [example.prompt_ids for example in examples]
    how = {**asdict(setting), "prompts": asked, "eos": tokens.eos_id, "pad": tokens.pad_id}
    if context.recipe.model.sampler == VLLM:
        how["sampler"] = VLLM
    abouts = [
        _about(context, output or home, **how | {"base": output is None, "seed": seed})
        for seed in seeds
    ]
    kept = group.first(lambda: [_recall(output or home, about) for about in abouts])
    missing = [seed for seed, answers in zip(seeds, kept, strict=True) if answers is None]
    told = (context.session, output, examples, setting, missing, context.progress.note)
    new = ask(*told) if missing else iter(())
    for about, answers in zip(abouts, kept, strict=True):
        if answers is None:
            answers = next(new)
            _keep(output or home, about, answers)
        yield answers
    next(new, None)  # lets go of the policy


def _about(context: StageContext, output: Path | None, **more: Any) -> dict[str, Any] | None:
    """All that decides a value of the stage that has this `output`; None if it has no record.

    A rehearsal's stages have none. `started` tells two stages of one key apart, as --fresh makes
    them. Rounding depends on the libraries and on the machine.
    """
    record = layout.read_record(output.parent) if output is not None else None
    if record is None:
        return None
    return {
        "stage": [record["key"], record["started"]],
        "kind": [context.kind, kind_of(context.kind).version],
        "dtype": str(compute_dtype(context.recipe.model.dtype)),
        "versions": provenance.versions(),
        "machine": machine(),
        **more,
    }


def _recall(output: Path | None, about: dict[str, Any] | None) -> Any:
    return None if about is None else recall(output.parent / "kept", about)


def _keep(output: Path | None, about: dict[str, Any] | None, value: Any) -> None:
    if about is not None and not group.rank():
        keep(output.parent / "kept", about, value)


def score(
    context: StageContext, groups: Sequence[Answered], tell: Tell = lambda count: None
) -> dict[str, list[float]]:
    """What the reward model and each judge say of every answer, by SCORERS' keys.

    Where PPO trains on several rewards, the first is their sum, and each is there as PART + name.

    Equal answers to a prompt are scored once, so that they tie. A group is scored apart, so what
    follows it changes no batch of it. Models score to four digits, which are all that answers.jsonl
    keeps: what is computed from them can be computed again. The reward model is what was optimised
    last, else the first one, if there is one.
    """
    recipe = context.recipe
    places = [
        [(tuple(e.prompt_ids), repr(e.row), tuple(ids)) for e, ids in some] for some in groups
    ]
    keys: list[Any] = [key for part in places for key in part]
    once: list[dict[Any, Any]] = []  # of each group, the answers that no earlier one has
    for part, some in zip(places, groups, strict=True):
        new = dict(zip(part, some, strict=True))
        once.append({k: row for k, row in new.items() if not any(k in one for one in once)})
    rows = [list(one.values()) for one in once]
    scorer, rewards = wiring(recipe)[EVALUATION].get("reward_model"), Rewards.of(context)
    names = {"reward_model": scorer, **{k: j.model for k, j in recipe.evaluation.judges.items()}}
    rules = written_rules(recipe)
    found: dict[str, list[float]] = {}
    for prefix, role in zip(SCORERS, ("reward_model", "judge", "judge2"), strict=True):
        if name := names.get(role):
            found[prefix] = scores_of(context, role, name, rows, tell)
        elif role in rules:
            found[prefix] = _judged(context, rules[role], rows, tell)
    if rewards:
        answered, own = [row for some in rows for row in some], found.get("")
        parts = group.first(lambda: rewards.parts(answered, own))
        for words in told_over(rewards.over):
            context.progress.note(words)
        found |= {"": rewards.totals(parts)}
        found |= {f"{PART}{k}_": [n or 0.0 for n in numbers] for k, numbers in parts.items()}
    order = {key: place for place, key in enumerate(key for one in once for key in one)}
    return {prefix: [scores[order[key]] for key in keys] for prefix, scores in found.items()}


def column_of(who: str) -> str:
    """What answers.jsonl calls the numbers of a scorer or of a part of the reward."""
    return SCORERS.get(who, who.removesuffix("_"))


def _judged(
    context: StageContext, judge: Term, groups: Sequence[Answered], tell: Tell
) -> list[float]:
    """By a rule; what it gave to answers that were over its bound is said."""
    rule, tokens = load_rule(judge, context.recipe.model.base), context.session.tokens
    rows = [said_of(row, tokens) for some in groups for row in some]
    found = group.first(lambda: [rule.verdict(row) for row in rows])
    tell(len(rows))
    for words in told_over({judge.name: rule.over}):
        context.progress.note(words)
    return found


def scores_of(
    context: StageContext, role: str, name: str, groups: Sequence[Answered], tell: Tell
) -> list[float]:
    """By the stage that serves `role`, else by the folder or hub id that it names.

    A judge on a base of its own is told the answers in its own ids; the policy's base goes first.
    """
    session, output, model = context.session, context.inputs.get(role), None
    on, found = session.of(JUDGE) if name == INDEPENDENT else session, list[float]()
    tokens, apart = on.tokens, on is not session
    for some in groups:
        both = [(list(example.prompt_ids), list(ids)) for example, ids in some]
        if apart:
            both, cut = reread(some, session.tokens, tokens, on.model_folder)
            if cut:
                what = f"{cut} of {len(both)} answers, with their prompts, were cut"
                context.progress.note(f"{what} to the positions of {on.recipe.model.name}")
        about = _about(context, output, rows=both, pad=tokens.pad_id)
        if (scores := group.first(partial(_recall, output, about))) is None:
            if model is None and output is not None:
                if apart:
                    session.release()
                model = open_reward(on.base, output)
            elif model is None:
                model = session.foreign(name)
            told = score_ids(model, both, tokens.pad_id, BATCH, tell).tolist()
            scores = [round(number, 4) for number in told]
            _keep(output, about, scores)
        else:
            tell(len(some))
        found += scores
    if model is not None:
        if model.told:
            context.progress.note(model.told)
        on.base.close(model)
    if apart:
        on.release()
    return found


# ---- the rehearsal of stages that only ask, and what their memory and work are counted from


def trial(recipe: Recipe, name: str) -> Trial:
    """As many prompts as are sampled at a time; of the best of many, two answers each."""
    asked = recipe.evaluation
    prompts = min(asked.prompts, SAMPLED)
    less = replace(asked, prompts=prompts, best_of=asked.best_of and 2)
    return Trial(replace(recipe, evaluation=less), 0, prompts)


def asked_work(recipe: Recipe, name: str, data: Data, answers: int, passes: int) -> Work:
    """So many `answers` to each prompt, each read by the model so many times."""
    found, asked = data.learned("test_prompts"), recipe.evaluation
    read = fmean(len(e.prompt_ids) for e in found) + answer_length(recipe, name)
    prompts = min(asked.prompts, len(found))
    each = 2 + len(asked.judges) + passes
    tokens = answers * -(-prompts // MOST) * answer_length(recipe, name)
    return Work(1, prompts * answers * read * each * FORWARD, tokens=tokens)


def sampling_memory(sim: Sim) -> Iterator[Held]:
    """A policy as it is exported, and as many answers as are sampled at a time."""
    rows = held_at_once(sim.recipe.evaluation.prompts, sim.lengths.row)
    with sim.model("policy", quantized=False, lora=False) as (tracker, [policy]):
        yield from sampling(tracker, policy, rows, sim.lengths)


def scoring_memory(sim: Sim) -> Iterator[Held]:
    yield from scoring(sim, min(BATCH, sim.recipe.evaluation.prompts))


def scoring(sim: Sim, rows: int) -> Iterator[Held]:
    """So many rows that a reward model reads."""
    with sim.model("reward") as (tracker, [reward]), torch.no_grad():
        reward(*ids_of(rows, sim.lengths.row))
        yield tracker.most
