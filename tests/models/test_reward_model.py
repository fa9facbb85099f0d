"""Reward models from elsewhere: who may score, and who is refused before anything is trained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from rlhf_recipes.data.tokens import Tokens, settle
from rlhf_recipes.errors import ModelError
from rlhf_recipes.models.base import UNIT
from rlhf_recipes.models.reward_model import check_foreign, open_foreign, read_floor
from rlhf_recipes.models.sampling import score_ids
from rlhf_recipes.pipeline.data_lint import data_lint
from rlhf_recipes.pipeline.plan import plan_run
from rlhf_recipes.pipeline.runner import run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages.session import Session
from tests.helpers.architectures import COMMON, GPT, VOCABULARY, byte_tokenizer
from tests.helpers.roles import make_base

pytestmark = pytest.mark.train

ROWS = [([1, 2, 3], [4, 256]), ([5], [6, 7, 8, 256])]


@pytest.fixture
def tokens() -> Tokens:
    return settle(byte_tokenizer(), VOCABULARY)


def classifier(
    folder: Path, kind: str, labels: int = 1, rows: int = VOCABULARY, **pad: str
) -> Path:
    """A random sequence classifier, and its tokenizer."""
    config = AutoConfig.for_model(kind, **COMMON | GPT | {"vocab_size": rows}, num_labels=labels)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    byte_tokenizer(**pad).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rows", [VOCABULARY, VOCABULARY + 1], ids=["as it was", "resized"])
def test_a_pad_token_that_a_script_added_leaves_the_tokenizer_the_same(
    tiny_model: Path, tokens: Tokens, tmp_path: Path, rows: int
) -> None:
    """As TRL's own scripts add it: in no row, for the policy's tokenizer has none such."""
    folder = classifier(tmp_path / "reward", "gpt2", rows=rows, pad_token="[PAD]")
    reward = open_foreign(folder, make_base(tiny_model), tokens)
    found = score_ids(reward, ROWS, tokens.pad_id, 2)
    alone = [score_ids(reward, [row], tokens.pad_id, 1).item() for row in ROWS]
    assert found.tolist() == pytest.approx(alone, abs=1e-5) and found[0] != found[1]


def test_a_pad_token_of_the_policy_alone_is_another_tokenizer(tmp_path: Path) -> None:
    """The policy may sample it, and the reward model has no row for it: it reads the text."""
    folder = classifier(tmp_path / "reward", "gpt2")
    resized = settle(byte_tokenizer(pad_token="[PAD]"), VOCABULARY + 1)
    assert not check_foreign(folder, resized)
    assert check_foreign(folder, settle(byte_tokenizer(pad_token="[PAD]"), VOCABULARY))


def test_who_cannot_score_is_refused_by_plan_and_before_the_first_stage(
    tiny_model: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    folder = classifier(tmp_path / "bert", "bert", labels=2, rows=32)
    shutil.copytree(
        tiny_model,
        folder,
        ignore=lambda *_: ["config.json", "model.safetensors"],
        dirs_exist_ok=True,
    )
    words = ['stages=["sft", "ppo"]', f"ppo.reward_model={folder}"]
    recipe, runs = load_recipe(tiny_recipe, set=words), tmp_path / "runs"
    plan = plan_run(recipe, runs)
    [finding] = data_lint(plan, Session(recipe, plan.model))
    assert (finding.level, finding.about) == ("fault", "model")
    assert "gives 2 numbers an answer, not one" in finding.text
    with pytest.raises(ModelError, match="gives 2 numbers an answer"):
        run(recipe, runs=runs)
    assert list((runs / ".stages").glob("sft-*")) == []


def test_a_floor_that_no_row_gave_is_none(tmp_path: Path) -> None:
    (tmp_path / UNIT).write_text('{"mean": 1.0, "std": 2.0, "floor": null}')
    assert read_floor(tmp_path) == float("inf")
