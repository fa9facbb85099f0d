"""A policy learns on its own answers, held near the reference: PPO's stage, RLOO's and GRPO's.

Three roles on one base, and in PPO a fourth, the value model, which starts from the reward model.
The reference is the policy that the stage starts from (the bare base only where nothing was trained
before). The reward is read in units of its own spread over the training chosen answers. An answer
that is cut off scores less than a bad one that ends: see `reward_model.fined`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch

from rlhf_recipes import signals, stats
from rlhf_recipes.data.dataset import Data
from rlhf_recipes.data.rows import Example, unique_prompts
from rlhf_recipes.models.fake_model import WEIGHTS, Held, Sim, ids_of, learning, sampling
from rlhf_recipes.models.reward_model import (
    floor_of,
    load_head,
    open_reward,
    read_floor,
    zero_head,
)
from rlhf_recipes.models.role import logprobs, logprobs_and_values, values
from rlhf_recipes.models.sampling import MOST, SAMPLED, held_at_once
from rlhf_recipes.recipe.kinds import MINIMUM_ACCURACY, Limits
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.tables import VLLM, StageTable
from rlhf_recipes.recipe.wiring import columns_of
from rlhf_recipes.stages import training
from rlhf_recipes.stages.contract import StageContext, StageResult, Trial, Work
from rlhf_recipes.stages.evidence import measure
from rlhf_recipes.stages.ppo.config import PPOConfig, episodes
from rlhf_recipes.stages.ppo.loop import OnPolicyTrainer
from rlhf_recipes.stages.ppo.losses import Rollout
from rlhf_recipes.stages.rewards.mixed import Prompt, Rewards
from rlhf_recipes.stages.rewards.rule import told_over

ROLLOUT = "local_rollout_forward_batch_size"
Options = Mapping[str, Any]
SHOWN = {"score": "objective/scores", "KL": "objective/kl", "length": "val/length"}
VALIDATION_PROMPTS = 64  # a mean over fewer would pick the best by luck


@dataclass(frozen=True)
class Method:
    """What tells the kinds of this stage apart."""

    trainer: type[OnPolicyTrainer]
    options: Callable[[StageTable], Options]  # the fields of PPOConfig
    words: Callable[[StageTable], Options]  # what its trainer is told beside them
    one_update: Callable[[StageTable], Options]  # by its own names: what a rehearsal runs
    critic: bool = False

    def exports(self) -> tuple[Callable[..., Any], ...]:
        """`run`, `trial`, `work`, `memory` and `answer_length` of its module."""
        return *(partial(one, method=self) for one in (run, trial, work, memory)), answer_length


def run(context: StageContext, method: Method) -> StageResult:
    recipe, session = context.recipe, context.session
    table = recipe.table(context.name)
    options = method.options(table)
    data, prompts = training.load_rows(context)
    validation = unique_prompts(data.validation, columns_of(recipe, context.name))

    # ---- a reward model that is worth it, or rules alone
    base, scorer = session.base, context.inputs.get("reward_model")
    rewards, minimum, key = Rewards.of(context), *minimum_accuracy(recipe, table)
    reward, floor, told = None, math.inf, {}
    if scorer is not None:
        found = json.loads((scorer / stats.FILE).read_text())["metrics"]
    elif table.reward_model:
        reward = session.foreign(table.reward_model)
        floor = floor_of(reward, data.rejected, session.tokens.pad_id, options[ROLLOUT])
        found = measure(context, reward, data, 1.0, options[ROLLOUT])
        name = "reward" if "reward" not in recipe.stages else "foreign"
        told = {f"{name}.{metric}": number for metric, number in found.items()}
    if table.reward_model:
        told["minimum_accuracy"] = minimum
        if doubt := stats.gate(found, minimum, key):
            context.progress.note(doubt)

    # ---- the roles on one base
    start = context.inputs.get("policy")
    seed = context.seed("lora")
    policy = base.open("policy", start, seed=seed, trainable=True)
    # An adapter even where nothing was trained before: that of DoRA rounds the bare base.
    start_of_reference = context.inputs.get("reference", start)
    reference = base.open("reference", start_of_reference, seed=seed, adapter=True)
    if scorer is not None:
        reward, floor = open_reward(base, scorer), read_floor(scorer)
    learners, words = [policy], dict(method.words(table))
    if method.critic:
        words["value_model"] = value = base.open(
            "value", scorer or start, seed=seed, trainable=True
        )
        value.add_head(load_head(value.lm, scorer) if scorer else zero_head(value.lm))
        learners.append(value)
    training.float32(*(weights for role in learners for weights in role.trainable()))

    if rewards:
        rewards.check([*prompts, *validation, *data.test])

    # ---- training
    report = Report(context, prompts)
    if math.isinf(floor):
        why = "no pairs" if table.reward_model else "rules alone"
        context.progress.note(f"{why}: a cut-off answer keeps its score, less the penalty")
    if table.extras["keep"] == "best" and not validation:
        context.progress.note("no validation prompts to find the best on: the last policy is kept")
    place, save = context.folder / "work" / "vllm", partial(base.save, policy)
    engine = session.engine(place, context.progress.note, save)
    trainer = method.trainer(
        args=training.trainer_config(PPOConfig, context, options),
        processing_class=session.tokens.tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        train_dataset=[{"input_ids": Prompt(example)} for example in prompts],
        rewards=rewards,
        other_reference="reference" in context.inputs,
        floor=floor,
        limits=Limits(**table.extras["guard"]),
        keep=table.extras["keep"],
        validation_prompts=[Prompt(example) for example in validation[:VALIDATION_PROMPTS]],
        on_update=report,
        merged={"merged": True, "adapters": False}.get(recipe.model.sampler),
        engine=engine,
        key=context.key,
        progress=context.progress,
        **words,
    )
    scored = options[ROLLOUT]
    sizes = f"{trainer.sampled} sampled together, " * (engine is None)
    sizes += f"{scored} scored together"
    context.progress.note(f"answers: {sizes}; sampled {trainer.sampler.told}")
    with signals.deferred():
        trainer.train()
    if engine is not None:
        engine.close()
        told["sampler_apart"] = trainer.metrics["val/sampler_apart"]
    if trainer.stopped:
        context.progress.note(f"stopped: {trainer.stopped}")

    if reward is not None and reward.told:
        context.progress.note(reward.told)
    if trainer.skipped:
        said = f"{trainer.skipped} optimizer steps were skipped: gradients beyond float16"
        context.progress.note(said)

    # ---- output
    output = context.folder / "output"
    base.save(policy, output)
    if method.critic:
        (output / "value").mkdir()
        base.save(value, output / "value")
    base.close(reference, *filter(None, [reward]), *learners)
    first, last = trainer.guard.first, trainer.metrics
    metrics = {
        "updates": trainer.state.global_step,
        "episodes": trainer.state.global_step * trainer.batch_size,
        "train_score_first": first["objective/scores"],
        "train_score": last["objective/scores"],
        "train_kl": last["objective/kl"],
        "train_length": last["val/length"],
        "stopped": trainer.stopped,
        **({"skipped_steps": trainer.skipped} if trainer.scaled else {}),
        **told,
    }
    if table.extras["keep"] == "best" and trainer.best is not None:
        metrics |= {"kept_update": trainer.best.update, "validation_score": trainer.best.score}
        metrics |= {"validation_objective": trainer.best.objective}
        metrics["kept_by"] = f"score - {trainer.args.kl_coef:g} × KL on validation prompts"
    if rewards:
        over = rewards.over.items()
        metrics |= {f"{context.name}.over.{rule}": sum(n.values()) for rule, n in over}
        for phrase in told_over(rewards.over):
            context.progress.note(phrase)
    before, now = metrics["train_score_first"], metrics["train_score"]
    summary = f"score {before:+.2f} → {now:+.2f}, KL {metrics['train_kl']:.2f}"
    if metrics.get("kept_update", trainer.state.global_step) != trainer.state.global_step:
        summary += f"; kept the policy of update {metrics['kept_update']}"
    return StageResult(metrics, summary + (f"; stopped: {trainer.stopped}" * bool(trainer.stopped)))


def minimum_accuracy(recipe: Recipe, table: StageTable) -> tuple[float, str]:
    """The accuracy below which the recipe does not want PPO to start, and the key that says so."""
    for name in (table.name, table.reward_model):
        own = recipe.tables[name].extras if name in recipe.tables else {}
        if own.get("minimum_accuracy") is not None:
            return own["minimum_accuracy"], f"{name}.minimum_accuracy"
    return MINIMUM_ACCURACY, f"{table.name}.minimum_accuracy"


class Report:
    """Hands each update's numbers, and two completions every few updates, to the progress."""

    def __init__(self, context: StageContext, prompts: list[Example]):
        self.context = context
        self.shown = {tuple(example.prompt_ids): example.prompt for example in prompts}

    def __call__(
        self, trainer: OnPolicyTrainer, rollout: Rollout, metrics: dict[str, float]
    ) -> None:
        state, shown = trainer.state, {name: metrics[key] for name, key in SHOWN.items()}
        self.context.progress.update(state.global_step, state.max_steps, **shown, **metrics)
        count = trainer.args.num_sample_generations
        every = math.ceil(state.max_steps / count) if count else 0
        if every and (state.global_step - 1) % every == 0:
            for row in range(min(2, len(rollout.scores))):
                self._sample(trainer, rollout, row)

    def _sample(self, trainer: OnPolicyTrainer, rollout: Rollout, row: int) -> None:
        tokens, sequences = self.context.session.tokens, rollout.sequences
        prompt = trainer.prompts(trainer.state.global_step)[row]
        answer = sequences.ids[row, -sequences.answer :][: int(sequences.lengths[row])]
        self.context.progress.sample(
            self.shown[tuple(prompt)],
            tokens.decode(answer.tolist()),
            update=trainer.state.global_step,
            score=float(rollout.scores[row]),
        )


