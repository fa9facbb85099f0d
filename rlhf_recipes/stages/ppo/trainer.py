"""TRL's PPOTrainer with a loop that is right: its constructor, config and metric names, our loop.

TRL 1.12 is the last release with PPO and its loop is unmaintained. Where it is right, this one
gives the same numbers. It departs in that (numbers are those of the TRL-facts list in LOG.md)

- 4: an optimizer step is one mini-batch: `num_ppo_epochs × num_mini_batches` steps an update,
  whatever the accumulation; losses are sums over a mini-batch's tokens divided by their number;
- 5: the reference is a role of its own, frozen where the stage started, not the bare base;
- 8, 16: what an update draws is a function of (seed, update), so the loop holds no hidden state,
  and goes on from a checkpoint as if it had never stopped;
- 10: prompts are taken from an endless permutation, so a dataset smaller than a batch serves;
- 12: rollouts are sampled under a GenerationConfig that nothing is filled into;
- 13: masks come from lengths;
- 15: `max_grad_norm` clips, policy and value apart; `gradient_checkpointing` is enabled for the
  update and off in rollouts;
- 18: an answer without EOS scores at most `floor`, less `missing_eos_penalty`;
- 19: no logits for prompt positions, none kept for a whole rollout batch;
- 21: policy and value have learning rates of their own.

In float16 its losses are scaled. Stock has no scaler there.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from trl.experimental.ppo import PPOTrainer as StockPPOTrainer
from trl.experimental.ppo.ppo_trainer import masked_mean

from rlhf_recipes import signals
from rlhf_recipes.errors import StageError
from rlhf_recipes.models.reward_model import fined
from rlhf_recipes.models.role import logprobs, logprobs_and_values, score, values
from rlhf_recipes.models.sampling import Sequences, join, rows_at_once, sample
from rlhf_recipes.recipe.kinds import Limits
from rlhf_recipes.screen import StageProgress
from rlhf_recipes.stages.checkpoints import STATE, Resumable
from rlhf_recipes.stages.ppo.guards import Guard
from rlhf_recipes.stages.ppo.losses import (
    Rollout,
    Rows,
    advantages,
    explained_variance,
    policy_loss,
    value_loss,
)
from rlhf_recipes.stages.training import two_rates
from rlhf_recipes.store.digests import derive_seed

# What rounding may do to the policy's reading of its own answers in another batch shape: the most
# of an approxkl, and of the share of tokens that are clipped; and of one log-probability.
ROUNDING = {torch.float32: (1e-6, 1e-3), torch.bfloat16: (0.02, 0.5), torch.float16: (1e-3, 0.1)}
# Of the losses in float16, whose least number is 6e-8: a token's share of 32,768 would lose its
# gradients. A step that overflows is skipped, and halves it.
LOSS_SCALE = 2.0**12
REPORT = "this is a bug in rlhf-recipes; please report it with the recipe"
GUARD = ("first", "scores", "broken")  # what a checkpoint holds of it


@dataclass(frozen=True)
class Best:
    """The policy that is best on the validation prompts so far, by PPO's own objective."""

    update: int  # 0: the start
    score: float
    objective: float  # score - kl_coef × KL: the score alone prefers the most over-optimised one
    policy: list[torch.Tensor]  # a copy of its trainable weights


