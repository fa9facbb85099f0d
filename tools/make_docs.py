"""docs/keys.md: every key that a recipe may hold, and what becomes of all the others."""

from collections.abc import Iterator, Mapping

from rlhf_recipes.recipe.aliases import names
from rlhf_recipes.recipe.fields import TYPE_NAMES, Field, Keys, fields_for, show
from rlhf_recipes.recipe.kinds import BITSANDBYTES, KINDS, LORA, listed
from rlhf_recipes.recipe.rewards import RULES
from rlhf_recipes.recipe.tables import top_keys

GIVES = {
    "equals": "1 where the answer is the text; case and outer spaces count with `exact`",
    "contains": "1 where the answer contains the text",
    "matches": "1 where the pattern (of the package `regex`) is found, in 0.1 s an answer",
    "number": "1 where the last number of the answer is that of the column, within `tolerance`",
    "math": "1 where math-verify says that the answer equals the column (the extra `[math]`)",
    "words": "1 within the bounds; less with each word, to 0 at twice `at_most` or without words",
    "json": "1 where the answer is JSON, with these `keys`: up to 64 KiB, nested up to 100 deep",
    "ended": "1 where the answer ended by itself",
    "think": "TRL's `think_format_reward`: 1 for `<think>…</think>…`",
    "repetition": "TRL's `get_repetition_penalty_reward`: from 0 to −1",
    "overlong": "TRL's `get_soft_overlong_punishment`: from 0 to −1",
}
REWARDS = """\
## Rules

A rule is an entry of `rewards`, or the `judge` of `[evaluation]`:
`{ rule = "words", at_most = 60 }`. In `rewards` it may have a `weight`; left out, that is 1. A
`column` is of the dataset's rows.

`{ python = "./FILE.py:FUNCTION", column = "…" }` is a function of a prompt, an answer and, if it
has a third parameter, the named columns of the row. It gives a number, or None: not about this row.
A rule is not about a row that lacks its column. Other rewards then score that row.

An answer over a bound of time, size or depth gets 0. Each stage says how many did. PPO's results
count them.

| rule | settings | gives |
|---|---|---|"""

OPENING = """\
# Every key

Made by `python -m tools.make_fields` from `tools/fields.toml`, as is what checks a recipe. What our
own keys do stands in `recipes/annotated.toml`; what the others do, in TRL's and PEFT's
documentation. A default in **bold** is ours, in place of upstream's; `·` is no key of that stage,
`–` no default. *Layout* settings say where and how a stage computes, *neutral* ones change nothing
of its result, and of a *source* the content counts. A stage runs again when any other setting
changes, or the content of a source.
"""


def field_tables() -> dict[str, dict[str, Field]]:
    """Every upstream field, by the names that `tools/fields.toml` has for the configs."""
    configs = {name: KINDS[name].config for name in listed() if KINDS[name].config}
    configs |= {"lora": LORA, "bitsandbytes": BITSANDBYTES}
    return {name: fields_for(config) for name, config in configs.items()}


def default(field: Field | None) -> str:
    if field is None or field.standing != "passed":
        return "·"
    if field.ours is not None:
        return f"**{show(field.ours)}**"
    return "–" if field.default in (None, [], {}) else show(field.default)


def allowed(field: Field) -> str:
    if field.choices:
        return ", ".join(f"`{show(choice)}`" for choice in field.choices)
    types = " or ".join(TYPE_NAMES[kind] for kind in field.types)
    return f"{types}, {field.range}" if field.range else types


def passed(tables: Mapping[str, Keys]) -> Iterator[str]:
    """A table of the keys that may be set, with a column of defaults for each of `tables`."""
    yield f"| key | may be | {' | '.join(tables)} | effect |"
    yield "|---" * (len(tables) + 3) + "|"
    for name in dict.fromkeys(name for keys in tables.values() for name in keys):
        fields = [keys.get(name) for keys in tables.values()]
        fields = [f if isinstance(f, Field) else None for f in fields]
        open_ = [f for f in fields if f and f.standing == "passed"]
        if open_:
            may = max(map(allowed, open_), key=len)
            defaults = " | ".join(map(default, fields))
            effects = sorted({f.effect for f in open_} - {"result"})
            yield f"| `{name}` | {may} | {defaults} | {', '.join(effects)} |"


def closed(standing: str) -> Iterator[str]:
    rows: dict[tuple[str, str], dict[str, list[str]]] = {}
    for table, fields in field_tables().items():
        for name, field in fields.items():
            if field.standing == standing:
                names = rows.setdefault((field.owner, field.reason), {})
                names.setdefault(name, []).append(table)
    for (owner, reason), names in rows.items():
        where = "; ".join(dict.fromkeys(" ".join(tables) for tables in names.values()))
        keys = ", ".join(f"`{name}`" for name in names)
        yield f"| {keys} | {where} | {f'{owner}: {reason}' if owner else reason} |"


def keys_md() -> str:
    trained, others = field_tables(), [kind for kind in listed() if not KINDS[kind].config]
    stages = {kind: {**KINDS[kind].extras, **trained[kind]} for kind in listed() if kind in trained}
    own = {name: keys for name, keys in top_keys().items() if not isinstance(keys, Field)}
    parts = [OPENING, "## Stages\n", *passed(stages), ""]
    parts += ["`[ppo.guard]`:\n", *passed({"guard": KINDS["ppo"].extras["guard"]}), ""]
    own = {kind: KINDS[kind].extras for kind in others} | own
    for name, keys in own.items():
        parts += [f"## `[{name}]`\n", *passed({name: keys}), ""]
    parts += [REWARDS]
    for rule, settings in RULES.items():
        parts.append(f"| `{rule}` | {', '.join(f'`{key}`' for key in settings)} | {GIVES[rule]} |")
    parts += ["", "## Set by another key, or by the program\n", "| keys | in | belongs to |"]
    parts += ["|---|---|---|", *closed("owned"), ""]
    parts += ["## Refused\n", "| keys | in | why |", "|---|---|---|", *closed("refused"), ""]
    parts += ["## What other tools call them\n", "| elsewhere | here |", "|---|---|"]
    said = {f"`{ours}`": theirs for ours, theirs in names()["renamed"].items()}
    said |= {f"no: {why}": theirs for why, theirs in names()["absent"].items()}
    for here, theirs in said.items():
        parts.append(f"| {', '.join(f'`{name}`' for name in theirs)} | {here} |")
    return "\n".join(parts) + "\n"
