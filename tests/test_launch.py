"""The shipped files for other machines: their commands are ours, and start a run with stand-ins."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer

from rlhf_recipes.cli import app
from rlhf_recipes.pipeline.sweep import command, trials, typed
from rlhf_recipes.recipe.load import shipped_folder

FILES = sorted((shipped_folder() / "launch").iterdir())
PROGRAM = '#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word"; done > called\n'


def parsed(line: str) -> dict[str, Any]:
    """What our own parser takes of a line `rlhf-recipes …`; it raises for what it does not know."""
    program, name, *rest = shlex.split(line, comments=True)
    assert program == "rlhf-recipes"
    sub = typer.main.get_command(app).commands[name]
    return sub.make_context(name, rest).params


def started(text: str, here: Path, *words: str, **variables: str) -> list[str]:
    """The words that `rlhf-recipes` gets from a script, on a machine of stand-ins."""
    (here / "bin").mkdir(exist_ok=True)
    for name, script in {"rlhf-recipes": PROGRAM, "srun": '#!/bin/sh\nexec "$@"\n'}.items():
        (here / "bin" / name).write_text(script)
        (here / "bin" / name).chmod(0o755)
    (here / "script").write_text(text)
    path = f"{here / 'bin'}:{os.environ['PATH']}"
    environment = {"PATH": path, "HOME": str(here), **variables}
    subprocess.run(["bash", "script", *words], cwd=here, env=environment, check=True)
    return (here / "called").read_text().splitlines()


def test_there_are_files_for_slurm_and_skypilot() -> None:
    assert [file.name for file in FILES] == ["array.sbatch", "run.sbatch", "sky.yaml"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_their_comments_say_to_type_is_ours(file: Path) -> None:
    said = re.findall(r"^#   (rlhf-recipes .*)$|`(rlhf-recipes [^`]*)`", file.read_text(), re.M)
    for line in (one or other for one, other in said):
        line = line.partition(" >")[0]
        if line not in ("rlhf-recipes doctor", "rlhf-recipes run"):
            assert parsed(line)["recipe"] == "smoke"
    assert "not run on a c" in file.read_text()


@pytest.mark.parametrize("file", [f for f in FILES if f.suffix == ".sbatch"], ids=lambda f: f.name)
def test_slurm_reads_the_options_and_bash_the_rest(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    options = [line for line in lines if line.startswith("#SBATCH")]
    known = "job-name ntasks gres cpus-per-task mem time signal requeue open-mode output".split()
    assert [re.fullmatch(r"#SBATCH --([a-z-]+)(=\S+)?", line)[1] for line in options] == known
    first = next(at for at, line in enumerate(lines) if not line.startswith("#"))
    assert max(map(lines.index, options)) < first  # sbatch reads none after a command
    subprocess.run(["bash", "-n", file], check=True)


def test_a_slurm_job_starts_a_run(tmp_path: Path) -> None:
    text = next(file for file in FILES if file.name == "run.sbatch").read_text()
    words = started(text, tmp_path, "smoke", "--set", 'title="a b"')
    assert words == ["run", "smoke", "--set", 'title="a b"', "--wait"]
    assert parsed(shlex.join(["rlhf-recipes", *words]))["wait"] is True


def test_a_slurm_array_starts_each_run_of_a_sweep(tmp_path: Path) -> None:
    text = next(file for file in FILES if file.name == "array.sbatch").read_text()
    sets = ["seed=1,2", 'sft.dataset={path="./smoke/pairs.jsonl"}']
    listed = [command("smoke", one, [], Path("runs"), True) for one in trials("smoke", sets)]
    (tmp_path / "runs.txt").write_text("".join(f"{typed(words)}\n" for words in listed))
    for task, words in enumerate(listed, 1):
        found = started(text, tmp_path, "runs.txt", SLURM_ARRAY_TASK_ID=str(task))
        assert found == words and parsed(typed(found))["set_"] == [f"seed={task}", sets[1]]
    with pytest.raises(subprocess.CalledProcessError):  # a task that has no line
        started(text, tmp_path, "runs.txt", SLURM_ARRAY_TASK_ID="3")


def test_a_skypilot_task_starts_a_run(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    text = next(file for file in FILES if file.name == "sky.yaml").read_text()
    task = yaml.safe_load(text)
    assert {*task} == {"name", "workdir", "resources", "envs", "setup", "run"}
    assert {*task["resources"]} == {"accelerators", "disk_size"}
    (tmp_path / "setup").write_text(task["setup"])
    subprocess.run(["bash", "-n", tmp_path / "setup"], check=True)
    (tmp_path / "setup").unlink()
    words = started(task["run"], tmp_path, RECIPE="smoke", WORDS="--set seed=3 --name s3")
    runs = str(tmp_path / "runs")
    assert words == ["run", "smoke", *"--set seed=3 --name s3".split(), "--runs", runs, "--wait"]
    assert parsed(shlex.join(["rlhf-recipes", *words]))["name"] == "s3"
    assert started(task["run"], tmp_path, **task["envs"])[:2] == ["run", "smoke"]
    # What `setup` installs with is in the clone that `workdir` sends.
    assert (Path(__file__).parents[1] / "constraints.txt").is_file()
    assert "sky launch -c rlhf recipes/launch/sky.yaml" in text
