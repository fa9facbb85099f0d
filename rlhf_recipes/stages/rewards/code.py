"""`python = "FILE.py:FUNCTION"`: a reward or a judge that is a function of the recipe's own.

It takes a prompt's last message and an answer, both texts, and if it has a third parameter the
columns of the row that the recipe names. It gives a number, the better the higher, or None. Its
file is run, as any Python that one downloads and starts: only where a person has agreed to it.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

from rlhf_recipes.recipe.rewards import Term
from rlhf_recipes.recipe.tables import located
from rlhf_recipes.sources.trust import check_judge

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class _AsWritten(SourceFileLoader):
    """Runs the text that a person has read, and no compiled file that came with it."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def load_function(term: Term, base: Path) -> tuple[Callable[..., Any], bool]:
    """The function that a recipe in folder `base` names, and whether it asks for the row.

    Raises UsageError for code that nobody has agreed to run, and whatever that code raises.
    """
    check_judge(term, base)
    name, function = term.code
    file = located(name, base)
    loader = _AsWritten(f"judge_{file.stem}", str(file))
    module_spec = importlib.util.spec_from_file_location(loader.name, file, loader=loader)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    found = getattr(module, function)
    kinds = [one.kind for one in inspect.signature(found).parameters.values()]
    return found, sum(kind in POSITIONAL for kind in kinds) > 2
