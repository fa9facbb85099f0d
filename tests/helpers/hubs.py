"""A recipe on the fake hub, and what goes wrong there."""

from __future__ import annotations

from pathlib import Path

from rlhf_recipes.recipe.load import Recipe, load_recipe
from rlhf_recipes.sources import fetch
from rlhf_recipes.sources import resolve as sources
from tests.helpers.counting import RECIPE
from tests.helpers.fake_hub import FakeHub

HUB = RECIPE.replace('"./model"', '"owner/model"').replace('"./pairs.jsonl"', '"owner/pairs"')


def recipe_of(folder: Path, text: str = HUB) -> Recipe:
    file = folder / "hub.toml"
    file.write_text(text)
    return load_recipe(file)


def fetched(recipe: Recipe) -> list[str]:
    said: list[str] = []
    fetch.fetch(recipe, said.append)
    return said


def weights(recipe: Recipe, folder: Path) -> bytes:
    identity = sources.identify_base(recipe, folder)
    return (sources.base_folder(recipe, identity) / "model.safetensors").read_bytes()


def trouble(fake: FakeHub, kind: str, what: str = "") -> None:
    if kind == "refused":
        from huggingface_hub import close_session

        close_session()  # a connection that is open would go on
        fake.shutdown()
        fake.server_close()
    else:
        fake.troubles[what] = kind
