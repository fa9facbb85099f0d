"""What a stage needs of memory, by rule: its step on tensors that have a shape and no content.

The roles are those of the stage and the passes its own, on a model built from `config.json`. Every
tensor that lives counts, under what it is for, and the moment when most do is the answer. It is
done on a few of the model's layers, twice; what one layer adds is the same for each.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from trl.trainer.sft_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE as CHUNK
from trl.trainer.sft_trainer import _chunk
from trl.trainer.utils import entropy_from_logits

from rlhf_recipes.data.dataset import Data
from rlhf_recipes.models import role as passes
from rlhf_recipes.models.role import Role
from rlhf_recipes.pipeline.fake_model import CACHE, Held, Lengths, Sim, Tracker
from rlhf_recipes.pipeline.flops import ASKED, SAMPLING, answer_length, batch, rows, sequences
from rlhf_recipes.pipeline.plan import PlannedStage
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.tables import EVALUATION
from rlhf_recipes.stages.answers import BATCH, SAMPLED, TOKENS
from rlhf_recipes.stages.evaluate import LOGITS
from rlhf_recipes.stages.ppo.stage import ROLLOUT, VALIDATION_PROMPTS

FEW, MORE = 2, 4  # layers


def lengths_of(recipe: Recipe, stage: PlannedStage, data: Data | None) -> Lengths:
    """Of a stage's longest rows; without any, of the longest that the recipe lets in."""
    prompt, answer = recipe.dataset.max_prompt_tokens, recipe.dataset.max_answer_tokens
    row, looked_at = prompt + answer, VALIDATION_PROMPTS
    if data and (found := rows(data, stage.kind)):
        prompt = max(len(example.prompt_ids) for example in found)
        answer = max(len(example.chosen_ids or ()) for example in found)
        row = max(max(sequences(example, stage.kind)) for example in found)
        looked_at = min(VALIDATION_PROMPTS, len(data.validation))
    if stage.kind in SAMPLING:
        answer = answer_length(recipe, stage)
        row = prompt + answer
    return Lengths(prompt, row, answer, looked_at)


