"""The reward model: stock `RewardTrainer` on ids that end in EOS, and its unit.

Departs from TRL's own script in that
- the model is an adapter and a scalar head on the base that the policy uses, read through the same
  `score()` that PPO and the evaluation use; stock trains the head on the newline that a template
  writes after EOS, while PPO scores at EOS (TRL-facts 27);
- the head trains with a learning rate of its own, in float32;
- mean and deviation of its scores over the training chosen answers are stored: the unit in which
  every later stage reads it; and what an answer that was cut off scores at most;
- what it is worth is measured on test pairs: PPO looks at that before it starts.

The independent judge is one too: from the bare base, on the pairs that this one never sees. Those
are fewer: where they are few, it reads them more often.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from trl import RewardConfig, RewardTrainer

from rlhf_recipes import stats
from rlhf_recipes.data.dataset import Data
from rlhf_recipes.data.rows import Example, pairs
from rlhf_recipes.models.base import UNIT
from rlhf_recipes.models.fake_model import Held, Sim, ids_of, training
from rlhf_recipes.models.load import new_head
from rlhf_recipes.models.reward_model import floor_of
from rlhf_recipes.models.role import Role
from rlhf_recipes.models.sampling import score_ids
from rlhf_recipes.recipe.kinds import JUDGE
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.stages import training as stock
from rlhf_recipes.stages.contract import StageContext, StageResult, Work
from rlhf_recipes.stages.training import Stock, float32, load_rows, trainer_config, trial, two_rates
from rlhf_recipes.store.files import write_json

__all__ = ["memory", "run", "trial", "work"]  # see contract.StageModule

UNIT_ROWS = 1024  # the deviation of so many scores is right to 2 %
FEW_PAIRS = 1000  # in all, or as many as the reward model reads: a judge of fewer reads them again,
REREAD = 4  # but at most so often


def run(context: StageContext) -> StageResult:
    recipe, session = context.recipe, context.session
    table = recipe.table(context.name)
    data, train = load_rows(context)
    validation = pairs(data.validation)

    # ---- reward model
    base, start = session.base, context.inputs.get("policy")
    reward = base.open("reward", start, seed=context.seed("lora"), trainable=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed("head"))
        reward.add_head(new_head(reward.lm))

    # ---- training
    args = trainer_config(RewardConfig, context, max_length=None)
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
    batch = args.per_device_eval_batch_size
    pad = session.tokens.pad_id
    some = train[:: -(-len(train) // UNIT_ROWS)]
    chosen = score_ids(reward, [(e.prompt_ids, e.chosen_ids) for e in some], pad, batch)
    mean, std = chosen.mean().item(), chosen.std().item()
    std = std if std > 0 else 1.0  # one answer alone, or all alike
    floor = floor_of(reward, some, pad, batch)
    metrics: dict[str, Any] = {
        "train_loss": trained.training_loss,
        "steps": trained.global_step,
        "pairs": len(train),
        "unit_mean": mean,
        "unit_std": std,
        "unit_floor": (floor - mean) / std,
    }
    summary = f"loss {trained.training_loss:.3f}"
    if validation:
        apart = margins(reward, validation, pad, batch)
        accuracy = stats.right(apart).mean().item()
        metrics |= {"validation_accuracy": accuracy, "validation_margin": apart.mean() / std}
        summary = f"validation accuracy {accuracy:.1%} of {len(validation)} pairs"
    found = measure(context, reward, data, std, batch)
    if found:
        summary = f"accuracy {found['accuracy']:.1%} of {found['test_pairs']} test pairs"

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
    most = min(len(pairs(data.reward_train)), FEW_PAIRS) / len(pairs(data.judge))
    return min(REREAD, max(1.0, most))


class Trainer(Stock, RewardTrainer):
    def row(self, example: Example) -> dict[str, list[int]]:
        answers = {"chosen_ids": example.chosen_ids, "rejected_ids": example.rejected_ids}
        return {name: example.prompt_ids + ids for name, ids in answers.items()}


def measure(
    context: StageContext, reward: Role, data: Data, std: float, batch: int
) -> dict[str, float]:
    """A reward model's numbers on test pairs, whose evidence goes to the stage's output.

    `std` is its unit in the scale of its head. A test split's pairs serve, also where the stage's
    `data` are its own.
    """
    session, whole = context.session, context.recipe.dataset
    split = any(table.test_split for table in (whole, *whole.more))
    rows = pairs((session.data(whole) if split else data).test)
    numbers, found = {}, {"pairs": 0, "margins": [], "calibration": [], "worst": []}
    if rows:
        apart = margins(reward, rows, session.tokens.pad_id, batch)
        lengths = [(len(e.chosen_ids), len(e.rejected_ids)) for e in rows]
        numbers, found = stats.of_pairs(apart, std, lengths)
        worst = [i for i in apart.argsort(kind="stable") if apart[i] <= 0][: stats.WORST]
        decode = session.tokens.decode
        found["worst"] = [
            {
                "prompt": rows[i].prompt,
                "chosen": decode(rows[i].chosen_ids),
                "rejected": decode(rows[i].rejected_ids),
                "margin": round(apart[i] / std, 4),
            }
            for i in worst
        ]
    file = context.folder / "output" / stats.FILE
    write_json(file, {**found, "metrics": numbers})
    return numbers


def margins(reward: Role, rows: list[Example], pad: int, batch: int) -> np.ndarray:
    """Score of the chosen less that of the rejected answer, a pair each, in the head's scale."""
    chosen = score_ids(reward, [(e.prompt_ids, e.chosen_ids) for e in rows], pad, batch)
    rejected = score_ids(reward, [(e.prompt_ids, e.rejected_ids) for e in rows], pad, batch)
    return (chosen - rejected).double().numpy()


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
