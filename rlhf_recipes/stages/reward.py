"""The reward model: stock `RewardTrainer` on ids that end in EOS, and its unit.

Departs from TRL's own script in that
- the model is an adapter and a scalar head on the base that the policy uses, read through the same
  `score()` that PPO and the evaluation use; stock trains the head on the newline that a template
  writes after EOS, while PPO scores at EOS (TRL-facts 27);
- the head trains with a learning rate of its own, in float32;
- a pair of a row that rates n answers weighs 2/(n(n−1)) in the loss, over the mean weight;
- an answer that a label calls good or bad, at a prompt that has no other kind, is held against a
  threshold: the loss is −log σ of its score plus a bias, or of minus that. Each row counts once in
  one mean, pair or single answer. The bias is the head's own: it cancels in a
  pair, and it is taken off before the unit is measured, so that it is in no score;
- mean and deviation of its scores over the training chosen answers are stored: the unit in which
  every later stage reads it; and what an answer that was cut off scores at most;
- what it is worth is measured on test pairs: PPO looks at that before it starts.

The independent judge is one too: from the bare base, on the pairs that this one never sees. Those
are fewer: where they are few, it reads them more often.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from rlhf_recipes import stats
from rlhf_recipes.data.dataset import Data
from rlhf_recipes.data.rows import Example, answered, feedback
from rlhf_recipes.models.base import UNIT
from rlhf_recipes.models.fake_model import Held, Sim, ids_of, training
from rlhf_recipes.models.load import new_head
from rlhf_recipes.models.reward_model import floor_of
from rlhf_recipes.models.role import Role
from rlhf_recipes.models.sampling import score_ids
from rlhf_recipes.recipe.kinds import JUDGE
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.wiring import judged_before
from rlhf_recipes.stages import training as stock
from rlhf_recipes.stages.contract import StageContext, StageResult, Work
from rlhf_recipes.stages.evidence import compared, measure
from rlhf_recipes.stages.label_curve import keep_curve
from rlhf_recipes.stages.training import Stock, float32, load_rows, trainer_config, trial, two_rates
from rlhf_recipes.store.files import write_json

__all__ = ["memory", "run", "trial", "work"]  # see contract.StageModule

NO_MARGIN = "use_margin is set, and no pair has a margin: name its column, or rank the answers"
UNIT_ROWS = 1024  # the deviation of so many scores is right to 2 %
FEW_PAIRS = 1000  # in all, or as many as the reward model reads: a judge of fewer reads them again,
REREAD = 4  # but at most so often


def run(context: StageContext) -> StageResult:
    recipe, session = context.recipe, context.session
    table = recipe.table(context.name)
    data, train = load_rows(context)
    if table.extras["use_margin"] and all(one.margin is None for one in train):
        context.progress.note(f"{context.name}: {NO_MARGIN}")
    validation = feedback(data.judged("validation"))
    good = sum(one.rejected_ids is None for one in train)
    bad = sum(one.chosen_ids is None for one in train)

    # ---- reward model
    base, start = session.base, context.inputs.get("policy")
    reward = base.open("reward", start, seed=context.seed("lora"), trainable=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed("head"))
        reward.add_head(new_head(reward.lm, bias=bool(good or bad)))
    if good or bad:
        reward.score.bias.data.fill_(math.log(max(good, 1) / max(bad, 1)))
        note = f"{len(train) - good - bad} pairs; {good} good and {bad} bad answers without a pair"
        context.progress.note(note)

    # ---- training
    args = trainer_config(RewardConfig, context, max_length=None)
    batch, pad = args.per_device_eval_batch_size, session.tokens.pad_id
    if context.kind != JUDGE and judged_before(recipe, context.name):
        keep_curve(context, reward, train, data, batch)
    args.num_train_epochs *= _rereads(context.kind, data)
    head = list(reward.score.parameters())
    body = reward.trainable()[: -len(head)]
    trainer = Trainer(
        context,
        reward,
        {"loss": "loss", "accuracy": "accuracy"},
        train,
        validation,
        model=reward,
        args=args,
        optimizers=(two_rates(args, body, head, table.extras["head_learning_rate"]), None),
    )
    float32(*reward.trainable())
    with reward.active(autocast=False):  # through the backward too: checkpointed layers recompute
        trained = trainer.train()

    # ---- unit, validation and evidence
    if good or bad:
        reward.score.bias.data.zero_()
    some = _some(answered(train) or train)
    chosen = score_ids(
        reward, [(e.prompt_ids, e.chosen_ids or e.rejected_ids) for e in some], pad, batch
    )
    mean, std = chosen.mean().item(), chosen.std().item()
    std = std if std > 0 else 1.0  # one answer alone, or all alike
    floor = floor_of(reward, _some([e for e in train if e.rejected_ids]), pad, batch)
    metrics: dict[str, Any] = {
        "train_loss": trained.training_loss,
        "steps": trained.global_step,
        "pairs": len(train) - good - bad,
        **({"good": good, "bad": bad} if good or bad else {}),
        "unit_mean": mean,
        "unit_std": std,
        "unit_floor": (floor - mean) / std,
    }
    summary = f"loss {trained.training_loss:.3f}"
    if seen := compared(reward, data.judged("validation"), pad, batch):
        accuracy = stats.right(seen.margins).mean().item()
        metrics |= {"validation_accuracy": accuracy, "validation_margin": seen.margins.mean() / std}
        summary = f"validation accuracy {accuracy:.1%} of {seen.told}"
    found = measure(context, reward, data, std, batch)
    if found:
        summary = f"accuracy {found['accuracy']:.1%} of {stats.cases(found)}"

    # ---- output
    output = context.folder / "output"
    base.save(reward, output)
    write_json(output / UNIT, {"mean": mean, "std": std, "floor": floor})
    base.close(reward)
    return StageResult(metrics | found, summary)


def _rereads(kind: str, data: Data) -> float:
    """How often more a judge of few pairs reads them than the recipe says."""
    if kind != JUDGE:
        return 1.0
    both = (len(data.learned(share)) for share in ("feedback", "judge_feedback"))
    most = min(next(both), FEW_PAIRS) / next(both)
    return min(REREAD, max(1.0, most))


def _some(rows: list[Example]) -> list[Example]:
    return rows[:: -(-len(rows) // UNIT_ROWS)] if rows else []


class Collator(DataCollatorForPreference):
    """Where rows have weights, an answer that a row lacks is left out, and `held` says which."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if "weight" not in examples[0]:
            return super().torch_call(examples)
        sides = ("chosen_ids", "rejected_ids")
        held = torch.tensor([[len(one[side]) > 0 for one in examples] for side in sides])
        whole = [
            one | {side: one[side] or [self.pad_token_id] for side in sides} for one in examples
        ]
        batch = super().torch_call(whole)
        batch |= {name: batch[name][held.flatten()] for name in ("input_ids", "attention_mask")}
        return batch | {"held": held, "weight": torch.tensor([one["weight"] for one in examples])}


