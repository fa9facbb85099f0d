"""What the four models of PPO weigh at the sizes people train, here and in TRL's example: bytes.

No run: both layouts are built with the real classes on torch's meta device, which has shapes and
dtypes and no data; their optimizers take a step there, and the bytes of each tensor are added up,
each tensor once. Activations, the KV cache and what a framework reserves are left out.

- `ours`: one base and four adapters (LoRA r 16 on all linear layers), AdamW over the policy's, the
  value's and its head.
- `trl`: TRL's example with `--use_peft`: a policy with that LoRA, whose reference is itself without
  it, and a value and a reward model of their own; AdamW over the LoRA and the whole value model.
- Gradients are one per trained weight on both sides, and stand apart from the compared sum.

16 bit: weights in bfloat16, adapters in float32, where PEFT puts them; AdamW's two moments have
their weight's dtype. 4 bit: a linear layer but the language head is nf4 with double quantization:
½ byte a weight, 1 byte of scale per 64 of them, 4 bytes per 256 scales. Embeddings, heads, norms
and biases stay 16 bit. A 4-bit weight cannot be trained, so there are two `trl`s in 4 bit:
`trl` has the value in 4 bit as the example's flag does, and trains what is left of it (embeddings,
norms, head); `trl_trained_value` keeps it in 16 bit and trains it in full, as in 16 bit.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from benchmarks import common
from benchmarks.common import Measured
from rlhf_recipes.models.base import Base
from rlhf_recipes.models.load import new_head

LORA = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear"}
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
Bytes = dict[str, float]


def qwen(hidden: int, inner: int, layers: int, heads: int, tied: bool, vocabulary: int) -> Any:
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=4 if hidden > 2000 else 2,
        tie_word_embeddings=tied,
        vocab_size=vocabulary,
    )


SHAPES: dict[str, PreTrainedConfig] = {
    "Qwen2.5-0.5B": qwen(896, 4864, 24, 14, tied=True, vocabulary=151_936),
    "Qwen2.5-1.5B": qwen(1536, 8960, 28, 12, tied=True, vocabulary=151_936),
    "Qwen2.5-7B": qwen(3584, 18944, 28, 28, tied=False, vocabulary=152_064),
    "Llama-3-8B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128_256,
    ),
}


def main() -> None:
    args = common.parser(__doc__, pairs=None).parse_args()
    shapes = dict(list(SHAPES.items())[:1]) if args.quick else SHAPES
    compared: Measured = {}
    with torch.device("meta"):
        for name, config in shapes.items():
            print(f"  {name}", file=sys.stderr)
            compared[name] = {"16 bit": compare(config, 16), "4 bit": compare(config, 4)}
    targets = {
        f"{name}, {bits} against {side}": common.at_most(0.25, ratio)
        for name, by_bits in compared.items()
        if name in ("Qwen2.5-7B", "Llama-3-8B")
        for bits, found in by_bits.items()
        for side, ratio in found["ratios"].items()
    }
    common.report("memory_by_size", args, {"shapes": compared, "targets": targets})


def compare(config: PreTrainedConfig, bits: int) -> Measured:
    sides = {"ours": ours(config, bits), "trl": trl(config, bits, bits)}
    if bits == 4:
        sides["trl_trained_value"] = trl(config, bits, 16)
    held = {name: total(found) for name, found in sides.items()}
    ratios = {name: round(held["ours"] / held[name], 4) for name in list(sides)[1:]}
    roles = {n: {role: round(b) for role, b in found.items()} for n, found in sides.items()}
    return {"ratios": ratios, "bytes": roles}


def total(found: Bytes) -> float:
    return sum(number for role, number in found.items() if role != "gradients")


# ---- the two layouts ----------------------------------------------------------------------------


def ours(config: PreTrainedConfig, bits: int) -> Bytes:
    base = Base(lambda _: causal_lm(config).requires_grad_(False), LORA, torch.bfloat16)
    trained: list[nn.Parameter] = []
    found: Bytes = {"base": weigh(base.lm, bits)}
    for name in ("policy", "reference", "reward", "value"):
        role = base.open(name, None, seed=0, trainable=True)
        if name in ("reward", "value"):
            role.add_head(new_head(role.lm, bias=True))
        found[f"{name} adapter"] = size(role.trainable())
        trained += role.trainable() if name in ("policy", "value") else []
    return found | optimize(trained)


def trl(config: PreTrainedConfig, bits: int, value_bits: int) -> Bytes:
    lm = causal_lm(config)
    found: Bytes = {"policy": weigh(lm, bits)}
    policy = get_peft_model(lm, LoraConfig(task_type="CAUSAL_LM", **LORA))
    trained = [p for p in policy.parameters() if p.requires_grad]
    found["policy adapter"] = size(trained)
    value, reward = classifier(config), classifier(config)
    found |= {"value": weigh(value, value_bits), "reward": weigh(reward, bits)}
    quantized = set(linear_weights(value)) if value_bits == 4 else set()
    return found | optimize([*trained, *(p for p in value.parameters() if p not in quantized)])


def causal_lm(config: PreTrainedConfig) -> nn.Module:
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def classifier(config: PreTrainedConfig) -> nn.Module:
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16)


# ---- weighing -----------------------------------------------------------------------------------


def weigh(model: nn.Module, bits: int) -> float:
    """Bytes of a model's weights; in 4 bit, of its linear layers by the rule above."""
    if bits == 16:
        return size(model.parameters())
    linear = linear_weights(model)
    count = sum(weight.numel() for weight in linear)
    return size(model.parameters()) - size(linear) + count * NF4_BYTES


def linear_weights(model: nn.Module) -> list[nn.Parameter]:
    """The weights that bitsandbytes takes: of every linear layer but the heads."""
    layers = model.get_submodule(model.base_model_prefix).modules()
    return [layer.weight for layer in layers if isinstance(layer, nn.Linear)]


def optimize(trained: list[nn.Parameter]) -> Bytes:
    """Gradients, and what AdamW keeps after its first step."""
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return {"optimizer": size(states), "gradients": size(trained)}


def size(tensors: Any) -> int:
    return sum(
        tensor.numel() * tensor.element_size() for tensor in {id(t): t for t in tensors}.values()
    )


if __name__ == "__main__":
    main()
