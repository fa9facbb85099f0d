"""The lint: no shell, no eval, no unsafe YAML, no pickle; every load says what it may not do."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN_CODE = {  # where code is run or found by name, and why that is none of a stranger's
    "stages/rewards/code.py": {"exec_module"},  # behind untrusted.check_code
    "stages/contract.py": {"import_module"},  # of KINDS
    "pipeline/schema.py": {"import_module"},  # of KINDS, too
    "__init__.py": {"import_module"},  # of this package
}
BANNED_CALLS = {"eval", "exec", "compile", "__import__", "execfile", "breakpoint"}
BANNED_MODULES = set("pickle cPickle dill cloudpickle marshal shelve joblib pty commands".split())
BANNED = set("system popen spawnl spawnv execv execl exec_module import_module".split())
LOADS = {"from_pretrained": {"SAFELY"}, "load_dataset_builder": set()}


def wrong(source: str, name: str) -> Iterator[str]:
    """What a module may not do."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            yield from (f"imports {one}" for one in names if one.split(".")[0] in BANNED_MODULES)
        if not isinstance(node, ast.Call):
            continue
        whole = ast.unparse(node.func)
        called = whole.rpartition(".")[2]
        words = {word.arg: ast.unparse(word.value) for word in node.keywords if word.arg}
        spread = " ".join(ast.unparse(word.value) for word in node.keywords if not word.arg)
        if whole in BANNED_CALLS:
            yield f"calls {whole}"
        if (
            whole != "platform.system"
            and called in BANNED - RUN_CODE.get(name, set())
            or "shell" in words
        ):
            yield f"calls {whole}"
        if whole == "yaml.load" or whole.startswith("yaml.unsafe"):
            yield f"calls {whole}"
        if whole in ("torch.load", "numpy.load", "np.load") and words.get("weights_only") != "True":
            yield f"calls {whole} without weights_only=True"
        if called == "from_pretrained" and not whole.startswith("hub"):
            gguf = "gguf" in source and '"trust_remote_code": False' in source
            if "SAFELY" not in spread and not gguf:
                yield f"calls {whole} without SAFELY"
            elif "Model" in whole and "WEIGHTS" not in spread and not gguf:
                yield f"calls {whole} without WEIGHTS"
        if words.get("trust_remote_code") == "True":
            yield "trusts"


def test_the_package_does_none_of_it() -> None:
    package = ROOT / "rlhf_recipes"
    found = {
        f"{file.relative_to(package)}: {what}"
        for file in package.rglob("*.py")
        for what in wrong(file.read_text(), file.relative_to(package).as_posix())
    }
    assert found == set()
    assert len(list(package.rglob("*.py"))) > 50


@pytest.mark.parametrize(
    "code",
    [
        *("eval(x)", "exec(x)", "__import__(x)", "os.system(x)", "os.popen(x)", "import pickle"),
        *(
            "from dill import load",
            "subprocess.run(x, shell=True)",
            "yaml.load(x)",
            "torch.load(x)",
        ),
        *("torch.load(x, weights_only=False)", "AutoModel.from_pretrained(x)", "import_module(x)"),
        *("AutoModel.from_pretrained(x, **SAFELY)", "spec.loader.exec_module(x)", "numpy.load(x)"),
        "AutoConfig.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_lint_sees_it(code: str) -> None:
    assert list(wrong(code, "a.py"))


def test_ruff_sees_it_too(tmp_path: Path) -> None:
    """In everything here, the tests and the tools too."""
    (tmp_path / "bad.py").write_text(
        "import os\nimport subprocess\n\nimport torch\nimport yaml\n\n"
        "eval(input())\nos.system(input())\nsubprocess.run(input(), shell=True)\n"
        "yaml.load(input())\ntorch.load(input())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise"]
        + ["--config", str(ROOT / "pyproject.toml"), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    for rule in ("S307", "S605", "S602", "S506"):
        assert rule in done.stdout, done.stdout + done.stderr