class PPOTrainer(Resumable, StockPPOTrainer):
    """`model`, `ref_model`, `reward_model` and `value_model` are `adapters.Role`s.

    `train_dataset` is a list of {"input_ids": prompt}. `on_update(trainer, rollout, metrics)` is
    called after each update. The reference must equal the policy at the start unless
    `other_reference`. With `keep="best"` the policy ends as it was where score - kl_coef × KL
    was highest on `validation_prompts`, within `limits.max_kl`, its start included.
    """

    def __init__(
        self,
        *args: Any,
        key: str,
        progress: StageProgress,
        value_learning_rate: float | None = None,
        value_warmup_epochs: int = 0,
        other_reference: bool = False,
        floor: float = math.inf,
        limits: Limits | None = None,
        keep: str = "last",
        validation_prompts: Sequence[list[int]] = (),
        on_update: Callable[[PPOTrainer, Rollout, dict[str, float]], None] = lambda *_: None,
        **kwargs: Any,
    ):
        self.key = key
        self.progress = progress
        self.value_learning_rate = value_learning_rate
        self.value_warmup_epochs = value_warmup_epochs
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
        super().__init__(*args, **kwargs)
        # accelerate's `backward` divides by this; the losses below are normalised already.
        self.accelerator.gradient_accumulation_steps = 1
        self.is_fsdp_xla_v1_enabled = False  # loading an optimizer asks; PPO's constructor forgot
        self.scaled = self.policy_model.dtype == torch.float16
        self.loss_scale = LOSS_SCALE if self.scaled else 1.0
        paired = self.policy_model.pairs_with(self.value_model)
        self.together = paired and self._device.type == "cpu"

    def create_optimizer(self, *_: Any) -> torch.optim.Optimizer:
        policy, value = self.policy_model.trainable(), self.value_model.trainable()
        rate = self.value_learning_rate or self.args.learning_rate
        self.optimizer = two_rates(self.args, policy, value, rate)
        return self.optimizer

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
        state.max_steps = args.num_total_batches
        state.num_train_epochs = args.total_episodes / self.train_dataset_len
        self.control = self.callback_handler.on_train_begin(args, state, self.control)
        started, before = time.time(), state.episode
        if not state.global_step:
            self.validate(0)
        self.progress.update(state.global_step, args.num_total_batches)
        for update in range(state.global_step + 1, args.num_total_batches + 1):
            if self.stopped:
                break
            rollout = self.rollout(update)
            if update == 1 and not self.other_reference:
                self._check_reference(rollout)
            metrics = self.optimize(rollout, update)
            state.global_step = update
            state.episode += args.batch_size
            state.epoch = state.episode / self.train_dataset_len
            metrics["eps"] = (state.episode - before) / (time.time() - started)
            metrics["episode"] = state.episode
            self.stopped = self.guard.why_stop(metrics) or ""
            self._check_not_lost()
            self.metrics = metrics | self.validate(update)
            self.on_update(self, rollout, self.metrics)
            if update % self._every(args.logging_steps) == 0 or update == args.num_total_batches:
                self.log(dict(self.metrics))
            self.control = self.callback_handler.on_step_end(args, state, self.control)
            due = update % self._every(args.save_steps) == 0
            saves = args.save_strategy == "steps" and not self.guard.broken
            if saves and (due or signals.requested()):
                self._save_checkpoint()
            if signals.requested():
                break
        if self.keep == "best" and self.best is not None:
            for mine, best in zip(self.policy_model.trainable(), self.best.policy, strict=True):
                mine.data.copy_(best)
        self.control = self.callback_handler.on_train_end(args, state, self.control)

    def validate(self, update: int) -> dict[str, float]:
        """Score and KL on the validation prompts, under the same draws each time, when due."""
        args, total = self.args, self.args.num_total_batches
        if args.eval_strategy == "no" or not self.validation_prompts or self.guard.broken:
            return {}
        if update % self._every(args.eval_steps) and update != total and not self.stopped:
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
        policy, value = self.policy_model.trainable(), self.value_model.trainable()
        parts = {"policy": policy, "value": value, "best": self.best.policy if self.best else []}
        return {f"{part}.{i}": t for part, tensors in parts.items() for i, t in enumerate(tensors)}

    def carried(self) -> dict[str, Any]:
        return {
            "guard": {name: getattr(self.guard, name) for name in GUARD},
            "best": self.best and [self.best.update, self.best.score, self.best.objective],
            "stopped": self.stopped,
            "metrics": self.metrics,
            "scale": [self.loss_scale, self.skipped],
        }

    def carry(self, kept: dict[str, Any]) -> None:
        vars(self.guard).update(kept["guard"])
        if kept["best"]:
            self.best = Best(*kept["best"], _copies(self.policy_model.trainable()))
        self.stopped, self.metrics = kept["stopped"], kept["metrics"]
        self.loss_scale, self.skipped = kept["scale"]

    def _every(self, steps: float) -> int:
        """A number of updates, also where it is given as a share of all of them."""
        return math.ceil(steps if steps >= 1 else steps * self.args.num_total_batches)

    def prompts(self, update: int) -> list[list[int]]:
        """The ids of this update's prompts: the next `batch_size` of an endless permutation."""
        count, size = self.train_dataset_len, self.args.batch_size
        first, end = (update - 1) * size, update * size
        epochs = range(first // count, math.ceil(end / count))
        order = torch.cat([self._permutation(count, "epoch", epoch) for epoch in epochs]).tolist()
        start = first % count
        return [self.train_dataset[row]["input_ids"] for row in order[start : start + size]]

    def _permutation(self, size: int, *place: str | int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derive_seed(self.args.seed, *place))
        return torch.randperm(size, generator=generator)

    def rollout(self, update: int) -> Rollout:
        """What the policy does with this update's prompts."""
        return self.explore(self.prompts(update), derive_seed(self.args.seed, "rollout", update))

    @cached_property
    def sampled(self) -> int:
        """Answers sampled together: decided once, so that a resumed run has the same batches."""
        prompts = [*(row["input_ids"] for row in self.train_dataset), *self.validation_prompts]
        count = max(self.args.batch_size, len(self.validation_prompts))
        longest = max(map(len, prompts))
        return rows_at_once(self.policy_model, longest, self.args.response_length, count)

    @torch.no_grad()
    def explore(self, prompts: Sequence[list[int]], seed: int) -> Rollout:
        """Sample an answer to each prompt; read the roles' opinions of it."""
        args, tokenizer = self.args, self.processing_class
        pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
        answers = sample(
            self.policy_model,
            prompts,
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
        for rows in sequences.alike(args.local_rollout_forward_batch_size):
            for name, part in self._opinions(sequences[rows].trimmed()).items():
                shape = (len(sequences), sequences.answer)[: part.dim()]
                whole = seen.setdefault(name, part.new_zeros(shape))
                whole[(rows, slice(part.shape[-1]))[: part.dim()]] = part
        ended = ended.to(self._device)
        seen["scores"] = fined(seen["scores"], ended, args.missing_eos_penalty, self.floor)
        return Rollout(
            sequences=sequences,
            mask=columns < sequences.lengths[:, None],
            value_mask=columns < sequences.lengths[:, None] + 1,
            ended=ended,
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
        with self.value_model.active():
            seen["values"] = values(self.value_model, ids, mask, answer)
        with self.reward_model.active():
            seen["scores"] = score(self.reward_model, ids, mask, chunk.last)
        return seen

    @property
    def _device(self) -> torch.device:
        return self.policy_model.lm.device

    # ---- one update -----------------------------------------------------------------------------

    def optimize(self, rollout: Rollout, update: int) -> dict[str, float]:
        """`num_ppo_epochs × num_mini_batches` optimizer steps on one rollout; TRL's metrics."""
        args = self.args
        advantage, returns, kl = advantages(rollout, args)
        stats: dict[str, list[float]] = defaultdict(list)
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        lengths = rollout.sequences.mask.sum(1).cpu()
        self._checkpointing(True)
        warmup = self.value_warmup_epochs if update == 1 else 0
        for epoch in range(-warmup, args.num_ppo_epochs):
            # Clipped, a warm-up would end within 0.2 of where it began, however long it is.
            learn = self._learn if epoch >= 0 else partial(self._learn_value, clip=False)
            order = self._permutation(args.local_batch_size, "minibatch", update, epoch)
            for mini in order.split(args.local_mini_batch_size):
                step: dict[str, float] = defaultdict(float)
                # The sum over a mini-batch does not depend on who shares a micro-batch: rows of
                # like length do, and are computed without the padding of longer ones.
                mini = mini[lengths[mini].argsort()]
                for micro in mini.split(args.per_device_train_batch_size):
                    rows = Rows(rollout, advantage, returns, mini, micro)
                    for name, number in learn(rows).items():
                        step[name] += number
                if update == 1 and epoch == 0 and not stats["policy/approxkl_avg"]:
                    self._check_unmoved(step, rows)
                self._step()
                for name, number in step.items():
                    stats[name].append(float(number))
        self._checkpointing(False)
        self.lr_scheduler.step()
        told = {"val/explained_variance": explained_variance(rollout, returns), "lr": learning_rate}
        told |= {"val/skipped_steps": float(self.skipped)} if self.scaled else {}
        return {**_averages(stats), **self._objective(rollout, kl), **told}

    def _learn(self, rows: Rows) -> dict[str, torch.Tensor]:
        """The gradients of both losses, and their metrics; forward and backward in one `active`.

        On a CPU in one pass over both adapters' rows: a product with 1600 rows takes 0.65 of the
        time of two with 800. Elsewhere apart, so that one graph at a time is held.
        """
        policy, value, args = self.policy_model, self.value_model, self.args
        if not self.together:
            with policy.active():
                new, entropy = logprobs(policy, *rows.tokens, args.temperature)
                loss, seen = policy_loss(new, entropy, rows, args)
                self.accelerator.backward(loss * self.loss_scale)
            return seen | self._learn_value(rows)
        with policy.active(beside=value):
            new, entropy, guess = logprobs_and_values(policy, value, *rows.tokens, args.temperature)
            loss, seen = policy_loss(new, entropy, rows, args)
            other, more = value_loss(guess, rows, args)
            self.accelerator.backward((loss + args.vf_coef * other) * self.loss_scale)
        return seen | more

    def _learn_value(self, rows: Rows, clip: bool = True) -> dict[str, torch.Tensor]:
        with self.value_model.active():
            guess = values(self.value_model, *rows.tokens)
            loss, seen = value_loss(guess, rows, self.args, clip)
            self.accelerator.backward(self.args.vf_coef * loss * self.loss_scale)
        return seen

    def _step(self) -> None:
        if self.scaled:
            found = [p for group in self.optimizer.param_groups for p in group["params"]]
            grads = [p.grad.div_(self.loss_scale) for p in found if p.grad is not None]
            if not all(grad.isfinite().all() for grad in grads):
                self.skipped, self.loss_scale = self.skipped + 1, self.loss_scale / 2
                return self.optimizer.zero_grad()
        if self.args.max_grad_norm:
            for group in self.optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], self.args.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _checkpointing(self, on: bool) -> None:
        """Checkpoint activations in the update alone: in a rollout it turns the cache off."""
        if not self.args.gradient_checkpointing:
            return
        for role in (self.policy_model, self.value_model):
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
            "val/entropy_per_token": masked_mean(rollout.entropy, rollout.mask),
        }
        return {name: float(number) for name, number in numbers.items()}

    # ---- what must hold -------------------------------------------------------------------------

    @property
    def _rounding(self) -> tuple[float, float]:
        """Of ROUNDING. Products of 8 bit hang on who shares them, and TF32 keeps ten bits."""
        tf32 = self._device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        coarse = tf32 or getattr(self.policy_model.lm, "is_loaded_in_8bit", False)
        return ROUNDING[torch.bfloat16 if coarse else self.policy_model.dtype]

    def _check_reference(self, rollout: Rollout) -> None:
        """At the first update policy and reference are one: their KL is 0, but for rounding."""
        apart = ((rollout.logprobs - rollout.ref_logprobs) * rollout.mask).abs().max().item()
        if apart > self._rounding[1]:
            raise StageError(
                f"the reference is not the policy that PPO starts from: log-probs differ by {apart}"
                " at the first update",
                REPORT,
            )

    def _check_unmoved(self, step: dict[str, Any], rows: Rows) -> None:
        """Before its first step the policy reads its answers as it did when it sampled them."""
        most, _ = self._rounding
        kl, clipped = (float(step[f"policy/{name}_avg"]) for name in ("approxkl", "clipfrac"))
        if max(kl, clipped) > most:  # what is no number is the guard's to say
            what = "the policy reads its own answers otherwise as it learns than as it samples"
            numbers = f"approxkl {kl:.2g}, {clipped:.0%} clipped before the first step"
            raise StageError(f"{what}: {numbers}; {self._first_apart(rows)}", REPORT)

    @torch.no_grad()
    def _first_apart(self, rows: Rows) -> str:
        """The first module whose output in training is not that of a rollout."""
        policy, outputs = self.policy_model, []
        for learning in (True, False):
            self._checkpointing(learning)
            seen: dict[str, torch.Tensor] = {}

            def keep(name: str, out: Any, seen: dict[str, torch.Tensor] = seen) -> None:
                out = out[0] if isinstance(out, tuple) else out
                if isinstance(out, torch.Tensor):
                    seen.setdefault(name, out.float())

            hooks = [
                module.register_forward_hook(
                    lambda _, __, out, name=name, keep=keep: keep(name, out)
                )
                for name, module in policy.lm.named_modules()
            ]
            with policy.active():
                logprobs(policy, *rows.tokens, self.args.temperature)
            for hook in hooks:
                hook.remove()
            outputs.append(seen)
        differ = (n for n, out in outputs[1].items() if not torch.allclose(out, outputs[0][n]))
        return f"the first module that differs is {next(differ, 'none, asked again')}"

    def _check_not_lost(self) -> None:
        """What is not a number ends the stage in order only where a good policy was kept."""
        if self.guard.broken and (self.keep == "last" or self.best is None):
            raise StageError(
                f"{self.stopped} at update {self.state.global_step}",
                'lower learning_rate, or set dtype = "float32" in [model]',
            )


def _copies(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def _averages(stats: dict[str, list[float]]) -> dict[str, float]:
    means = {name: sum(numbers) / len(numbers) for name, numbers in stats.items()}
    means["val/ratio_var"] = float(torch.tensor(stats["val/ratio"]).var(unbiased=False))
    return means
