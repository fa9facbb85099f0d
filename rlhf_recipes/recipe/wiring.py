"""What each stage takes: from the stages before it, or from elsewhere."""

from __future__ import annotations

from rlhf_recipes.recipe.kinds import FROM_DATASET, JUDGE, ROLES
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.rewards import Term
from rlhf_recipes.recipe.tables import INDEPENDENT


def wiring(recipe: Recipe) -> dict[str, dict[str, str]]:
    """By stage, in the order in which they run: what serves each of its roles.

    That is a stage, or else a model's folder or hub id. The evaluation takes every policy, by
    "policy:<stage>", and scores by what was optimised last. What learns from judgements takes them
    by "label:<stage>". Rules are not roles: see `written_rules`.
    """
    taken: dict[str, dict[str, str]] = {}
    for stage in recipe.stages:
        table = recipe.table(stage)
        taken[stage] = {role: getattr(table, role) for role in ROLES if getattr(table, role)}
        taken[stage] |= {f"label:{name}": name for name in judged_before(recipe, stage)}
    if recipe.evaluation is None:
        return taken
    makes = {stage: recipe.kind(stage).makes for stage in recipe.all_stages}
    policies = {f"policy:{name}": name for name in recipe.stages if makes[name] == "policy"}
    optimised = [roles["reward_model"] for roles in taken.values() if "reward_model" in roles]
    trained = [name for name in recipe.stages if makes[name] == "reward_model"]
    scorers = optimised[-1:] or trained[:1]
    if recipe.explorer and recipe.explorer.rewards:  # rules alone have no model
        scorers = [one for one in [recipe.explorer.reward_model] if one]
    scorer = {"reward_model": scorers[0]} if scorers else {}
    judges = {
        role: JUDGE if judge.model == INDEPENDENT else judge.model
        for role, judge in recipe.evaluation.judges.items()
        if judge.model
    }
    start = recipe.explorer and recipe.explorer.policy
    one = {"policy": start} if start else {}
    for stage in recipe.all_stages[len(recipe.stages) :]:
        asked = (one if recipe.kind(stage).borrows else policies) | scorer | judges
        own = {f"label:{name}": name for name in judged_before(recipe, stage)}
        taken[stage] = asked if makes[stage] == "numbers" else own
    return taken


def judged_before(recipe: Recipe, stage: str) -> list[str]:
    """The `label` stages whose judgements a stage learns from."""
    if not recipe.kind(stage).compares:
        return []
    listed = [*recipe.stages]
    before = listed[: listed.index(stage)] if stage in listed else listed
    named = recipe.table(stage).extras.get("pairs")
    return [
        name
        for name in before
        if recipe.kind(name).makes == "judgements" and (named is None or name in named)
    ]


def reads_dataset(recipe: Recipe, stage: str) -> bool:
    """Whether a stage learns from the rows of its dataset: `pairs` may leave them out."""
    table = recipe.tables.get(stage)
    named = table and table.extras.get("pairs")
    return not named or FROM_DATASET in named


def written_rules(recipe: Recipe) -> dict[str, Term]:
    """By role: each judge that is not a model."""
    judges = recipe.evaluation.judges if recipe.evaluation else {}
    return {role: judge for role, judge in judges.items() if not judge.model}


def rewards_of(recipe: Recipe, stage: str) -> list[Term]:
    """The list of rewards that a stage trains on, or asks: that of the last policy that explores.

    Empty where the recipe has none: then a reward model is all there is.
    """
    table = recipe.tables.get(stage, recipe.explorer)
    return table.rewards if table else []


def columns_of(recipe: Recipe, stage: str) -> list[str]:
    """The columns of a row that a stage's rewards and judges ask for."""
    judges = [] if stage in recipe.tables else [*written_rules(recipe).values()]
    if recipe.kind(stage).makes == "answers":  # a `label` stage may judge them by a rule
        judges = [t.rule for t in recipe.tables.values() if t.answers == stage and t.rule]
    asked = rewards_of(recipe, stage) + judges
    return sorted({column for one in asked for column in one.columns})


def model_judges(recipe: Recipe) -> list[str]:
    """The models that judge in `label` stages on this machine, by folder or hub id."""
    found = [t.extras for t in recipe.tables.values() if t.extras.get("by") == "model"]
    return [extras["model"] for extras in found if not extras["url"]]


def principles_of(recipe: Recipe) -> list[str]:
    """The files of principles that models judge by."""
    found = [table.extras.get("principles") for table in recipe.tables.values()]
    return [file for file in found if file]


def code_of(recipe: Recipe) -> list[Term]:
    """Every reward and judge that is a function in a Python file."""
    found = [*written_rules(recipe).values()]
    found += [one for name in recipe.stages for one in recipe.tables[name].rewards]
    found += [table.rule for table in recipe.tables.values() if table.rule]
    return [one for one in found if one.code]
