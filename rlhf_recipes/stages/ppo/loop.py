"""Training a policy on the answers that it samples: what PPO, RLOO and GRPO share.

Where TRL's PPO loop was right, this one gives the same numbers, under TRL's names. It departs in
that (numbers are those of the TRL-facts list in LOG.md)

- 4: an optimizer step is one mini-batch: `num_ppo_epochs × num_mini_batches` steps an update,
  whatever the accumulation; losses are sums over a mini-batch's tokens divided by their number;
- 5: the reference is a role of its own, frozen where the stage started, not the bare base;
- 8, 16: what an update draws is a function of (seed, update), so the loop holds no hidden state,
  and goes on from a checkpoint as if it had never stopped;
- 10: prompts are taken from an endless permutation, so a dataset smaller than a batch serves;
- 12: rollouts are sampled under a GenerationConfig that nothing is filled into;
- 13: masks come from lengths;
- 15: `max_grad_norm` clips, each group of weights apart; `gradient_checkpointing` is enabled for
  the update and off in rollouts;
- 18: an answer without EOS scores at most `floor`, less `missing_eos_penalty`;
- 19: no logits for prompt positions, none kept for a whole rollout batch.

In float16 its losses are scaled. Stock has no scaler there.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer
from trl.trainer.utils import disable_dropout_in_model

from rlhf_recipes import group, signals
from rlhf_recipes.errors import StageError
from rlhf_recipes.models.reward_model import fined
from rlhf_recipes.models.role import Role, logprobs, score
from rlhf_recipes.models.sampler import SHARE, Sampler, apart
from rlhf_recipes.models.sampling import Sequences, join, rows_at_once
from rlhf_recipes.models.vllm import Vllm
from rlhf_recipes.recipe.kinds import Limits
from rlhf_recipes.recipe.rewards import LOGGED
from rlhf_recipes.screen import StageProgress
from rlhf_recipes.stages.checkpoints import STATE, Resumable
from rlhf_recipes.stages.ppo import checks
from rlhf_recipes.stages.ppo.config import PPOConfig, episodes
from rlhf_recipes.stages.ppo.guards import Guard
from rlhf_recipes.stages.ppo.losses import (
    Learned,
    Loss,
    Rollout,
    Rows,
    corrected,
    masked_mean,
)
from rlhf_recipes.stages.rewards.mixed import Rewards
from rlhf_recipes.stages.training import batch, two_rates
from rlhf_recipes.store.digests import derive_seed

# Of the losses in float16, whose least number is 6e-8: a token's share of 32,768 would lose its
# gradients. A step that overflows is skipped, and halves it.
LOSS_SCALE = 2.0**12
GUARD = ("first", "scores", "broken")  # what a checkpoint holds of it


@dataclass(frozen=True)
class Best:
    """The policy that is best on the validation prompts so far, by PPO's own objective."""

    update: int  # 0: the start
    score: float
    objective: float  # score - kl_coef × KL: the score alone prefers the most over-optimised one
    policy: list[torch.Tensor]  # a copy of its trainable weights


