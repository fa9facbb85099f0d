"""Two runs' last policies against each other: the same prompts, draws and judge, the first run's.

Prompts are those that the first run's evaluation asked, as far as they are on the second's test
side, too: nothing was trained on them in either. Answers that an evaluation kept are taken from it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_recipes import stats
from rlhf_recipes.errors import UsageError
from rlhf_recipes.findings import said
from rlhf_recipes.pipeline.export import finished_stage, shared_of
from rlhf_recipes.recipe.kinds import EVALUATION
from rlhf_recipes.recipe.wiring import columns_of, wiring
from rlhf_recipes.report.facts import Facts
from rlhf_recipes.report.policy_rules import judges_called
from rlhf_recipes.screen import Screen
from rlhf_recipes.stages.contract import StageContext
from rlhf_recipes.stages.session import Session

JUDGES = ("judge_", "judge2_")


@dataclass(frozen=True)
class Beaten:
    """How often the first policy's answer is preferred to the second's."""

    policies: tuple[str, str]
    shares: dict[str, stats.Share]  # by whom
    temperature: float
    length: int

    def __str__(self) -> str:
        first, second = self.policies
        lines = [
            f"{first} wins against {second} on {said(share, 'prompts')} by {who}"
            for who, share in self.shares.items()
        ]
        how = f"temperature {self.temperature:g}, at most {self.length} tokens, one draw for both"
        return "\n".join([*lines, f"asked alike: {how}; ties count one half"])


class _Notes:
    """What the stages' own functions say, on a screen."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen

    def update(self, done: int, total: int, **numbers: float) -> None: ...
    def resume(self, done: int) -> None: ...
    def sample(self, prompt: str, answer: str, **numbers: float) -> None: ...
    def note(self, text: str) -> None:
        self.screen.line(f"  {text}", "dim")


def head_to_head(first: Path, second: Path, screen: Screen) -> Beaten:
    """Raises UsageError where the first run has no judge, or the runs share no test prompt."""
    sessions = [shared_of(folder) for folder in (first, second)]
    recipe = sessions[0].recipe
    names, _, outputs = zip(*(finished_stage(one, None) for one in (first, second)), strict=True)
    if recipe.evaluation is None or EVALUATION not in recipe.all_stages:
        raise UsageError(f"{first} has no evaluation to judge by", "name a run with one first")
    with tempfile.TemporaryDirectory() as aside:
        contexts = [
            StageContext(EVALUATION, EVALUATION, s.recipe, Path(aside), {}, _Notes(screen), s)
            for s in sessions
        ]
        roles = _roles(first, recipe)
        contexts[0] = replace(contexts[0], inputs=roles)
        found, asked = _scores(contexts, outputs)
    called = dict(zip(JUDGES, judges_called(Facts(first)), strict=False))
    by = {who: found[who] for who in JUDGES if who in found} or {"": found.get("")}
    shares = {}
    for who, scores in by.items():
        if scores is None:
            raise UsageError(f"{first} has nobody who judges", "name a run with a judge first")
        mine, its = scores[: len(scores) // 2], scores[len(scores) // 2 :]
        wins = [(a > b) + 0.5 * (a == b) for a, b in zip(mine, its, strict=True)]
        low, high = stats.bootstrap(wins, asked.seed)
        share = stats.Share(sum(wins) / len(wins), low, high, len(wins))
        shares[called.get(who, f"the reward model of {first.name}")] = share
    whose = [f"{n} of {f.resolve().name}" for n, f in zip(names, (first, second), strict=True)]
    return Beaten((whose[0], whose[1]), shares, asked.temperature, asked.length)


def _roles(run: Path, recipe: Any) -> dict[str, Path]:
    """The outputs of the stages that judge for a run's evaluation."""
    taken = wiring(recipe)[EVALUATION]
    return {
        role: finished_stage(run, name)[2]
        for role, name in taken.items()
        if name in recipe.all_stages and not role.startswith("policy:")
    }


def _scores(
    contexts: Sequence[StageContext], outputs: Sequence[Path]
) -> tuple[dict[str, list[float]], Any]:
    """What everyone says of the first policy's answers and then of the second's; how both asked."""
    from rlhf_recipes.stages.answers import answers_of, asked, score

    mine, other = contexts
    rows, setting = asked(mine)
    columns = columns_of(other.recipe, EVALUATION)
    held = other.session.data(other.recipe.dataset).learned("test_prompts", columns)
    its = {str(row.turns or row.prompt): row for row in held}
    shared = [row for row in rows if str(row.turns or row.prompt) in its]
    if not shared:
        what = "the runs have no test prompt in common"
        raise UsageError(what, "the same [dataset] and test_fraction in both gives them the same")
    asking = [shared, [its[str(row.turns or row.prompt)] for row in shared]]
    ids = [
        next(answers_of(context, output, examples, setting, [setting.seed]))
        for context, output, examples in zip(contexts, outputs, asking, strict=True)
    ]
    if other.session.model != mine.session.model:
        ids[1] = [_retold(one, other.session, mine.session) for one in ids[1]]
    groups = [list(zip(shared, one, strict=True)) for one in ids]
    return score(mine, groups), setting


def _retold(answer: list[int], own: Session, other: Session) -> list[int]:
    """An answer in another tokenizer's ids."""
    from rlhf_recipes.data.tokens import ids

    [found] = ids(other.tokens, [own.tokens.decode(answer)])
    return found + [other.tokens.eos_id] * (answer[-1] == own.tokens.eos_id)
