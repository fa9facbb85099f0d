"""TOML read within limits, and the line of each of its keys.

No TOML library for Python tells where a key stands (tomllib and tomlkit keep it to themselves),
and a text that nests deeply or names a key of many parts costs tomllib its stack or minutes.
"""

import re
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

KeyPath = tuple[str | int, ...]
Words = list[tuple[str, int]]

MAX_SIZE = 100_000  # characters; the longest recipe that ships has 10,000
MAX_DEPTH = 32  # of tables and arrays in one another
MAX_WORD = 200  # characters of a number or of a key without quotes

# Comments, strings (to the end where they do not close), marks, and what stands between them.
WORD = re.compile(
    r"""
    \#[^\n]*
    | \"{3} (?: \\.? | [^\\] )*? (?: \"{3,5} | \Z ) | '{3} .*? (?: '{3,5} | \Z )
    | " (?: \\[^\n] | [^"\\\n] )* "? | ' [^'\n]* '?
    | [][{},=\n] | [^][{},=\n\s"'#]+
    """,
    re.VERBOSE | re.DOTALL,
)


def parse(text: str) -> dict[str, Any]:
    """`text` as TOML. Raises tomllib.TOMLDecodeError, also for what is beyond the limits."""
    if len(text) > MAX_SIZE:
        raise tomllib.TOMLDecodeError(f"More than {MAX_SIZE} characters")
    if wrong := _beyond(text):
        raise tomllib.TOMLDecodeError(wrong)
    return tomllib.loads(text)


@lru_cache(maxsize=1)
def _beyond(text: str) -> str:
    """What is too deep or too long, in the form of tomllib's messages."""
    levels = [0]  # at the start of each array and table that is open
    level = 0
    for word, line in _words(text):
        if word in "[{":
            levels.append(level := level + 1)
        elif word in "]}":
            levels = levels[:-1] or [0]
            level = levels[-1]
        elif word == "," or (word == "\n" and len(levels) == 1):
            level = levels[-1]
        elif word[0] not in "\"'":
            if len(word) > MAX_WORD:
                return f"More than {MAX_WORD} characters in a row (at line {line}, column 1)"
            inside = not word.startswith(".") and not word.endswith(".")  # 1.5, or a.b
            level += max(0, word.count(".") - inside)
        if level > MAX_DEPTH:
            return f"Nested more than {MAX_DEPTH} deep (at line {line}, column 1)"
    return ""


def key_lines(text: str) -> dict[KeyPath, int]:
    """From a key's path, with an index for each place in an array, to its line, counted from 1.

    `text` is valid TOML. A table stands where it is first named or implied.
    """
    found: dict[KeyPath, int] = {}
    newest: dict[KeyPath, int] = {}  # the last place of each array of tables
    table: KeyPath = ()
    words, i = [*_words(text), ("\n", 0)], 0
    while i < len(words):
        word, line = words[i]
        if word == "\n":
            i += 1
        elif word != "[":
            i = _pair(words, i, table, found)
        else:
            many = words[i + 1][0] == "["
            end = next(n for n in range(i, len(words)) if words[n][0] == "]")
            parts = [part for word, _ in words[i + 1 + many : end] for part in _parts(word)]
            table, i = (), end + 1 + many
            for left, part in enumerate(parts, 1 - len(parts)):
                table = (*table, part)
                found.setdefault(table, line)
                if many and left == 0:
                    newest[table] = newest.get(table, -1) + 1
                if table in newest:
                    table = (*table, newest[table])
                    found.setdefault(table, line)
    return found


def _pair(words: Words, i: int, at: KeyPath, found: dict[KeyPath, int]) -> int:
    """Note the key that begins at word `i`, and what its value holds; the word after it."""
    line = words[i][1]
    while words[i][0] != "=":
        for part in _parts(words[i][0]):
            at = (*at, part)
            found.setdefault(at, line)
        i += 1
    return _value(words, i + 1, at, found)


def _value(words: Words, i: int, at: KeyPath, found: dict[KeyPath, int]) -> int:
    opens, place = words[i][0], 0
    if opens not in "[{":
        while words[i][0] not in "\n,]}":
            i += 1
        return i
    i += 1
    while words[i][0] not in "]}":
        if words[i][0] in "\n,":
            place += words[i][0] == ","
            i += 1
        elif opens == "{":
            i = _pair(words, i, at, found)
        else:
            found.setdefault((*at, place), words[i][1])
            i = _value(words, i, (*at, place), found)
    return i + 1


def _words(text: str) -> Iterator[tuple[str, int]]:
    """Each word but comments, with its line."""
    line = 1
    for found in WORD.finditer(text):
        if not found[0].startswith("#"):
            yield found[0], line
        line += found[0].count("\n")


def _parts(word: str) -> list[str]:
    """The parts of a key that a word of it holds."""
    if word[0] in "\"'":
        return list(tomllib.loads(f"{word}=0"))
    return [part for part in word.split(".") if part]
