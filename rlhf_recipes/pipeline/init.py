"""A recipe for a person's own file: `rlhf-recipes init pairs.csv --model …`.

The stages follow from what the rows hold, limits from their lengths, splits from how many prompts
there are, and batch sizes from the memory rule (`fit`). What cannot be known without the model's
files is estimated, and the recipe says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.rows import unique_prompts
from rlhf_recipes.errors import ModelError, UsageError
from rlhf_recipes.pipeline import init_text
from rlhf_recipes.pipeline.init_text import Plans, Sizes
from rlhf_recipes.pipeline.look import Looked, look
from rlhf_recipes.pipeline.memory import read_size
from rlhf_recipes.pipeline.plan import Plan, make_plan
from rlhf_recipes.recipe.edit import edit, without_comments
from rlhf_recipes.recipe.kinds import JUDGE, KINDS
from rlhf_recipes.recipe.load import Recipe, loads
from rlhf_recipes.recipe.tables import form_of, is_path
from rlhf_recipes.screen import beginning, quietly
from rlhf_recipes.sources import resolve as sources
from rlhf_recipes.stages.session import Session
from rlhf_recipes.store.fingerprint import Identities, tables_read
from rlhf_recipes.text import size

if TYPE_CHECKING:
    from rlhf_recipes.pipeline.fit import Room

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # where none is named: small enough for any machine
# What each kind of rows teaches (`Kind.learns_from`), and the method where none is named.
TEACHES = {
    "prompts": ("prompts",),
    "answers": ("prompts", "answers"),
    "labels": ("prompts", "answers", "labels", "feedback"),
    "pairs": ("prompts", "answers", "labels", "feedback", "pairs"),
}
USUAL = {"prompts": "grpo", "answers": "sft", "labels": "kto", "pairs": "ppo"}


@dataclass
class Start:
    """A file and a model that have been looked at; `write` makes the recipe."""

    file: Path
    new: Path
    model: str
    looked: Looked
    identity: dict[str, str]
    config: Any = None  # the model's config.json; None where it cannot be had
    here: bool = False  # whether the whole model is on this machine
    weights: int | None = None
    set: Sequence[str] = ()
    unset: Sequence[str] = ()
    runs: Path = Path("runs")
    notes: list[str] = field(default_factory=list)
    tell: Callable[[str], None] = lambda what: None  # of a step that takes its time

    @property
    def methods(self) -> list[str]:
        """The kinds that these rows can end in, the usual one first."""
        teaches, usual = TEACHES[self.looked.holds], USUAL[self.looked.holds]
        able = [
            kind.name
            for kind in KINDS.values()
            if kind.listed and kind.makes == "policy" and kind.learns_from in teaches
        ]
        return sorted(able, key=lambda name: name != usual)

    def write(self, method: str = "", device: str = "") -> Recipe:
        """Write the recipe and return it. Raises UsageError, RecipeError and DataError."""
        method = method or self.methods[0]
        if method not in self.methods:
            what = f"{self.file} holds {self.looked.holds}, from which {method} cannot learn"
            raise UsageError(what, f"--method is {' or '.join(self.methods)}")
        given = read_size(device) if device else None
        with beginning() as self.tell, quietly():
            recipe = self._fitted(method, given)
        self.new.parent.mkdir(parents=True, exist_ok=True)
        told = edit(recipe.text, self.set, ()).words  # whose comments are of other values
        self.new.write_text(without_comments(recipe.text, told), encoding="utf-8")
        return recipe

    def _fitted(self, method: str, given: float | None) -> Recipe:
        sizes = Sizes(self.weights, method)
        card = given is not None or _card()
        plans = Plans(self.looked, sizes, self.here, card, given, self.config)
        recipe, plan = self._made(plans)
        if self.config is not None:
            room = self._room(recipe, plan, given)
            plans.memory = f"{room.name} ({size(room.bytes)} free)" if room.here else room.name
            recipe, plan = self._fit(plans, recipe, plan, room, given)
        if self.here:
            data = self._session(recipe).data(recipe.dataset)
            plans.tested = len(unique_prompts(data.test))
            plans.validated = len(unique_prompts(data.validation))
            plans.trained = len(data.train)
            recipe, _ = self._made(plans)
        return recipe

    def _fit(
        self, plans: Plans, recipe: Recipe, plan: Plan, room: Room, given: float | None
    ) -> tuple[Recipe, Plan]:
        """The settings with which each stage fits."""
        # The judge takes what the reward model takes.
        stages = [stage for stage in plan.stages if stage.name != JUDGE]
        large = [stage for stage in stages if not room.holds(room.need(stage))]
        if not large:
            return recipe, plan
        trained = [stage.name for stage in large if stage.name in recipe.stages]
        plans.change({f"{name}.gradient_checkpointing": True for name in trained})
        recipe, plan = self._made(plans)
        changes = self._room(recipe, plan, given).changes(large)
        if changes is None or plans.lost(changes) > 0.5:
            self.notes.append(f"no setting makes {self.model} fit {room.name}: name a smaller one")
            plans.memory += "; no setting makes it fit, so name a smaller model"
            return recipe, plan
        plans.change(changes)
        return self._made(plans)

    def _made(self, plans: Plans) -> tuple[Recipe, Plan]:
        path = os.path.relpath(self.file.resolve(), self.new.parent.resolve())
        path = path if path.startswith(".") else f"./{path}"
        model = self.model
        if is_path(model):
            model = os.path.relpath(Path(model).expanduser().resolve(), self.new.parent.resolve())
            model = model if model.startswith(".") else f"./{model}"
        called = Path(self.model).expanduser().resolve().name
        text = init_text.recipe(plans, model=model, called=called, file=path)
        recipe = loads(text, self.new, self.set, self.unset)
        tables = {table: {"content": ""} for table in tables_read(recipe)}
        return recipe, make_plan(recipe, Identities(self.identity, {}, tables, {}), self.runs)

    def _session(self, recipe: Recipe) -> Session:
        return Session(recipe, self.identity)

    def _room(self, recipe: Recipe, plan: Plan, given: float | None) -> Room:
        from rlhf_recipes.pipeline.fit import Room

        session = self._session(recipe) if self.here else None
        return Room(recipe, self.config, session, given, tell=self.tell)


def start(
    file: Path,
    new: Path | None = None,
    *,
    model: str = MODEL,
    set: Sequence[str] = (),
    unset: Sequence[str] = (),
    runs: Path = Path("runs"),
) -> Start:
    """Look at a file of rows and a model. Raises UsageError, DataError, ModelError, RecipeError."""
    if not file.exists():
        raise UsageError(f"no file {file}", "name a file of rows: .csv, .tsv, .jsonl, .json")
    if file.is_file() and not form_of(file):
        known = ".csv, .tsv, .jsonl, .json and .parquet"
        raise UsageError(f"{file} is not a file of rows by its name", f"known are {known}")
    new = new or Path(f"{file.name.partition('.')[0]}.toml")
    new = new if new.suffix == ".toml" else new.with_name(f"{new.name}.toml")
    if new.exists():
        other = f"rlhf-recipes init {file} OTHER.toml"
        raise UsageError(f"{new} is there already", f"name another: {other}")
    if Path(model).is_dir() and not is_path(model):
        model = f"./{model}"
    made = Start(file, new, model, Looked({}, ""), {}, set=set, unset=unset, runs=runs)
    with quietly():
        bare = loads(init_text.bare(made.file.resolve(), _absolute(model)), new, set, unset)
        tokens = _look_at_model(made, bare)
        made.looked = look(bare.dataset, tokens)
    return made


def _absolute(model: str) -> str:
    return str(Path(model).expanduser().resolve()) if is_path(model) else model


def _look_at_model(made: Start, bare: Recipe) -> Any:
    """Fill in what can be known of the model; the tokenizer where the model is here."""
    try:
        made.identity = sources.identify_base(bare, made.runs)
        from rlhf_recipes.models.load import without_weights
        from rlhf_recipes.pipeline import fit

        folder = sources.config_folder(bare, made.identity)
        made.config = fit.architecture(folder)
        made.weights = sum(p.numel() for p in without_weights(folder).parameters())
    except ModelError as error:
        if bare.model.is_local:
            raise
        made.notes.append(f"{error.message}: lengths are estimated and batch sizes are small")
        made.weights = weights_by_name(bare.model.name)
        return None
    made.here = bare.model.is_local or sources.base_repo(bare).cached() is not None
    return Session(bare, made.identity).tokens if made.here else None


def weights_by_name(name: str) -> int | None:
    """What a model's name says: "SmolLM2-135M", "Qwen2.5-0.5B"."""
    found = re.search(r"(?<![A-Za-z\d.])(\d+(?:\.\d+)?)([MB])(?![A-Za-z\d])", name, re.IGNORECASE)
    return round(float(found[1]) * {"m": 1e6, "b": 1e9}[found[2].lower()]) if found else None


def _card() -> bool:
    import torch

    return torch.cuda.is_available()
