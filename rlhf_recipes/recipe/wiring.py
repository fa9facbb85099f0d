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
    policies: dict[str, str] = {}
    scorer: dict[str, str] = {}
    for stage in recipe.stages:
        table, makes = recipe.table(stage), recipe.kind(stage).makes
        roles = {role: getattr(table, role) for role in ROLES if getattr(table, role)}
        taken[stage] = roles
        if makes == "policy":
            policies[f"policy:{stage}"] = stage
            scorer = {"reward_model": roles["reward_model"]} if "reward_model" in roles else scorer
        elif makes == "reward_model" and not scorer:
            scorer = {"reward_model": stage}
    asked = recipe.evaluation
    if asked is None:
        return taken
    judges = {
        role: JUDGE if judge == INDEPENDENT else judge
        for role, judge in asked.judges.items()
        if not python_judge(judge)
    }
    for stage in recipe.all_stages[len(recipe.stages) :]:
        if recipe.kind(stage).makes != "numbers":
            taken[stage] = {}
            continue
        start = recipe.explorer and recipe.explorer.policy
        one = {"policy": start} if start else {}
        taken[stage] = (one if recipe.kind(stage).borrows else policies) | scorer | judges
    return taken


def written_rules(recipe: Recipe) -> dict[str, tuple[str, str]]:
    """By role: file and function of each judge that is a rule in a file."""
    judges = recipe.evaluation.judges if recipe.evaluation else {}
    return {role: rule for role, judge in judges.items() if (rule := python_judge(judge))}
