"""Check the Dockerfile's steps without Docker: its files, its shell lines, and what it installs.

usage: python -m tools.try_dockerfile [--pip]

The files that it copies are put in a folder of their own. A wheel built there must hold what the
wheel of the clone holds. No step changes this machine: those with apt and useradd are only read.
With `--pip`, pip resolves what its steps would install, for this Python, and installs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

from tools.try_wheel import ROOT, apart, build

KNOWN = set("FROM ARG RUN COPY USER ENV VOLUME WORKDIR ENTRYPOINT CMD".split())


def steps(text: str) -> list[tuple[str, str]]:
    """The instructions and their words; lines that go on are joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split()[0], line.partition(" ")[2]) for line in joined.splitlines() if line]


def problems(text: str) -> list[str]:
    """What can be said by reading alone; empty where nothing is wrong."""
    found = steps(text)
    wrong = [f"unknown instruction {word}" for word, _ in found if word not in KNOWN]
    if not found or found[0][0] != "FROM":
        wrong.append("the first instruction is not FROM")
    copied: set[str] = set()
    for word, rest in found:
        if word == "COPY":
            *sources, target = shlex.split(rest)
            wrong += [
                f"COPY {name}: no such file" for name in sources if not (ROOT / name).exists()
            ]
            copied |= {f"{target}{name}" if target.endswith("/") else target for name in sources}
        if word == "RUN":
            done = subprocess.run(["sh", "-n", "-c", rest], capture_output=True, text=True)
            wrong += [f"RUN {rest}: {done.stderr.strip()}"] if done.returncode else []
            for name in re.findall(r"/source/[\w.]+", rest):
                wrong += [f"RUN names {name} before it is copied"] if name not in copied else []
    last = dict(found)
    if last.get("USER", "root").split(":")[0] in ("root", "0"):
        wrong.append("the container runs as root")
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    if json.loads(last.get("ENTRYPOINT", "[]"))[:1] != list(scripts):
        wrong.append("ENTRYPOINT is not the command of pyproject.toml")
    return wrong


def copy(text: str, into: Path) -> None:
    """What the steps COPY to /source, put into a folder."""
    for word, rest in steps(text):
        if word == "COPY":
            *sources, target = shlex.split(rest)
            for name in sources:
                inside = Path(target).relative_to("/source")
                to = into / (inside / name if target.endswith("/") else inside)
                to.parent.mkdir(parents=True, exist_ok=True)
                if (ROOT / name).is_dir():
                    shutil.copytree(ROOT / name, to, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / name, to)


def resolve(text: str, source: Path, environment: Path) -> None:
    """The steps with pip, as a dry run in a fresh environment, with the default index."""
    venv.create(environment, with_pip=True)
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    for word, rest in steps(text):
        if word == "RUN" and rest.startswith("pip install "):
            line = rest.replace("pip install ", "pip install --dry-run --quiet ")
            line = line.replace("/source", str(source))
            subprocess.run(["sh", "-c", line], check=True, env={**os.environ, "PATH": path})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pip", action="store_true", help="resolve what pip would install")
    given = parser.parse_args()
    text = (ROOT / "Dockerfile").read_text()
    wrong = problems(text)
    with tempfile.TemporaryDirectory() as work:
        if not wrong:
            source = Path(work) / "source"
            copy(text, source)
            with zipfile.ZipFile(build(source, Path(work) / "wheels")) as archive:
                wrong = apart(archive.namelist())
            if given.pip:
                resolve(text, source, Path(work) / "environment")
    if wrong:
        raise SystemExit("\n".join(["Dockerfile:", *wrong]))
    print(f"{len(steps(text))} steps of the Dockerfile checked; its files build the whole wheel")


if __name__ == "__main__":
    main()
