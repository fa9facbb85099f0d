"""What PPO and the stock trainers report: TRL's numbers under TRL's names, where that is asked."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_recipes.errors import RecipeError
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.screen import Screen, StageProgress
from tests.helpers.chains import Chain

pytestmark = pytest.mark.train

PPO = "objective/kl objective/entropy objective/scores objective/rlhf_reward policy/clipfrac_avg"
PPO += " loss/value_avg loss/policy_avg val/clipfrac_avg val/ended val/length lr"


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """By tag and step, what the event files of a folder hold."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert list(folder.glob("events.out.tfevents.*"))
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()["scalars"]
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in tags}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, in which a trainer might leave what nobody asked for."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    return tmp_path / "here"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own imports
def test_every_stage_reports_to_tensorboard(tiny_recipe: Path, tmp_path: Path, here: Path) -> None:
    words = [f"{stage}.report_to=tensorboard" for stage in ("sft", "reward", "ppo")]
    words += ["sft.logging_steps=1", "reward.logging_steps=2", "reward.eval_strategy=steps"]
    words += ["reward.eval_steps=3", "ppo.eval_steps=1", "ppo.logging_steps=1"]
    chain = Chain(load_recipe(tiny_recipe, set=words), tmp_path / "stages")
    results = chain.train()
    assert list(here.iterdir()) == []

    sft = scalars(tmp_path / "stages" / "sft" / "tensorboard")
    assert list(sft["train/loss"]) == [1, 2, 3, 4]
    assert "train/mean_token_accuracy" in sft and "train/grad_norm" in sft
    assert sft["eval/loss"] == {
        0: pytest.approx(results["sft"].metrics["validation_loss_before"]),
        4: pytest.approx(results["sft"].metrics["validation_loss"]),
    }
    reward = scalars(tmp_path / "stages" / "reward" / "tensorboard")
    assert list(reward["train/accuracy"]) == [2, 4, 6] and list(reward["eval/margin"]) == [3, 6]

    ppo = scalars(tmp_path / "stages" / "ppo" / "tensorboard")
    updates = [told for told in chain.progress.updates if "objective/kl" in told]
    assert len(updates) == 2
    for name in [*PPO.split(), "eval/score", "eval/kl"]:
        told = {step: numbers[name] for step, numbers in enumerate(updates, 1)}
        assert ppo[f"train/{name}"] == pytest.approx(told, rel=1e-5), name


def test_nothing_is_reported_unless_asked(
    tiny_recipe: Path,
    tmp_path: Path,
    here: Path,
    capsys: pytest.CaptureFixture[str],
    trained: SimpleNamespace,
) -> None:
    """Not even where tensorboard is installed; all of PPO's numbers are kept, three are shown."""
    chain = Chain(load_recipe(tiny_recipe), tmp_path / "stages", outputs=dict(trained.outputs))
    with Screen(tmp_path / "log.txt") as screen:
        (tmp_path / "stages" / "ppo").mkdir(parents=True)
        with StageProgress(screen, tmp_path / "stages" / "ppo") as chain.progress:
            chain.run("ppo", {"policy": "sft", "reward_model": "reward"})
    assert list(here.iterdir()) == [] and not list(tmp_path.rglob("*tfevents*"))
    lines = (tmp_path / "stages" / "ppo" / "metrics.jsonl").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert [line["step"] for line in told] == [1, 2]
    for line in told:
        assert list(line)[:4] == ["step", "score", "KL", "length"]
        assert set(PPO.split()) <= line.keys() and 0 <= line["val/ended"] <= 1
        assert line["KL"] == line["objective/kl"] and line["score"] == line["objective/scores"]
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  2/2")]
    assert len(shown) == 1
    assert shown[0].split()[1::2] == ["score", "KL", "length"] and "loss" not in shown[0]


def test_a_service_that_nobody_knows_is_refused(tiny_recipe: Path) -> None:
    with pytest.raises(RecipeError, match='"tensorbord" .did you mean "tensorboard"'):
        load_recipe(tiny_recipe, set=["ppo.report_to=tensorbord"])
    load_recipe(tiny_recipe, set=['ppo.report_to=["tensorboard"]'])


def test_reports_are_neutral_and_a_run_is_named(tiny_recipe: Path, tmp_path: Path) -> None:
    from trl import SFTConfig

    from rlhf_recipes.stages.contract import StageContext
    from rlhf_recipes.stages.training import trainer_config
    from rlhf_recipes.store.fingerprint import Identities, settings

    plain, asked = (
        load_recipe(tiny_recipe),
        load_recipe(tiny_recipe, set=["sft.report_to=tensorboard"]),
    )
    known = Identities({}, {}, {}, {})
    assert settings(plain, "sft", known) == settings(asked, "sft", known)
    context = StageContext("sft", "sft", asked, tmp_path, {}, None, None)
    config = trainer_config(SFTConfig, context)
    assert (config.report_to, config.run_name) == (["tensorboard"], "tiny-sft")
