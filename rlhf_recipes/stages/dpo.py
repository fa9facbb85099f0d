"""Direct preference optimisation: stock `DPOTrainer` on ids, against the policy it starts from.

Departs from TRL's own script in that
- ids come from `encode()`; stock takes texts alone, and tokenizes them its own way;
- the reference is a frozen second adapter on the same base, or the bare base where nothing was
  trained before. Stock would copy an adapter called "default", or take the bare base, and its
  switch between the two marks adapters trainable and frozen as it goes (TRL-facts 33);
- the policy's weights are not rounded to bfloat16 on a 4-bit base, so that it starts as exactly the
  reference: the first loss is log 2;
- like the reward model, it never sees the judge's pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import entropy_from_logits

from rlhf_recipes.data.rows import Example, pairs
from rlhf_recipes.models.fake_model import Held, Sim, ids_of, training
from rlhf_recipes.models.role import Role
from rlhf_recipes.stages.contract import StageContext, StageResult
from rlhf_recipes.stages.training import Stock, load_rows, trainer_config, trial, work

__all__ = ["memory", "run", "trial", "work"]  # see contract.StageModule


def run(context: StageContext) -> StageResult:
    recipe, session = context.recipe, context.session
    data, train = load_rows(context)
    validation = pairs(data.validation)

    # ---- policy and reference
    base = session.base
    policy, reference = open_both(context)

    # ---- training
    shown = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}
    trainer = Trainer(
        context,
        policy,
        shown,
        train,
        validation,
        model=policy.lm if recipe.lora is None else base.peft,
        ref_model=Reference(reference),
        args=trainer_config(DPOConfig, context, max_length=None),
    )
    with policy.active(autocast=False):
        trained = trainer.train()
        found = trainer.evaluate() if validation else {}

    # ---- output
    base.save(policy, context.folder / "output")
    base.close(policy, reference)
    loss = trained.training_loss
    metrics = {"train_loss": loss, "steps": trained.global_step, "pairs": len(train)}
    if not validation:
        return StageResult(metrics, f"loss {loss:.3f}")
    accuracy, margin = found["eval_rewards/accuracies"], found["eval_rewards/margins"]
    metrics |= {"validation_loss": found["eval_loss"], "validation_accuracy": accuracy}
    metrics |= {"validation_margin": margin}  # β × nats, chosen over rejected
    summary = f"validation accuracy {accuracy:.1%} of {len(validation)} pairs, margin {margin:.2f}"
    return StageResult(metrics, summary)


def open_both(context: StageContext) -> tuple[Role, Role]:
    """The policy, to be trained, and what it is held near: where it starts, or another stage."""
    base, start = context.session.base, context.inputs.get("policy")
    seed = context.seed("lora")
    policy = base.open("policy", start, seed=seed, trainable=True)
    return policy, base.open("reference", context.inputs.get("reference", start), seed=seed)


class Compared(Stock):
    """Mixed in before a stock trainer of a policy and a reference; rows reach it as ids."""

    def __init__(self, context: StageContext, policy: Role, *args: Any, **words: Any):
        weights = [parameter.data for parameter in policy.trainable()]
        super().__init__(context, policy, *args, **words)
        for parameter, unrounded in zip(policy.trainable(), weights, strict=True):
            parameter.data = unrounded  # stock rounds them on a 4-bit base

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


class Trainer(Compared, DPOTrainer):
    def row(self, example: Example) -> dict[str, list[int]]:
        parts = ("prompt_ids", "chosen_ids", "rejected_ids")
        return {part: getattr(example, part) for part in parts}

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        out = super().prediction_step(model, inputs, *args, **kwargs)
        # Stock means over batches; a batch counts once a pair here, for the last one is smaller.
        for values in self._metrics["eval"].values():
            values += values[-1:] * (len(inputs["input_ids"]) // 2 - 1)
        return out


class Reference(nn.Module):
    """What `DPOTrainer` asks of a reference model: a role's `lm` under its own adapter."""

    def __init__(self, role: Role):
        super().__init__()
        self.roles = (role,)  # in a tuple, torch does not take the base for this module's own

    def forward(self, **inputs: Any) -> Any:
        (role,) = self.roles
        with role.active():
            return role.lm(**inputs)


# ---- what its memory is counted from


def memory(sim: Sim) -> Iterator[Held]:
    """Policy and reference read both answers; the logits of both are kept whole."""
    with sim.model("policy", "reference", trained=["policy"]) as (tracker, both):

        def loss(rows: int) -> torch.Tensor:
            ids, mask = ids_of(2 * rows, sim.lengths.row)
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

        yield from training(sim, tracker, both[0], loss)
