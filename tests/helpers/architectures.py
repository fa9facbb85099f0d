"""Tiny random models of many architectures, and a tokenizer as GPT-2 has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

VOCABULARY = 257  # a token for each byte, and <|endoftext|>
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": None,
}
GPT = {"n_embd": 32, "n_inner": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1}
ROUTED |= {"topk_group": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32}
# By a name of ours: the config's `model_type`, and settings beside COMMON.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT),
    "opt": ("opt", OPT),
    "mixtral": ("mixtral", GROUPED | EXPERTS),
    "gemma": ("gemma", GROUPED),
    "qwen3": ("qwen3", GROUPED),
    # ---- the rest
    "opt-350m": ("opt", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    ),
    "gptj": ("gptj", GPT | {"rotary_dim": 4}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "codegen": ("codegen", GPT | {"rotary_dim": 4}),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "falcon": ("falcon", {}),
    "falcon-alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False}),
    "xglm": (
        "xglm",
        {
            "d_model": 32,
            "ffn_dim": 64,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 512,
        },
    ),
    "biogpt": ("biogpt", {}),
    "llama": ("llama", GROUPED),
    "mistral": ("mistral", GROUPED),
    "qwen2": ("qwen2", GROUPED),
    "qwen3_moe": ("qwen3_moe", GROUPED | EXPERTS | {"moe_intermediate_size": 16}),
    "olmoe": ("olmoe", GROUPED | EXPERTS),
    "gemma2": ("gemma2", GROUPED),
    "gemma3": ("gemma3_text", GROUPED),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "stablelm": ("stablelm", GROUPED),
    "olmo2": ("olmo2", GROUPED),
    "cohere": ("cohere", GROUPED),
    "granite": ("granite", GROUPED),
    "lfm2": ("lfm2", GROUPED | {"layer_types": ["conv", "full_attention"]}),
    "starcoder2": ("starcoder2", GROUPED),
    "smollm3": ("smollm3", GROUPED),
    "nemotron": ("nemotron", GROUPED),
    "glm4": ("glm4", GROUPED),
    "minicpm3": ("minicpm3", {"dim_model_base": 8}),
    "qwen3_5": ("qwen3_5_text", GROUPED | {"layer_types": ["linear_attention", "full_attention"]}),
    "deepseek_v3": ("deepseek_v3", ROUTED | LATENT | {"v_head_dim": 8}),
    "granitemoe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gpt_oss": ("gpt_oss", GROUPED | EXPERTS),
}
# transformers has no class ...ForSequenceClassification of these.
NO_CLASSIFIER = ("codegen", "xglm", "cohere", "granite", "lfm2", "olmoe", "granitemoe")
SAMPLE = ("gpt2", "opt", "mixtral", "gemma", "qwen3")  # what each pull request tries


def byte_tokenizer(**words: Any) -> Any:
    """GPT-2's way: bytes, no pad token, no template, and EOS as the only special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    inner = Tokenizer(models.BPE(vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    words = {"bos_token": end, "eos_token": end, "unk_token": end, **words}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **words)


def save_model(folder: Path, kind: str, **settings: Any) -> Path:
    """A random model of two layers, without a tokenizer; `kind` is the config's `model_type`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **COMMON | settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def save(folder: Path, kind: str, **settings: Any) -> Path:
    """A random model of two layers, and GPT-2's kind of tokenizer beside it."""
    byte_tokenizer().save_pretrained(folder)
    return save_model(folder, kind, **settings)
