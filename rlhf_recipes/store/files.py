"""Files that are whole or not there, also when the power fails; and JSON of ours."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

FORMAT = 1  # of every JSON file here


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinity become null, scalars of torch and NumPy plain numbers."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not math.isfinite(number) else number


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, to_json({"format": FORMAT, **value}, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    with whole(path) as stream:
        stream.write(text.encode("utf-8", "backslashreplace"))


def aside(path: Path) -> Path:
    """A name to write `path` under until it is whole: no other process's, on whatever machine."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that is there whole or not at all, also when the power fails.

    It has a temporary name until it is synced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = aside(path)
    try:
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file of ours; None where it is missing, damaged or of another format."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value.get("format") == FORMAT else None


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """A file, a folder with all that is in it, or a link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_all(folder: Path) -> None:
    """What was written below `folder` outlives a power failure from here on."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            sync(path)


def no_link(file: str, flags: int) -> int:
    """An opener: what a link in a stranger's runs folder leads to is not ours to write to."""
    return os.open(file, flags | os.O_NOFOLLOW, 0o666)
