"""PPO goes on from a checkpoint and ends as a run that was never cut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf_recipes import checkpoints
from rlhf_recipes.guards import Limits
from rlhf_recipes.ppo_trainer import PPOTrainer
from tests.test_adapters import make_base
from tests.test_ppo_trainer import make_trainer

CLOCK = {"eps"}


class Killed(Exception):
    pass


def build(model: Path, folder: Path, *, killed_after: int = 0, **config) -> PPOTrainer:
    seen: list[dict] = []

    def on_update(trainer: PPOTrainer, _, metrics: dict[str, float]) -> None:
        seen.append({k: v for k, v in metrics.items() if k not in CLOCK})
        if killed_after and len(seen) > killed_after:
            raise Killed

    words = {
        "keep": "best",
        "validation_prompts": [[1, 4, 15, 5]],
        "value_warmup_epochs": 1,
        "limits": Limits(max_score_drop=1e9),
        "on_update": on_update,
    }
    settings = {
        "total_episodes": 40,
        "save_strategy": "steps",
        "save_steps": 2,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "lr_scheduler_type": "cosine",
        **config,
    }
    folder.mkdir(exist_ok=True)
    trainer = make_trainer(make_base(model), folder, model=model, words=words, **settings)
    trainer.seen = seen
    return trainer


def weights(trainer: PPOTrainer) -> list[torch.Tensor]:
    return [*trainer.policy_model.trainable(), *trainer.value_model.trainable()]


@pytest.mark.parametrize("killed_after", [2, 3, 4])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    tiny_model: Path, tmp_path: Path, killed_after: int
) -> None:
    whole = build(tiny_model, tmp_path / "whole")
    whole.train()
    cut = build(tiny_model, tmp_path / "cut", killed_after=killed_after)
    with pytest.raises(Killed):
        cut.train()
    again = build(tiny_model, tmp_path / "cut")
    again.train()
    first = 2 * (killed_after // 2)
    assert again.seen == whole.seen[first:]
    assert again.best.update == whole.best.update
    for one, other in zip(weights(again), weights(whole), strict=True):
        assert torch.equal(one, other)
    states = [list(t.optimizer.state_dict()["state"].values()) for t in (again, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({}, [2, 4]),
        ({"save_steps": 1, "save_total_limit": 3}, [3, 4, 5]),
        ({"save_steps": 0.4}, [2, 4]),
        ({"save_total_limit": None, "save_steps": 1}, [1, 2, 3, 4, 5]),
        ({"save_strategy": "no"}, []),
    ],
)
def test_what_is_saved_and_kept(tiny_model: Path, tmp_path: Path, config, kept) -> None:
    build(tiny_model, tmp_path, **config).train()
    assert sorted(f.name for f in tmp_path.glob("checkpoint*")) == [
        f"checkpoint-{update:06d}.pt" for update in kept
    ]


def test_a_run_that_a_guard_stopped_does_not_go_on(tiny_model: Path, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path, save_steps=1)
    trainer.guard.limits = Limits(max_kl=1e-9)
    trainer.train()
    assert trainer.stopped
    again = build(tiny_model, tmp_path)
    again.train()
    assert again.stopped == trainer.stopped and again.seen == []


@pytest.mark.parametrize("cut", [0, 100, 700])
def test_a_damaged_checkpoint_leaves_the_one_before(tmp_path: Path, cut: int) -> None:
    cpu = torch.device("cpu")
    for step in (3, 4):
        state = {"start": "a", "step": step, "weights": torch.ones(50)}
        checkpoints.save(tmp_path, step, state, keep=None)
    assert checkpoints.newest(tmp_path, "a", cpu)["step"] == 4
    last = tmp_path / "checkpoint-000004.pt"
    last.write_bytes(last.read_bytes()[:cut])
    assert checkpoints.newest(tmp_path, "a", cpu)["step"] == 3
    assert not last.exists()
    assert checkpoints.newest(tmp_path / "none", "a", cpu) is None


def test_a_checkpoint_of_a_run_from_other_weights_is_not_gone_on_from(
    tiny_model: Path, tmp_path: Path
) -> None:
    build(tiny_model, tmp_path).train()
    other = build(tiny_model, tmp_path, killed_after=2)
    other.start = "other"
    with pytest.raises(Killed):
        other.train()
    assert len(other.seen) == 3
    assert [f.name for f in tmp_path.glob("checkpoint*")] == ["checkpoint-000002.pt"]
