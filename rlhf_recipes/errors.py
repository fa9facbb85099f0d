"""Every error that a person is meant to read, and the exit code it ends the command with.

    RlhfRecipesError              1
    ├── RecipeError               2    the recipe is wrong: every problem, with file and line
    ├── UsageError                2    the call is wrong
    ├── DataError                 1    the data cannot be used
    ├── ModelError                1    the model cannot be used
    ├── StageError                1    a stage failed
    │   └── GateError             3    a stage saw no sense in going on
    ├── MachineError              1    disk or memory gave out
    ├── BusyError                75    another process holds the run
    └── Interrupted         130/143    stopped by a signal; the same command goes on from there

`str(error)` is one line, what is wrong and what to do next (RecipeError: one line a problem). The
command line prints it without a traceback.
"""

import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
# The password of a URL; tokens of Hugging Face, OpenAI, Anthropic, GitHub, GitLab, Slack, AWS.
SECRET = re.compile(
    r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)|\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[opsu]_\w{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abp]-[\w-]{20,}|AKIA[A-Z0-9]{16})"
)
SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY)$")
SECRET_LENGTH = 12  # a shorter value is a word of some other meaning
OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|not enough memory|ALLOC_FAILED", re.I)


def masked(text: str) -> str:
    """`text` without the passwords and tokens in it: those known by shape, and this process's."""
    text = SECRET.sub("***", text)
    for name, value in os.environ.items():
        if len(value) >= SECRET_LENGTH and SECRET_NAME.search(name) and not value.startswith("/"):
            text = text.replace(value, "***")
    return text


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


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def plain(text: str) -> str:
    """`text` in one line, with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


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
    pass


class ModelError(RlhfRecipesError):
    pass


class StageError(RlhfRecipesError):
    pass


class GateError(StageError):
    exit_code = 3


def lost(what: str) -> StageError:
    """For a training that came to what is no number: it is kept nowhere."""
    hint = 'lower learning_rate, or set dtype = "float32" in [model]'
    return StageError(f"{what} that are no numbers", hint)


class MachineError(RlhfRecipesError):
    pass


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
