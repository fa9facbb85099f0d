"""Models of random weights, and recipes that name them, for `benchmarks.gpu_items`."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT

SHAPES = {
    "0.5b": dict(hidden=896, inner=4864, layers=24, heads=14, kv=2, words=151936, tied=True),
    "1.5b": dict(hidden=1536, inner=8960, layers=28, heads=12, kv=2, words=151936, tied=True),
    "8b": dict(hidden=4096, inner=14336, layers=32, heads=32, kv=8, words=128256, tied=False),
}


def made_model(work: Path, size: str, quick: bool) -> Path:
    """A folder with a model of this shape in bfloat16, made once; quick: the smoke model."""
    if quick:
        return ROOT / "recipes" / "smoke" / "model"
    folder = work / f"model-{size}"
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = SHAPES[size]
    # Llama's code for all: AutoTokenizer puts a tokenizer of its own on a "qwen2" model.
    config = LlamaConfig(
        vocab_size=shape["words"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
        max_position_embeddings=8192,
        tie_word_embeddings=shape["tied"],
        eos_token_id=2,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModelForCausalLM.from_config(config)
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="4GB")
    _tokenizer(shape["words"]).save_pretrained(folder)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return folder


def _tokenizer(count: int) -> Any:
    """Of so many words, w0, w1 and so on, with a ChatML template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<|im_start|>", "<|im_end|>", "<unk>", "user", "assistant", "system"]
    words = [*special, *(f"w{i}" for i in range(count - len(special)))]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    turn = "<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> "
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        additional_special_tokens=special[1:3],
        chat_template="{% for m in messages %}"
        + turn
        + "{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}",
    )


def _rows(file: Path, prompt: int, quick: bool) -> Path:
    import random

    draw = random.Random(0)
    words = "red green blue cat dog owl".split() if quick else [f"w{i}" for i in range(5000)]
    rows = [{"prompt": " ".join(draw.choices(words, k=prompt))} for _ in range(128)]
    rows = [row | {"chosen": "w1 w2", "rejected": "w3"} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


RECIPE = """\
stages = ["sft", "reward", "ppo"]
[model]
name = "{model}"
dtype = "{dtype}"
quantization = "{bits}"
[lora]
r = 16
[dataset]
path = "{rows}"
max_prompt_tokens = {prompt}
validation_fraction = 0.0
test_fraction = 0.0
judge_fraction = 0.0
[ppo]
total_episodes = {episodes}
response_length = {length}
per_device_train_batch_size = {micro}
gradient_accumulation_steps = {steps}
local_rollout_forward_batch_size = {sampled}
num_ppo_epochs = 1
gradient_checkpointing = {checkpointing}
num_sample_generations = 0
[evaluation]
prompts = 32
"""


def recipe_for(work: Path, size: str, quick: bool, **given: Any) -> Path:
    words = {
        "model": made_model(work, size, quick),
        "dtype": "float32" if quick else "bfloat16",
        "bits": "none",
        "prompt": 600,
        "episodes": 192,
        "length": 64,
        "micro": 8,
        "steps": 8,
        "sampled": 64,
        "checkpointing": "false",
        **given,
    }
    if quick:
        words |= {"episodes": 16, "length": 4, "micro": 4, "steps": 2, "sampled": 8, "bits": "none"}
    words["rows"] = _rows(
        work / f"rows-{size}.jsonl", 8 if quick else given.get("words", 60), quick
    )
    file = work / f"recipe-{size}.toml"
    file.write_text(RECIPE.format(**words))
    return file
