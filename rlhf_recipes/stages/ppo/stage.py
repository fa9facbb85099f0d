"""PPO: the policy and its value model learn against the reward model, held near the reference.

Four roles on one base. The reference is the policy that the stage starts from (the bare base only
where nothing was trained before), the value starts from the reward model, and the reward is read in
units of its own spread over the training chosen answers. An answer that is cut off scores less than
a bad one that ends: see `reward_model.fined`. Default λ is 1: over answers of tens of
tokens with one score at the end, bootstrapping from a young value model costs more in bias than it
saves in variance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from statistics import fmean
from typing import Any

import torch
from trl.experimental.ppo import PPOConfig

from rlhf_recipes import signals, stats
from rlhf_recipes.data.dataset import Data
from rlhf_recipes.data.rows import Example, unique_prompts
from rlhf_recipes.models.fake_model import Held, Sim, ids_of, learning, sampling
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
from rlhf_recipes.recipe.tables import StageTable
from rlhf_recipes.stages import training
from rlhf_recipes.stages.contract import StageContext, StageResult, Trial, Work
from rlhf_recipes.stages.evidence import measure
from rlhf_recipes.stages.ppo.losses import Rollout
from rlhf_recipes.stages.ppo.trainer import PPOTrainer

__all__ = ["answer_length", "memory", "run", "trial", "work"]  # see contract.StageModule

ROLLOUT = "local_rollout_forward_batch_size"
SHOWN = {"score": "objective/scores", "KL": "objective/kl", "length": "val/length"}
VALIDATION_PROMPTS = 64  # a mean over fewer would pick the best by luck


def run(context: StageContext) -> StageResult:
    recipe, session = context.recipe, context.session
    table = recipe.table(context.name)
    data, prompts = training.load_rows(context)
    validation = [example.prompt_ids for example in unique_prompts(data.validation)]

    # ---- a reward model that is worth it
    base, scorer = session.base, context.inputs.get("reward_model")
    minimum, key = minimum_accuracy(recipe, table)
    if scorer is not None:
        found, told = json.loads((scorer / stats.FILE).read_text())["metrics"], {}
    else:
        reward = session.foreign(table.reward_model)
        floor = floor_of(reward, data.rejected, session.tokens.pad_id, table.options[ROLLOUT])
        found = measure(context, reward, data, 1.0, table.options[ROLLOUT])
        name = "reward" if "reward" not in recipe.stages else "foreign"
        told = {f"{name}.{metric}": number for metric, number in found.items()}
    if doubt := stats.gate(found, minimum, key):
        context.progress.note(doubt)

    # ---- four roles on one base
    start = context.inputs.get("policy")
    seed = context.seed("lora")
    policy = base.open("policy", start, seed=seed, trainable=True)
    # An adapter even where nothing was trained before: that of DoRA rounds the bare base.
    start_of_reference = context.inputs.get("reference", start)
    reference = base.open("reference", start_of_reference, seed=seed, adapter=True)
    value = base.open("value", scorer or start, seed=seed, trainable=True)
    if scorer is not None:
        reward, floor = open_reward(base, scorer), read_floor(scorer)
        value.add_head(load_head(value.lm, scorer))
    else:
        value.add_head(zero_head(value.lm))
    training.float32(*policy.trainable(), *value.trainable())

    # ---- training
    report = Report(context, prompts)
    if math.isinf(floor):
        context.progress.note("no pairs: a cut-off answer keeps its score, less the penalty")
    if table.extras["keep"] == "best" and not validation:
        context.progress.note("no validation prompts to find the best on: the last policy is kept")
    trainer = PPOTrainer(
        args=training.trainer_config(PPOConfig, context, stop_token="eos"),
        processing_class=session.tokens.tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=[{"input_ids": example.prompt_ids} for example in prompts],
        value_learning_rate=table.extras["value_learning_rate"],
        other_reference="reference" in context.inputs,
        value_warmup_epochs=table.extras["value_warmup_epochs"],
        floor=floor,
        limits=Limits(**table.extras["guard"]),
        keep=table.extras["keep"],
        validation_prompts=validation[:VALIDATION_PROMPTS],
        on_update=report,
        key=context.key,
        progress=context.progress,
    )
    scored = table.options[ROLLOUT]
    context.progress.note(f"answers: {trainer.sampled} sampled together, {scored} scored together")
    with signals.deferred():
        trainer.train()
    if trainer.stopped:
        context.progress.note(f"stopped: {trainer.stopped}")

    if reward.told:
        context.progress.note(reward.told)
    if trainer.skipped:
        said = f"{trainer.skipped} optimizer steps were skipped: gradients beyond float16"
        context.progress.note(said)

    # ---- output
    output = context.folder / "output"
    base.save(policy, output)
    (output / "value").mkdir()
    base.save(value, output / "value")
    base.close(policy, reference, reward, value)
    first, last = trainer.guard.first, trainer.metrics
    metrics = {
        "updates": trainer.state.global_step,
        "episodes": trainer.state.episode,
        "train_score_first": first["objective/scores"],
        "train_score": last["objective/scores"],
        "train_kl": last["objective/kl"],
        "train_length": last["val/length"],
        "stopped": trainer.stopped,
        "minimum_accuracy": minimum,
        **({"skipped_steps": trainer.skipped} if trainer.scaled else {}),
        **told,
    }
    if table.extras["keep"] == "best" and trainer.best is not None:
        metrics |= {"kept_update": trainer.best.update, "validation_score": trainer.best.score}
        metrics |= {"validation_objective": trainer.best.objective}
        metrics["kept_by"] = f"score - {trainer.args.kl_coef:g} × KL on validation prompts"
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

    def __call__(self, trainer: PPOTrainer, rollout: Rollout, metrics: dict[str, float]) -> None:
        state, shown = trainer.state, {name: metrics[key] for name, key in SHOWN.items()}
        self.context.progress.update(state.global_step, state.max_steps, **shown, **metrics)
        count = trainer.args.num_sample_generations
        every = math.ceil(state.max_steps / count) if count else 0
        if every and (state.global_step - 1) % every == 0:
            for row in range(min(2, len(rollout.scores))):
                self._sample(trainer, rollout, row)

    def _sample(self, trainer: PPOTrainer, rollout: Rollout, row: int) -> None:
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
    return recipe.table(name).options["response_length"]


def trial(recipe: Recipe, name: str) -> Trial:
    given = recipe.table(name).options
    options = one_update(given)
    less = training.shortened(recipe, name, options, minimum_accuracy=0.0)
    return Trial(less, options["total_episodes"], min(given[ROLLOUT], VALIDATION_PROMPTS))


def one_update(given: Mapping[str, Any]) -> dict[str, Any]:
    """An update on no more answers than are sampled or scored together, in two steps or more."""
    rows, micros = given["per_device_train_batch_size"], given["gradient_accumulation_steps"]
    minis = given["num_mini_batches"]
    if micros >= minis and not given["whiten_rewards"]:  # else a mini-batch is as small as it goes
        sampled = min(max(SAMPLED, given[ROLLOUT]), rows * micros)
        each, minis = micros // minis, min(minis, training.STEPS)
        each = min(each, max(min(each, training.STEPS), -(-sampled // (rows * minis))))
        micros = each * minis
    updates = 1 if minis * given["num_ppo_epochs"] > 1 else training.STEPS
    return {
        "gradient_accumulation_steps": micros,
        "num_mini_batches": minis,
        "total_episodes": rows * micros * updates,
        "eval_steps": updates,
        "save_steps": updates,
    }


def work(recipe: Recipe, name: str, data: Data) -> Work:
    options, asked = recipe.table(name).options, data.learned("prompts")
    size = training.batch(options)
    steps = math.ceil(options["total_episodes"] / size)
    read = fmean(len(e.prompt_ids) for e in asked) + options["response_length"]
    learns = options["num_ppo_epochs"] * 2 * (training.FORWARD + training.BACKWARD)
    times, prompts = _looks(options, steps), min(VALIDATION_PROMPTS, len(data.validation))
    seen = 5 * training.FORWARD * read  # the sampling, and the opinions of four roles
    batches = steps * math.ceil(size / MOST) + times * bool(prompts)
    tokens = batches * options["response_length"]
    return Work(steps, size * (seen + learns * read), times * prompts * seen, tokens)


def _looks(options: Mapping[str, Any], updates: int) -> int:
    """How often PPO looks at validation prompts."""
    if options["eval_strategy"] == "no":
        return 0
    every = options["eval_steps"]
    return 1 + math.ceil(updates / math.ceil(every if every >= 1 else every * updates))


def memory(sim: Sim) -> Iterator[Held]:
    """The sampling, the opinions of the roles, and the learning of policy and value."""
    lengths, options = sim.lengths, sim.options
    temperature, size = options["temperature"], training.batch(options)
    rows = min(options["per_device_train_batch_size"], size // options["num_mini_batches"])
    looked_at = lengths.validation if options["eval_strategy"] != "no" else 0
    scored = min(options[ROLLOUT], max(size, looked_at))
    sampled = held_at_once(max(size, looked_at), lengths.row)
    if sim.card:  # there it is as many as the rest of the memory holds
        sampled = min(sampled, scored)
    names, trained = ["policy", "reference", "value", "reward"], ["policy", "value"]
    with sim.model(*names, trained=trained) as (tracker, [policy, _, value, *_]):
        policy.lm.eval(), value.lm.eval()
        yield from sampling(tracker, policy, sampled, lengths)
        tracker.begin()
        given = (*ids_of(scored, lengths.row), lengths.answer)
        with policy.active(), torch.no_grad():
            logprobs(policy, *given, temperature)
        yield tracker.most
        given = (*ids_of(rows, lengths.row), lengths.answer)
        if options["gradient_checkpointing"]:
            policy.lm.train(), value.lm.train()
        if not sim.card and policy.pairs_with(value):
            with policy.active(beside=value):

                def both() -> torch.Tensor:
                    new, _, guess = logprobs_and_values(policy, value, *given, temperature)
                    return new.sum() + guess.sum()

                yield from learning(tracker, both)
            return
        with policy.active():
            words = (policy, *given, temperature)
            yield from learning(tracker, lambda: logprobs(*words)[0].sum())
        with value.active():
            yield from learning(tracker, lambda: values(value, *given).sum())
