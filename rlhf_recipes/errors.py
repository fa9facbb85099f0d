"""Every error that a person is meant to read, and the exit code it ends the command with.

    RlhfRecipesError              1
    ├── RecipeError               2    the recipe is wrong: every problem, with file and line
    ├── UsageError                2    the call is wrong
    ├── DataError                 1    the data cannot be used
    ├── ModelError                1    the model cannot be used
    ├── StageError                1    a stage failed
    ├── BusyError                75    another process holds the run
    └── Interrupted         130/143    stopped by a signal; the same command goes on from there

`str(error)` is one line, what is wrong and what to do next (RecipeError: one line a problem). The
command line prints it without a traceback.
"""

from collections.abc import Sequence
from dataclasses import dataclass


class RlhfRecipesError(Exception):
    """`message` says what is wrong, `hint` what to do next."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(f"{message} ({hint})" if hint else message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe. `file` may be a `--set key=value` instead; it has no line."""

    file: str
    line: int | None
    key: str
    message: str

    def __str__(self) -> str:
        parts = (self.file if self.line is None else f"{self.file}:{self.line}", self.key)
        return ": ".join([*(part for part in parts if part), self.message])


class RecipeError(RlhfRecipesError):
    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = list(problems)


class UsageError(RlhfRecipesError):
    exit_code = 2


class DataError(RlhfRecipesError):
    pass


class ModelError(RlhfRecipesError):
    pass


class StageError(RlhfRecipesError):
    pass


class BusyError(RlhfRecipesError):
    exit_code = 75


class Interrupted(RlhfRecipesError):
    """`exit_code` is 128 + the signal: 130 for Ctrl-C, 143 for a termination."""

    def __init__(self, message: str, hint: str = "", *, exit_code: int = 130) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code
