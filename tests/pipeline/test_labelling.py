"""`rlhf-recipes sample RUN`: more answers of a run's policies, for people to judge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_recipes.cli import app
from rlhf_recipes.errors import UsageError
from rlhf_recipes.feedback.items import item, read_items
from rlhf_recipes.pipeline.runner import run
from rlhf_recipes.recipe.load import load_recipe

pytestmark = pytest.mark.train

WORDS = ['stages=["warmup", "sft"]', "warmup.kind=sft", "warmup.max_steps=1", "evaluation=false"]


@pytest.fixture(scope="module")
def made(trained: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("made")
    run(load_recipe(trained.recipe, set=WORDS), runs=runs, name="mine")
    return runs


@pytest.fixture
def finished(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "runs") / "mine"


def sample(folder: Path, *words: Any) -> None:
    call = ["sample", folder.name, "--runs", folder.parent, "--prompts", 12, *words]
    app([str(word) for word in call], standalone_mode=False)


def test_a_runs_policies_are_asked_for_answers(finished: Path, tmp_path: Path, capsys: Any):
    out, before = tmp_path / "items.jsonl", (finished / "manifest.json").read_bytes()
    sample(finished, "--out", out)
    items = list(read_items(out))
    assert 6 < len(items) <= 12 and capsys.readouterr().out == (
        f"{len(items)} items written to {out}\n"
    )
    for one in items:
        assert one.made["stage"] == ["sft", "sft"]
        assert item(one.prompt, one.answers).id == one.id

    # The same call adds nothing; two policies against each other are other items.
    content = out.read_bytes()
    sample(finished, "--out", out)
    assert capsys.readouterr().out == f"0 items written to {out}\n"
    assert out.read_bytes() == content
    sample(finished, "--out", out, "--stage", "warmup", "--stage", "sft")
    capsys.readouterr()
    more = list(read_items(out))[len(items) :]
    assert more and all(sorted(one.made["stage"]) == ["sft", "warmup"] for one in more)
    assert len({one.id for one in (*items, *more)}) == len(items) + len(more)

    # Without a file they are printed; single answers, too.
    sample(finished, "--answers", 1)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert 6 < len(printed) <= 12 and all(len(one["answers"]) == 1 for one in printed)

    # The run is as it was, and no model was merged for what is asked.
    assert (finished / "manifest.json").read_bytes() == before
    assert not (finished.with_name("mine-asked") / "model").exists()


def test_what_cannot_be_sampled_is_refused_in_a_line(finished: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="has no policy 'ppo' .there are warmup, sft"):
        sample(finished, "--stage", "ppo")
    with pytest.raises(UsageError, match="name one or two with --stage"):
        sample(finished, *["--stage", "sft"] * 3)
    other = tmp_path / "rows.jsonl"
    other.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    with pytest.raises(UsageError, match="holds other rows than answers to be judged"):
        sample(finished, "--out", other)
    for stage in (finished.parent / ".stages").glob("sft-*"):
        if stage.is_dir():
            shutil.rmtree(stage)
    with pytest.raises(UsageError, match="warmup, sft of mine would have to run again") as gone:
        sample(finished)
    assert gone.value.hint == f"rlhf-recipes run {finished / 'resolved.toml'}"
    assert not (finished.parent / "mine-asked").exists()
