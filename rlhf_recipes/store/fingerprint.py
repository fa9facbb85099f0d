"""What determines a stage's result, and what differs between two such fingerprints.

One rule for every key of a recipe: the field where the key is defined says its effect, and only
keys of effect "result" whose value differs from the default are in a fingerprint, beside the kind's
version. So a new optional key changes no fingerprint, and a changed default needs a new version.
What a key of effect "source" names is in it by content.

`sources/resolve.identify` makes the `Identities`: a commit, or a digest of the content.
`pipeline/plan.make_plan` puts the inputs' keys in place of their names and digests all: the key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from rlhf_recipes.recipe.fields import Field, Keys, fields_for, resolve
from rlhf_recipes.recipe.kinds import KINDS, LORA, Kind, extras_of
from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.recipe.rewards import RULES, Term
from rlhf_recipes.recipe.tables import VLLM, DatasetTable, dataset_keys, keys_of, top_keys
from rlhf_recipes.recipe.wiring import (
    columns_of,
    reads_dataset,
    rewards_of,
    wiring,
    written_rules,
)
from rlhf_recipes.store.digests import canonical

Values = dict[str, Any]
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Identities:
    """What the names in a recipe mean on this machine, each by content or by commit."""

    base: Values  # the base model
    models: Mapping[str, Values]  # every other model from elsewhere, by its name in the recipe
    datasets: Mapping[DatasetTable, Values]  # every table of `tables_read`
    rules: Mapping[str, str]  # files of functions that reward or judge, and of principles


def tables_read(recipe: Recipe) -> Iterable[DatasetTable]:
    """Every table whose files determine the rows of some stage."""
    own = [table.dataset for table in recipe.tables.values() if table.dataset]
    for table in (recipe.dataset, *recipe.dataset.more, *own):
        yield table
        if table.test_split:
            yield table.test_part


def foreign_models(recipe: Recipe) -> Iterable[str]:
    """The models from elsewhere that serve a role, besides the base."""
    taken = wiring(recipe)
    for roles in taken.values():
        yield from (source for source in roles.values() if source not in taken)


def fingerprints(recipe: Recipe, known: Identities) -> Iterable[tuple[str, Values]]:
    """Of each stage, in order: its name and its fingerprint.

    "inputs" there has the stage that serves a role; its key has to take the place of its name.
    """
    taken = wiring(recipe)
    for stage, roles in taken.items():
        kind, model = recipe.kind(stage), recipe.model_of(stage)
        base = known.base if model is recipe.model else known.models[model.name]
        yield (
            stage,
            {
                "kind": kind.name,
                "name": stage,  # its randomness is a function of the seed and of this
                "version": kind.version,
                "settings": settings(recipe, stage, known),
                "model": base | changed(keys_of("model"), asdict(model)),
                "lora": recipe.lora is not None and changed(fields_for(LORA), recipe.lora),
                "dataset": _rows(recipe, recipe.dataset_of(stage), kind, known),
                **changed({"seed": top_keys()["seed"]}, {"seed": recipe.seed}),
                "inputs": {role: source for role, source in roles.items() if source in taken},
                **{role: known.models[s] for role, s in roles.items() if s not in taken},
            },
        )


# ---- the rule


def changed(keys: Keys, values: Values, kind: Kind | None = None, defaults: Values = {}) -> Values:  # noqa: B006
    """The values that differ from the defaults, of the keys that determine the result.

    `defaults` stand for the fields' own. A key that determines the results of some kinds alone
    counts for those.
    """
    found: Values = {}
    for name, value in values.items():
        field = keys.get(name)
        if field is None or value is None:
            continue
        default = defaults.get(name, _default(field))
        if isinstance(field, Mapping):
            inner = changed(field, value, kind, default or {})
            found |= {name: inner} if inner else {}
        elif field.effect == "result" and canonical(value) != canonical(default):
            if kind is None or not field.learners or kind.learns_from in field.learners:
                found[name] = value
    return found


def _default(field: Field | Keys) -> Any:
    if isinstance(field, Mapping):
        return {}
    return field.default if field.ours is None else field.ours


def settings(recipe: Recipe, stage: str, known: Identities) -> Values:
    """The stage's own settings that determine its result. Of the batch only its size counts."""
    kind, table = recipe.kind(stage), recipe.tables.get(stage)
    found: Values = {}
    if table and not kind.config:
        found |= changed(kind.extras, table.extras, kind)
        if table.rule:
            found["rule"] = _term(table.rule, known)
        if table.extras.get("by") == "model":
            found["model"] = known.models.get(table.extras["model"]) or table.extras["model"]
            if file := table.extras["principles"]:
                found["principles"] = known.rules[file]
    elif table:
        fields, lora = fields_for(kind.config), recipe.lora is not None
        usual, _ = resolve(fields, {}, lora)
        found |= changed(fields, table.options, kind, usual)
        rates = extras_of(kind, {}, table.options["learning_rate"])
        found |= changed(kind.extras, table.extras, kind, rates)
        if _batch(table.options) != _batch(usual):
            found["batch_size"] = _batch(table.options)
    asked = table.extras if table else {}
    if kind.reads:
        asked = {key: recipe.asked_with(key) for key in kind.reads}
        found |= changed(keys_of("evaluation"), asked)
        found |= {role: _term(judge, known) for role, judge in written_rules(recipe).items()}
    if lent := recipe.explorer:
        found |= {key: lent.said(key) for key in kind.borrows if asked.get(key) is None}
    if kind.samples and recipe.model.sampler == VLLM:
        found["sampler"] = VLLM
    if not reads_dataset(recipe, stage):
        found["pairs"] = "judgements alone"
    if kind.makes == "answers" and (columns := columns_of(recipe, stage)):
        found["columns"] = columns
    if rewards := [_term(one, known) for one in rewards_of(recipe, stage)]:
        found |= {"rewards": rewards} if rewards != [_MODEL] else {}
    return found


