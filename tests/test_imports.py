"""Arrows go one way, from callers down to callees; and the command line loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import rlhf_recipes

PACKAGE = Path(rlhf_recipes.__file__).parent

# Each module may import those above it, never one below: lazily or not.
ORDER = """
errors stopping intervals evidence guards lines fields tables elsewhere validate wiring edit recipe
identity rundir progress memory untrusted hub mirror sources judge fetch stages
tokens data attention models passes adapters rewards sequences ppo_losses checkpoints ppo_trainer
shared
stages.common stages.sft stages.reward stages.ppo stages.dpo stages.answers stages.evaluate
stages.best_of
facts history clean doctor plan work lint findings policy_rules verdict show plots charts house card
report comparison export hollow footprint rehearsal fit
chat runner reckoning later cli __main__
""".split()

LIGHT = [
    *ORDER[: ORDER.index("tokens")],
    *ORDER[ORDER.index("facts") : ORDER.index("work")],
    *ORDER[ORDER.index("lint") : ORDER.index("export")],
    *"shared runner later cli".split(),
]
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes"}


def modules() -> dict[str, Path]:
    """Every module of the package but its own `__init__`, which loads others only on demand."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and parts[0] != "recipes":
            found[name] = file
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules of this package that code imports anywhere but under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "rlhf_recipes":
            yield from (f"rlhf_recipes.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        yield from imports(node)


def test_arrows_go_down() -> None:
    wrong = []
    for name, file in modules().items():
        assert name in ORDER, f"{name} has no place in this test's ORDER"
        for target in imports(ast.parse(file.read_text())):
            callee = target.removeprefix("rlhf_recipes.")
            if callee != target and ORDER.index(callee) >= ORDER.index(name):
                wrong.append(f"{name} imports {callee}")
    assert wrong == []


def test_stages_know_neither_runner_nor_plan_nor_disk() -> None:
    for name, file in modules().items():
        if name.startswith("stages"):
            known = set(imports(ast.parse(file.read_text())))
            banned = {"runner", "cli", "plan", "rundir", "progress", "export", "chat"}
            assert known.isdisjoint({f"rlhf_recipes.{callee}" for callee in banned}), name


def test_light_modules_load_no_heavy_library() -> None:
    code = "; ".join(f"import rlhf_recipes.{name}" for name in LIGHT)
    code += f"; import sys; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
