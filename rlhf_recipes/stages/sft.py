"""Supervised fine-tuning: stock `SFTTrainer` on ids, loss on the answer alone.

Departs from TRL's own script in that
- ids and labels come from `encode()`, so EOS is the last token trained and no newline follows it;
- trainable weights stay float32 on a 4-bit base;
- a model that scales its logits in a way that TRL's chunked loss leaves out gets the plain loss;
- without demonstrations of its own (`dataset = {…}`), it learns the chosen answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import _CHUNKED_LM_HEAD_CHUNK_SIZE as CHUNK
from trl.trainer.sft_trainer import _chunk

from rlhf_recipes.data.rows import Example, answered
from rlhf_recipes.models.fake_model import Held, Sim, ids_of, training
from rlhf_recipes.stages.contract import StageContext, StageResult
from rlhf_recipes.stages.training import Stock, float32, load_rows, trainer_config, trial, work

__all__ = ["memory", "run", "trial", "work"]  # see contract.StageModule


# What a model does to its logits, by its config, and TRL 1.12's chunked loss does not: Granite's,
# Falcon-H1's, RecurrentGemma's. On a Granite with 8 the loss was 5.66, and the model's own 5.49.
SCALES = ("logits_scaling", "lm_head_multiplier", "logits_soft_cap")


def run(context: StageContext) -> StageResult:
    recipe, session = context.recipe, context.session
    data, train = load_rows(context)

    # ---- policy
    base, start = session.base, context.inputs.get("policy")
    policy = base.open("policy", start, seed=context.seed("lora"), trainable=True)

    # ---- training
    words = {"max_length": None, "completion_only_loss": True}
    config = policy.lm.config.get_text_config()
    counts = [hasattr(config, key) for key in ("num_experts", "num_experts_per_tok")]
    if hasattr(config, "output_router_logits") and not all(counts):
        words["router_aux_loss_coef"] = 0.0  # TRL would look for them: an AttributeError
        note = f"no load-balancing loss: TRL cannot count the experts of a {config.model_type}"
        context.progress.note(note)
    asked = recipe.table(context.name).options.get("loss_type")
    if asked in (None, "chunked_nll") and not _in_chunks(config):  # None is TRL's chunked loss
        words["loss_type"] = "nll"
        note = f"loss_type is nll: TRL's chunked loss is not that of a {config.model_type}"
        context.progress.note(note)
    trainer = Trainer(
        context,
        policy,
        {"loss": "loss", "mean_token_accuracy": "accuracy"},
        train,
        answered(data.validation),
        model=policy.lm if recipe.lora is None else base.peft,
        args=trainer_config(SFTConfig, context, **words),
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


def _in_chunks(config: Any) -> bool:
    """Whether TRL's chunked loss is the model's own."""
    return all(getattr(config, name, None) in (None, 1.0) for name in SCALES)


class Trainer(Stock, SFTTrainer):
    def row(self, example: Example) -> dict[str, list[int]]:
        prompt, answer = example.prompt_ids, example.chosen_ids
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    def validation_loss(self) -> float | None:
        return self.evaluate()["eval_loss"] if self.eval_dataset is not None else None


# ---- what its memory is counted from


def memory(sim: Sim) -> Iterator[Held]:
    """TRL computes the loss over the answers' tokens in chunks; each is checkpointed."""
    with sim.model("policy", trained=["policy"]) as (tracker, [policy]):

        def loss(rows: int) -> torch.Tensor:
            with policy.active():
                hidden = policy.hidden(*ids_of(rows, sim.lengths.row))
                packed = hidden[:, :-1].reshape(-1, hidden.shape[-1])
                packed = packed[torch.zeros(len(packed), dtype=torch.long)]
                head, total = policy.lm.get_output_embeddings(), 0.0
                size, some = CHUNK, min(rows * sim.lengths.answer, 3 * CHUNK)  # more take no more
                if not _in_chunks(sim.config.get_text_config()):
                    size = some = len(packed)
                for start in range(0, some, size):
                    part = packed[start : start + size]
                    goal = torch.zeros(len(part), dtype=torch.long)
                    words = (part, head.weight, head.bias, goal, 1.0, None)
                    total = total + checkpoint(_chunk, *words, use_reentrant=False)[0]
                return total

        yield from training(sim, tracker, policy, loss)
