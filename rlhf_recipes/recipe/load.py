"""A recipe: one TOML file that names a model, a dataset and the stages. No torch in here."""

from __future__ import annotations

import json
import os
import re
import shlex
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.errors import Problem, RecipeError, UsageError
from rlhf_recipes.recipe.check import Key, dotted
from rlhf_recipes.recipe.check_stages import check
from rlhf_recipes.recipe.edit import Edited, edit, rebase, without_comments
from rlhf_recipes.recipe.fields import fields_for, suggest
from rlhf_recipes.recipe.kinds import BEST_OF, EVALUATION, JUDGE, REWARD, Kind, kind_of
from rlhf_recipes.recipe.tables import ModelTable, form_of, located, move_paths, written
from rlhf_recipes.recipe.toml import MAX_SIZE, key_lines, parse
from rlhf_recipes.text import cut, masked

if TYPE_CHECKING:
    from rlhf_recipes.recipe.tables import DatasetTable, EvaluationTable, StageTable

HINTS = Path(__file__).with_name("hints.toml")  # what to do about tomllib's messages


@dataclass(frozen=True, repr=False)
class Recipe:
    path: Path
    text: str  # as written, `--set` and `--unset` applied
    overrides: tuple[str, ...]  # the words of `--set`, and "unset KEY"
    title: str
    stages: tuple[str, ...]
    seed: int
    model: ModelTable
    lora: dict[str, Any] | None  # LoraConfig's arguments; None: all weights train
    dataset: DatasetTable
    evaluation: EvaluationTable | None
    tables: dict[str, StageTable]  # of its stages, and of an independent judge
    notes: tuple[str, ...]  # what is no mistake, and yet worth a look

    def __repr__(self) -> str:
        return f"<Recipe {self.title!r}: {' → '.join(self.all_stages)}>"

    @property
    def all_stages(self) -> list[str]:
        """Its stages, and those that [evaluation] asks for."""
        if self.evaluation is None:
            return [*self.stages]
        judge = [JUDGE] if JUDGE in self.tables else []
        best_of = [BEST_OF] if self.evaluation.best_of else []
        return [*self.stages, *judge, EVALUATION, *best_of]

    def kind(self, stage: str) -> Kind:
        """Of any of its stages; those that [evaluation] asks for are called as their kinds."""
        return self.tables[stage].of if stage in self.tables else kind_of(stage)

    def model_of(self, stage: str) -> ModelTable:
        """The base model that a stage is on. The judge may have one of its own."""
        asked, own = self.model, self.evaluation.judge_model if self.evaluation else None
        if stage != JUDGE or own is None or JUDGE not in self.tables:
            return asked
        return ModelTable(own, dtype=asked.dtype, quantization=asked.quantization, base=asked.base)

    def written_as(self, stage: str) -> str:
        """The table to change a stage's settings in; "" where there is none.

        The judge has the settings of the last reward stage, else those of `[reward]`.
        """
        if stage in self.stages:
            return stage
        alike = [name for name in self.stages if self.kind(name).makes == "reward_model"]
        return [REWARD, *alike][-1] if stage == JUDGE else ""

    def dataset_of(self, stage: str) -> DatasetTable:
        """The rows that a stage reads: its own, else the recipe's."""
        table = self.tables.get(stage)
        return (table and table.dataset) or self.dataset

    @property
    def explorer(self) -> StageTable | None:
        """The last stage that trains a policy on its own answers: its settings ask every policy."""
        found = [self.tables[name] for name in self.stages if self.tables[name].of.explores]
        return found[-1] if found else None

    def usual(self, key: str, own: Any) -> Any:
        """How answers are asked for: in a stage's own word, else as the explorer asks."""
        lent = self.explorer.said(key) if self.explorer else None
        usual = {"temperature": 0.7, "response_length": self.dataset.max_answer_tokens}
        return own or lent or usual.get(key)

    def asked_with(self, key: str) -> Any:
        """How the evaluation asks, by its own word or the usual one."""
        return self.usual(key, getattr(self.evaluation, key, None))

    def most_tokens(self, stage: str) -> int | None:
        """The most tokens of an answer that a stage samples; None where it samples none."""
        key, table = "response_length", self.tables[stage]
        return self.usual(key, table.said(key)) if table.of.samples else None

    def table(self, stage: str) -> StageTable:
        return self.tables[stage]

    def resolved(self) -> dict[str, Any]:
        """Every key with its value, paths absolute: a recipe of its own, whose stages are these."""
        listed = [written(table) for table in (self.dataset, *self.dataset.more)]
        if any(table["test_split"] for table in listed):
            listed = [table | {"test_fraction": None} for table in listed]
        asked = {key: self.asked_with(key) for key in ("temperature", "response_length")}
        keys: dict[str, Any] = {
            "title": self.title,
            "stages": list(self.stages),
            "seed": self.seed,
            "evaluation": written(self.evaluation) | asked if self.evaluation else False,
            "lora": False if self.lora is None else self.lora,
            "model": written(self.model),
            "dataset": listed if self.dataset.more else listed[0],
            **{name: self.tables[name].written() for name in self.stages},
        }
        if JUDGE in self.tables and (place := self.written_as(JUDGE)) not in self.stages:
            keys[place] = self.tables[JUDGE].written() | {"kind": REWARD}
        move_paths(keys, lambda place: str(located(place, self.model.base)))
        return _without_none(keys)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(v) for key, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


