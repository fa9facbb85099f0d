"""Beside import-linter: no torch before a stage runs, no reaching in, and the core's size."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import rlhf_recipes
from tools.count_lines import by_package, lines_of_code

PACKAGE = Path(rlhf_recipes.__file__).parent
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes"}
# Packages whose modules load none of HEAVY, and modules of others.
LIGHT = ("recipe", "store", "sources", "report", "data.rows", "stages.contract", "stages.session")
LIGHT += ("pipeline.plan", "pipeline.runner", "pipeline.doctor", "pipeline.memory")
LIGHT += ("pipeline.export", "pipeline.to_gguf", "pipeline.modelfile", "stages.rewards.rule")
LIGHT += ("pipeline.data_lint", "pipeline.estimate", "cli", "cli_tables", "screen", "signals", "ui")
LIGHT += ("feedback.agreement", "feedback.exchange", "feedback.imports", "feedback.winrate")
LIGHT += ("feedback.judge_file", "pipeline.sweep", "pipeline.places", "cli_sweep")
LIGHT += ("errors", "text", "stats", "findings")
# Lines of code of recipe, store, data, models, stages, plan and runner. Growth is a decision: who
# raises this number says why in the commit.
CORE_BUDGET = 10_050


def modules() -> dict[str, Path]:
    """Every module by its name below `rlhf_recipes`."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if name := ".".join(parts[:-1] if parts[-1] == "__init__" else parts):
            found[name] = file
    return found


def test_light_modules_load_no_heavy_library() -> None:
    light = [
        name
        for name in modules()
        if any(name == one or name.startswith(f"{one}.") for one in LIGHT)
    ]
    assert len(light) > 45
    code = "; ".join(f"import rlhf_recipes.{name}" for name in light)
    code += f"; import sys; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_no_package_reaches_into_another() -> None:
    """A name that starts with an underscore is its package's own."""
    wrong = []
    for name, file in modules().items():
        own = name.rpartition(".")[0]
        aliases: dict[str, str] = {}
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_recipes"):
                home = (node.module or "").removeprefix("rlhf_recipes").lstrip(".")
                for alias in node.names:
                    aliases[alias.asname or alias.name] = home
                    if alias.name.startswith("_") and home.partition(".")[0] != own:
                        wrong.append(f"{name} imports {home}.{alias.name}")
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                if isinstance(node.value, ast.Name) and node.value.id in aliases:
                    if aliases[node.value.id].partition(".")[0] != own.partition(".")[0]:
                        wrong.append(f"{name} uses {node.value.id}.{node.attr}")
    assert wrong == []


def test_the_core_stays_within_its_budget() -> None:
    count = by_package()["core"]
    assert count <= CORE_BUDGET
    assert count > CORE_BUDGET - 100, "lower CORE_BUDGET: the core became smaller"


def test_lines_of_code_are_counted_without_prose() -> None:
    text = '"""Two\n\nlines."""\n\n# why\nx = [\n    1,\n]\n'
    text += '\n\ndef f():\n    """Doc."""\n    return x\n'
    assert lines_of_code(text) == 5
