"""Loading weights: the base model in 32, 16, 8 or 4 bit, on the device of this machine."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_recipes import group
from rlhf_recipes.errors import ModelError, briefly, machine_error
from rlhf_recipes.models import attention
from rlhf_recipes.sources.trust import TOKENIZER_HINT
from rlhf_recipes.store import provenance

# Of every load. What is here has been brought whole: nothing is fetched as a model is opened.
SAFELY = {"trust_remote_code": False, "local_files_only": True}
NAME = "name a model that AutoModelForCausalLM loads: a text-only one of the same family"
WEIGHTS = {"use_safetensors": True, "weights_only": True}


def device() -> torch.device:
    """A card of this process's own, in a group."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if group.size() > 1 else None)


def machine() -> dict[str, Any]:
    """What rounding, memory and speed depend on, beside the libraries."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return provenance.hardware() | {"cpu": torch.backends.cpu.get_cpu_capability(), "card": card}


def compute_dtype(name: str) -> torch.dtype:
    """The dtype that `[model] dtype` means on this machine.

    "auto" is bfloat16 where the processor multiplies in it, else float32: emulated bfloat16 is
    slower than float32, and float16 on a CPU did no update in 500 s (TRL-facts 42).
    """
    if name != "auto":
        return getattr(torch, name)
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def use_tf32() -> None:
    """Have a card multiply float32 by its tensor cores, with 10 bits of the fraction.

    bfloat16 has 7, and float32's 23 are some 8 times slower there. Sums stay in float32.
    """
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_tf32 = True


def load_tokenizer(source: str | Path, trusted: bool = False) -> PreTrainedTokenizerBase:
    """Raises ModelError where the folder has none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(source, **SAFELY | {"trust_remote_code": trusted})
    except (OSError, ValueError) as error:
        what = f"{source} has no tokenizer that can be read: {briefly(error)}"
        raise ModelError(what, TOKENIZER_HINT) from error


def load_config(source: str | Path, trusted: bool = False) -> Any:
    """Raises ModelError where transformers does not know such a model."""
    try:
        return AutoConfig.from_pretrained(source, **SAFELY | {"trust_remote_code": trusted})
    except Exception as error:  # its config classes look at their fields, each in its own way
        if machine_error(error):
            raise
        hint = "see that the folder is whole, and that this transformers knows such a model"
        raise ModelError(
            f"{source} has a config that cannot be used: {briefly(error)}", hint
        ) from error


def without_weights(source: str | Path, trusted: bool = False) -> PreTrainedModel:
    """The base model's modules, with nothing in them."""
    with torch.device("meta"):
        config = load_config(source, trusted)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)


def stored_bits(config: Any) -> str:
    """How a checkpoint's own weights are stored: "4bit" or "8bit" by bitsandbytes, else "none"."""
    about: Any = getattr(config, "quantization_config", None) or {}
    return next((bits for bits in ("4bit", "8bit") if about.get(f"load_in_{bits}")), "none")


