"""A canonical encoding of plain values, digests of it, and the seeds that are derived from it.

The encoding refuses whatever has no stable form rather than falling back to `str()`: a key that
changes by itself throws hours of training away, and one that fails to change hands out the wrong
model.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any


def canonical(value: Any) -> bytes:
    """The one encoding of a value built of dict, list, tuple, str, int, float, bool and None.

    Raises TypeError, naming the place, for anything else: NaN, infinity, sets, paths, objects.
    """
    _refuse_unstable(value, "value")
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


def _refuse_unstable(value: Any, where: str) -> None:
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise TypeError(f"{where}: the key {key!r} is no string, so it has no stable form")
            _refuse_unstable(item, f"{where}.{key}")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _refuse_unstable(item, f"{where}[{index}]")
    elif type(value) is float:
        if not math.isfinite(value):
            raise TypeError(f"{where}: {value!r} has no stable form")
    elif value is not None and type(value) not in (str, int, bool):
        raise TypeError(f"{where}: {type(value).__name__} {value!r} has no stable form")


def digest(value: Any) -> str:
    """SHA-256 of the canonical encoding, as 64 hex digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def derive_seed(seed: int, *place: str | int) -> int:
    """A seed in [0, 2**31) for one place of use, whatever ran before: ("rollout", 3)."""
    return int(digest([seed, *place])[:8], 16) & 0x7FFFFFFF
