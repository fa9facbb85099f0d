"""What makes two stages the same: a canonical encoding, digests of it, and differences in words.

The encoding refuses whatever has no stable form rather than falling back to `str()`: a key that
changes by itself throws hours of training away, and one that fails to change hands out the wrong
model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from itertools import zip_longest
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
        files = [(contents or {}).get(one) for one in (old, new)]
        return (all(files) and difference(*files, where)) or [f"{where} changed"]
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