def check_base(config: Any, quantization: str) -> None:
    """Raise ModelError where a base model cannot be loaded as the recipe says."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map"):
        seen = ", a vision-language model" if hasattr(config, "vision_config") else ""
        what = f"the base model is a {config.model_type}{seen}"
        raise ModelError(f"{what}, and not a causal language model", NAME)
    made = config.architectures or []
    if made and all("ForMaskedLM" in name for name in made):
        raise ModelError(
            f"the base model is a {made[0]}: it fills gaps, and writes no answers", NAME
        )
    stored = stored_bits(config)
    if stored != "none" and quantization not in ("none", stored):
        what = f"the base model's weights are stored in {stored}, not in {quantization}"
        raise ModelError(what, f'set quantization = "{stored}" in [model]; "none" unpacks them')


def load_causal_lm(
    source: str | Path,
    *,
    dtype: torch.dtype,
    quantization: str = "none",
    trusted: bool = False,
) -> PreTrainedModel:
    """The base model, frozen, in eval mode, with nothing set that would bend sampling.

    Weights that are stored in 4 or 8 bit stay so, or are unpacked where `quantization` is "none".

    Fields that a GenerationConfig leaves None are filled from the model's own: a model that ships
    `repetition_penalty` then answers under another distribution than the one PPO differentiates
    (ratio 0.978 at the first step, TRL-facts 12). So the model's own is put aside as
    `shipped_generation_config`, for export.
    """
    attention.use()
    use_tf32()
    config = load_config(source, trusted)
    check_base(config, quantization)
    packed = stored_bits(config) != "none"
    how = {} if packed else {"quantization_config": _quantization_config(quantization, dtype)}
    lm = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        device_map={"": device()},
        **how,
        **WEIGHTS,
        **SAFELY | {"trust_remote_code": trusted},
    )
    if packed and quantization == "none":
        lm = lm.dequantize(dtype)
        lm._weight_conversions = None  # saving would undo how packed weights were read, and cannot
    _compute_in(dtype, lm)
    _without_dropout(lm)
    lm.shipped_generation_config = lm.generation_config
    lm.generation_config = GenerationConfig()
    lm.config.use_cache = True
    without_router_logits(lm)
    # On a CPU a bfloat16 product with a slice of the hidden states, which is what `logits_to_keep`
    # gives the head, took 2.5 to 3.9 s where a contiguous one takes 0.06 s.
    lm.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    return lm.requires_grad_(False).eval()


def _without_dropout(lm: PreTrainedModel) -> None:
    """Else a stage's result hangs on which trainer ran before it, and a policy that learns is not
    the one that sampled. Attention keeps its rate as a number: no nn.Dropout is to be found."""
    for module in lm.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def without_router_logits(lm: PreTrainedModel) -> None:
    """Have a mixture of experts return no router's logits unless it is asked in the call.

    TRL's SFTTrainer switches them on in the config, and the loss that is then computed beside the
    logits needs a mask of another size than PPO's.
    """
    if getattr(lm.config.get_text_config(), "output_router_logits", False):
        lm.config.get_text_config().output_router_logits = False


def load_reward_model(source: str | Path, *, dtype: torch.dtype) -> PreTrainedModel:
    """A finished reward model from elsewhere, held apart from the base."""
    model = AutoModelForSequenceClassification.from_pretrained(
        source, dtype=dtype, device_map={"": device()}, **WEIGHTS, **SAFELY
    )
    return model.requires_grad_(False).eval()


def empty(lm: PreTrainedModel) -> None:
    """Let go of a model's weights now; circles of references may hold the rest for a while."""
    for tensor in (*lm.parameters(), *lm.buffers()):
        tensor.data = tensor.data.new_empty(0)
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def new_head(lm: PreTrainedModel, *, bias: bool = False) -> nn.Linear:
    """A scalar head for `lm`, float32, N(0, 1/(d+1)) as in arXiv 2403.17031."""
    size = lm.get_output_embeddings().in_features  # OPT-350m's hidden states are projected
    head = nn.Linear(size, 1, bias=bias, device=lm.device, dtype=torch.float32)
    nn.init.normal_(head.weight, std=(size + 1) ** -0.5)
    return head


def config_with_one_label(lm: PreTrainedModel) -> Any:
    """A copy of the model's config, as RewardTrainer asks for it."""
    config = copy.deepcopy(lm.config)
    config.num_labels = 1
    return config


def _quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization == "none":
        return None
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _compute_in(dtype: torch.dtype, lm: PreTrainedModel) -> None:
    """Have 4-bit layers compute in this dtype, and keep their gradients.

    On AVX512-BF16 processors bitsandbytes repacks weights in place in the first forward in eval
    mode, and that path has no gradient: LoRA parameters with a gradient went 4, 8, 0, 0, 0 over
    five steps with evaluations between (TRL-facts 36).
    """
    if not getattr(lm, "is_loaded_in_4bit", False):
        return
    from bitsandbytes.nn import Linear4bit

    for module in lm.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype = dtype  # a packed checkpoint names its own
