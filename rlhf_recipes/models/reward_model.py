"""Reward models as roles: this run's, in units of its own spread, or one from elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rlhf_recipes.data.rows import Example
from rlhf_recipes.data.tokens import Tokens, special_tokens, try_template
from rlhf_recipes.errors import ModelError
from rlhf_recipes.models.base import HEAD, UNIT, Base
from rlhf_recipes.models.load import load_config, load_reward_model, load_tokenizer, new_head
from rlhf_recipes.models.retold import Prompts, Retold
from rlhf_recipes.models.role import Role
from rlhf_recipes.models.sampling import score_ids

FLOOR_ROWS = 256  # the mean of so many scores is right to 6 % of their deviation


def open_reward(base: Base, output: Path) -> Role:
    """The reward model of a stage's output folder, frozen, scoring in units."""
    reward = base.open("reward", output, seed=0)
    return reward.add_head(load_head(reward.lm, output).requires_grad_(False))


def open_foreign(
    source: Path, base: Base, tokens: Tokens, prompts: Callable[[], Prompts] = dict
) -> Role:
    """A sequence classifier from elsewhere, held apart, scoring as it scores.

    One with the policy's tokenizer reads the policy's ids. Any other is told their text, of which
    `prompts` knows the turns. Raises ModelError as `check_foreign` does.
    """
    reads_ids = check_foreign(source, tokens)
    model = load_reward_model(source, dtype=base.dtype)
    if not reads_ids:
        return Retold(model, load_tokenizer(source), source, base.dtype, tokens, prompts())
    return Role(model, None, base.dtype).add_head(model.score.float())


def check_foreign(source: Path, tokens: Tokens) -> bool:
    """Whether a model from elsewhere reads the policy's ids as they are. No weights are read.

    It does where its tokenizer has each of the policy's tokens under the same id, and its head is
    called `score`: then it reads the last token's state, as this project's do. The tokenizer may
    have special tokens of its own, such as the "[PAD]" that scripts add: they are in no row.

    Raises ModelError where it does not give one number, or its chat template fails a trial.
    """
    hint = "name a sequence classifier with num_labels = 1"
    config = load_config(source)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(f"{source} is a {config.model_type}, which gives no score", hint)
    if config.num_labels != 1:
        raise ModelError(f"{source} gives {config.num_labels} numbers an answer, not one", hint)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    theirs = load_tokenizer(source)
    own, other = tokens.tokenizer.get_vocab(), theirs.get_vocab()
    known = {token: number for token, number in own.items() if number < tokens.rows}
    alike = all(other.get(token) == number for token, number in known.items())
    if alike and not other.keys() - own.keys() - special_tokens(theirs) and hasattr(model, "score"):
        return True
    if theirs.chat_template is not None:
        try_template(theirs, f"the chat template of the reward model {source}")
    return False


def load_head(lm: PreTrainedModel, output: Path) -> nn.Linear:
    """The trained head of a reward stage, with mean 0 and deviation 1 folded into it.

    The unit is that of its scores over the training chosen answers, so `kl_coef`, clip ranges and
    guards mean the same in every recipe.
    """
    head = new_head(lm, bias=True)
    weight = load_file(output / HEAD, device=str(lm.device))["score.weight"]
    mean, std = read_unit(output)
    head.weight.data.copy_(weight / std)
    head.bias.data.fill_(-mean / std)
    return head


def zero_head(lm: PreTrainedModel) -> nn.Linear:
    """A head that says 0 of everything: where a value model has no reward model to start from."""
    head = new_head(lm, bias=True)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def read_unit(output: Path) -> tuple[float, float]:
    """Mean and standard deviation of the reward over the training chosen answers."""
    unit = json.loads((output / UNIT).read_text())
    return unit["mean"], unit["std"]


# ---- answers that were cut off


def floor_of(reward: Role, rows: Sequence[Example], pad: int, batch: int) -> float:
    """The most that an answer without EOS may score before its penalty, in the model's own scale.

    That is a deviation below the mean of the rejected answers of `rows`, which are pairs: what a
    bad answer scores that is complete. It is inf without rows. N+ (arXiv 2403.17031) puts a
    constant in the place of the score, but a reward model from elsewhere has no unit for one.
    """
    if not rows:
        return math.inf
    some = rows[:: -(-len(rows) // FLOOR_ROWS)]
    both = [(e.prompt_ids, e.rejected_ids) for e in some]
    scores = score_ids(reward, both, pad, batch)
    return (scores.mean() - scores.std(correction=0)).item()


def read_floor(output: Path) -> float:
    """`floor_of` the training pairs, in units; inf where a reward stage of before wrote none."""
    mean, std = read_unit(output)
    floor = json.loads((output / UNIT).read_text()).get("floor")
    return math.inf if floor is None else (floor - mean) / std  # null: no row was worse


def fined(
    scores: torch.Tensor, ended: torch.Tensor, penalty: float | None, floor: float
) -> torch.Tensor:
    """The scores [batch] that a policy is trained on and chosen by; None takes them as they are.

    An answer that did not end (`ended` [batch]) scores at most `floor`, less the penalty. A reward
    model was trained on whole answers. On smoke it scores half of a rejected answer 1.5 units above
    the whole: with a penalty of 1 alone, a bad answer is better cut off than ended.
    """
    if penalty is None:
        return scores
    return torch.where(ended, scores, scores.clamp(max=floor) - penalty)
