"""The wheel as a person gets it: built, installed in a fresh environment, used in a bare folder.

usage: python -m tools.try_wheel [--site DIR] [--run] [--notebook notebooks/quickstart.ipynb]
       python -m tools.try_wheel --into DIR      builds it, compares its files, and stops there
       python try_wheel.py --wheel FILE …        where there is no clone

The environment holds what pip installs. With `--site`, it holds another environment's libraries,
and little is downloaded. No command sees a clone: the folder is elsewhere, PYTHONPATH is not set.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHERE = {"rlhf_recipes": "rlhf_recipes", "recipes": "rlhf_recipes/shipped"}
WHERE |= {"docs": "rlhf_recipes/docs"}
ROWS = [f"what is {n},it is {n},no\n" for n in range(40)]


def wanted() -> set[str]:
    """Every file that a wheel of this clone holds, besides its own metadata."""
    names = set()
    for folder, inside in WHERE.items():
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                names.add(f"{inside}/{file.relative_to(ROOT / folder).as_posix()}")
    return names


def apart(held: Iterable[str]) -> list[str]:
    """What a wheel of these names lacks, and what it should not hold; empty where it is whole."""
    here = {name for name in held if ".dist-info/" not in name}
    lacks, more = wanted() - here, here - wanted()
    return [f"lacks {name}" for name in sorted(lacks)] + [f"holds {name}" for name in sorted(more)]


def build(source: Path, into: Path) -> Path:
    """The wheel of a folder with `pyproject.toml`."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", f"--wheel-dir={into}"]
    subprocess.run([*command, str(source)], check=True)
    (wheel,) = into.glob("rlhf_recipes-*.whl")
    return wheel


class Environment:
    """A fresh environment with the wheel in it, and a bare folder to type commands in."""

    def __init__(self, work: Path, wheel: Path, site: Path | None) -> None:
        self.wheel, self.bare = wheel.resolve(), work / "bare"
        self.commands = work / "environment" / "bin"
        self.bare.mkdir()
        venv.create(work / "environment", with_pip=True)
        self.variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.variables |= {"PATH": f"{self.commands}:{os.environ['PATH']}"}
        self.variables |= {"RLHF_RECIPES_WHEEL": str(self.wheel)}
        if site:
            # Behind the wheel: where the other environment has this project, the wheel's is first.
            (own,) = work.glob("environment/lib/python*/site-packages")
            (own / "libraries.pth").write_text(f"{site.resolve()}\n")
        self.install(str(self.wheel), *(["--no-deps", "--force-reinstall"] if site else []))

    def install(self, *words: str) -> None:
        self.do("python", "-m", "pip", "install", "--quiet", *words)

    def do(self, *words: str) -> str:
        """What a command prints. Raises SystemExit where it fails."""
        print("$", *words, flush=True)
        command = [str(self.commands / words[0]), *words[1:]]
        done = subprocess.run(
            command, cwd=self.bare, env=self.variables, text=True, stdout=subprocess.PIPE
        )
        if done.returncode:
            raise SystemExit(f"{done.stdout}\n{' '.join(words)} ended with {done.returncode}")
        return done.stdout


def type_first(there: Environment) -> None:
    """What a person types first, and what it should say."""
    place = there.do("python", "-c", "import rlhf_recipes; print(rlhf_recipes.__file__)")
    package = Path(place.strip()).parent
    assert there.commands.parent.resolve() in package.resolve().parents, f"not the wheel's: {place}"
    shipped = sorted(file.stem for file in (package / "shipped").glob("*.toml"))
    listed = there.do("rlhf-recipes", "recipes").splitlines()
    assert [line.split()[0] for line in listed] == shipped and "smoke" in shipped
    assert ": ok (" in there.do("rlhf-recipes", "check", "smoke")
    for name in shipped:
        there.do("rlhf-recipes", "fork", name, f"own-{name}.toml")
    schema = (package / "docs" / "recipe.schema.json").read_text(encoding="utf-8")
    assert there.do("rlhf-recipes", "schema") == schema
    (there.bare / "pairs.csv").write_text("question,good_answer,bad_answer\n" + "".join(ROWS))
    there.do("rlhf-recipes", "init", "pairs.csv", "--model", str(package / "shipped/smoke/model"))
    assert ": ok (" in there.do("rlhf-recipes", "check", "pairs")


def train(there: Environment) -> None:
    there.do("rlhf-recipes", "run", "smoke")
    assert there.do("rlhf-recipes", "report", "smoke").startswith("✓")


def execute(there: Environment, notebook: Path) -> None:
    """The notebook, by nbclient, and what its cells should show."""
    there.install("nbclient", "ipykernel")
    shutil.copy(notebook, there.bare / "quickstart.ipynb")
    there.do("jupyter-execute", "--timeout=1800", "--output=done.ipynb", "quickstart.ipynb")
    done = json.loads((there.bare / "done.ipynb").read_text(encoding="utf-8"))
    outputs = {
        cell["id"]: json.dumps(cell.get("outputs"), ensure_ascii=False) for cell in done["cells"]
    }
    for cell, shown in (
        ("run", "Stage 5 of 5"),
        ("verdict", "<li>✓ "),
        ("numbers", "'ppo.win_rate': "),
        ("report", "<iframe srcdoc="),
        ("chat", "ppo"),
    ):
        assert shown in outputs[cell], f"{cell}: no {shown} in {outputs[cell][:2000]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wheel", type=Path, help="a wheel that is built already")
    parser.add_argument("--into", type=Path, help="build the wheel into this folder, and stop")
    parser.add_argument("--site", type=Path, help="site-packages with the libraries")
    parser.add_argument("--run", action="store_true", help="train the recipe smoke")
    parser.add_argument("--notebook", type=Path, help="execute this notebook")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wheel = given.wheel
        if wheel is None:
            wheel = build(ROOT, given.into or Path(folder))
            with zipfile.ZipFile(wheel) as archive:
                if wrong := apart(archive.namelist()):
                    raise SystemExit("\n".join([f"{wheel.name}:", *wrong]))
        if not given.into:
            there = Environment(Path(folder), wheel, given.site)
            type_first(there)
            if given.run:
                train(there)
            if given.notebook:
                execute(there, given.notebook)
    print(f"{wheel.name} is whole{'' if given.into else ', and works in a bare folder'}")


if __name__ == "__main__":
    main()
