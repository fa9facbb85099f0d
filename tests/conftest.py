"""A tiny model with a chat template, and rows to train it on. The network is off."""

from __future__ import annotations

import json
import os
import pickle
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.canary import Canary

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=tempfile.mkdtemp(prefix="rlhf-recipes-tests-"),
    HF_HUB_DISABLE_TELEMETRY="1",
    TRL_EXPERIMENTAL_SILENCE="1",
    RLHF_RECIPES_ALLOW_CODE="1",  # of the judges that tests write
    RLHF_RECIPES_RUNS="",
    COLUMNS="200",
    OMP_NUM_THREADS="1",  # these models are too small to share out; it also fixes every sum's order
)
# A job in a script's background ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WORDS = "red green blue grey black white pink gold cat dog owl fox hen cow pig bat".split()


def word_tokenizer() -> Any:
    """Of WORDS and the words of a chat."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    words = [*specials, "user", "assistant", "system", *WORDS]
    vocabulary = {word: index for index, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=specials[:3],
        chat_template=TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: a random two-layer Llama, float32, and a word tokenizer with a ChatML template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=2,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("tiny-model")
    LlamaForCausalLM(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 pairs: to two words, people prefer three colours to three animals, in any order."""
    import random

    draw = random.Random(0)
    rows = []
    for first in WORDS:
        for second in WORDS[:6]:
            row = {"prompt": f"{first} {second}"}
            row["chosen"] = " ".join(draw.sample(WORDS[:8], draw.choice([2, 3])))
            row["rejected"] = " ".join(draw.sample(WORDS[8:], draw.choice([2, 3])))
            rows.append(row)
    file = tmp_path_factory.mktemp("tiny-data") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


RECIPE = """\
title = "Tiny"
stages = ["sft", "reward", "ppo"]
seed = 7

[model]
name = "{model}"
dtype = "float32"

[lora]
r = 4
lora_alpha = 8

[dataset]
path = "{data}"
max_prompt_tokens = 16
max_answer_tokens = 8
validation_fraction = 0.15
test_fraction = 0.2
judge_fraction = 0.2

[sft]
max_steps = 4
per_device_train_batch_size = 8
learning_rate = 1e-2
gradient_checkpointing = false

[reward]
max_steps = 6
per_device_train_batch_size = 8
learning_rate = 1e-2
gradient_checkpointing = false

[ppo]
total_episodes = 32
response_length = 6
per_device_train_batch_size = 8
gradient_accumulation_steps = 2
num_mini_batches = 2
num_ppo_epochs = 2
keep = "last"
temperature = 1.0
learning_rate = 1e-2
gradient_checkpointing = false

[evaluation]
prompts = 12
"""


@pytest.fixture
def tiny_recipe(tiny_model: Path, tiny_pairs: Path, tmp_path: Path) -> Path:
    """A recipe file for the whole chain on the tiny model: seconds."""
    file = tmp_path / "tiny.toml"
    file.write_text(RECIPE.format(model=tiny_model, data=tiny_pairs))
    return file


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    """Must stay away all the test long; that its payloads would work is tried first."""
    canary = Canary(tmp_path / "canary")
    for payload in (lambda: pickle.loads(canary.pickled), lambda: exec(canary.code)):
        payload()
        canary.file.rmdir()
    yield canary
    assert not canary.touched


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The cases that `make torture` tried, and those that passed: what tests record as "cases"."""
    if terminalreporter.config.option.markexpr != "torture":
        return
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in report.user_properties:
                if name == "cases" and report.when == "call":
                    terminalreporter.write_line(f"{value:>14}  {report.nodeid}")
