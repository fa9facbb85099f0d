"""The rules for every key of a recipe but the stages' own: types, ranges, files, and what clashes.

`wiring.check` goes through the whole recipe.
"""

import json
import os
import re
import warnings
from os.path import exists, isdir, isfile  # Path's own raise for a name that is too long
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe import rewards, tables
from rlhf_recipes.recipe.aliases import elsewhere
from rlhf_recipes.recipe.fields import (
    TYPE_NAMES,
    Field,
    Keys,
    fields_for,
    is_closed,
    resolve,
    show,
    suggest,
)
from rlhf_recipes.recipe.kinds import LORA, listed

Key = tuple[str | int, ...]
OUTSIDE = re.compile(r'"[/~]|(?<=["/])\.\.(?=["/])|://|::')
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
REVISION = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
PINNED_WHEEL = re.compile(r"[A-Za-z0-9][\w.-]*==[\w.+!-]+", re.ASCII)
GGUF_FILE = re.compile(r"[\w./+-]+\.gguf", re.ASCII)
MIRROR = {
    "wheel": (PINNED_WHEEL, 'a wheel on PyPI with its version: "name==1.2"'),
    "file": (GGUF_FILE, 'a .gguf file\'s place in the wheel: "package/model.gguf"'),
    "sha256": (re.compile(r"[0-9a-f]{64}"), "the SHA-256 of that file, 64 hex digits"),
}
# In a regular expression: what may match in many ways, and what may do so for ever.
REPEATS, REPEATED_GROUP, MAX_COSTS = re.compile(r"(?<!\()[*+?{]"), re.compile(r"\)[*+{]"), 16
ENOUGH = 100  # problems, after which no more nearest names are looked for
# Modules that carry the vocabulary, by the names that transformers' models give them.
VOCABULARY = "lm_head embed_out output_projection embed_tokens wte wpe word_embeddings embed_in"


