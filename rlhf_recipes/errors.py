"""Every error that a person is meant to read, and the exit code it ends the command with.

    RlhfRecipesError              1
    ├── RecipeError               2    the recipe is wrong: every problem, with file and line
    ├── UsageError                2    the call is wrong
    ├── DataError                 1    the data cannot be used
    ├── ModelError                1    the model cannot be used
    ├── StageError                1    a stage failed
    │   ├── GateError             3    a stage saw no sense in going on
    │   └── PeopleNeeded          4    people have to judge before the run can go on
    ├── MachineError              1    disk or memory gave out
    ├── BusyError                75    another process holds the run
    └── Interrupted         130/143    stopped by a signal; the same command goes on from there

Not an error: `run --strict` ends with 5 if the verdict of a whole run has a fault.

`str(error)` is one line, what is wrong and what to do next (RecipeError: one line a problem). The
command line prints it without a traceback.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf_recipes.text import masked, plain

FREE = "free some space there, and the same command goes on"
ELSEWHERE = "see who may read and write it; --runs DIR keeps runs elsewhere"
FAULTS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), FREE),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR), ELSEWHERE),
    errno.ELOOP: "nothing is written through a link: look where it leads, and take it away",
    errno.EIO: "the disk may be failing; the same command goes on from what is whole",
}
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # as Rust's libraries say it
NOT_WRITTEN = re.compile(r"inline_container|iostream error")  # torch.save says no more than that
OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|not enough memory|ALLOC_FAILED", re.I)


class RlhfRecipesError(Exception):
    """`message` says what is wrong, `hint` what to do next; no secret is in them."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        message, hint = masked(message), masked(hint)
        super().__init__(f"{message} ({hint})" if hint else message)
        self.message = message
        self.hint = hint


def briefly(error: BaseException) -> str:
    """Its kind, and the first line of what it says."""
    return f"{type(error).__name__}: " + str(error).strip().partition("\n")[0][:160]


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe. `file` may be a `--set key=value` instead; it has no line."""

    file: str
    line: int | None
    key: str
    message: str

    def __str__(self) -> str:
        parts = (self.file if self.line is None else f"{self.file}:{self.line}", self.key)
        return plain(": ".join([*(part for part in parts if part), self.message]))


class RecipeError(RlhfRecipesError):
    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        said = "\n".join(map(str, problems))
        super().__init__(said)
        self.problems = list(problems)
        if self.message != said:
            self.problems = [
                replace(p, file=masked(p.file), key=masked(p.key), message=masked(p.message))
                for p in problems
            ]


class UsageError(RlhfRecipesError):
    exit_code = 2


class DataError(RlhfRecipesError):
    """The data cannot be used."""


class ModelError(RlhfRecipesError):
    """The model cannot be used."""


class StageError(RlhfRecipesError):
    """A stage failed."""


class GateError(StageError):
    exit_code = 3


class PeopleNeeded(StageError):
    exit_code = 4


def lost(what: str) -> StageError:
    """For a training that came to what is no number: it is kept nowhere."""
    hint = 'lower learning_rate, or set dtype = "float32" in [model]'
    return StageError(f"{what} that are no numbers", hint)


class MachineError(RlhfRecipesError):
    """Disk or memory gave out."""


class BusyError(RlhfRecipesError):
    exit_code = 75


class Interrupted(RlhfRecipesError):
    """`exit_code` is 128 + the signal: 130 for Ctrl-C, 143 for a termination."""

    def __init__(self, message: str, hint: str = "", *, exit_code: int = 130) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


def machine_error(error: BaseException, what: str = "", smaller: str = "") -> MachineError | None:
    """What the machine lacked, where that is what an exception is about, or one that led to it.

    `what` is where it happened; `smaller` is what to do where memory ran out.
    """
    cause: BaseException | None = error
    while cause is not None:
        number, words, hint = getattr(cause, "errno", None), "", smaller
        if found := OS_ERROR.search(str(cause)):
            number = int(found[1])
        if number in FAULTS:
            place = getattr(cause, "filename", None)
            words = os.strerror(number) + (f": {str(place)!r}" if place else "")
            hint = FAULTS[number]
        elif isinstance(cause, RuntimeError) and NOT_WRITTEN.search(str(cause)):
            words, hint = "a file could not be written whole: the disk may be full", FREE
        elif isinstance(cause, (RuntimeError, OSError, MemoryError)):
            full = isinstance(cause, MemoryError) or OUT_OF_MEMORY.search(str(cause))
            words = "out of memory" if full else ""
        if words:
            return MachineError(f"{what}: {words}" if what else words, hint)
        cause = cause.__cause__ or cause.__context__
    return None
