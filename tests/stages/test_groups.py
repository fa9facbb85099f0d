"""RLOO and GRPO: the same step as TRL's, what moves, and groups that stay whole."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from torch import nn

from rlhf_recipes.data.tokens import settle
from rlhf_recipes.models import sampler
from rlhf_recipes.models.load import load_causal_lm, load_tokenizer
from rlhf_recipes.models.role import Role
from rlhf_recipes.recipe.kinds import Limits
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages import groups
from rlhf_recipes.stages.grpo import GRPOTrainer
from rlhf_recipes.stages.ppo.config import PPOConfig
from rlhf_recipes.stages.rloo import RLOOTrainer
from tests.helpers.chains import Chain, Silent, adapter, base_weights, differs
from tests.helpers.tiny import OTHERS, RECIPE
from tests.helpers.trainers import PROMPTS, TableReward

pytestmark = pytest.mark.train

GROUP, LENGTH = 4, 6
FREE = Limits(max_kl=1e9, min_entropy=0.0, min_length=0.0, max_score_drop=1e9)
SHARED = {
    "per_device_train_batch_size": 4 * GROUP,
    "gradient_accumulation_steps": 1,
    "temperature": 0.9,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
}
TABLE = torch.linspace(-1, 1, 32).roll(9)  # what an answer is worth, by its last token


def given(prompts: list[list[int]], update: int) -> list[list[int]]:
    """An answer to each prompt, of its own length, another to each copy of it."""
    seen: dict[tuple[int, ...], int] = {}
    answers = []
    for prompt in prompts:
        copies = seen[tuple(prompt)] = seen.get(tuple(prompt), 0) + 1
        generator = torch.Generator().manual_seed(sum(prompt) * 1000 + copies * 10 + update)
        length = int(torch.randint(1, LENGTH + 1, (1,), generator=generator))
        answers.append(torch.randint(4, 32, (length,), generator=generator).tolist())
    return answers


def stock(kind: str, model: Path, folder: Path, passes: int, **words: Any) -> nn.Module:
    """TRL's trainer after two generations of the answers above."""
    Stock = getattr(trl, f"{kind.upper()}Trainer")

    class Trainer(Stock):  # type: ignore[valid-type, misc]
        generations = 0

        def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[Any, None, dict]:
            return prompts, None, {}

        def _generate_single_turn(self, prompts: list[list[int]], *_: Any) -> Any:
            self.generations += 1
            answers = given(prompts, self.generations)
            return answers if kind == "rloo" else (answers, None)

    config = getattr(trl, f"{kind.upper()}Config")
    lm = load_causal_lm(model, dtype=torch.float32).requires_grad_(True)
    trainer = Trainer(
        model=lm,
        args=config(
            **SHARED,
            output_dir=str(folder),
            num_generations=GROUP,
            num_iterations=passes,
            max_completion_length=LENGTH,
            max_steps=2 * passes,
            disable_dropout=True,
            **words,
        ),
        processing_class=settle(load_tokenizer(model), 32).tokenizer,
        train_dataset=Dataset.from_list([{"prompt": row["input_ids"]} for row in PROMPTS[:4]]),
        reward_funcs=lambda completion_ids, **_: [float(TABLE[ids[-1]]) for ids in completion_ids],
    )
    trainer.train()
    return lm


def ours(
    trainer: type[groups.GroupTrainer],
    model: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    passes: int,
    own: dict[str, Any],
) -> nn.Module:
    lm = load_causal_lm(model, dtype=torch.float32).requires_grad_(True)
    roles = [Role(one, None, torch.float32) for one in (lm, copy.deepcopy(lm))]
    updates = iter((1, 2))
    monkeypatch.setattr(sampler, "sample", lambda _, prompts, **__: given(prompts, next(updates)))
    made = trainer(
        args=PPOConfig(
            **SHARED,
            output_dir=str(folder),
            num_ppo_epochs=passes,
            response_length=LENGTH,
            kl_coef=own["beta"],
            total_episodes=2 * 4 * GROUP,
        ),
        processing_class=settle(load_tokenizer(model), 32).tokenizer,
        model=roles[0],
        ref_model=roles[1],
        reward_model=TableReward(TABLE),
        train_dataset=PROMPTS[:4],
        limits=FREE,
        key="the stage's",
        progress=Silent(),
        copies=GROUP,
        own={"epsilon": 0.2, "epsilon_high": None, **own},
    )
    made.train()
    return lm