class Checker:
    """Goes through a recipe; `problems` holds a key path and a message each, in no order."""

    def __init__(self, data: dict[str, Any], base: Path) -> None:
        self.data = data
        self.base = base
        self.kinds = tables.kinds_in(data)
        self.problems: list[tuple[Key, str]] = []
        self.notes: list[str] = []

    def problem(self, key: Key, message: str) -> None:
        self.problems.append((key, message))

    # ---- any table: unknown, owned and refused keys; types, choices and ranges

    def table(self, data: Any, keys: Keys, at: Key) -> dict[str, Any]:
        """The values that are right. The others are left out, and noted as problems."""
        if not isinstance(data, dict):
            false = " or false" if at in (("lora",), ("evaluation",)) else ""
            self.problem(at, f"must be a table{false}, not {show(data)}")
            return {}
        values = {}
        for name, value in data.items():
            field, key = keys.get(name), (*at, name)
            if field is None:
                self.problem(key, self.unknown(name, keys))
            elif not isinstance(field, Field):
                values[name] = self.table(value, field, key)
            elif field.standing != "passed":
                self.problem(key, field.closed())
            else:
                values[name], wrong = field.check(value)
                if wrong:
                    self.problem(key, wrong)
                    del values[name]
        return values

    def unknown(self, name: str, keys: Keys) -> str:
        """What to say of a key that its table does not have."""
        known = tables.all_keys(self.kinds)
        if name in known:
            return "unknown key here: it belongs at the top, before the first [table]"
        held = {t: k[name] for t, k in known.items() if not isinstance(k, Field) and name in k}
        if there := [table for table, key in held.items() if not is_closed(key)]:
            return f"unknown key here: it is one of [{'], ['.join(there)}]"
        if closed := [key for key in held.values() if isinstance(key, Field)]:
            return closed[0].closed()
        if hint := elsewhere(name):
            return f"unknown key: {hint}"
        stages = {kind: tables.stage_keys(kind) for kind in listed()}
        if able := [k for k, own in stages.items() if name in own and not is_closed(own[name])]:
            return f"unknown key here: a stage of kind {' or '.join(able)} has it"
        if len(self.problems) > ENOUGH:
            return "unknown key"
        here = [key for key, field in keys.items() if not is_closed(field)]
        few = f" (there are {', '.join(here)})" if len(here) < 20 else ""
        return "unknown key" + (suggest(name, here) or few)

    # ---- the recipe's own keys and tables

    def top(self) -> dict[str, Any]:
        """title, stages and seed; and every key that is no table and should not be there."""
        keys = tables.top_keys()
        own = {k for k, field in keys.items() if isinstance(field, Field)}
        aside = {k for k, value in self.data.items() if isinstance(value, dict)} - own
        aside |= {*self.kinds, *(keys.keys() - own)}
        top = self.table({k: v for k, v in self.data.items() if k not in aside}, keys, ())
        if not top.get("stages") and not any(key[0] == "stages" for key, _ in self.problems):
            self.problem(("stages",), 'is missing: stages = ["sft", "reward", "ppo"], or fewer')
        if not top.get("title", "").isprintable():
            self.problem(("title",), "must be one line of text")
        return top

    def model(self) -> dict[str, Any]:
        at = ("model",)
        written = self.data.get("model")
        if written is None:
            self.problem(at, 'is missing: [model] with name = "…" names the base model')
            return {}
        model = self.table(written, tables.keys_of("model"), at)
        if not isinstance(written, dict):
            return {}
        if "name" not in written:
            self.problem(at, 'needs name = "…": a hub id, or a folder (./…)')
        if name := model.get("name"):
            self.model_name(name, (*at, "name"))
            for key, has in (("revision", "has"), ("mirror", "needs")):
                if tables.is_path(name) and key in model:
                    self.problem((*at, key), f"is for models on the hub; a folder {has} none")
            self.revision(model, at)
            pinned = not tables.is_path(name) and COMMIT.fullmatch(model.get("revision", ""))
            if model.get("trust_remote_code") and not pinned:
                what = "runs code of the hub's: name its revision, all 40 hex digits of the commit"
                self.problem((*at, "trust_remote_code"), what)
        mirror: Any = written.get("mirror")
        for key, (pattern, what) in MIRROR.items() if isinstance(mirror, dict) else ():
            if key not in mirror:
                self.problem((*at, "mirror"), f"needs {key}: {what}")
            elif key in model["mirror"] and not pattern.fullmatch(model["mirror"][key]):
                self.problem((*at, "mirror", key), f"must be {what}")
        return model

    def model_name(self, name: str, key: Key) -> None:
        folder = self.base / os.path.expanduser(name)
        if not tables.is_path(name):
            if not HUB_ID.fullmatch(name):
                self.problem(key, f"{show(name)} is neither a hub id nor a folder (./… or /…)")
            elif isdir(folder):
                self.notes.append(f'{dotted(key)}: a hub id; for the folder write "./{name}"')
        elif not isdir(folder):
            self.problem(key, f"no such folder: {folder}")
        elif not isfile(folder / "config.json"):
            what = "no model: it has no config.json"
            if isfile(folder / "adapter_config.json"):
                what = "an adapter, not a whole model: name what its merge_and_unload() saves"
            self.problem(key, f"{folder} is {what}")

    def revision(self, values: dict[str, Any], at: Key) -> None:
        if not REVISION.fullmatch(named := values.get("revision", "main")):  # a path in the cache
            what = f"must be a branch, a tag or a commit, not {show(named)}"
            self.problem((*at, "revision"), what)

    def datasets(self) -> list[dict[str, Any]]:
        """[dataset], or each [[dataset]]; what a later one leaves out is as in the first."""
        written = self.data.get("dataset")
        if written in (None, []):
            what = 'is missing: [dataset] with path = "…" names the preference data'
            self.problem(("dataset",), what)
            return [{}]
        listed = written if isinstance(written, list) else [written]
        found: list[dict[str, Any]] = []
        shared: dict[str, Any] = {}
        tested = any(isinstance(one, dict) and "test_split" in one for one in listed)
        for place, one in enumerate(listed):
            at: Key = ("dataset", place) if listed is written else ("dataset",)
            values = self.table(one, tables.keys_of("dataset"), at)
            self.data_source(one, values, at)
            if tested and "test_fraction" in values:
                what = "leave it out: test_split says what the test is"
                self.problem((*at, "test_fraction"), what)
            for key in tables.SHARED_DATA_KEYS:
                if key in values and shared.setdefault(key, values[key]) != values[key]:
                    what = "a prompt is on the same side in every dataset"
                    self.problem((*at, key), f"is {shared[key]} above, and {what}")
            found.append(values)
        validation = shared.get("validation_fraction", tables.DatasetTable.validation_fraction)
        test = shared.get("test_fraction", tables.DatasetTable.test_fraction)
        test *= not any("test_split" in values for values in found)
        if validation + test >= 1:
            key = "test_fraction" if "test_fraction" in shared else "validation_fraction"
            what = f"nothing is left to train on: {validation} + {test} ≥ 1"
            self.problem(("dataset", key), what)
        return [shared | tables.inherited(found[0]) | values for values in found]

    def data_source(self, written: Any, values: dict[str, Any], at: Key) -> None:
        if isinstance(written, dict) and "path" not in written:
            self.problem(at, 'needs path = "…": a hub id, or a file or folder (./…)')
        if "path" not in values:
            return
        table, key = tables.DatasetTable(values["path"], base=self.base), (*at, "path")
        if not table.is_local:
            if table.path in ("json", "csv", "parquet", "text"):
                self.problem(key, 'name the file itself: path = "./….jsonl"')
            elif not HUB_ID.fullmatch(table.path):
                self.problem(key, f"{show(table.path)} is neither a hub id nor a file (./… or /…)")
            self.revision(values, at)
            return
        if not exists(table.file):
            self.problem(key, f"no such file or folder: {table.file}")
        elif isfile(table.file) and not tables.form_of(table.file):
            what = "must end in .jsonl, .json, .csv, .tsv or .parquet, packed (.gz, .zst) or not"
            self.problem(key, f"{what}, or be a folder")
        split = values.get("split", "train")
        if isfile(table.file) and re.split(r"[\[+]", split)[0] != "train":
            self.problem((*at, "split"), 'of a file is "train", or a part of it: leave it out')
        is_file = bool(tables.form_of(table.file))
        for name in ("revision", "name", "data_dir", "data_files") if is_file else ("revision",):
            if name in values:
                self.problem((*at, name), "says nothing about a local file: leave it out")
        for name in () if is_file else ("data_dir", "data_files"):
            if OUTSIDE.search(json.dumps(values.get(name))):  # what lies elsewhere is in no key
                self.problem((*at, name), f"must name what is inside {table.path}")

    def lora(self, quantization: str) -> dict[str, Any] | None:
        """LoraConfig's arguments, every passed field that is not None; None for `lora = false`."""
        written, at = self.data.get("lora", {}), ("lora",)
        if written is False:
            if quantization != "none":
                self.problem(at, f"weights in {quantization} cannot train; adapters on them can")
            return None
        fields = fields_for(LORA)
        given = self.table(written, fields, at)
        lora, _ = resolve(fields, given, lora=True)
        for key in ("layers_to_transform", "layers_pattern"):
            if key in given and isinstance(lora["target_modules"], str):
                self.problem((*at, key), "needs target_modules to be a list of names")
        if "layers_pattern" in given and "layers_to_transform" not in given:
            self.problem((*at, "layers_pattern"), "needs layers_to_transform")
        if lora["init_lora_weights"] == "orthogonal" and lora["r"] % 2:
            self.problem((*at, "r"), 'must be even for init_lora_weights = "orthogonal"')
        if isinstance(given.get("exclude_modules"), str):
            self.pattern(given["exclude_modules"], (*at, "exclude_modules"))
        for key in ("rank_pattern", "alpha_pattern"):  # PEFT matches their keys
            for name, number in given.get(key, {}).items():
                self.pattern(name, (*at, key, name))
                if type(number) is not int or number < 1:
                    what = f"must be a whole number of at least 1, not {show(number)}"
                    self.problem((*at, key, name), what)
        self.targets(lora["target_modules"], (*at, "target_modules"))
        return {key: value for key, value in lora.items() if value is not None}

    def targets(self, targets: str | list[str], key: Key) -> None:
        hit = []
        if targets in ("all", ["all"], ["all-linear"]):
            self.problem(key, 'all layers are "all-linear", without brackets')
        elif isinstance(targets, str) and re.fullmatch(r"\s*\w+(\s*,\s*\w+)+\s*", targets):
            names = ", ".join(f'"{name.strip()}"' for name in targets.split(","))
            self.problem(key, f"names are a list: [{names}]")
        if isinstance(targets, list):
            hit = [t for t in targets if t.split(".")[-1] in VOCABULARY.split()]
        elif pattern := self.pattern(targets, key):
            places = [f"{place}{n}" for n in VOCABULARY.split() for place in ("", "model.")]
            hit = [name for name in places if pattern.fullmatch(name)]
        if hit:
            self.problem(key, f"{hit[0]} holds the vocabulary, which all adapters share as it is")

    def pattern(self, text: str, key: Key) -> re.Pattern[str] | None:
        """A regular expression for modules, if it is one and cannot take for ever to match."""
        costs = 2 * len(REPEATS.findall(text)) + text.count("|")
        if len(text) > 300 or costs > MAX_COSTS or REPEATED_GROUP.search(text):
            what = "is a regular expression that may take for ever: name the modules, in a list"
            self.problem(key, what)
            return None
        try:
            with warnings.catch_warnings(action="ignore"):
                return re.compile(text)
        except (re.error, RecursionError, OverflowError) as error:
            self.problem(key, f"is no regular expression: {error}")
            return None

    def evaluation(self) -> tables.EvaluationTable | None:
        written = self.data.get("evaluation", {})
        if written is False:
            return None
        values = self.table(written, tables.keys_of("evaluation"), ("evaluation",))
        judge, key = values.get("judge", "none"), ("evaluation", "judge")
        listed = judge if isinstance(judge, list) else [judge]
        if not 1 <= len(listed) <= 2 or (len(listed) == 2 and listed[0] == listed[1]):
            self.problem(key, f"must be one judge, or two that differ, not {show(judge)}")
        for place, one in enumerate(listed if judge != "none" else ()):
            if isinstance(one, dict):
                self.term(one, (*key, place) if isinstance(judge, list) else key, judges=True)
            elif code := rewards.python_judge(one):
                self.file(code[0], key)
            elif tables.is_path(one) or "/" in one:
                self.model_name(one, key)
            elif one != tables.INDEPENDENT:
                known = '"none", "independent", "python:FILE.py:FUNCTION"'
                self.problem(key, f"must be {known}, or a model's folder or id, not {show(one)}")
        if named := values.get("judge_model"):
            key = ("evaluation", "judge_model")
            self.model_name(named, key)
            if tables.INDEPENDENT not in listed:
                self.notes.append('evaluation.judge_model: read by judge = "independent" alone')
        return tables.EvaluationTable(**values)

    def term(self, written: dict[str, Any], at: Key, judges: bool = False) -> None:
        """A reward or a judge that is a table: of one kind, with that kind's settings."""
        kinds = [kind for kind in ("rule", "python", "model") if kind in written]
        if len(kinds) != 1 or (judges and kinds == ["model"]):
            named = 'rule = "…", python = "FILE.py:FUNCTION"' + ', model = "…"' * (not judges)
            self.problem(at, f"needs one of {named}")
            return
        rule = str(written.get("rule"))
        text: Field = Field(("str",), choices=tuple(rewards.RULES) if kinds == ["rule"] else ())
        own: Keys = rewards.PYTHON if kinds == ["python"] else {}
        if kinds == ["rule"]:
            anything = dict.fromkeys(written, Field((*TYPE_NAMES,)))  # the name is wrong already
            own = rewards.RULES.get(rule, anything)
        keys = {**own, kinds[0]: text, **({} if judges else {"weight": rewards.WEIGHT})}
        values = self.table(written, keys, at)
        for name, what in rewards.lacking(rule, values) if len(values) == len(written) else ():
            self.problem((*at, name) if name else at, what)
        if "python" in values:
            if code := rewards.function_in(values["python"]):
                self.file(code[0], (*at, "python"))
            else:
                wrong = f'must be "FILE.py:FUNCTION", not {show(values["python"])}'
                self.problem((*at, "python"), wrong)

    def file(self, name: str, key: Key) -> None:
        if not isfile(file := tables.located(name, self.base)):
            self.problem(key, f"no such file: {file}")


def dotted(key: Key) -> str:
    """A key's path as a recipe spells it; places in an array are left out."""
    return ".".join(part for part in key if isinstance(part, str))
