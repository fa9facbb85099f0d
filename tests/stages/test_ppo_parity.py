"""PPO against the stock loop where that is right, and against the optimum of its objective."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from rlhf_recipes.data.tokens import settle
from rlhf_recipes.models import sampler
from rlhf_recipes.models.load import load_causal_lm, load_tokenizer
from rlhf_recipes.models.role import Role
from rlhf_recipes.models.sampling import sampling
from rlhf_recipes.recipe.kinds import Limits
from rlhf_recipes.stages.ppo.config import PPOConfig
from rlhf_recipes.stages.ppo.trainer import PPOTrainer
from tests.helpers.chains import Silent
from tests.helpers.roles import make_base
from tests.helpers.trainers import PROMPTS, TableReward, make_trainer

pytestmark = pytest.mark.train

UPDATES, BATCH, LENGTH = 5, 4, 6
NO_LIMITS = Limits(max_kl=1e9, min_entropy=0.0, min_length=0.0, max_score_drop=1e9)
# The stock loop averages these over padding too.
OVER_PADDING = {"policy/approxkl_avg", "policy/entropy_avg", "val/ratio", "val/ratio_var"}


def config(folder: Path, kind: Any = PPOConfig, **more: Any) -> Any:
    """One micro-batch a mini-batch, no clipping of gradients: where the stock loop is right."""
    return kind(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=3,
        total_episodes=UPDATES * BATCH,
        response_length=LENGTH,
        temperature=0.9,
        learning_rate=3e-3,
        kl_coef=0.1,
        missing_eos_penalty=1.0,
        max_grad_norm=0.0,
        logging_steps=1,
        num_sample_generations=0,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        **more,
    )


def load(model: Path) -> tuple[Any, Any, Any, Any]:
    """Policy, reference, reward and value, each a model of its own, all weights trainable."""
    policy = load_causal_lm(model, dtype=torch.float32).requires_grad_(True)
    torch.manual_seed(4)
    reward = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=torch.float32
    )
    nn.init.normal_(reward.score.weight)
    return policy, copy.deepcopy(policy), reward.eval(), copy.deepcopy(reward)


def generate(policy: Any, queries: torch.Tensor, update: int) -> torch.Tensor:
    """The answers of update `update`; never the pad token, which the stock loop cannot tell."""
    settings = sampling(LENGTH, 0.9, eos=2, pad=0)
    settings.suppress_tokens = [0]
    with torch.random.fork_rng():
        torch.manual_seed(update)
        mask = (queries != 0).long()
        return policy.generate(input_ids=queries, attention_mask=mask, generation_config=settings)


class Ours(PPOTrainer):
    """Our loop on the same prompts and in the same order as the stock loop is given."""

    def prompts(self, update: int) -> list[list[int]]:
        return [row["input_ids"] for row in self.train_dataset]

    def _permutation(self, size: int, *_: Any) -> torch.Tensor:
        return torch.arange(size)


def run_ours(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    policy, reference, reward, value = (Role(lm, None, torch.float32) for lm in load(model))
    for role in (reward, value):
        role.add_head(role.lm.score)
        role.lm.score = nn.Identity()  # its weights belong to the role alone
    logged: list[dict] = []
    updates = iter(range(1, UPDATES + 1))

    def answers(role: Role, prompts: list[list[int]], **_: Any) -> list[list[int]]:
        width = max(map(len, prompts))
        queries = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
        rows = generate(role.lm, queries, next(updates))[:, width:].tolist()
        return [row[: row.index(2) + 1] if 2 in row else row for row in rows]

    monkeypatch.setattr(sampler, "sample", answers)
    trainer = Ours(
        args=config(folder),
        processing_class=settle(load_tokenizer(model), 32).tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=PROMPTS[:BATCH],
        limits=NO_LIMITS,
        on_update=lambda _, __, metrics: logged.append(metrics),
        key="the stage's",
        progress=Silent(),
    )
    trainer.train()
    return logged


def run_stock(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    from trl.experimental.ppo import ppo_trainer as stock

    policy, reference, reward, value = load(model)
    tokenizer = settle(load_tokenizer(model), 32).tokenizer
    updates = iter(range(1, UPDATES + 1))

    def batch_generation(lm: Any, queries: torch.Tensor, *_: Any) -> tuple:
        rows = generate(lm, queries, next(updates))
        rows = nn.functional.pad(rows, (0, queries.shape[1] + LENGTH - rows.shape[1]))
        logits = stock.forward(lm, rows, 0).logits[:, queries.shape[1] - 1 : -1]
        return rows, logits / (0.9 + 1e-7)

    monkeypatch.setattr(stock, "batch_generation", batch_generation)
    monkeypatch.setattr(np.random, "permutation", np.arange)
    trainer = PPOTrainer(
        args=config(folder, PPOConfig, stop_token="eos"),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=PROMPTS[:BATCH],
    )
    trainer.dataloader = [trainer.data_collator(PROMPTS[:BATCH])]  # in order
    trainer.train()
    return [entry for entry in trainer.state.log_history if "objective/kl" in entry]


@pytest.mark.skipif(find_spec("trl.experimental.ppo") is None, reason="TRL 1.13 removed PPO")
def test_five_updates_give_the_stock_metrics(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged prompts, answers that end and that do not, three epochs, KL, penalty, both clips."""
    mine = run_ours(tiny_model, tmp_path / "ours", monkeypatch)
    theirs = run_stock(tiny_model, tmp_path / "stock", monkeypatch)
    shared = set(mine[0]) & set(theirs[0]) - OVER_PADDING - {"eps"}
    assert len(shared) == 12 and len(mine) == len(theirs) == UPDATES
    for one, other in zip(mine, theirs, strict=True):
        for name in shared:
            assert one[name] == pytest.approx(other[name], abs=1e-4), name
    assert mine[-1]["objective/kl"] > 0.05 and mine[-1]["val/clipfrac_avg"] > 0
    assert 0 < sum(entry["val/num_eos_tokens"] for entry in mine) < UPDATES * BATCH


def test_a_one_token_bandit_converges_to_its_optimum(tiny_model: Path, tmp_path: Path) -> None:
    """max E[r] − β KL(p ‖ p₀) has the optimum p₀ · exp(r/β) / Z: PPO finds it."""
    beta, prompt = 0.5, [1, 4, 7, 5]
    trainer = make_trainer(
        make_base(tiny_model),
        tmp_path,
        model=tiny_model,
        prompts=[{"input_ids": prompt}],
        words={"limits": NO_LIMITS},
        response_length=1,
        per_device_train_batch_size=128,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
        num_ppo_epochs=2,
        total_episodes=128 * 45,
        learning_rate=1e-2,
        kl_coef=beta,
        local_rollout_forward_batch_size=128,
        missing_eos_penalty=None,
    )
    reward = torch.linspace(-1, 1, 32).roll(9)
    trainer.reward_model = TableReward(reward)

    def distribution(role: Role) -> torch.Tensor:
        with role.active(), torch.no_grad():
            return role.lm(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)

    start = distribution(trainer.ref_model)
    best = start * (reward / beta).exp()
    best /= best.sum()
    trainer.train()
    found = distribution(trainer.policy_model)
    # What is lost of the objective is β KL(found ‖ best); a policy that ignored the KL would sit on
    # the best token, at −log best there.
    far, near, greedy = kl(start, best), kl(found, best), -best.max().log().item()
    assert near < 0.08 < 0.6 < min(far, greedy), (far, near, greedy)


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return (p * (p / q).log()).sum().item()
