"""Lines of code by package, without blank lines, comments and docstrings.

python -m tools.count_lines
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "rlhf_recipes"
CORE = ("recipe", "store", "data", "models", "stages", "pipeline/plan.py", "pipeline/runner.py")
SKIPPED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def lines_of_code(text: str) -> int:
    """Lines that hold a token which is not of a docstring."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                if isinstance(first.value.value, str):
                    documented |= {*range(first.lineno, (first.end_lineno or 0) + 1)}
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SKIPPED:
            held |= {*range(token.start[0], token.end[0] + 1)}
    return len(held - documented)


def by_package() -> Counter[str]:
    """Lines by package; those of the top level, and of the core, under "." and "core"."""
    found: Counter[str] = Counter()
    for file in PACKAGE.rglob("*.py"):
        place = file.relative_to(PACKAGE)
        count = lines_of_code(file.read_text(encoding="utf-8"))
        found[place.parts[0] if len(place.parts) > 1 else "."] += count
        found["all"] += count
        if place.parts[0] in CORE or place.as_posix() in CORE:
            found["core"] += count
    return found


if __name__ == "__main__":
    for name, count in by_package().most_common():
        print(f"{name:<12}{count:>6,}")
