"""A causal model as one GGUF file, which llama.cpp, Ollama and LM Studio load.

The names of keys and tensors are llama.cpp's, from its package `gguf`. That package holds no
converter, and the one on PyPI overwrites `gguf` where it is installed. So this converts the
architectures in which the two differ by names alone, and by the order of the rows of q and k.
Every other one is refused by name: llama.cpp's `convert_hf_to_gguf.py` takes the merged folder.

What has no place in a GGUF: an NFC normalizer (llama.cpp ignores Qwen's, too).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.errors import UsageError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFWriter
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rlhf_recipes.data.tokens import Tokens

KINDS = ("f16", "q8_0")
MODELS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
ROPES = ("default", "llama3")  # of `rope_type`
ELSEWHERE = "export --form merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py"

# How llama.cpp calls the ways in which byte-level tokenizers split a text before they merge.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    ("words",): "gpt-2",
    ("digits", "words"): "smollm",
    (_WORDS % r"\p{N}",): "qwen2",
    (_WORDS % r"\p{N}{1,3}",): "llama-bpe",
}


def check(config: dict[str, Any]) -> None:
    """Raise UsageError for a model, by its config.json, that this does not convert."""
    kind, rope = config.get("model_type"), config.get("rope_parameters") or {}
    scaled = (rope or config.get("rope_scaling") or {}).get("rope_type", "default")
    windowed = config.get("sliding_window") and config.get("use_sliding_window", True)
    what = ""
    if kind not in MODELS:
        what = f"a model of the kind {kind!r} (it does: {', '.join(MODELS)})"
    elif scaled not in ROPES:
        what = f"rotary embeddings of the kind {scaled!r}"
    elif windowed:
        what = "attention in a sliding window"
    elif config.get("hidden_act", "silu") != "silu":
        what = f"the activation {config['hidden_act']!r}"
    if what:
        raise UsageError(f"export writes no GGUF of {what}", ELSEWHERE)


def split_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for how a tokenizer splits. Raises UsageError where there is none."""
    name = _split(json.loads(tokenizer.backend_tokenizer.to_str())) if tokenizer.is_fast else None
    if name is None:
        what = "export writes no GGUF with this tokenizer: it is not one of the byte-level BPE"
        raise UsageError(f"{what} that GPT-2, SmolLM, Qwen2 and Llama 3 have", ELSEWHERE)
    return name


def _split(made: dict[str, Any]) -> str | None:
    model, parts = made["model"], made["pre_tokenizer"] or {}
    if model["type"] != "BPE" or model["byte_fallback"]:
        return None
    found = tuple(word for p in parts.get("pretokenizers", [parts]) if (word := _word(p)))
    name = SPLITS.get(found)
    plain = made["normalizer"] in (None, {"type": "NFC"})
    whole = model.get("ignore_merges", False) == (name == "llama-bpe")  # as llama.cpp has it
    return name if plain and whole else None


def _word(part: dict[str, Any]) -> str:
    """A step of a pre-tokenizer, as SPLITS names it; empty for one that splits nothing."""
    kind = part.get("type")
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return "words" if part["use_regex"] else ""
    if kind == "Digits" and part["individual_digits"]:
        return "digits"
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return part["pattern"].get("Regex", "?")
    return f"{kind}?"


def write(lm: PreTrainedModel, tokens: Tokens, file: Path, *, kind: str, name: str) -> None:
    """Write `lm` with its weights in `kind`, one of KINDS; `name` is what the file calls it.

    Vectors are float32, as llama.cpp has them. Raises UsageError, before anything is written, as
    `check` and `split_of` do.
    """
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType, quants

    config = lm.config
    check(config.to_dict())
    split = split_of(tokens.tokenizer)
    writer = GGUFWriter(file, MODELS[config.model_type])
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind.upper()}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    _add_shape(writer, config)
    _add_tokenizer(writer, tokens, config.vocab_size, split)
    for place, weight in _weights(lm):
        form = _form(weight, kind)
        shape = quants.quant_shape_to_byte_shape(weight.shape, form)
        size = shape[-1] * (weight.numel() // weight.shape[-1])
        writer.add_tensor_info(place, tuple(weight.shape), None, size, form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, weight in _weights(lm):  # one by one: all at once would be the model again, in memory
        writer.write_tensor_data(quants.quantize(weight.float().cpu().numpy(), _form(weight, kind)))
    writer.close()


def _form(weight: torch.Tensor, kind: str) -> Any:
    """How a tensor is stored; rows that do not divide into blocks of 32 stay in float16."""
    from gguf import GGMLQuantizationType as Type

    if weight.dim() == 1:
        return Type.F32
    return Type.F16 if weight.shape[-1] % 32 else Type[kind.upper()]


def _weights(lm: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under llama.cpp's name."""
    import torch
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = lm.config
    arch = MODELS[config.model_type]
    [key] = [key for key, name in MODEL_ARCH_NAMES.items() if name == arch]
    names = get_tensor_name_map(key, config.num_hidden_layers)
    if config.rope_parameters["rope_type"] != "default":  # by how much each frequency is divided
        scaled = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, "cpu")[0]
        steps = torch.arange(0, 2 * len(scaled), 2).float() / (2 * len(scaled))
        yield "rope_freqs.weight", config.rope_parameters["rope_theta"] ** -steps / scaled
    for name, weight in lm.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        part = name.split(".")[-2]
        if arch == "llama" and part in ("q_proj", "k_proj"):
            # transformers rotates one half of a head against the other, llama.cpp pairs of rows.
            heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
            halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        yield names.get_name(name, try_suffixes=(".weight", ".bias")), weight


def _add_shape(writer: GGUFWriter, config: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: GGUFWriter, tokens: Tokens, rows: int, split: str) -> None:
    """The tokenizer, with a token for each row of the embedding."""
    from gguf import TokenType

    tokenizer = tokens.tokenizer
    texts = {i: text for text, i in tokenizer.get_vocab().items() if i < rows}
    kinds = dict.fromkeys(texts, TokenType.NORMAL)
    for i, added in tokenizer.added_tokens_decoder.items():
        special = added.special or added.content in tokens.specials
        kinds[i] = TokenType.CONTROL if special else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list([texts.get(i, f"[PAD{i}]") for i in range(rows)])
    writer.add_token_types([kinds.get(i, TokenType.UNUSED) for i in range(rows)])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    for add, i in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokens.eos_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokens.pad_id),
    ):
        if i is not None:
            add(i)
    writer.add_add_bos_token(tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1])
    template = tokenizer.chat_template
    writer.add_chat_template(template if isinstance(template, str) else template["default"])
