"""Attention for training in 16 bit on a CPU: torch's forward, and a backward of matrix products.

Forward and backward of a layer of SmolLM2-135M, torch's and this, in ms (two cores with AMX): 16
rows of 116 tokens 27 and 8.5, 8 of 200 17 and 11, 8 of 320 27 and 23, 8 of 512 55 and 81. Longer
rows are left to torch, which does not hold a whole row's weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

UNKNOWN = ("position_bias", "softcap", "cache")  # which sdpa_attention_forward acts on or refuses
LONGEST = 256  # tokens
CACHED = 2**19  # weights of attention held at a time


def use() -> None:
    """Have models that attend by torch's `sdpa` train this way: 16 bit, on a CPU, short rows.

    Under the name "sdpa", which transformers and its models compare with.
    """
    ALL_ATTENTION_FUNCTIONS.register("sdpa", _forward)


def _forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    ours = (
        torch.is_grad_enabled()
        and query.requires_grad
        and query.device.type == "cpu"
        and query.dtype != torch.float32
        and attention_mask is not None
        and attention_mask.dtype == torch.bool
        and key.shape[2] <= LONGEST
        and key.shape[-1] == value.shape[-1]
        and not dropout
        and all(more.get(name) is None for name in UNKNOWN)
    )
    if not ours:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = MatmulBackward.apply(query, key, value, attention_mask, scale)
    return out.transpose(1, 2).contiguous(), None


class MatmulBackward(torch.autograd.Function):
    """query [batch, heads, length, size]; key and value may have fewer heads; mask: may look."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        # The query heads of one key head in one row; a few batch rows at a time stay in the cache.
        heads = (len(key), key.shape[1], -1, key.shape[-1])
        bias = torch.zeros_like(mask, dtype=query.dtype)
        bias.masked_fill_(~mask, torch.finfo(query.dtype).min / 2)
        parts = ((query * ctx.scale).reshape(heads), key, value, grad.reshape(heads), bias)
        rows = max(1, CACHED // (query.shape[1] * mask.shape[-1] ** 2))
        found = [_backward(*part) for part in zip(*(t.split(rows) for t in parts), strict=True)]
        dq, dk, dv = (torch.cat(pieces) for pieces in zip(*found, strict=True))
        return dq.view_as(query).mul_(ctx.scale), dk, dv, None, None


def _backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Weights do not change by what all keys share; rounded to 16 bit, a score with it would.
    k = k - k.mean(2, keepdim=True)
    score = q @ k.mT
    score.view(len(q), -1, *bias.shape[2:]).add_(bias)
    weight = torch.softmax(score, -1)
    dv = weight.mT @ grad
    change = torch._softmax_backward_data(grad @ v.mT, weight, -1, weight.dtype)
    return change @ k, change.mT @ q, dv
