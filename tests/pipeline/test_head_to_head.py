"""Two runs' policies against each other, before the first run's judge."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

from rlhf_recipes.pipeline.runner import run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages import answers
from tests.helpers.runs import call, stages_of

pytestmark = pytest.mark.train

SHORT = ["sft.max_steps=2", "reward.max_steps=2", 'stages=["sft", "dpo"]', "dpo.max_steps=2"]
SHORT += ['evaluation.judge="independent"']


@pytest.fixture(autouse=True)
def quick(stages_alone: None) -> None: ...


def judged(folder: Path) -> list[float]:
    file = stages_of(folder)["evaluation"] / "output" / "answers.jsonl"
    return [json.loads(line)["judged"]["dpo"] for line in file.read_text().splitlines()]


def test_the_answers_that_both_evaluations_kept_meet_before_the_first_s_judge(
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    runs = tmp_path / "runs"
    for name, rate in (("one", "1e-2"), ("two", "5e-2")):
        words = [*SHORT, f"dpo.learning_rate={rate}"]
        run(load_recipe(tiny_recipe, set=words), runs=runs, name=name, rehearse=False)
    record = json.loads((stages_of(runs / "one")["evaluation"] / "stage.json").read_text())
    assert record["summary"].startswith("dpo over sft: win rate by the judge ")
    monkeypatch.setattr(answers, "Sampler", None)  # nothing is left to ask
    words = ("compare", "one", "two", "--head-to-head", "--runs", str(runs))
    out, _ = call(monkeypatch, capfd, *words)
    pairs = zip(judged(runs / "one"), judged(runs / "two"), strict=True)
    share = fmean((a > b) + 0.5 * (a == b) for a, b in pairs)
    assert out[0].startswith(
        f"dpo of one wins against dpo of two on {100 * share:.0f} % of 12 prompts ("
    )
    assert out[0].endswith(") by a second reward model on the same base")
    assert out[1].startswith("asked alike: temperature 0.7, at most ")
    said = json.loads("\n".join(call(monkeypatch, capfd, *words, "--json")[0]))
    assert said["policies"] == ["dpo of one", "dpo of two"]
    [(_, told)] = said["win_rates"].items()
    assert (told["value"], told["count"]) == (share, 12)

    _, (error,) = call(monkeypatch, capfd, *words, "--page", "x.html", code=2)
    assert error == "--head-to-head takes two runs and no --page (leave out the rest)"
    file = runs / "two" / "resolved.toml"
    pairs_file = tmp_path / "other.jsonl"
    rows = [{"prompt": f"new {n}", "chosen": "a", "rejected": "b"} for n in range(80)]
    pairs_file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(file)
    file.write_text(file.read_text().replace(str(recipe.dataset.file), str(pairs_file)))
    _, errors = call(monkeypatch, capfd, *words, code=2)
    assert errors[-1].startswith("the runs have no test prompt in common (the same [dataset]")
    file = runs / "one" / "resolved.toml"
    file.write_text(file.read_text().replace('judge = "independent"', 'judge = "none"'))
    _, errors = call(monkeypatch, capfd, "compare", "one", "one", *words[3:], code=2)
    assert errors[-1].endswith("one has nobody who judges (name a run with a judge first)")
