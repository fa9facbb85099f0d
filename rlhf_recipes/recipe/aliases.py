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
def _answers() -> tuple[list[str], re.Pattern[str]]:
    """What to say, and one pattern whose groups stand in the same order."""
    said = {f"here that is {ours}": theirs for ours, theirs in names()["renamed"].items()}
    said |= {f"nothing here does that: {why}": t for why, t in names()["absent"].items()}
    groups = ("|".join(map(fnmatch.translate, theirs)) for theirs in said.values())
    return list(said), re.compile("|".join(f"({group})" for group in groups))


def elsewhere(name: str) -> str:
    """What stands here for another tool's key, or why nothing does; empty where none is known."""
    said, pattern = _answers()
    found = pattern.match(name)
    return said[found.lastindex - 1] if found and found.lastindex else ""
