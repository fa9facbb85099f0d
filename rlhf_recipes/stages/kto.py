"""Kahneman-Tversky optimisation (arXiv 2402.01306): stock `KTOTrainer` on ids.

It learns from single answers that people call good or bad; a pair gives one of each. Departs from
TRL's own script in that (numbers are those of the TRL-facts list in LOG.md)
- ids come from `encode()`; the reference is a frozen second adapter on the same base, as in DPO;
- 79: rows are shuffled in every epoch. Stock puts a thousand good answers before a thousand bad
  ones, and reads them in order, so that its batches hold one kind;
- 80: the KL is that of each micro-batch's answers moved one row on, paired as the batch is made. So
  the micro-batch counts as a change here, and is at least 2;
- 82: where neither weight is set, the rarer kind is weighted so that both count alike (the paper's
  equation 8). Stock only warns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from trl import KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
from trl.trainer.utils import entropy_from_logits

from rlhf_recipes.data.rows import Example, labelled
from rlhf_recipes.models.fake_model import Held, Sim, ids_of, training
from rlhf_recipes.stages.contract import StageContext, StageResult
from rlhf_recipes.stages.dpo import Compared, Reference, open_both
from rlhf_recipes.stages.training import load_rows, trainer_config, trial, work

__all__ = ["memory", "run", "trial", "work"]  # see contract.StageModule


def run(context: StageContext) -> StageResult:
    recipe, session = context.recipe, context.session
    data, train = load_rows(context)
    validation = labelled(data.judged("validation"))
    good = sum(example.chosen_ids is not None for example in train)
    bad = len(train) - good

    # ---- policy and reference
    base = session.base
    policy, reference = open_both(context)

    # ---- training
    args = trainer_config(KTOConfig, context, max_length=None)
    if not {"desirable_weight", "undesirable_weight"} & recipe.table(context.name).given.keys():
        args.desirable_weight, args.undesirable_weight = even(good, bad)
    said = f"{good} good answers of weight {args.desirable_weight:.3g}, "
    context.progress.note(f"{said}{bad} bad ones of weight {args.undesirable_weight:.3g}")
    trainer = Trainer(
        context,
        policy,
        {"loss": "loss", "rewards/margins": "margin", "kl": "KL"},
        train,
        validation,
        model=policy.lm if recipe.lora is None else base.peft,
        ref_model=Reference(reference),
        args=args,
        data_collator=Collator(pad_token_id=session.tokens.pad_id),
    )
    with policy.active(autocast=False):
        trained = trainer.train()
        found = trainer.evaluate() if validation else {}

    # ---- output
    base.save(policy, context.folder / "output")
    base.close(policy, reference)
    loss = trained.training_loss
    metrics = {"train_loss": loss, "steps": trained.global_step, "good": good, "bad": bad}
    summary = f"loss {loss:.3f} on {good} good and {bad} bad answers"
    if not validation:
        return StageResult(metrics, summary)
    metrics |= {"validation_loss": found["eval_loss"]}
    if (margin := found.get("eval_rewards/margins")) is not None:  # β × nats, good over bad
        metrics |= {"validation_margin": margin}
        summary += f", validation margin {margin:.2f}"
    return StageResult(metrics, summary)


def even(good: int, bad: int) -> tuple[float, float]:
    """Weights of good and bad answers under which both kinds count alike: the rarer's is over 1.

    One kind alone keeps the weight 1.
    """
    if not good or not bad:
        return 1.0, 1.0
    return max(1.0, bad / good), max(1.0, good / bad)


OTHER = "KL_completion_ids"


def paired(examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row of a micro-batch with the answer of the row before it, for the KL."""
    answers = [example["completion_ids"] for example in examples]
    moved = [answers[-1], *answers[:-1]]
    return [{**example, OTHER: other} for example, other in zip(examples, moved, strict=True)]


class Collator(DataCollatorForUnpairedPreference):
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return super().torch_call(examples if OTHER in examples[0] else paired(examples))


class Trainer(Compared, KTOTrainer):
    strategy = "random"

    def together(self, examples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return paired(examples)

    def row(self, example: Example) -> dict[str, Any]:
        good = example.chosen_ids is not None
        answer = example.chosen_ids if good else example.rejected_ids
        return {"prompt_ids": example.prompt_ids, "completion_ids": answer, "label": good}


# ---- what its memory is counted from


def memory(sim: Sim) -> Iterator[Held]:
    """Policy and reference read each answer at its prompt, and at the next one's."""
    with sim.model("policy", "reference", trained=["policy"]) as (tracker, both):

        def loss(rows: int) -> torch.Tensor:
            ids, mask = ids_of(rows, sim.lengths.row)
            total, outs = 0.0, []
            for role in both:
                learns = torch.is_grad_enabled() and role is both[0]
                words = {"attention_mask": mask, "use_cache": False}
                with role.active(), torch.no_grad():
                    outs.append(role.lm(input_ids=ids, **words).logits.float()[:, :-1])
                with role.active(), torch.set_grad_enabled(learns):
                    outs.append(role.lm(input_ids=ids, **words).logits.float()[:, :-1])
                total = total + torch.stack([torch.logsumexp(row, -1) for row in outs[-1]]).sum()
            entropy_from_logits(outs[1].detach())
            tracker.kept.append(outs[1])
            return total

        yield from training(sim, tracker, both[0], loss)
