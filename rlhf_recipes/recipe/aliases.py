"""What other tools call a key, by `elsewhere.toml`: asked about one that no table of ours has."""

import fnmatch
import re
import tomllib
from functools import cache
from pathlib import Path


@cache
def names() -> dict[str, dict[str, list[str]]]:
    """`renamed`: theirs by ours; `absent`: theirs by why there is none, with * in them."""
    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
    return {table: {k: v.split() for k, v in said.items()} for table, said in tables.items()}


@cache
def _answers() -> list[tuple[str, re.Pattern[str]]]:
    said = {f"here that is {ours}": theirs for ours, theirs in names()["renamed"].items()}
    said |= {f"nothing here does that: {why}": t for why, t in names()["absent"].items()}
    return [(s, re.compile("|".join(map(fnmatch.translate, t)))) for s, t in said.items()]


def elsewhere(name: str) -> str:
    """What stands here for another tool's key, or why nothing does; empty where none is known."""
    return next((said for said, pattern in _answers() if pattern.match(name)), "")
