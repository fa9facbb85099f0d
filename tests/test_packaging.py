"""What is shipped: the files of the wheel, the steps of the Dockerfile, and the notebook."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

from tools.try_dockerfile import problems
from tools.try_wheel import ROOT, apart, wanted

NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_the_wheel_holds_every_file_of_the_package_recipes_and_pages() -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel")
    builder = wheel.WheelBuilder(str(ROOT))
    forced = builder.config.get_force_include()
    files = [*builder.recurse_included_files(), *builder.recurse_forced_files(forced)]
    held = {Path(file.distribution_path).as_posix() for file in files}
    assert apart(held) == []
    for name in (
        "py.typed",
        "docs/recipe.schema.json",
        "feedback/templates/page.js",
        "report/templates/report.html",
        "shipped/feedback/prompts.jsonl",
        "shipped/launch/array.sbatch",
        "shipped/launch/sky.yaml",
        "shipped/smoke/model/model.safetensors",
        "shipped/tasks/sorting.jsonl",
    ):
        assert f"rlhf_recipes/{name}" in held


def test_a_wheel_that_lacks_a_file_is_told_of() -> None:
    held = wanted() - {"rlhf_recipes/py.typed"} | {"rlhf_recipes/x.pyc", "a.dist-info/METADATA"}
    assert apart(held) == ["lacks rlhf_recipes/py.typed", "holds rlhf_recipes/x.pyc"]


def test_the_steps_of_the_dockerfile() -> None:
    assert problems(DOCKERFILE) == []
    for right, wrong, said in (
        ("COPY docs", "COPY dogs", "COPY dogs: no such file"),
        ("USER person", "USER root", "the container runs as root"),
        ("ARG ", "ARGS ", "unknown instruction ARGS"),
        ("COPY constraints.txt /source/\n", "", "RUN names /source/constraints.txt before"),
        ('["rlhf-recipes"]', '["rlhf"]', "ENTRYPOINT is not the command"),
        ("&& mkdir", "&& (mkdir", "RUN useradd"),
    ):
        assert right in DOCKERFILE
        assert any(said in one for one in problems(DOCKERFILE.replace(right, wrong))), said


def cells(kind: str) -> list[str]:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


def test_the_notebook_is_one_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len({*ids}) == len(ids) and all(re.fullmatch(r"[\w-]{1,64}", one) for one in ids)
    for cell in notebook["cells"]:
        own = {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
        assert cell | own == cell and {*cell} == {"cell_type", "id", "metadata", "source", *own}


def test_the_notebook_s_code_names_what_there_is() -> None:
    helped = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    commands = {*re.findall(r"^Usage: rlhf-recipes (\w+)", helped, re.MULTILINE)}
    text = "\n".join(cells("code") + cells("markdown"))
    named = re.findall(r'(?:!|`)rlhf-recipes (\w+)|"rlhf-recipes", "(\w+)"', text)
    assert {one or other for one, other in named} >= {"run", "chat"}
    assert {one or other for one, other in named} <= commands
    for code in cells("code"):
        plain = re.sub(r"^( *)[!%].*$", r"\1pass", code, flags=re.MULTILINE)
        for node in ast.walk(ast.parse(plain)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rlhf_recipes"):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, alias.name) for alias in node.names)
