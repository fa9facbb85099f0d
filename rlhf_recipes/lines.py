"""The line of each key in a TOML text.

No TOML library for Python tells where a key stands (tomllib and tomlkit keep it to themselves).
But the lines up to any one of them are TOML, too, and hold the keys that begin there or before.
"""

import tomllib
from collections.abc import Iterator
from typing import Any

KeyPath = tuple[str | int, ...]

ENDS = ("", "]", "]]", "]}")  # what may be missing after a line: it can stand inside an array


def key_lines(text: str) -> dict[KeyPath, int]:
    """From a key's path, with an index for each place in an array, to its line, counted from 1.

    `text` is valid TOML. A table stands where it is first named or implied.
    """
    found: dict[KeyPath, int] = {}
    lines = text.split("\n")
    begins = 1  # the line that the key or the place now read begins on
    for number in range(1, len(lines) + 1):
        data = _parse("\n".join(lines[:number]))
        if data is not None:
            for path in _paths(data, ()):
                found.setdefault(path, begins)
            begins = number + 1
    return found


def _parse(text: str) -> dict[str, Any] | None:
    """The first lines of a TOML text, parsed; None where they end inside a value."""
    for end in ENDS:
        try:
            return tomllib.loads(f"{text}\n{end}")
        except tomllib.TOMLDecodeError:
            continue
    return None


def _paths(value: Any, at: KeyPath) -> Iterator[KeyPath]:
    if at:
        yield at
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _paths(inner, (*at, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            yield from _paths(inner, (*at, place))
