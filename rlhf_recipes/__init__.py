"""RLHF on one GPU: one recipe, one command, SFT → reward → PPO. The same from Python:

    recipe = load_recipe("smoke")
    outcome = run(recipe)

Loaded on first use, so that importing a light module of this package loads no other.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors
    from rlhf_recipes.pipeline.plan import plan_run as plan_run
    from rlhf_recipes.pipeline.runner import run as run
    from rlhf_recipes.recipe.load import load_recipe as load_recipe

# To be set before torch loads. A cache grows a little at each token, and a card whose memory is in
# fixed pieces then holds 1.2 to 1.5 times what is in use.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

_HOMES = {"load_recipe": "recipe.load", "plan_run": "pipeline.plan", "run": "pipeline.runner"}
__all__ = ["load_recipe", "plan_run", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