# ---- loading


def load_recipe(
    source: str | Path | Mapping[str, Any], *, set: Sequence[str] = (), unset: Sequence[str] = ()
) -> Recipe:
    """Read and check a recipe: a file, a shipped recipe's name, or its tables as a mapping.

    Relative paths in a mapping start from the current folder, and its run is called "recipe".
    Raises RecipeError with every problem, UsageError for a bad call.
    """
    if isinstance(source, Mapping):
        import tomlkit

        return loads(tomlkit.dumps(source), Path("recipe.toml"), set, unset)
    path = find_recipe(source) if isinstance(source, str) else source
    return loads(_read(path), path, set, unset)


def loads(text: str, path: Path, set: Sequence[str] = (), unset: Sequence[str] = ()) -> Recipe:
    """A recipe from its text, as if that stood in `path`. Raises as `load_recipe` does."""
    edited = edit(text, set, unset)
    if secrets := _secrets(text, path, set):
        raise RecipeError(secrets)
    try:
        parts, checker = check(parse(edited.text), path)
    except tomllib.TOMLDecodeError as error:
        what = f"makes no TOML of the recipe: {error}; change the file itself"
        raise RecipeError([Problem(" ".join(edited.words.values()), None, "", what)]) from None
    lines = key_lines(text) if checker.problems else {}
    problems = [_place(key, what, path, lines, edited) for key, what in checker.problems]
    if problems or edited.problems:
        problems.sort(key=lambda p: (p.file != str(path), p.line or 0))
        raise RecipeError([*problems, *edited.problems])
    overrides = (*set, *(f"unset {key}" for key in unset))
    return Recipe(path=path, text=edited.text, overrides=overrides, **parts)


def _secrets(text: str, path: Path, set: Sequence[str]) -> list[Problem]:
    """Where a password or a token stands: what a recipe says is copied to every run."""
    what = "holds a password or a token: take it out; it is read from the environment (HF_TOKEN)"
    lines = enumerate(text.split("\n") if masked(text) != text else (), 1)
    found = [Problem(str(path), at, "", what) for at, line in lines if masked(line) != line]
    words = [word.partition("=")[0] for word in set if masked(word) != word]
    return found + [Problem(f"--set {key}", None, "", what) for key in words]


def changed(recipe: Recipe, words: Sequence[str]) -> Recipe:
    """The recipe with more words of `--set`. Raises RecipeError."""
    return loads(recipe.text, recipe.path, words, ())


def _read(path: Path) -> str:
    """A recipe's text, once it is known to be TOML. Raises UsageError and RecipeError."""
    try:
        with path.open("rb") as file:
            text = file.read(4 * MAX_SIZE).decode("utf-8-sig").replace("\r\n", "\n")
        parse(text)
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(f"{path} is no recipe file", "`rlhf-recipes recipes` lists some") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RecipeError([Problem(str(path), line, "", "is not UTF-8 text")]) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError([_no_toml(str(error), text, path)]) from None
    return text


def _no_toml(said: str, text: str, path: Path) -> Problem:
    message, _, place = said.partition(" (at ")
    written = text.rstrip("\n").split("\n")
    found = re.match(r"line (\d+)", place)
    line = int(found[1]) if found else len(written)
    hints = tomllib.loads(HINTS.read_text(encoding="utf-8")).items()
    hint = next((hint for start, hint in hints if re.match(start, message)), "")
    if place.startswith("end"):
        hint = "something is not closed: quotes, a ] or a }"
    shown = cut(written[line - 1].strip(), 60)
    return Problem(str(path), line, "", f"not TOML: {message}: {shown}{hint and '; '}{hint}")


