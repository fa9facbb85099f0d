"""A judge beside the reward model: a rule that was written down, and that nothing was trained on.

`[evaluation] judge = "python:FILE.py:FUNCTION"` names a function of the recipe's own: it takes a
prompt's last message and an answer, both texts, and gives a number, the better the higher. Its file
is run, as any Python that one downloads and starts: only where a person has agreed to it.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

from rlhf_recipes.errors import StageError
from rlhf_recipes.recipe.tables import located, python_judge
from rlhf_recipes.sources.trust import check_judge

Judge = Callable[[str, str], float]


class _AsWritten(SourceFileLoader):
    """Runs the text that a person has read, and no compiled file that came with it."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_judge(spec: str, base: Path) -> Judge | None:
    """The function that a recipe in folder `base` names; None for a model. Raises StageError."""
    if not (named := python_judge(spec)):
        return None
    check_judge(spec, base)
    name, function = named
    file = located(name, base)
    loader = _AsWritten(f"judge_{file.stem}", str(file))
    module_spec = importlib.util.spec_from_file_location(loader.name, file, loader=loader)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        rule = getattr(module, function)
    except Exception as error:
        raise _trouble(spec, error) from error

    def judge(prompt: str, answer: str) -> float:
        try:
            score = float(rule(prompt, answer))
        except Exception as error:
            raise _trouble(spec, error) from error
        if not math.isfinite(score):
            raise _trouble(spec, ValueError(f"{score} for the answer {answer[:60]!r}"))
        return score

    return judge


def _trouble(spec: str, error: Exception) -> StageError:
    return StageError(
        f"the judge {spec} does not judge: {type(error).__name__}: {error}",
        "it must take a prompt and an answer, and give a number",
    )