GRPO = {
    "beta": 0.04,
    "loss_type": "dapo",
    "scale_rewards": "group",
    "importance_sampling_level": "token",
    "use_bias_correction_kl": True,
}
CASES = {
    "rloo": (RLOOTrainer, {"beta": 0.05, "normalize_advantages": False}, 3),
    "rloo normalised": (RLOOTrainer, {"beta": 0.05, "normalize_advantages": True}, 1),
    "grpo": (GRPOTrainer, GRPO, 3),
    "grpo by answer": (GRPOTrainer, GRPO | {"loss_type": "grpo", "scale_rewards": "batch"}, 2),
    "dr_grpo": (GRPOTrainer, GRPO | {"loss_type": "dr_grpo", "scale_rewards": "none"}, 2),
    "gspo": (
        GRPOTrainer,
        GRPO | {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_high": 0.3},
        3,
    ),
    "free": (GRPOTrainer, GRPO | {"beta": 0.0, "use_bias_correction_kl": False}, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_two_updates_on_the_same_answers_end_with_the_weights_of_stock(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    trainer, words, passes = CASES[case]
    mine = ours(trainer, tiny_model, tmp_path / "ours", monkeypatch, passes, words)
    kind = "rloo" if trainer is RLOOTrainer else "grpo"
    theirs = stock(kind, tiny_model, tmp_path / "stock", passes, **words)
    start = dict(load_causal_lm(tiny_model, dtype=torch.float32).named_parameters())
    moved = 0.0
    for (name, one), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        moved = max(moved, (one - start[name]).abs().max().item())
        assert (one - other).abs().max() < 1e-5, name
    assert moved > 1e-3


# ---- the stage on a tiny chain


@pytest.fixture(scope="module")
def start(tiny_model: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """SFT and a reward model, for all kinds to start from."""
    folder = tmp_path_factory.mktemp("start")
    file = folder / "tiny.toml"
    file.write_text(RECIPE.format(model=tiny_model, data=tiny_pairs) + OTHERS)
    words = ['stages=["sft","reward","rloo","grpo"]', "sft.max_steps=8", "reward.max_steps=20"]
    chain = Chain(load_recipe(file, set=words), folder / "stages")
    chain.run("sft", {})
    chain.run("reward", {"policy": "sft"})
    return chain


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_it_learns_from_a_reward_model_and_moves_its_own_adapter_alone(
    start: Chain, tmp_path: Path, kind: str
) -> None:
    chain = Chain(start.recipe, tmp_path, outputs=dict(start.outputs))
    base = base_weights(chain.session.base)
    metrics = chain.run(kind, {"policy": "sft", "reward_model": "reward"}).metrics
    assert not differs(base, base_weights(chain.session.base))
    output = chain.outputs[kind]
    assert len(differs(adapter(chain.outputs["sft"]), adapter(output))) == 28
    assert not (output / "value").exists()
    first, *_, last = chain.progress.updates
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5) and last["objective/kl"] > 0.05
    assert metrics["updates"] == 10 and metrics["episodes"] == 160
    assert metrics["train_score"] > metrics["train_score_first"] + 0.2
    assert [n for n, _ in chain.session.base.lm.named_parameters() if "lora_" in n] == []


@pytest.mark.parametrize("update", [1, 3])
def test_a_group_is_whole_and_every_prompt_has_its_turn(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int
) -> None:
    seen = RLOOTrainer.prompts(
        SimpleNamespace(
            train_dataset=PROMPTS,
            batch_size=12,
            copies=4,
            _permutation=lambda size, *_: torch.arange(size),
        ),
        update,
    )
    order = [PROMPTS[i % 5]["input_ids"] for i in range(3 * (update - 1), 3 * update)]
    assert seen == [prompt for prompt in order for _ in range(4)]


@pytest.mark.parametrize(
    ("words", "answers", "minis", "episodes"),
    [
        ({}, 32, 1, None),
        ({"generation_batch_size": 128}, 128, 4, None),
        ({"generation_batch_size": 128, "max_steps": 10}, 128, 4, 384),
        ({"num_iterations": 2, "max_steps": 10}, 32, 1, 160),
    ],
)
def test_stock_s_sizes_in_the_loop_s_words(
    tmp_path: Path, words: dict[str, int], answers: int, minis: int, episodes: int | None
) -> None:
    file = tmp_path / "sizes.toml"
    file.write_text(
        'stages = ["rloo"]\nmodel.name = "a/b"\ndataset.path = "a/b"\nrloo.reward_model = "a/b"'
    )
    words = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4} | words
    table = load_recipe(file, set=[f"rloo.{key}={value}" for key, value in words.items()]).table(
        "rloo"
    )
    found = groups._options(table)
    assert found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] == answers
    assert (found["num_mini_batches"], found["total_episodes"]) == (minis, episodes)
    assert found["response_length"] == 512 and found["kl_coef"] == 0.05
    less = groups._one_update(table)
    assert less["generation_batch_size"] % table.options["num_generations"] == 0
    assert less["generation_batch_size"] <= answers
