"""Runs in processes of their own, of which one operation on a file fails; see `test_faults.py`.

Their stages only count.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import gc
import io
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_recipes.errors import RlhfRecipesError
from rlhf_recipes.pipeline.runner import run
from rlhf_recipes.recipe.load import Recipe, load_recipe
from rlhf_recipes.stages import contract
from rlhf_recipes.store import layout, provenance
from tests.helpers import counting
from tests.helpers.counting import Counting, toy

KILLED = 137


# ---- faults -------------------------------------------------------------------------------------


class Faults:
    """Counts the operations on files below `root`; at number `at`, `fail` is called instead."""

    def __init__(self, root: Path, at: int = 0, fail: Callable[[], None] = lambda: None) -> None:
        self.root, self.at, self.fail = os.path.realpath(root), at, fail
        self.seen: list[str] = []
        for module, names in [
            (os, "open fsync replace rename unlink rmdir mkdir listdir scandir"),
            (fcntl, "flock"),
        ]:
            for name in names.split():
                setattr(module, name, partial(self._operate, name, getattr(module, name)))
        io.open = builtins.open = partial(self._open, io.open)

    def step(self, name: str, file: Any, dir_fd: int | None = None, half: Any = None) -> None:
        """One operation on a file: a path, a descriptor or a stream. `half` is done if it fails."""
        if hasattr(file, "fileno"):
            file = file.fileno()
        if isinstance(file, int):
            file = os.readlink(f"/proc/self/fd/{file}")
        folder = os.getcwd() if dir_fd is None else os.readlink(f"/proc/self/fd/{dir_fd}")
        path = os.path.join(folder, os.fspath(file))
        if path.endswith(layout.PROGRESS):  # written by the clock, and let go of if it fails
            return
        if (path + os.sep).startswith(self.root + os.sep):
            self.seen.append(f"{name} {path}")
            if len(self.seen) == self.at:
                if half is not None:
                    half()
                self.fail()

    def _operate(self, name: str, real: Callable, file: Any = ".", *rest: Any, **words: Any) -> Any:
        self.step(name, file, words.get("dir_fd"))
        return None if name == "fsync" else real(file, *rest, **words)  # the disk is not at issue

    def _open(self, real: Callable, file: Any, mode: str = "r", *rest: Any, **words: Any) -> Any:
        if isinstance(file, int):
            return real(file, mode, *rest, **words)
        self.step("open", file)
        if mode in ("r", "rb"):
            return real(file, mode, *rest, **words)
        raw = _Raw(os.fspath(file), mode.replace("b", ""), opener=words.pop("opener", None))
        raw.faults = self
        stream = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return stream
        buffering = rest[0] if rest else words.pop("buffering", -1)
        encoding, errors, newline = (*rest[1:], None, None, None)[:3]
        words = {"encoding": encoding, "errors": errors, "newline": newline} | words
        return io.TextIOWrapper(stream, **words, line_buffering=buffering == 1)


class _Raw(io.FileIO):
    faults: Faults

    def write(self, data: Any) -> int:
        real = super().write
        self.faults.step("write", self, half=lambda: real(bytes(data)[: len(data) // 2]))
        return real(data)


def error(number: int) -> Callable[[], None]:
    def fail() -> None:
        raise OSError(number, os.strerror(number))

    return fail


FAULTS = {
    "EIO": error(errno.EIO),
    "ENOSPC": error(errno.ENOSPC),
    "kill": lambda: os._exit(KILLED),
}
FAULT_WORDS = {"EIO": "Input/output error", "ENOSPC": "No space left on device"}


def start(recipe: Recipe, at: int = 0, fault: str = "EIO", **options: Any) -> int:
    """A run in a process of its own, whose id this is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork where other tests left threads
        child = os.fork()
    if child:
        return child
    code, line, faults, beside = 99, "", None, recipe.path.parent
    try:
        gc.freeze()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdout = sys.stderr = (beside / "screen").open("a", buffering=1)
        os.dup2(sys.stderr.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        faults = Faults(beside / "runs", at, FAULTS[fault])
        run(recipe, **({"runs": beside / "runs"} | options))
        code = 0
    except RlhfRecipesError as error:
        code, line = error.exit_code, str(error)
    except BaseException:
        line = traceback.format_exc()
    finally:
        seen = faults.seen if faults else []
        (beside / f"said-{os.getpid()}").write_text(json.dumps([line, seen]))
        os._exit(code)


def end(recipe: Recipe, child: int) -> tuple[int, str, list[str]]:
    """Its exit code, what it said, the operations that it made."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = recipe.path.parent / f"said-{child}"
    line, seen = json.loads(said.read_text()) if code != KILLED else ("", [])
    return code, line, seen


def attempt(recipe: Recipe, at: int = 0, fault: str = "EIO", **options: Any) -> tuple:
    return end(recipe, start(recipe, at, fault, **options))


def outputs(runs: Path) -> dict[str, bytes]:
    """The bytes of all that a run promises, by their place below the runs folder."""
    made = [*runs.glob(".stages/[!.]*/output/**/*"), *runs.glob("[!.]*/model/**/*")]
    made += runs.glob("[!.]*/results.json")
    return {
        file.relative_to(runs).as_posix(): file.read_bytes()
        for file in made
        if file.is_file() and file.name not in ("source.json", "README.md")
    }


def no_part_is_taken_for_a_whole(runs: Path, whole: dict[str, bytes]) -> None:
    """Where a record stands, every file that it speaks for is there, and whole."""
    for record in [*runs.glob(".stages/*/stage.json"), *runs.glob("*/model/source.json")]:
        folder = record.parent
        named = folder.with_name(folder.name.removeprefix(".").removesuffix(".fresh"))
        place = named.relative_to(runs).as_posix() + "/"
        for name, data in whole.items():
            if name.startswith(place):
                file = folder / name.removeprefix(place)
                assert file.is_file() and file.read_bytes() == data, file


def steady_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """Of stages that save each step; for processes that are forked from here."""
    import rlhf_recipes.stages.checkpoints  # noqa: F401  (torch: once, for all of them)

    Counting(monkeypatch)
    steady = SimpleNamespace(run=counting.steady)
    monkeypatch.setattr(contract, "module_of", lambda kind: steady)
    provenance.versions()
    text = counting.RECIPE.replace('"reward", "ppo"]', '"reward"]\nevaluation = false')
    return load_recipe(toy(tmp_path, text=text.partition("[ppo]")[0]))