def _place(key: Key, message: str, path: Path, lines: dict[Key, int], edited: Edited) -> Problem:
    """A problem with the `--set` that made it, or the line of its key or of the table around it."""
    around = [key[:length] for length in range(len(key), 0, -1)]
    words = [edited.words[at] for at in around if at in edited.words]
    if not words and key not in lines:
        words = [word for at, word in edited.words.items() if at[: len(key)] == key]
    if words:
        return Problem(words[0], None, dotted(key), message)
    line = next((lines[at] for at in around if at in lines), None)
    return Problem(str(path), line, dotted(key), message)


# ---- layout: what may change without another result


def layout_settings(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The settings that say where and how the stage computes, and move its result by rounding."""
    if stage not in recipe.tables:
        return {}
    table = recipe.tables[stage]
    fields = fields_for(table.of.config)
    return {key: v for key, v in table.options.items() if fields[key].effect == "layout"}


def smaller_layout(recipe: Recipe, stage: str, run: str) -> str:
    """What to type where a stage of a run lacks memory: layout settings that ask for less."""
    options = recipe.tables[stage].options if stage in recipe.tables else {}
    rows, words = layout_settings(recipe, stage).get("per_device_train_batch_size", 1), {}
    if rows > 1:
        part = next(n for n in range(2, rows + 1) if rows % n == 0)
        words["per_device_train_batch_size"] = rows // part
        words["gradient_accumulation_steps"] = options["gradient_accumulation_steps"] * part
    if options.get("gradient_checkpointing") is False:
        words["gradient_checkpointing"] = "true"
    scored = recipe.tables[stage].called("local_rollout_forward_batch_size") if options else ""
    if (rollout := options.get(scored, 1)) > 1:
        words[scored] = rollout // 2
    if not words:
        return "end what else holds memory, and the same command goes on"
    table = recipe.written_as(stage)
    changes = " ".join(f"--set {table}.{key}={value}" for key, value in words.items())
    # With `--set` alone the run would have another name, and be another pass of `--fresh`.
    named = f"{changes} --name {shlex.quote(run)}"
    return f"the same command with {named} needs less, and goes on from the last checkpoint"


# ---- files


def shipped_folder() -> Path:
    """The recipes of this installation: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "shipped"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped_recipes() -> list[Path]:
    return sorted(shipped_folder().rglob("*.toml"))


def find_recipe(name: str) -> Path:
    """A file, with or without its ".toml", or a shipped recipe by its stem. Raises UsageError."""
    if form_of(name):
        raise UsageError(f"{name} holds rows, not a recipe", f"rlhf-recipes init {name} writes one")
    for file in (name, f"{name}.toml"):
        if os.path.isfile(file):
            return Path(file)
    shipped = {path.stem: path for path in shipped_recipes()}
    if name not in shipped:
        near = suggest(name, shipped)
        raise UsageError(f"no recipe {name}{near}", f"shipped: {', '.join(shipped)}")
    return shipped[name]


def fork_recipe(
    source: Path, new: Path, *, set: Sequence[str] = (), unset: Sequence[str] = ()
) -> Path:
    """Write a copy to change: relative paths re-based, what it came from on line 1.

    Comments are kept, but those of changed lines. A title that is written becomes the copy's name.
    Relative paths in `set` start from where the copy will lie.
    Raises RecipeError if the copy would not be valid, UsageError if `new` is there already.
    """
    new = new if new.suffix == ".toml" else new.with_name(new.name + ".toml")
    if new.exists():
        raise UsageError(f"{new} is there already", "choose another name")
    titled = load_recipe(source).title != source.stem
    new.parent.mkdir(parents=True, exist_ok=True)
    moved = rebase(_read(source), source.parent, new.parent)
    edited = edit(moved, set, unset)
    changes = ", ".join(edited.changes) or "nothing changed yet"
    if titled and not {("title",)} & edited.words.keys() and "title" not in unset:
        set = [*set, f"title={json.dumps(new.stem)}"]
        edited.words[("title",)] = ""
    text = without_comments(loads(moved, new, set, unset).text, edited.words)
    head = "\n".join(f"# {line}" for line in textwrap.wrap(f"Forked from {source}: {changes}", 98))
    if edited.changes:
        head += "\n# The comments are of that recipe; changed lines have none."
    new.write_text(f"{head}\n{text}", encoding="utf-8")
    return new
