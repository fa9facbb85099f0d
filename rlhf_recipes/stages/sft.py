"""Supervised fine-tuning: stock `SFTTrainer` on ids, loss on the answer alone.

Departs from TRL's own script in that
- ids and labels come from `encode()`, so EOS is the last token trained and no newline follows it;
- trainable weights stay float32 on a 4-bit base;
- without demonstrations of its own (`dataset = {…}`), it learns the chosen answers.
"""

from __future__ import annotations

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from rlhf_recipes.data.rows import Example, answered
from rlhf_recipes.stages.contract import StageContext, StageResult
from rlhf_recipes.stages.training import Stock, float32, load_rows, need, trainer_config
from rlhf_recipes.store.fingerprint import derive_seed


def run(context: StageContext) -> StageResult:
    recipe, shared = context.recipe, context.shared
    data = load_rows(context)
    train = need(answered(data.train), "answers on the train side", context)
    validation = answered(data.validation)

    # ---- policy
    base = shared.base
    policy = base.open(
        "policy",
        context.inputs.get("policy"),
        seed=derive_seed(recipe.seed, context.name, "lora"),
        trainable=True,
    )

    # ---- training
    trainer = Trainer(
        context,
        policy,
        {"loss": "loss", "mean_token_accuracy": "accuracy"},
        model=policy.lm if recipe.lora is None else base.peft,
        args=trainer_config(SFTConfig, context, max_length=None, completion_only_loss=True),
        train_dataset=_rows(train),
        eval_dataset=_rows(validation) if validation else None,
        processing_class=shared.tokens.tokenizer,
    )
    float32(*policy.trainable())
    with policy.active(autocast=False):
        trained = trainer.train(first=trainer.validation_loss)
        before, after = trainer.first, trainer.validation_loss()

    # ---- output
    base.save(policy, context.folder / "output")
    base.close(policy)
    metrics = {
        "train_loss": trained.training_loss,
        "steps": trained.global_step,
        "rows": len(train),
        "rows_dropped": sum(data.dropped.values()),
    }
    if before is None:
        return StageResult(metrics, f"loss {trained.training_loss:.3f}")
    metrics |= {"validation_loss_before": before, "validation_loss": after}
    return StageResult(metrics, f"validation loss {before:.3f} → {after:.3f}")


class Trainer(Stock, SFTTrainer):
    def validation_loss(self) -> float | None:
        return self.evaluate()["eval_loss"] if self.eval_dataset is not None else None


def _rows(examples: list[Example]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "input_ids": e.prompt_ids + e.chosen_ids,
                "labels": [-100] * len(e.prompt_ids) + e.chosen_ids,
            }
            for e in examples
        ]
    )
