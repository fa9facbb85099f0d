"""Write what checks a recipe, completes it and explains it, from the pinned versions' configs.

    python -m tools.make_fields

`fields.toml` says what becomes of every field.
"""

import dataclasses
import fnmatch
import inspect
import json
import pkgutil
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from rlhf_recipes.pipeline.schema import schema_json
from rlhf_recipes.recipe.fields import Field, fields_of
from rlhf_recipes.recipe.kinds import BITSANDBYTES, KINDS, LORA, listed
from rlhf_recipes.store.fingerprint import defaults, shared_defaults
from tools.make_docs import keys_md

ROOT = Path(__file__).parents[1]


TABLE = tomllib.loads((ROOT / "tools" / "fields.toml").read_text(encoding="utf-8"))
# What fields.toml calls each config, and where it is.
PLACES = {name: KINDS[name].config for name in listed() if KINDS[name].config} | {
    "lora": LORA,
    "bitsandbytes": BITSANDBYTES,
}
CONFIGS = {name: pkgutil.resolve_name(place) for name, place in PLACES.items()}


def matches(names: str, field: str) -> bool:
    return any(fnmatch.fnmatchcase(field, pattern) for pattern in names.split())


def found(part: str, table: str, name: str) -> list[dict[str, Any]]:
    """The entries of [[ours]], [[choices]] or [[never]] for a field."""
    return [e for e in TABLE[part] if table in e["in"].split() and e["field"] == name]


def upstream(table: str) -> dict[str, Field]:
    """Every field of a config, as upstream has it."""
    if table != "bitsandbytes":
        return fields_of(CONFIGS[table])
    names = inspect.signature(CONFIGS[table]).parameters  # its dataclass declares none of them
    return {name: Field() for name in names if name != "kwargs"}


def verdict(table: str, name: str) -> dict[str, str]:
    """Standing, owner, reason and effect, by the first row that names the field."""
    for row in TABLE["row"]:
        if table in row["in"].split() and matches(row["fields"], name):
            said = {key: row[key] for key in ("owner", "reason", "effect") if key in row}
            standing = "owned" if "owner" in row else "refused"
            return said if "effect" in row else {"standing": standing} | said
    raise SystemExit(f"{table}.{name}: no row of fields.toml names it")


def choices(table: str, name: str, field: Field) -> tuple[Any, ...]:
    kept = next((e["values"] for e in found("choices", table, name)), field.choices)
    if name == "report_to":
        kept = ("none", *INTEGRATION_TO_CALLBACK)
    dropped = " ".join(entry["values"] for entry in found("never", table, name))
    return tuple(choice for choice in kept if not matches(dropped, str(choice)))


def ranges(table: str, name: str) -> str:
    found = (
        r
        for r, names in TABLE["ranges"].items()
        for n in (f"{table}.{name}", name)
        if matches(names, n)
    )
    return next(found, "")


def describe(table: str) -> dict[str, Field]:
    """Every field of a config, as `fields.toml` has it."""
    described = {}
    for name, field in upstream(table).items():
        said = verdict(table, name)
        if "standing" in said:
            described[name] = Field(**said)
            continue
        default = field.default
        if field.types == ("float",) and default is not None:
            default = float(default)
        ours = next(iter(found("ours", table, name)), {})
        described[name] = dataclasses.replace(
            field,
            **said,
            default=default,
            choices=choices(table, name, field),
            range=ranges(table, name),
            ours=ours.get("value"),
            reason=ours.get("reason", ""),
            ours_needs_lora=ours.get("needs_lora", False),
        )
    return described


def check_rows() -> None:
    names = {table: [*upstream(table)] for table in CONFIGS}
    for row in TABLE["row"]:
        for pattern in row["fields"].split():
            if not any(matches(pattern, n) for table in row["in"].split() for n in names[table]):
                raise SystemExit(f"{pattern}: a row of fields.toml names it, and no config has it")


def fields_json() -> str:
    """One line a field; what equals Field's own default is left out, but a passed field's type."""
    check_rows()
    defaults = dataclasses.asdict(Field())
    tables, reasons = [], []
    for place in dict.fromkeys(PLACES.values()):
        lines = []
        table = next(name for name in PLACES if PLACES[name] == place)
        for name, field in describe(table).items():
            entry = {k: v for k, v in dataclasses.asdict(field).items() if v != defaults[k]}
            if field.reason:
                if field.reason not in reasons:
                    reasons.append(field.reason)
                entry["reason"] = reasons.index(field.reason)
            lines.append(f"    {json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}")
        tables.append(f'  "{place}": {{\n' + ",\n".join(lines) + "\n  }")
    pins = {name: version(name) for name in ("trl", "transformers", "peft")}
    said = ",\n".join(f"  {json.dumps(reason, ensure_ascii=False)}" for reason in reasons)
    head = f'"format": 1,\n"versions": {json.dumps(pins)},\n"reasons": [\n{said}\n],\n'
    return "{\n" + head + '"tables": {\n' + ",\n".join(tables) + "\n}\n}\n"


def _changed(then: Any, now: Any) -> bool:
    """Whether a default is another one or gone. A new key's is neither: fingerprints lack it."""
    if isinstance(then, dict) and isinstance(now, dict):
        return any(key not in now or _changed(then[key], now[key]) for key in then)
    return then != now


def defaults_json() -> str:
    """Each kind's version and defaults. Stops where a default changed and the version did not."""
    file = ROOT / "tools" / "defaults.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    made, shared = {}, shared_defaults()
    for name, kind in KINDS.items():
        now = {"lora": defaults(kind, True), "whole": defaults(kind, False), "shared": shared}
        then = kept.get(name)
        if then and _changed(then["defaults"], json.loads(json.dumps(now))):
            if kind.version <= then["version"]:
                raise SystemExit(f"{name}: a default changed: raise its version in recipe/kinds.py")
        made[name] = {"version": kind.version, "defaults": now}
    return json.dumps(made, indent=1) + "\n"


if __name__ == "__main__":  # in this order: the others read what the first writes
    package, docs = ROOT / "rlhf_recipes" / "recipe", ROOT / "docs"
    (package / "fields.json").write_text(fields_json(), encoding="utf-8")
    (docs / "recipe.schema.json").write_text(schema_json(), encoding="utf-8")
    (ROOT / "docs" / "keys.md").write_text(keys_md(), encoding="utf-8")
    (ROOT / "tools" / "defaults.json").write_text(defaults_json(), encoding="utf-8")
