"""The reward model: stock `RewardTrainer` on ids that end in EOS, and its unit.

Departs from TRL's own script in that
- the model is an adapter and a scalar head on the base that the policy uses, read through the same
  `score()` that PPO and the evaluation use; stock trains the head on the newline that a template
  writes after EOS, while PPO scores at EOS (TRL-facts 27);
- the head trains with a learning rate of its own, in float32;
- mean and deviation of its scores over the training chosen answers are stored: the unit in which
  every later stage reads it.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

from rlhf_recipes.adapters import UNIT, Role
from rlhf_recipes.data import Example, pairs
from rlhf_recipes.identity import derive_seed
from rlhf_recipes.models import new_head
from rlhf_recipes.sequences import score_ids
from rlhf_recipes.stages import StageContext, StageResult
from rlhf_recipes.stages.common import Stock, float32, load_rows, need, trainer_config, write_json

UNIT_ROWS = 1024  # the deviation of so many scores is right to 2 %


def run(context: StageContext) -> StageResult:
    recipe, shared = context.recipe, context.shared
    table = recipe.table(context.name)
    data = load_rows(context)
    train = need(pairs(data.reward_train), "pairs on the train side", context)
    validation = pairs(data.validation)

    # ---- reward model
    base = shared.base
    seed = derive_seed(recipe.seed, context.name, "lora")
    reward = base.open("reward", context.inputs.get("policy"), seed=seed, trainable=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, context.name, "head"))
        reward.add_head(new_head(reward.lm))

    # ---- training
    args = trainer_config(RewardConfig, context, max_length=None)
    trainer = Trainer(
        context,
        reward,
        {"loss": "loss", "accuracy": "accuracy"},
        model=reward,
        args=args,
        train_dataset=_rows(train),
        eval_dataset=_rows(validation) if validation else None,
        processing_class=shared.tokens.tokenizer,
        optimizers=(_optimizer(reward, args, table.extras["head_learning_rate"]), None),
    )
    float32(*reward.trainable())
    with reward.active(autocast=False):  # through the backward too: checkpointed layers recompute
        trained = trainer.train()

    # ---- unit and validation
    batch = args.per_device_eval_batch_size
    pad = shared.tokens.pad_id
    some = train[:: -(-len(train) // UNIT_ROWS)]
    chosen = score_ids(reward, [(e.prompt_ids, e.chosen_ids) for e in some], pad, batch)
    mean, std = chosen.mean().item(), chosen.std().item()
    metrics: dict[str, Any] = {
        "train_loss": trained.training_loss,
        "steps": trained.global_step,
        "pairs": len(train),
        "unit_mean": mean,
        "unit_std": std,
    }
    summary = f"loss {trained.training_loss:.3f}"
    if validation:
        accuracy, margin = preference(reward, validation, pad, batch)
        metrics |= {"validation_accuracy": accuracy, "validation_margin": margin / std}
        summary = f"validation accuracy {accuracy:.1%} of {len(validation)} pairs"

    # ---- output
    output = context.folder / "output"
    base.save(reward, output)
    write_json(output / UNIT, {"format": 1, "mean": mean, "std": std})
    base.close(reward)
    return StageResult(metrics, summary)


class Trainer(Stock, RewardTrainer):
    pass


def preference(reward: Role, rows: list[Example], pad: int, batch: int) -> tuple[float, float]:
    """Share of pairs ranked right, a tie counting half, and mean margin in the head's own scale."""
    chosen = score_ids(reward, [(e.prompt_ids, e.chosen_ids) for e in rows], pad, batch)
    rejected = score_ids(reward, [(e.prompt_ids, e.rejected_ids) for e in rows], pad, batch)
    margin = (chosen - rejected).double()
    return ((margin > 0) + 0.5 * (margin == 0)).mean().item(), margin.mean().item()


def _rows(examples: list[Example]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "chosen_ids": e.prompt_ids + e.chosen_ids,
                "rejected_ids": e.prompt_ids + e.rejected_ids,
            }
            for e in examples
        ]
    )


def _optimizer(
    reward: Role, args: RewardConfig, head_learning_rate: float
) -> torch.optim.Optimizer:
    """The optimizer that `optim` names, with a group for the adapter and one for the head."""
    head = list(reward.score.parameters())
    inner = {id(p) for p in head}
    body = [p for p in reward.trainable() if id(p) not in inner]
    kind, words = RewardTrainer.get_optimizer_cls_and_kwargs(args)
    groups = [{"params": body}, {"params": head, "lr": head_learning_rate}]
    return kind(groups, weight_decay=args.weight_decay, **words)