_MODEL = {"model": "reward_model"}  # by its role: that is in the inputs, or beside them


def _term(term: Term, known: Identities) -> Values:
    """A reward or a judge: its settings, and of a function its file's content."""
    what: Values = {**(_MODEL if term.model else {"rule": term.rule})}
    if term.code:
        what = {"function": term.code[1], "content": known.rules[term.code[0]]}
    usual = {"weight": 1.0, **{k: _default(f) for k, f in RULES.get(term.rule, {}).items()}}
    said = {**term.words, "weight": term.weight}
    return what | {key: value for key, value in said.items() if value != usual.get(key)}


def defaults(kind: Kind, lora: bool) -> Values:
    """Every default of the kind that its fingerprints leave out. A change needs a new version."""
    options, _ = resolve(fields_for(kind.config), {}, lora)
    found: Values = {}
    if kind.listed and not options:
        found = {key: _default(f) for key, f in kind.extras.items() if _counts(f)}
    elif options:
        fields = fields_for(kind.config)
        found = {key: v for key, v in options.items() if fields[key].effect == "result"}
        found["batch_size"] = _batch(options)
        for key, value in extras_of(kind, {}, options["learning_rate"]).items():
            field = kind.extras[key]
            if isinstance(field, Mapping) or field.effect == "result":
                found[key] = value
    return found | {key: _default(keys_of("evaluation")[key]) for key in kind.reads}


def shared_defaults() -> Values:
    """The defaults of the tables that all stages share: a change needs new versions of all."""
    tables = {name: keys_of(name) for name in ("model", "dataset", "lora")}
    tables |= {"": {"seed": top_keys()["seed"]}}
    return {
        name: {k: _default(f) for k, f in keys.items() if _counts(f)}
        for name, keys in tables.items()
    }