# ---- its rehearsal, and what its memory and its work are counted from


def answer_length(recipe: Recipe, name: str) -> int:
    return recipe.table(name).said("response_length")


def trial(recipe: Recipe, name: str, method: Method) -> Trial:
    table = recipe.table(name)
    less = training.shortened(recipe, name, method.one_update(table), minimum_accuracy=0.0)
    answers = method.options(less.table(name))["total_episodes"]
    return Trial(less, answers, min(method.options(table)[ROLLOUT], VALIDATION_PROMPTS))


def cut(given: Options) -> dict[str, int]:
    """An update on no more answers than are sampled or scored together, in two steps or more."""
    rows, micros = given["per_device_train_batch_size"], given["gradient_accumulation_steps"]
    minis = given["num_mini_batches"]
    if micros >= minis and not given["whiten_rewards"]:  # else a mini-batch is as small as it goes
        sampled = min(max(SAMPLED, given[ROLLOUT]), rows * micros)
        each, minis = micros // minis, min(minis, training.STEPS)
        each = min(each, max(min(each, training.STEPS), -(-sampled // (rows * minis))))
        micros = each * minis
    return {"gradient_accumulation_steps": micros, "num_mini_batches": minis}


def work(recipe: Recipe, name: str, data: Data, method: Method) -> Work:
    options, asked = (
        method.options(recipe.table(name)),
        data.learned("prompts", columns_of(recipe, name)),
    )
    size = training.batch(options)
    copies = recipe.table(name).options.get("num_generations", 1)
    steps = math.ceil(episodes(options, len(asked) * copies) / size)
    read = fmean(len(e.prompt_ids) for e in asked) + options["response_length"]
    roles = 1 + method.critic
    learns = options["num_ppo_epochs"] * roles * (training.FORWARD + training.BACKWARD)
    times, prompts = _looks(options, steps), min(VALIDATION_PROMPTS, len(data.validation))
    seen = (3 + roles) * training.FORWARD * read  # the sampling, and each role's opinion
    batches = steps * math.ceil(size / MOST) + times * bool(prompts)
    tokens = batches * options["response_length"]
    return Work(steps, size * (seen + learns * read), times * prompts * seen, tokens)


def _looks(options: Mapping[str, Any], updates: int) -> int:
    """How often PPO looks at validation prompts."""
    if options["eval_strategy"] == "no":
        return 0
    every = options["eval_steps"]
    return 1 + math.ceil(updates / math.ceil(every if every >= 1 else every * updates))


def memory(sim: Sim, method: Method) -> Iterator[Held]:
    """The sampling, the opinions of the roles, and the learning of those that learn."""
    lengths, options = sim.lengths, method.options(sim.recipe.table(sim.name))
    temperature, size = options["temperature"], training.batch(options)
    rows = min(options["per_device_train_batch_size"], size // options["num_mini_batches"])
    looked_at = lengths.validation if options["eval_strategy"] != "no" else 0
    scored = min(options[ROLLOUT], max(size, looked_at))
    sampled = held_at_once(max(size, looked_at), lengths.row)
    if sim.card:  # there it is as many as the rest of the memory holds
        sampled = min(sampled, scored)
    trained = ["policy", "value"] if method.critic else ["policy"]
    names = [*trained, "reference"]
    names += ["reward"] if sim.recipe.table(sim.name).reward_model else []
    with sim.model(*names, trained=trained) as (tracker, roles):
        policy, value = roles[0], roles[1] if method.critic else None
        learners = roles[: len(trained)]
        for role in learners:
            role.lm.eval()
        merged = sim.recipe.model.sampler == "merged" and sim.recipe.model.quantization != "8bit"
        layers = [layer for _, layer in policy.adapted()] if merged else []
        copies = [torch.empty(m.out_features * m.in_features, dtype=sim.dtype) for m in layers]
        for tensor in copies:
            tracker.move(tensor, WEIGHTS)
        if sim.recipe.model.sampler != VLLM:
            yield from sampling(tracker, policy, sampled, lengths)
        tracker.begin()
        given = (*ids_of(scored, lengths.row), lengths.answer)
        with policy.active(), torch.no_grad():
            logprobs(policy, *given, temperature)
        yield tracker.most
        given = (*ids_of(rows, lengths.row), lengths.answer)
        if options["gradient_checkpointing"]:
            for role in learners:
                role.lm.train()
        if value and not sim.card and policy.pairs_with(value):
            with policy.active(beside=value):

                def both() -> torch.Tensor:
                    new, _, guess = logprobs_and_values(policy, value, *given, temperature)
                    return new.sum() + guess.sum()

                yield from learning(tracker, both)
            return
        with policy.active():
            words = (policy, *given, temperature)
            yield from learning(tracker, lambda: logprobs(*words)[0].sum())
        if value:
            with value.active():
                yield from learning(tracker, lambda: values(value, *given).sum())
