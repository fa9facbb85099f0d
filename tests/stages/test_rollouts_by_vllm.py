"""Stages whose answers come from a vLLM server: what they learn from, and when they stop."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_recipes.errors import StageError
from rlhf_recipes.models.sampling import join
from rlhf_recipes.models.vllm import Vllm
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages.answers import Setting, ask
from rlhf_recipes.stages.ppo import loop
from rlhf_recipes.stages.ppo.losses import Learned, Rollout, corrected
from rlhf_recipes.stages.ppo.trainer import PPOTrainer
from rlhf_recipes.stages.session import Session
from tests.helpers.fake_vllm import Serve, serve
from tests.helpers.roles import make_base, trained
from tests.helpers.trainers import make_trainer

__all__ = ["serve"]  # a fixture
pytestmark = pytest.mark.train


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path):
    def build(**words: Any) -> PPOTrainer:
        base = make_base(tiny_model)
        how = {
            "num_ppo_epochs": 1,
            "learning_rate": 0.1,
            "total_episodes": 16,
            "response_length": 4,
        }
        trainer = make_trainer(base, tmp_path, model=tiny_model, **how | words)
        save = partial(base.save, trainer.policy_model)
        trainer.sampler.engine = Vllm(tmp_path / "vllm", trainer.progress.note, save)
        return trainer

    return build


def trainable(trainer: PPOTrainer) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in trainer.policy_model.trainable()]


def test_each_update_samples_from_the_policy_that_the_last_one_made(serve: Serve, make) -> None:
    server, told = serve(), list[float]()
    trainer = make()
    trainer.on_update = lambda _, rollout, metrics: told.append(metrics["val/sampler_apart"])
    trainer.train()
    assert len(told) == len(server.loaded) == 2 and max(told) < 1e-5
    assert trainer.metrics["val/importance"] == 1 and trainer.metrics["val/importance_cut"] == 0


def test_an_adapter_of_an_earlier_update_stops_the_stage(serve: Serve, make) -> None:
    """A learning rate of 0.1 moves the policy by more than rounding."""
    serve(stale=True)
    trainer = make()
    with pytest.raises(StageError, match="from the trainer's on average, over 0.01: it serves"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_log_probabilities_that_are_wrong_stop_the_stage(serve: Serve, make) -> None:
    server = serve(shift=0.02)
    with pytest.raises(StageError) as error:
        make().rollout(1)
    said = f"vLLM at {server.url}: a token's log-probability is 0.02 from the trainer's on average"
    assert str(error.value).startswith(said) and "as in: vllm serve" in str(error.value)


def test_a_small_distance_is_weighted(
    serve: Serve, make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And where server and trainer agree, the weights are 1 and nothing is learned otherwise."""
    serve()
    monkeypatch.setattr(loop, "SHARE", 0.0)  # weighted at any distance
    trainer = make(total_episodes=8)
    trainer.train()
    assert 0 < trainer.metrics["val/sampler_apart"] < 1e-5
    assert trainer.metrics["val/importance"] == pytest.approx(1, abs=1e-4)
    weighted = trainable(trainer)
    monkeypatch.setattr(loop, "SHARE", 0.1)
    plain = make(total_episodes=8)
    plain.train()
    for a, b in zip(weighted, trainable(plain), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    serve(shift=0.005)
    far = make(total_episodes=8)
    far.train()
    assert far.metrics["val/importance"] == pytest.approx(0.99501, abs=1e-4)  # exp(-0.005)


@pytest.mark.parametrize("whole", [False, True])
def test_weights_are_of_tokens_or_of_whole_answers_and_are_cut(whole: bool) -> None:
    sequences = join([[5], [6]], [[1, 2], [3]], 0, torch.device("cpu"))
    mask = torch.tensor([[True, True], [True, False]])
    read, zero = torch.tensor([[-1.0, -1.0], [-1.0, -9.0]]), torch.zeros(2, 2)
    rollout = Rollout(sequences, mask, mask, read, read, zero[:, 0], mask[:, 0], zero, apart=0.5)
    sampled = torch.tensor([[-1.5, -2.0], [-0.5, -1.0]])
    learned = Learned(torch.ones(2, 2), zero)
    found = corrected(learned, rollout, sampled, 0.1, whole)
    first, last = torch.tensor(1.5).exp(), torch.tensor(-0.5).exp()
    want = [[2.0, 2.0], [last, last]] if whole else [[torch.tensor(0.5).exp(), 2.0], [last, 1.0]]
    assert first > 2 and torch.equal(found.advantage, torch.tensor(want))
    share = found.told["val/importance_cut"]
    assert share == pytest.approx(2 / 3 if whole else 1 / 3)
    near = corrected(learned, rollout, sampled, 0.5, whole)
    assert torch.equal(near.advantage, learned.advantage) and near.told["val/importance_cut"] == 0


def test_a_stage_goes_on_after_its_server_was_gone(serve: Serve, make) -> None:
    server = serve()
    trainer = make(save_strategy="steps", save_steps=1)

    def gone(_: Any, rollout: Any, metrics: Any) -> None:
        server.faults["loading"] = 99

    trainer.on_update = gone
    with pytest.raises(StageError, match="503.*the same command goes on from the last checkpoint"):
        trainer.train()
    assert trainer.state.global_step == 1
    server.faults.clear()
    again = make(save_strategy="steps", save_steps=1)
    again.train()
    assert again.state.global_step == 2 and again.metrics["val/sampler_apart"] < 1e-5


def test_an_evaluation_asks_the_server_and_reads_some_of_its_answers(
    serve: Serve, tiny_recipe: Path, tiny_model: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(tiny_recipe, set=["model.sampler=vllm"])
    session, output = Session(recipe, {}), tmp_path / "output"
    output.mkdir()
    session.base.save(trained(session.base, "policy"), output)
    examples = session.data(recipe.dataset).test[:4]
    setting = Setting(6, 0.9, 5)
    server = serve()
    [answers], [bare] = (
        [*ask(session, folder, examples, setting, [5])] for folder in (output, None)
    )
    assert len(answers) == len(bare) == 4 and answers != bare
    assert [body["model"] for body in server.bodies] == [*server.loaded * 4, *[server.base] * 4]
    assert server.names == []
    serve(stale=True).load("of another", str(other(session, tmp_path)))
    with pytest.raises(StageError, match="from the trainer's on average"):
        next(ask(session, output, examples, setting, [5]))


def other(session: Session, folder: Path) -> Path:
    """The folder of another adapter."""
    (new := folder / "other").mkdir()
    role = trained(session.base, "other", 9)
    with torch.no_grad():
        for weight in role.trainable():
            weight *= 3
    session.base.save(role, new)
    return new
