"""The tiny recipe, and the words of its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


def byte_tokenizer(split: Any = None, ignore_merges: bool = False) -> Any:
    """A byte-level BPE as GPT-2's, with a few merges; `split` takes its pre-tokenizer's place."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [("r", "e"), ("re", "d"), ("Ġ", "red"), ("1", "2"), ("'", "s"), ("Ġ", "1")]
    words = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocabulary = {word: index for index, word in enumerate(words)}
    inner = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    inner.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=specials[:2],
        chat_template=TEMPLATE,
    )


def save_llama(folder: Path, tokenizer: Any, **settings: Any) -> Path:
    """A random two-layer Llama in float32, and its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        **settings,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Tables of kinds that RECIPE has no stage of.
OTHERS = """
[kto]
max_steps = 20
per_device_train_batch_size = 8
learning_rate = 1e-2

[rloo]
num_generations = 4
max_steps = 40
num_iterations = 2
per_device_train_batch_size = 8
generation_batch_size = 16
max_completion_length = 6
keep = "last"
learning_rate = 1e-2
gradient_checkpointing = false

[grpo]
num_generations = 4
max_steps = 40
num_iterations = 2
per_device_train_batch_size = 8
generation_batch_size = 16
max_completion_length = 6
keep = "best"
learning_rate = 1e-2
gradient_checkpointing = false
"""

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