def _counts(field: Field | Keys) -> bool:
    return isinstance(field, Field) and field.standing == "passed" and field.effect == "result"


def _batch(options: Values) -> int:
    return options[BATCH[0]] * options[BATCH[1]]


def _rows(recipe: Recipe, table: DatasetTable, kind: Kind, known: Identities) -> Values:
    """A stage's rows; of its own dataset, less the prompts of the recipe's test splits."""
    found, whole = _table(table, kind, known), recipe.dataset
    if table != whole:
        tests = [one.test_part for one in (whole, *whole.more) if one.test_split]
        if tests:
            found["held_out"] = [_table(test, kind, known) for test in tests]
    return found


def _table(table: DatasetTable, kind: Kind, known: Identities) -> Values:
    """The identity of a table's files, and the settings that choose among their rows."""
    found = known.datasets[table] | changed(dataset_keys(), asdict(table), kind)
    if table.more:
        found["more"] = [_table(other, kind, known) for other in table.more]
    return found


# ---- what differs


def differences(
    old: Values, new: Values, contents: Mapping[str, dict[str, str]] | None = None
) -> list[str]:
    """What changed from one fingerprint to another, but for their inputs: a phrase each."""
    old, new = {**old, "inputs": None}, {**new, "inputs": None}
    return difference(_told(old, new), _told(new, old), contents=contents)


def _told(one: Values, other: Values) -> Values:
    """A fingerprint with the defaults of those settings that the other fingerprint has."""
    # Another version may have written it: of a kind that is not known here, or with lora = None.
    lora = isinstance(one["lora"], dict)
    usual = defaults(KINDS[one["kind"]], lora) if one["kind"] in KINDS else {}
    filled = {key: usual.get(key) for key in other["settings"] if key not in one["settings"]}
    for key, value in filled.items():
        if key.endswith("learning_rate") and key != "learning_rate":
            rate = one["settings"].get("learning_rate", usual.get("learning_rate"))
            filled[key] = rate if value is not None else None
    told = {**one, "settings": one["settings"] | filled}
    for part in ("model", "dataset", "lora"):
        keys, has = keys_of(part), one[part]
        if isinstance(has, dict) and isinstance(other[part], dict):  # with lora = false it is False
            lacking = [key for key in other[part] if key not in has and key in keys]
            told[part] = has | {key: _default(keys[key]) for key in lacking}
    return {**told, "seed": one.get("seed", _default(top_keys()["seed"]))}


def difference(
    old: Any, new: Any, where: str = "", contents: Mapping[str, dict[str, str]] | None = None
) -> list[str]:
    """What changed from one payload to another, a phrase each: `learning_rate 1e-05 → 2e-05`.

    Digests are told as "changed", or file by file where `contents` knows the files of both; a key
    that only one side has reads "unset" on the other.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        places = [(f"{where}.{key}" if where else key, key) for key in dict.fromkeys([*old, *new])]
        pairs = [(place, old.get(key), new.get(key)) for place, key in places]
    elif _is_list(old) and _is_list(new) and any(isinstance(one, dict) for one in (*old, *new)):
        numbered = enumerate(zip_longest(old, new), 1)
        pairs = [(f"{where}[{number}]", *pair) for number, pair in numbered]
    # Compared as encoded: a payload read back from JSON has lists for tuples.
    elif canonical(old) == canonical(new):
        return []
    elif _is_digest(old) and _is_digest(new):
        was, now = ((contents or {}).get(one) for one in (old, new))
        return (was and now and difference(was, now, where)) or [f"{where} changed"]
    elif _is_digest(old or new) and None in (old, new):
        return [f"{where} {'added' if old is None else 'removed'}"]
    else:
        return [f"{where} {_words(old)} → {_words(new)}"]
    return [said for place, a, b in pairs for said in difference(a, b, place, contents)]


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", value) is not None


def _words(value: Any) -> str:
    if value is None:
        return "unset"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