class Trainer(Stock, RewardTrainer):
    """Stock's loss, weighted where rows have weights, and for rows that lack one answer."""

    def __init__(
        self,
        context: StageContext,
        role: Role,
        shown: dict[str, str],
        train: list[Example],
        validation: list[Example],
        **words: Any,
    ):
        rows = [*train, *validation]
        self.margins = context.recipe.table(context.name).extras["use_margin"]
        self.weighted = any(one.labelled or one.weight != 1.0 for one in rows)
        self.mean = fmean(one.weight for one in train)
        pad, multiple = context.session.tokens.pad_id, words["args"].pad_to_multiple_of
        words["data_collator"] = Collator(pad_token_id=pad, pad_to_multiple_of=multiple)
        super().__init__(context, role, shown, train, validation, **words)

    def row(self, example: Example) -> dict[str, Any]:
        answers = {"chosen_ids": example.chosen_ids, "rejected_ids": example.rejected_ids}
        row: dict[str, Any] = {
            name: example.prompt_ids + ids if ids else [] for name, ids in answers.items()
        }
        row |= {"margin": example.margin or 0.0} if self.margins else {}
        return row | ({"weight": example.weight / self.mean} if self.weighted else {})

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["chosen_ids", "rejected_ids", "margin", "weight"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **words: Any
    ) -> Any:
        if not self.weighted:
            return super().compute_loss(model, inputs, return_outputs, **words)
        held, weight = inputs.pop("held"), inputs.pop("weight")

        def whole(**asked: Any) -> Any:
            """A score for each place of a pair; 0, the threshold, where a row has no answer."""
            out = model(**asked)
            places = out.logits.new_zeros(held.numel(), 1)
            out.logits = places.masked_scatter(held.view(-1, 1), out.logits)
            return out

        loss, out = super().compute_loss(whole, inputs, return_outputs=True, **words)
        chosen, rejected = out.logits.squeeze(-1).chunk(2)
        # Stock's is the plain mean.
        loss -= ((weight - 1) * logsigmoid(chosen - rejected - inputs.get("margin", 0.0))).mean()
        return (loss, out) if return_outputs else loss


# ---- what its memory and its work are counted from


def work(recipe: Recipe, name: str, data: Data) -> Work:
    kind = recipe.kind(name)
    found = data.learned(kind.learns_from)
    scored = min(UNIT_ROWS, len(found)) / 2 + len(data.validation) + len(data.test)
    return stock.work(recipe, name, data, _rereads(kind.name, data), scored)


def memory(sim: Sim) -> Iterator[Held]:
    """Chosen and rejected answers are read side by side."""
    with sim.model("reward", trained=["reward"]) as (tracker, [reward]):

        def scores(rows: int) -> torch.Tensor:
            return reward(*ids_of(rows, sim.lengths.row)).logits.sum()

        yield from training(sim, tracker, reward, scores, each=2)
