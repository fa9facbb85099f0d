"""Changing a recipe's text with its comments kept: `--set`, `--unset`, and a fork's paths.

tomlkit is loaded where a text is changed, for to check one needs none of it.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.errors import Problem, UsageError
from rlhf_recipes.recipe.fields import parse_value, show, suggest
from rlhf_recipes.recipe.tables import field_at, kinds_in, move_paths, top_keys
from rlhf_recipes.recipe.toml import WORD, key_lines
from rlhf_recipes.text import cut, plain


@dataclass
class Edited:
    text: str
    # From a key's path to its `--set …`.
    words: dict[tuple[str | int, ...], str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)  # "seed 42 → 7", for people


def edit(text: str, set: Sequence[str], unset: Sequence[str]) -> Edited:
    """`text`, valid TOML, with keys taken out and then set.

    A value is read as its field's type asks; `stages` and whole tables come before the keys in
    them, whatever the order of the words. Raises UsageError for a word that is no `key=value`.
    """
    edited = Edited(text)
    if not set and not unset:
        return edited
    import tomlkit

    document = tomlkit.parse(text)
    for key in unset:
        path = tuple(key.split("."))
        if wrong := _remove(document, path, edited):
            edited.problems.append(Problem(f"--unset {key}", None, key, wrong))
    for path, raw in sorted(map(_split, set), key=lambda pair: len(pair[0])):
        key = ".".join(path)
        word = edited.words[path] = f"--set {key}={cut(raw, 80)}"
        if wrong := _put(document, path, raw, edited):
            edited.problems.append(Problem(word, None, key, wrong))
    edited.text = document.as_string()
    return edited


def _split(word: str) -> tuple[tuple[str, ...], str]:
    key, equals, raw = word.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise UsageError(f"--set {plain(word)}: no key=value", "as in --set ppo.kl_coef=0.1")
    return path, raw.strip()


def _remove(document: Any, path: tuple[str, ...], edited: Edited) -> str:
    node = document
    for part in path[:-1]:
        inner = node.get(part)
        node = inner if isinstance(inner, dict) else {}
    if path[-1] not in node:
        return "is not written in the recipe" + suggest(path[-1], node)
    edited.changes.append(f"{'.'.join(path)} left out")
    del node[path[-1]]
    return ""


def _put(document: Any, path: tuple[str, ...], raw: str, edited: Edited) -> str:
    import tomlkit

    kinds = kinds_in(document.unwrap())
    stages = document.get("stages")
    named = [s for s in stages if isinstance(s, str)] if isinstance(stages, list) else []
    tables = {*top_keys(), *document, *named}
    if len(path) > 1 and path[0] not in tables:
        return f"the recipe has no table [{path[0]}]{suggest(path[0], [*tables, *kinds])}"
    node = document
    for depth, part in enumerate(path[:-1], 1):
        if part not in node:
            node[part] = tomlkit.table() if depth == 1 else tomlkit.inline_table()
        node = node[part]
        if not isinstance(node, dict):
            return f"{'.'.join(path[:depth])} is {show(node)} here, not a table"
    known = field_at(path, kinds)
    value = known.read(raw) if known and known.types else parse_value(raw)
    name, old = path[-1], node.get(path[-1])
    before = "" if old is None else f"{show(tomlkit.item(old).unwrap())} → "
    after = f"{show(value)} set" if old is None else show(value)
    edited.changes.append(f"{'.'.join(path)} {before}{after}")
    if isinstance(old, dict):
        del node[name]  # in place, a plain value would end up inside the table before it
    node[name] = tomlkit.parse(f"_ = {raw}")["_"] if isinstance(value, dict) else value
    return ""


def without_comments(text: str, paths: Iterable[tuple[str | int, ...]]) -> str:
    """`text` without the comments of these keys' lines, which speak of other values."""
    lines, at = text.split("\n"), key_lines(text)
    for number in sorted({at[path] - 1 for path in paths if path in at}, reverse=True):
        if (inside := _without_comment(lines[number])) != lines[number]:
            lines[number] = inside.rstrip()
            # Such a comment goes on in lines of its own, far to the right.
            while number + 1 < len(lines) and re.match(r" {12,}#", lines[number + 1]):
                del lines[number + 1]
    return "\n".join(lines)


def _without_comment(line: str) -> str:
    return line[: next((m.start() for m in WORD.finditer(line) if m[0][0] == "#"), None)]


def rebase(text: str, source: Path, target: Path) -> str:
    """`text` with its relative paths, which start from `source`, starting from `target`."""
    import tomlkit

    def moved(written: str) -> str:
        if written.startswith(("/", "~")):
            return written
        path = os.path.relpath(os.path.realpath(source / written), target.resolve())
        return path if path.startswith(".") else f"./{path}"

    document = tomlkit.parse(text)
    move_paths(document, moved)
    return document.as_string()
