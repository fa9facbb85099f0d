"""The weighted sum of a stage's rewards: its reward model's score, and what its rules give."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

import torch

from rlhf_recipes.data.rows import Example
from rlhf_recipes.data.tokens import THINK, Tokens
from rlhf_recipes.models.reward_model import fined
from rlhf_recipes.recipe.rewards import Term
from rlhf_recipes.recipe.wiring import rewards_of
from rlhf_recipes.stages.contract import StageContext
from rlhf_recipes.stages.rewards.rule import Said, load_rule, silent

TAIL = 8  # tokens at a prompt's end, in which "<think>" stands where the template begins it
Answered = Sequence[tuple[Example, list[int]]]
Parts = dict[str, list[float | None]]  # by the reward's name, before its weight


class Prompt(list[int]):
    """A prompt's ids that know their row: two rows may have one prompt and other columns."""

    def __init__(self, example: Example) -> None:
        super().__init__(example.prompt_ids)
        self.example = example


def said_of(answered: tuple[Example, Sequence[int]], tokens: Tokens) -> Said:
    example, ids = answered
    ended = list(ids[-1:]) == [tokens.eos_id]
    begun = tokens.decode(example.prompt_ids[-TAIL:]).rstrip().endswith(THINK)
    return Said(example.prompt, example.row, tokens.decode(list(ids)), ids, ended, begun)


class Rewards:
    """The rewards of a list, ready to be asked. Raises StageError as `load_rule` does."""

    def __init__(self, context: StageContext, terms: Sequence[Term]) -> None:
        self.terms, self.tokens = terms, context.session.tokens
        base = context.recipe.model.base
        self.rules = {one.name: rule for one in terms if (rule := load_rule(one, base))}
        self.model = next((one for one in terms if one.model), None)

    @classmethod
    def of(cls, context: StageContext) -> Rewards | None:
        """What a stage trains on, or asks; None where it is a reward model's score and no more."""
        terms = rewards_of(context.recipe, context.name)
        plain = [one.model and one.weight == 1 for one in terms]
        return None if plain in ([], [True]) else cls(context, terms)

    def parts(self, answered: Answered, scores: Sequence[float] | None) -> Parts:
        """What each reward gives. `scores` are the reward model's, where there is one.

        Raises StageError for an answer of whose row no reward speaks.
        """
        said = [said_of(one, self.tokens) for one in answered]
        found: Parts = {}
        for one in self.terms:
            rule = self.rules.get(one.name)
            found[one.name] = list(scores or ()) if rule is None else [rule(each) for each in said]
        for each, *given in zip(said, *found.values(), strict=True):
            if all(number is None for number in given):
                raise silent(list(found), each)
        return found

    def check(self, rows: Sequence[Example]) -> None:
        """Raise StageError for a row of which no rule speaks, before hours go into the others."""
        if self.rules and all(one.rule for one in self.terms):
            self.parts([(row, [self.tokens.eos_id]) for row in rows], None)
            self.carry({})

    def totals(self, parts: Parts) -> list[float]:
        """The weighted sums; a reward that does not speak of a row adds nothing."""
        sums = [0.0] * len(next(iter(parts.values())))
        for one in self.terms:
            for place, number in enumerate(parts[one.name]):
                sums[place] += 0.0 if number is None else one.weight * number
        return sums

    def pay(
        self,
        answered: Answered,
        scores: torch.Tensor | None,
        ended: torch.Tensor,
        penalty: float | None,
        floor: float,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """What a policy is trained on [batch], and each reward's mean over what it speaks of."""
        parts = self.parts(answered, None if scores is None else scores.tolist())
        totals = torch.tensor(self.totals(parts), dtype=torch.float32, device=ended.device)
        spoken = {k: [n for n in numbers if n is not None] for k, numbers in parts.items()}
        means = {name: fmean(numbers) for name, numbers in spoken.items() if numbers}
        return self.fined(totals, scores, ended, penalty, floor), means

    def fined(
        self,
        totals: torch.Tensor,
        scores: torch.Tensor | None,
        ended: torch.Tensor,
        penalty: float | None,
        floor: float,
    ) -> torch.Tensor:
        """`fined` of sums [batch]: the floor is the reward model's, the penalty is of the whole."""
        if penalty is not None and scores is not None and self.model:
            totals = totals + self.model.weight * (fined(scores, ended, 0.0, floor) - scores)
        return fined(totals, ended, penalty, math.inf)

    @property
    def over(self) -> dict[str, dict[str, int]]:
        """By rule and bound: how many answers were over it, and got 0."""
        return {name: dict(rule.over) for name, rule in self.rules.items() if rule.over}

    def carry(self, over: dict[str, dict[str, int]]) -> None:
        """Go on from these counts."""
        for name, rule in self.rules.items():
            rule.over = Counter(over.get(name, {}))