def footprint(sim: Sim) -> Held:
    """The bytes that a stage needs when it needs most, by role; without those of the libraries."""
    layers = sim.config.get_text_config().num_hidden_layers
    if layers <= MORE:
        phases = _phases(sim, layers)
    else:
        few, more = (_phases(sim, n) for n in (FEW, MORE))
        phases = [
            Counter({r: m[r] + (m[r] - f[r]) * (layers - MORE) / (MORE - FEW) for r in m})
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
    steps = {"sft": _sft, "ppo": _ppo, "dpo": _dpo, **dict.fromkeys(ASKED, _evaluation)}
    return list(steps.get(sim.stage.kind, _reward)(replace(sim, config=config)))


# ---- the stages' parts --------------------------------------------------------------------------


def _ids(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)


def _learning(tracker: Tracker, loss: Callable[[], torch.Tensor]) -> Iterator[Held]:
    """Forward and backward."""
    tracker.begin()
    total = loss()
    yield tracker.most
    tracker.begin()
    total.backward()
    yield tracker.most


def _training(
    sim: Sim, tracker: Tracker, role: Role, loss: Callable[[int], torch.Tensor], each: int = 1
) -> Iterator[Held]:
    """A step, of `each` sequences a row; and what is evaluated between the steps and after them."""
    rows = sim.options["per_device_train_batch_size"]
    yield from _learning(tracker, lambda: loss(each * rows))
    role.lm.eval()
    for weight in role.lm.parameters():
        weight.grad = None
    tracker.kept = [tensor for tensor in tracker.kept if tensor.dtype == torch.uint8]
    tracker.begin()
    with torch.no_grad():
        loss(sim.options["per_device_eval_batch_size"])
    yield tracker.most


def _sft(sim: Sim) -> Iterator[Held]:
    with sim.model("policy", trained=["policy"]) as (tracker, [policy]):

        def loss(rows: int) -> torch.Tensor:
            with policy.active():
                hidden = policy.hidden(*_ids(rows, sim.lengths.row))
                packed = hidden[:, :-1].reshape(-1, hidden.shape[-1])
                packed = packed[torch.zeros(len(packed), dtype=torch.long)]
                head, total = policy.lm.get_output_embeddings(), 0.0
                some = min(rows * sim.lengths.answer, 3 * CHUNK)  # more chunks take no more
                for start in range(0, some, CHUNK):
                    part = packed[start : start + CHUNK]
                    goal = torch.zeros(len(part), dtype=torch.long)
                    words = (part, head.weight, head.bias, goal, 1.0, None)
                    total = total + checkpoint(_chunk, *words, use_reentrant=False)[0]
                return total

        yield from _training(sim, tracker, policy, loss)


def _reward(sim: Sim) -> Iterator[Held]:
    with sim.model("reward", trained=["reward"]) as (tracker, [reward]):

        def scores(rows: int) -> torch.Tensor:
            return reward(*_ids(rows, sim.lengths.row)).logits.sum()

        yield from _training(sim, tracker, reward, scores, each=2)


def _dpo(sim: Sim) -> Iterator[Held]:
    with sim.model("policy", "reference", trained=["policy"]) as (tracker, both):

        def loss(rows: int) -> torch.Tensor:
            ids, mask = _ids(2 * rows, sim.lengths.row)
            total, outs = 0.0, []
            for role in both:
                learns = torch.is_grad_enabled() and role is both[0]
                with role.active(), torch.set_grad_enabled(learns):
                    words = {"attention_mask": mask, "use_cache": False}
                    # In float32: accelerate's. And nothing is left of what it was before.
                    outs.append(role.lm(input_ids=ids, **words).logits.float()[:, :-1])
                # TRL's log-probability less its `gather`, which keeps the logits, and whose
                # gradient is added in place; here it would not be.
                total = total + torch.stack([torch.logsumexp(row, -1) for row in outs[-1]]).sum()
            entropy_from_logits(outs[0].detach())
            tracker.kept.append(outs[0])
            return total

        yield from _training(sim, tracker, both[0], loss)


def _ppo(sim: Sim) -> Iterator[Held]:
    lengths, options = sim.lengths, sim.options
    temperature, size = options["temperature"], batch(options)
    rows = min(options["per_device_train_batch_size"], size // options["num_mini_batches"])
    looked_at = lengths.validation if options["eval_strategy"] != "no" else 0
    sampled = min(options[ROLLOUT], max(size, looked_at))
    names, trained = ["policy", "reference", "value", "reward"], ["policy", "value"]
    with sim.model(*names, trained=trained) as (tracker, [policy, _, value, *_]):
        policy.lm.eval(), value.lm.eval()
        yield from _sampling(tracker, policy, sampled, lengths)
        tracker.begin()
        given = (*_ids(sampled, lengths.row), lengths.answer)
        with policy.active(), torch.no_grad():
            passes.logprobs(policy, *given, temperature)
        yield tracker.most
        given = (*_ids(rows, lengths.row), lengths.answer)
        if options["gradient_checkpointing"]:
            policy.lm.train(), value.lm.train()
        if not sim.card and policy.pairs_with(value):
            with policy.active(beside=value):

                def both() -> torch.Tensor:
                    new, _, guess = passes.logprobs_and_values(policy, value, *given, temperature)
                    return new.sum() + guess.sum()

                yield from _learning(tracker, both)
            return
        with policy.active():
            words = (policy, *given, temperature)
            yield from _learning(tracker, lambda: passes.logprobs(*words)[0].sum())
        with value.active():
            yield from _learning(tracker, lambda: passes.values(value, *given).sum())


def _sampling(tracker: Tracker, policy: Role, rows: int, lengths: Lengths) -> Iterator[Held]:
    """The prompts, and the last token of the longest answers."""

    def read(new: int, length: int, cache: Any = None) -> Any:
        words = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        ids, mask = _ids(rows, new)[0], _ids(rows, length)[1]
        with policy.active(), torch.no_grad():
            return policy.lm(input_ids=ids, attention_mask=mask, **words)

    tracker.begin()
    read(lengths.prompt, lengths.prompt)
    yield tracker.most
    cache = read(lengths.row - 1, lengths.row - 1).past_key_values
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            if tensor is not None:
                tracker.move(tensor, CACHE)
    tracker.begin()
    logits = read(1, lengths.row, cache).logits[:, -1].float()
    torch.multinomial(torch.softmax(logits / 0.7, -1), 1)
    yield tracker.most


def _evaluation(sim: Sim) -> Iterator[Held]:
    lengths, prompts = sim.lengths, sim.recipe.evaluation.prompts
    rows = max(1, min(SAMPLED, prompts, TOKENS // lengths.row))
    with sim.model("policy", quantized=False, lora=False) as (tracker, [policy]):
        yield from _sampling(tracker, policy, rows, lengths)
    if sim.stage.kind == EVALUATION:
        rows = min(BATCH, prompts, max(1, LOGITS // (lengths.answer * sim.vocabulary)))
        with sim.model("policy", "start", quantized=False) as (tracker, both), torch.no_grad():
            given, found = (*_ids(rows, lengths.row), lengths.answer, 1.0), []
            for role in both:
                with role.active():
                    out = passes.logits(role, *given)
                found.append(torch.log_softmax(out, dim=-1))
            (found[0].exp() * (found[0] - found[1])).sum(-1)
            yield tracker.most
    with sim.model("reward") as (tracker, [reward]), torch.no_grad():
        reward(*_ids(min(BATCH, prompts), lengths.row))
        yield tracker.most