class OnPolicyTrainer(Resumable, Trainer):
    """The loop. Its heirs say what an answer was worth (`learned`) and what is lost (`loss`).

    `model`, `ref_model` and `reward_model` are `Role`s. `train_dataset` is a list of
    {"input_ids": prompt}. `on_update(trainer, rollout, metrics)` is called after each update. The
    reference must equal the policy at the start unless `other_reference`. With `keep="best"` the
    policy ends as it was where score - kl_coef × KL was highest on `validation_prompts`, within
    `limits.max_kl`, its start included. With `rewards` a score is their sum, the prompts are
    `mixed.Prompt`s, and there need be no reward model. `merged` says whether answers come from a
    merged copy; None: as the checkpoint has it that the loop goes on from, else they do not. With
    an `engine` they come from there.
    """

    whole_answers = False  # whether the ratio that is clipped is a whole answer's

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: Role,
        ref_model: Role,
        reward_model: Role | None,
        train_dataset: Sequence[dict[str, list[int]]],
        *,
        key: str,
        progress: StageProgress,
        other_reference: bool = False,
        floor: float = math.inf,
        limits: Limits | None = None,
        keep: str = "last",
        validation_prompts: Sequence[list[int]] = (),
        on_update: Callable[[Any, Rollout, dict[str, float]], None] = lambda *_: None,
        copies: int = 1,
        rewards: Rewards | None = None,
        merged: bool | None = None,
        engine: Vllm | None = None,
    ):
        self.key, self.progress = key, progress
        self.policy_model, self.ref_model, self.reward_model = model, ref_model, reward_model
        self.other_reference = other_reference
        self.floor = floor
        self.guard = Guard(limits or Limits())
        self.keep = keep
        self.validation_prompts = validation_prompts
        self.best: Best | None = None
        self.stopped = ""  # why it ended before its last update
        self.metrics: dict[str, float] = {}  # the last update's
        self.on_update = on_update
        self.skipped = 0  # optimizer steps
        self.rewards = rewards
        self.copies = copies  # answers to a prompt in an update
        self.batch_size = batch(vars(args))
        self.mini_batch_size, rest = divmod(self.batch_size, args.num_mini_batches)
        if rest:
            raise ValueError("`num_mini_batches` must divide an update's answers")
        self.episodes = episodes(vars(args), len(train_dataset) * self.copies)
        self.updates = math.ceil(self.episodes / self.batch_size)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=list(validation_prompts),
            processing_class=processing_class,
        )
        for role in {model, ref_model, reward_model, *self.learners} - {None}:
            disable_dropout_in_model(role)  # LoRA's
        self.create_optimizer_and_scheduler(self.updates)
        prompts = [*(row["input_ids"] for row in train_dataset), *validation_prompts]
        self.longest = max(map(len, prompts))
        steps = self.updates * args.response_length
        self.merged = merged
        self.sampler = Sampler(model, bool(merged), progress.note, self.longest, steps, engine)
        self.scaled = model.dtype == torch.float16
        self.loss_scale = LOSS_SCALE if self.scaled else 1.0

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        self.optimizer = two_rates(self.args, self.policy_model.trainable())
        return self.optimizer

    # ---- what its heirs say

    def learned(self, rollout: Rollout) -> Learned:
        """What the rollout teaches."""
        raise NotImplementedError

    def loss(self, new: torch.Tensor, entropy: torch.Tensor, rows: Rows) -> Loss:
        """The policy's, from its log-probabilities and entropies now."""
        raise NotImplementedError

    @property
    def learners(self) -> tuple[Role, ...]:
        """The roles whose weights move."""
        return (self.policy_model,)

    def passes(self, update: int) -> Iterator[tuple[int, Callable[[Rows], dict]]]:
        """The passes over an update's answers: each with its number, and what learns in it."""
        return ((epoch, self._learn) for epoch in range(self.args.num_ppo_epochs))

    # ---- the loop -------------------------------------------------------------------------------

    def train(self) -> None:
        """Run the updates that `total_episodes` asks for, or fewer where a guard stops.

        It goes on from the newest checkpoint in `output_dir`, if there is one, and ends with the
        weights and metrics of a run in one piece.
        """
        if folder := self.newest():
            self.state = type(self.state).load_from_json(folder / STATE)
            self.carry(self.state.stateful_callbacks["carried"])
            self._load_from_checkpoint(folder)
            self._load_optimizer_and_scheduler(folder)
            self._load_rng_state(folder)  # of a base's own dropout
        args, state = self.args, self.state
        state.max_steps = self.updates
        state.num_train_epochs = self.episodes / (len(self.train_dataset) * self.copies)
        self.control = self.callback_handler.on_train_begin(args, state, self.control)
        started, before = time.time(), state.global_step
        if not state.global_step:
            self.validate(0)
        self.progress.update(state.global_step, self.updates)
        for update in range(state.global_step + 1, self.updates + 1):
            if self.stopped:
                break
            rollout = self.rollout(update)
            if update == 1 and not self.other_reference:
                checks.reference(self.policy_model, rollout)
            metrics = self.optimize(rollout, update)
            state.global_step = update
            metrics["episode"] = update * self.batch_size
            state.epoch = metrics["episode"] / (len(self.train_dataset) * self.copies)
            metrics["eps"] = (update - before) * self.batch_size / (time.time() - started)
            self.stopped = self.guard.why_stop(metrics) or ""
            self._check_not_lost()
            self.metrics = metrics | self.validate(update)
            self.on_update(self, rollout, self.metrics)
            if update % self._every(args.logging_steps) == 0 or update == self.updates:
                self.log(dict(self.metrics))
            self.control = self.callback_handler.on_step_end(args, state, self.control)
            due = update % self._every(args.save_steps) == 0
            saves = args.save_strategy == "steps" and not self.guard.broken
            if saves and (due or signals.requested()):
                self._save_checkpoint()
            if signals.requested():
                break
        group.check_same([*self.tensors().values()], "at the end")
        if self.keep == "best" and self.best is not None:
            for mine, best in zip(self.policy_model.trainable(), self.best.policy, strict=True):
                mine.data.copy_(best)
        self.control = self.callback_handler.on_train_end(args, state, self.control)

    def validate(self, update: int) -> dict[str, float]:
        """Score and KL on the validation prompts, under the same draws each time, when due."""
        args = self.args
        if args.eval_strategy == "no" or not self.validation_prompts or self.guard.broken:
            return {}
        if update % self._every(args.eval_steps) and update != self.updates and not self.stopped:
            return {}
        seen = self.explore(self.validation_prompts, derive_seed(args.seed, "validation"))
        kl = ((seen.logprobs - seen.ref_logprobs) * seen.mask).sum(1).mean().item()
        score = seen.scores.mean().item()
        objective = score - args.kl_coef * kl
        within = math.isfinite(objective) and kl <= self.guard.limits.max_kl
        if within and (self.best is None or objective > self.best.objective):
            self.best = Best(update, score, objective, _copies(self.policy_model.trainable()))
        return {"eval/score": score, "eval/kl": kl, "eval/objective": objective}

    def tensors(self) -> dict[str, torch.Tensor]:
        return numbered(
            policy=self.policy_model.trainable(), best=self.best.policy if self.best else []
        )

    def carried(self) -> dict[str, Any]:
        return {
            "guard": {name: getattr(self.guard, name) for name in GUARD},
            "best": self.best and [self.best.update, self.best.score, self.best.objective],
            "stopped": self.stopped,
            "metrics": self.metrics,
            "scale": [self.loss_scale, self.skipped],
            "over": self.rewards.over if self.rewards else {},
            "merged": self.sampler.copy is not None,
        }

    def carry(self, kept: dict[str, Any]) -> None:
        vars(self.guard).update(kept["guard"])
        if kept["best"]:
            self.best = Best(*kept["best"], _copies(self.policy_model.trainable()))
        self.stopped, self.metrics = kept["stopped"], kept["metrics"]
        self.loss_scale, self.skipped = kept["scale"]
        if self.merged is None:
            self.sampler.merge(kept.get("merged", False))
        if self.rewards:
            self.rewards.carry(kept["over"])

    def _every(self, steps: float) -> int:
        """A number of updates, also where it is given as a share of all of them."""
        return math.ceil(steps if steps >= 1 else steps * self.updates)

    def prompts(self, update: int) -> list[list[int]]:
        """The ids of this update's prompts: the next of an endless permutation, in `copies`."""
        count, size = len(self.train_dataset), self.batch_size // self.copies
        first, end = (update - 1) * size, update * size
        epochs = range(first // count, math.ceil(end / count))
        order = torch.cat([self._permutation(count, "epoch", epoch) for epoch in epochs]).tolist()
        chosen = order[first % count :][:size]
        return [self.train_dataset[row]["input_ids"] for row in chosen for _ in range(self.copies)]

    def _permutation(self, size: int, *place: str | int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.args.seed, *place))
        return torch.randperm(size, generator=generator)

    def rollout(self, update: int) -> Rollout:
        """What the policy does with this update's prompts."""
        return self.explore(self.prompts(update), derive_seed(self.args.seed, "rollout", update))

    @cached_property
    def sampled(self) -> int:
        """Answers sampled together: decided once, so that a resumed run has the same batches."""
        count = max(self.batch_size, len(self.validation_prompts))
        return rows_at_once(self.sampler.role, self.longest, self.args.response_length, count)

    @torch.no_grad()
    def explore(self, prompts: Sequence[list[int]], seed: int) -> Rollout:
        """Sample an answer to each prompt; read the roles' opinions of it."""
        args, tokenizer = self.args, self.processing_class
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        picked: list[list[float]] = []
        answers = self.sampler.sample(
            prompts,
            picked=picked,
            length=args.response_length,
            temperature=args.temperature,
            eos=eos,
            pad=pad,
            batch=self.sampled,
            seed=seed,
        )
        # One column more than the longest answer where it ended early: the state after its EOS is
        # where TRL, like the reference implementation, places the score.
        ended = torch.tensor([ids[-1] == eos for ids in answers])
        width = min(max(len(ids) for ids in answers) + 1, args.response_length)
        sequences = join(prompts, answers, pad, self._device, width)
        columns = torch.arange(sequences.answer, device=self._device)
        seen: dict[str, torch.Tensor] = {}
        size = group.at_once(args.local_rollout_forward_batch_size, len(sequences))
        chunks = group.share(sequences.alike(size))
        mine = [(rows.cpu(), self._opinions(sequences[rows].trimmed())) for rows in chunks]
        for rows, opinions in self._everyone(mine):
            for name, part in opinions.items():
                shape = (len(sequences), sequences.answer)[: part.dim()]
                whole = seen.setdefault(name, part.new_zeros(shape))
                whole[(rows, slice(part.shape[-1]))[: part.dim()]] = part
        gap = apart(picked, seen["logprobs"])
        if self.sampler.far(gap):
            return self.explore(prompts, seed)
        if self.sampler.engine is not None:
            rows = [numbers + [0.0] * (sequences.answer - len(numbers)) for numbers in picked]
            seen["sampled"] = torch.tensor(rows, device=self._device)
        ended = ended.to(self._device)
        given, means = (args.missing_eos_penalty, self.floor), dict[str, float]()
        if self.rewards is None:
            seen["scores"] = fined(seen["scores"], ended, *given)
        else:
            answered = [(prompt.example, ids) for prompt, ids in zip(prompts, answers, strict=True)]
            told, pay = (answered, seen.get("scores"), ended, *given), self.rewards.pay
            # A function of the recipe's is called once an answer.
            seen["scores"], means = group.first(lambda: _on_cpu(pay(*told)))
            seen["scores"] = seen["scores"].to(self._device)
        return Rollout(
            sequences=sequences,
            mask=columns < sequences.lengths[:, None],
            value_mask=columns < sequences.lengths[:, None] + 1,
            ended=ended,
            apart=gap,
            rewards=means,
            **seen,
        )

    def _opinions(self, chunk: Sequences) -> dict[str, torch.Tensor]:
        ids, mask, answer = chunk.ids, chunk.mask, chunk.answer
        policy, reference = self.policy_model, self.ref_model
        temperature, seen = self.args.temperature, {}
        with policy.active():
            seen["logprobs"], seen["entropy"] = logprobs(policy, ids, mask, answer, temperature)
        with reference.active():
            seen["ref_logprobs"], _ = logprobs(reference, ids, mask, answer, temperature)
        if self.reward_model is not None:
            with self.reward_model.active():
                seen["scores"] = score(self.reward_model, ids, mask, chunk.last)
        return seen

    def _everyone(
        self, mine: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]
    ) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
        """Each process's chunks of rows with the roles' opinions of them."""
        if group.size() == 1:
            yield from mine
            return
        told = [(rows, {name: part.cpu() for name, part in seen.items()}) for rows, seen in mine]
        for rows, seen in (one for some in group.everyone(told) for one in some):
            yield rows, {name: part.to(self._device) for name, part in seen.items()}

    @property
    def _device(self) -> torch.device:
        return self.policy_model.lm.device

    # ---- one update -----------------------------------------------------------------------------

    def optimize(self, rollout: Rollout, update: int) -> dict[str, float]:
        """`num_ppo_epochs × num_mini_batches` optimizer steps on one rollout; TRL's metrics."""
        learned = self.learned(rollout)
        if rollout.sampled is not None:
            beyond = SHARE * self.sampler.limit()
            learned = corrected(learned, rollout, rollout.sampled, beyond, self.whole_answers)
        stats: dict[str, list[float]] = defaultdict(list)
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        lengths = rollout.sequences.mask.sum(1).cpu()
        self._checkpointing(True)
        for epoch, learn in self.passes(update):
            order = self._permutation(self.batch_size, "minibatch", update, epoch)
            for mini in order.split(self.mini_batch_size):
                step: dict[str, float] = defaultdict(float)
                # The sum over a mini-batch does not depend on who shares a micro-batch: rows of
                # like length do, and are computed without the padding of longer ones.
                mini = mini[lengths[mini].argsort()]
                mine = mini[group.rank() :: group.size()]
                for micro in mine.split(self.args.per_device_train_batch_size):
                    rows = Rows(rollout, learned, mini, micro)
                    for name, number in learn(rows).items():
                        step[name] += number
                step = _added(step)
                if update == 1 and epoch == 0 and not stats["policy/approxkl_avg"]:
                    once = (step, self.policy_model, rows, self._reread)
                    checks.unmoved(*once, self.whole_answers)
                self._step()
                for name, number in step.items():
                    stats[name].append(float(number))
        self._checkpointing(False)
        self.lr_scheduler.step()
        told = learned.told | {"lr": learning_rate}
        told |= {"val/skipped_steps": float(self.skipped)} if self.scaled else {}
        return {**_averages(stats), **self._objective(rollout, learned.kl), **told}

    def _learn(self, rows: Rows) -> dict[str, torch.Tensor]:
        """The gradients of the policy's loss, and its metrics; forward and backward in one go."""
        policy = self.policy_model
        with policy.active():
            new, entropy = logprobs(policy, *rows.tokens, self.args.temperature)
            loss, seen = self.loss(new, entropy, rows)
            (loss * self.loss_scale).backward()
        return seen

    def _reread(self, learning: bool, rows: Rows) -> None:
        """The policy's reading of an update's answers, as it learns or as it samples."""
        self._checkpointing(learning)
        with self.policy_model.active(), torch.no_grad():
            logprobs(self.policy_model, *rows.tokens, self.args.temperature)

    def _step(self) -> None:
        found = [p for some in self.optimizer.param_groups for p in some["params"]]
        group.add_gradients(found)
        if self.scaled:
            grads = [p.grad.div_(self.loss_scale) for p in found if p.grad is not None]
            if not all(grad.isfinite().all() for grad in grads):
                self.skipped, self.loss_scale = self.skipped + 1, self.loss_scale / 2
                return self.optimizer.zero_grad()
        if self.args.max_grad_norm:
            for some in self.optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(some["params"], self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _checkpointing(self, on: bool) -> None:
        """Checkpoint activations in the update alone: in a rollout it turns the cache off."""
        if not self.args.gradient_checkpointing:
            return
        for role in self.learners:
            if on:
                words = self.args.gradient_checkpointing_kwargs or {"use_reentrant": False}
                role.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=words)
            else:
                role.lm.gradient_checkpointing_disable()
            role.lm.train(on)  # layers checkpoint in training mode alone

    def _objective(self, rollout: Rollout, kl: torch.Tensor) -> dict[str, float]:
        surprise = (-rollout.logprobs * rollout.mask).sum(1).mean()
        penalty = (-self.args.kl_coef * kl).sum(1).mean()
        numbers = {
            "objective/scores": rollout.scores.mean(),
            "objective/kl": kl.sum(1).mean(),
            "objective/entropy": surprise,
            "objective/non_score_reward": penalty,
            "objective/rlhf_reward": penalty + rollout.scores.mean(),
            "val/num_eos_tokens": rollout.ended.sum(),
            "val/ended": rollout.ended.float().mean(),
            "val/length": rollout.sequences.lengths.float().mean(),
            "val/sampler_apart": rollout.apart,
            "val/entropy_per_token": masked_mean(rollout.entropy, rollout.mask),
            **{f"{LOGGED}{name}": mean for name, mean in rollout.rewards.items()},
        }
        return {name: float(number) for name, number in numbers.items()}

    def _check_not_lost(self) -> None:
        """What is not a number ends the stage in order only where a good policy was kept."""
        if self.guard.broken and (self.keep == "last" or self.best is None):
            raise StageError(
                f"{self.stopped} at update {self.state.global_step}",
                'lower learning_rate, or set dtype = "float32" in [model]',
            )


def numbered(**parts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by the name of their part and their place in it."""
    return {f"{part}.{i}": t for part, tensors in parts.items() for i, t in enumerate(tensors)}


def _added(step: dict[str, Any]) -> dict[str, Any]:
    """A step's metrics, each the sum of the processes' shares."""
    if group.size() == 1:
        return step
    names = sorted(step)
    numbers = torch.stack([torch.as_tensor(step[name]).float() for name in names])
    group.add([numbers])
    return dict(zip(names, numbers, strict=True))


def _on_cpu(paid: tuple[torch.Tensor, dict[str, float]]) -> tuple[torch.Tensor, dict[str, float]]:
    return paid[0].cpu(), paid[1]


def _copies(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _averages(stats: dict[str, list[float]]) -> dict[str, float]:
    means = {name: sum(numbers) / len(numbers) for name, numbers in stats.items()}
    means["val/ratio_var"] = float(torch.tensor(stats["val/ratio"]).var(unbiased=False))
    return means
