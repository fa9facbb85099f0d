"""The real command on a tiny model: what it prints, leaves on disk, and does the second time."""

from __future__ import annotations

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf_recipes.pipeline.runner import run
from rlhf_recipes.recipe.load import load_recipe
from tests.helpers.runs import call
from tests.helpers.tiny import RECIPE
from tests.helpers.whole import command, digests

pytestmark = pytest.mark.train

# Golden: what programs read. These do not change without need.
RESULTS = """
evaluation.prompts
base.ended base.length base.score
sft.ended sft.kl sft.length sft.rows sft.rows_dropped sft.score sft.score_gain sft.steps
sft.train_loss sft.unchanged sft.validation_loss sft.validation_loss_before sft.win_rate
reward.accuracy reward.length_accuracy reward.margin reward.pairs reward.steps reward.test_pairs
reward.train_loss reward.unit_mean reward.unit_std reward.unit_floor reward.validation_accuracy
reward.validation_margin
reward.accuracy_high reward.accuracy_low reward.calibration_error reward.shorter_accuracy
reward.shorter_pairs ppo.minimum_accuracy
ppo.ended ppo.episodes ppo.kl ppo.length ppo.score ppo.score_gain ppo.stopped
ppo.train_kl ppo.train_length ppo.train_score ppo.train_score_first ppo.unchanged ppo.updates
ppo.win_rate
base.distinct_2 base.nats_under_base base.repetition sft.distinct_2 sft.nats_under_base
sft.repetition ppo.distinct_2 ppo.nats_under_base ppo.repetition
sft.win_rate_low sft.win_rate_high sft.score_gain_low sft.score_gain_high
ppo.win_rate_low ppo.win_rate_high ppo.score_gain_low ppo.score_gain_high
sft.ended_pairs sft.win_rate_ended sft.like_length_pairs sft.win_rate_like_length
ppo.ended_pairs ppo.win_rate_ended ppo.like_length_pairs ppo.win_rate_like_length
ppo.win_rate_over_base ppo.win_rate_over_base_low ppo.win_rate_over_base_high
""".split()
STAGE_FILES = {
    "sft": ["adapter_config.json", "adapter_model.safetensors"],
    "reward": [
        *("adapter_config.json", "adapter_model.safetensors", "evidence.json"),
        *("head.safetensors", "unit.json"),
    ],
    "ppo": ["adapter_config.json", "adapter_model.safetensors", "value"],
    "evaluation": ["answers.jsonl"],
}


@pytest.fixture(scope="module")
def finished(tiny_model: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the tiny recipe has run, once for all tests."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.toml").write_text(RECIPE.format(model=tiny_model, data=tiny_pairs))
    first = command("run", "tiny.toml", cwd=folder)
    assert first.returncode == 0, first.stderr
    return folder


@pytest.fixture
def done(finished: Path, tiny_recipe: Path, tmp_path: Path) -> Path:
    """A copy of it, beside a recipe that is a test's own."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    return tmp_path


def test_a_run_leaves_what_it_promises(done: Path) -> None:
    run = done / "runs" / "tiny"
    assert sorted(p.name for p in run.iterdir() if not p.name.startswith(".")) == [
        "log.txt",
        "manifest.json",
        "model",
        "recipe.toml",
        "report.html",
        "resolved.toml",
        "results.json",
    ]
    results = json.loads((run / "results.json").read_text())
    assert results.pop("format") == 1
    assert sorted(results) == sorted(RESULTS)
    for entry in json.loads((run / "manifest.json").read_text())["stages"]:
        folder = run.parent / entry["folder"]
        assert re.fullmatch(rf"{entry['kind']}-[0-9a-f]{{12}}", folder.name)
        assert sorted(p.name for p in (folder / "output").iterdir()) == STAGE_FILES[entry["kind"]]


def test_the_second_run_computes_nothing_in_seconds(done: Path, tiny_recipe: Path) -> None:
    before = digests(done / "runs")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    again = command("run", tiny_recipe, cwd=done)
    # Of work: how long that takes depends on who else works on this machine.
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime < 5
    assert again.returncode == 0
    assert again.stderr.count("— cached (") == 4
    assert digests(done / "runs") == before


def test_a_fork_of_ppo_redoes_ppo_and_evaluation_and_says_why(
    done: Path,
    tiny_recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(done)
    call(monkeypatch, capfd, "fork", str(tiny_recipe), "mine.toml")
    said = call(monkeypatch, capfd, "run", "mine.toml", "--set", "ppo.kl_coef=0.2")[1]
    headings = [line for line in said if line.startswith("Stage ")]
    assert [line.partition(" — ")[2].partition(" (")[0] for line in headings] == [
        "cached",
        "cached",
        "kl_coef 0.05 → 0.2",
        "input ppo changed",
    ]


def test_two_runs_from_nothing_give_the_same_bytes(done: Path, tiny_recipe: Path) -> None:
    """One in a process of its own, and one in this."""
    run(load_recipe(tiny_recipe), runs=done / "elsewhere")
    first, second = digests(done / "runs"), digests(done / "elsewhere")
    assert len(first) == 7 and first == second
    assert (done / "runs/tiny/results.json").read_bytes() == (
        done / "elsewhere/tiny/results.json"
    ).read_bytes()


def test_the_model_folder_is_the_policy_and_stops_at_its_eos(done: Path) -> None:
    """Merged by transformers alone, it gives the adapter's logits and carries EOS and pad."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = done / "runs" / "tiny"
    merged = AutoModelForCausalLM.from_pretrained(run / "model")
    manifest = json.loads((run / "manifest.json").read_text())
    output = run.parent / manifest["stages"][2]["folder"] / "output"
    base = re.search(r'name = "(.*)"', (run / "recipe.toml").read_text())[1]
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output)
    ids = torch.tensor([[1, 4, 7, 2, 1, 5]])
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, policy(ids).logits, atol=1e-4)
    assert merged.generation_config.eos_token_id == 2
    assert merged.generation_config.pad_token_id == 0
    assert AutoTokenizer.from_pretrained(run / "model").eos_token == "<|im_end|>"


def test_export(
    done: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(done)
    words = ["export", "tiny", "out", "--stage", "reward", "--form", "adapter"]
    assert call(monkeypatch, capfd, *words)[1] == []
    assert set(load_file(done / "out" / "head.safetensors")) == {"score.weight"}
    again = call(monkeypatch, capfd, "export", "tiny", "out", code=2)[1]
    assert again == ["out is not empty (name a new folder)"]


def test_five_mistakes_are_five_lines(
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    text = tiny_recipe.read_text()
    for old, new in [
        ('dtype = "float32"', 'dtype = "float31"'),
        ("learning_rate = 1e-2", "learning_rat = 1e-2"),
        ("num_mini_batches = 2", "num_mini_batches = 3"),
        ("r = 4", 'r = "4"'),
        ("total_episodes = 32", 'output_dir = "x"'),
    ]:
        text = text.replace(old, new, 1)
    (tmp_path / "bad.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    lines, complaints = call(monkeypatch, capfd, "check", "bad.toml", code=2)
    assert complaints == []
    assert [line.split(": ")[:2] for line in lines] == [
        ["bad.toml:7", "model.dtype"],
        ["bad.toml:10", "lora.r"],
        ["bad.toml:24", "sft.learning_rat"],
        ["bad.toml:34", "ppo.output_dir"],
        ["bad.toml:38", "ppo.num_mini_batches"],
    ]
    assert 'did you mean "learning_rate"?' in lines[2]
