"""What each stage takes: from the stages before it, or from elsewhere."""

from __future__ import annotations

from rlhf_recipes.recipe.kinds import JUDGE, ROLES
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.tables import INDEPENDENT, python_judge


def wiring(recipe: Recipe) -> dict[str, dict[str, str]]:
    """By stage, in the order in which they run: what serves each of its roles.

    That is a stage, or else a model's folder or hub id. The evaluation takes every policy, by
    "policy:<stage>", and scores by what was optimised last. Rules are not roles: see
    `written_rules`.
    """
    taken: dict[str, dict[str, str]] = {}
    for stage in recipe.stages:
        table = recipe.table(stage)
        taken[stage] = {role: getattr(table, role) for role in ROLES if getattr(table, role)}
    if recipe.evaluation is None:
        return taken
    makes = {stage: recipe.kind(stage).makes for stage in recipe.all_stages}
    policies = {f"policy:{name}": name for name in recipe.stages if makes[name] == "policy"}
    optimised = [roles["reward_model"] for roles in taken.values() if "reward_model" in roles]
    trained = [name for name in recipe.stages if makes[name] == "reward_model"]
    scorers = optimised[-1:] or trained[:1]
    scorer = {"reward_model": scorers[0]} if scorers else {}
    judges = {
        role: JUDGE if judge == INDEPENDENT else judge
        for role, judge in recipe.evaluation.judges.items()
        if not python_judge(judge)
    }
    start = recipe.explorer and recipe.explorer.policy
    one = {"policy": start} if start else {}
    for stage in recipe.all_stages[len(recipe.stages) :]:
        asked = (one if recipe.kind(stage).borrows else policies) | scorer | judges
        taken[stage] = asked if makes[stage] == "numbers" else {}
    return taken


def written_rules(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """By role: file and function of each judge that is a rule in a file."""
    judges = recipe.evaluation.judges if recipe.evaluation else {}
    return {role: rule for role, judge in judges.items() if (rule := python_judge(judge))}
