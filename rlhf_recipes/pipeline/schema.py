"""The JSON Schema that editors complete from (Taplo, Even Better TOML, Tombi).

It has keys, types, choices and ranges from the table that checks a recipe; `check` does the rest.
The description of a key is upstream's help text; of our own keys, the comment in annotated.toml.
"""

from __future__ import annotations

import dataclasses
import json
import pkgutil
import re
import warnings
from typing import Any

from rlhf_recipes.recipe.fields import Field, Keys
from rlhf_recipes.recipe.kinds import KINDS, LORA, listed
from rlhf_recipes.recipe.load import find_recipe
from rlhf_recipes.recipe.tables import stage_keys, top_keys

TYPES = {
    "bool": {"type": "boolean"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "str": {"type": "string"},
    "dict": {"type": "object"},
}
TYPES |= {f"list[{one}]": {"type": "array", "items": TYPES[one]} for one in ("str", "int", "float")}
TYPES["list[str | dict]"] = {
    "type": "array",
    "items": {"anyOf": [TYPES["str"], TYPES["dict"]]},
}
RANGES = {
    "above 0": {"exclusiveMinimum": 0},
    "a whole number, or a share below 1": {
        "exclusiveMinimum": 0,
        "anyOf": [{"exclusiveMaximum": 1}, {"multipleOf": 1}],
    },
    "at least 0": {"minimum": 0},
    "at least 1": {"minimum": 1},
    "at least 2": {"minimum": 2},
    "at least 1, or -1": {"minimum": -1, "not": {"const": 0}},
    "above 0, at most 1": {"exclusiveMinimum": 0, "maximum": 1},
    "from 0 to 1": {"minimum": 0, "maximum": 1},
    "at least 0 and below 1": {"minimum": 0, "exclusiveMaximum": 1},
}


def configs() -> dict[str, type]:
    """The config class of LoRA and of each kind that has one; importing them takes ten seconds."""
    places = {name: KINDS[name].config for name in listed()} | {"lora": LORA}
    places = {name: place for name, place in places.items() if place}
    with warnings.catch_warnings(action="ignore"):  # trl.experimental announces itself
        return {name: pkgutil.resolve_name(place) for name, place in places.items()}


def helps() -> dict[str, dict[str, str]]:
    """What upstream says of its fields, by table."""
    return {
        table: {
            field.name: " ".join(field.metadata["help"].split())
            for field in dataclasses.fields(config)
            if field.metadata.get("help")
        }
        for table, config in configs().items()
    }


def comments() -> dict[str, dict[str, str]]:
    """What the annotated recipe says of each key, by table ("" at the top) or kind of stage."""
    said: dict[str, dict[str, str]] = {"": {}}
    table, key = "", ""
    for line in find_recipe("annotated").read_text(encoding="utf-8").split("\n"):
        if header := re.match(r"\[+([\w.]+)\]+ *(?:# (.*))?", line):
            table, key = header[1], ""
            said.setdefault(table, {})
        elif found := re.match(r"#?(\w+) = .*?  +# (.*)", line):
            key = found[1]
            said[table].setdefault(key, found[2].removeprefix("(ours) "))
        elif key and (more := re.match(r" {20,}# (.*)|#? {20,}# (.*)", line)):
            said[table][key] += " " + (more[1] or more[2])
        else:
            key = ""
    return said


def entry(field: Field, said: str) -> dict[str, Any]:
    types = (*field.types, "str") if [*field.types] == ["list[str]"] else field.types  # one of it
    kinds = [TYPES[kind] | RANGES.get(field.range, {}) for kind in types]
    if field.choices:
        allowed = {"enum": list(field.choices)}
        kinds = [kind | {"items": allowed} if "items" in kind else allowed for kind in kinds]
    made = kinds[0] if all(kind == kinds[0] for kind in kinds) else {"anyOf": kinds}
    default = field.default if field.ours is None else field.ours
    if default not in (None, {}, []):
        made["default"] = default
    return made | {"description": said} if said else made


def table(keys: Keys, said: dict[str, str]) -> dict[str, Any]:
    """Every key that may be set; no editor shall complete what is owned or refused."""
    properties = {
        name: entry(field, said.get(name, "")) if isinstance(field, Field) else table(field, {})
        for name, field in keys.items()
        if not isinstance(field, Field) or field.standing == "passed"
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def schema_json() -> str:
    """The schema, as a file."""
    said = comments()
    for name, texts in helps().items():
        said.setdefault(name, {}).update(texts)
    top = table(top_keys(), said[""])
    places = top["properties"]
    for name in ("model", "dataset", "evaluation", "lora", "rounds"):
        places[name] = table(top_keys()[name], said[name])
    for name in ("evaluation", "lora"):
        places[name] = {"anyOf": [{"const": False}, places[name]]}
    places["dataset"] = {
        "anyOf": [places["dataset"], {"type": "array", "items": places["dataset"]}]
    }
    stages = {kind: table(stage_keys(kind), said[kind]) for kind in listed()}
    for kind in stages:
        if guard := stage_keys(kind).get("guard"):
            stages[kind]["properties"]["guard"] = table(guard, said["ppo.guard"])
    for kind in listed():
        stages[kind]["properties"]["kind"] = {"const": kind, "type": "string"}
        places[kind] = {"$ref": f"#/$defs/{kind}"}
    of_kind = [
        {
            "if": {"properties": {"kind": {"const": kind}}, "required": ["kind"]},
            "then": {"$ref": f"#/$defs/{kind}"},
        }
        for kind in listed()
    ]
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "A recipe of rlhf-recipes",
        "$defs": stages,
        **top,
        "required": ["stages", "model", "dataset"],
        # Not anyOf: Taplo would complete the stages' keys in every other table, too.
        "additionalProperties": {
            "type": "object",
            "properties": {"kind": {"enum": listed()}},
            "required": ["kind"],
            "allOf": of_kind,
        },
    }
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"
