"""What is asked of a run when it has ended: a stage more, in its folder, and nothing else again."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from rlhf_recipes.errors import UsageError
from rlhf_recipes.pipeline.plan import plan_run
from rlhf_recipes.pipeline.runner import RunOutcome, run
from rlhf_recipes.recipe.kinds import BEST_OF, EVALUATION
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.store.history import manifest_of

KEY = f"{EVALUATION}.{BEST_OF}="


def best_of(*, run_folder: Path, count: int) -> RunOutcome:
    """Run the best-of-`count` stage of a run, in that run; its recipe.toml stays as written.

    Raises UsageError where another of its stages would have to run first, and what `run` raises.
    """
    folder = run_folder.resolve()
    manifest = manifest_of(folder)
    recipe = load_recipe(folder / "resolved.toml", set=[f"{KEY}{count}"])
    for stage in plan_run(recipe, folder.parent, name=folder.name).stages:
        if not stage.done and stage.kind != BEST_OF:
            hint = shlex.join(["rlhf-recipes", "run", manifest["recipe"], "--name", folder.name])
            what = f"{stage.name} of {run_folder} would have to run first"
            raise UsageError(f"{what}: {stage.reason}", hint)
    before = (word for word in manifest.get("overrides", ()) if not word.startswith(KEY))
    text, path = (folder / "recipe.toml").read_text(encoding="utf-8"), Path(manifest["recipe"])
    written = replace(recipe, path=path, text=text, overrides=(*before, f"{KEY}{count}"))
    return run(written, runs=folder.parent, name=folder.name)
