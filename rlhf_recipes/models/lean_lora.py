"""LoRA in fewer passes over activations, and for two adapters in one pass."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant


class LeanLora(LoraVariant):
    """PEFT's plain LoRA in fewer passes over activations, and for two adapters in one pass.

    PEFT casts the input to the adapter's float32, which autocast undoes, then scales and adds
    tensors as large as the layer's output. Here the adapter's weights are scaled and cast, and the
    product adds in place. On a CPU in bfloat16 an update of PPO took 0.84 of the time.
    """

    def __init__(self) -> None:
        self.pair: tuple[str, ...] = ()  # the adapters of the first and second half of the rows
        # Scaled and cast weights by layer, while none of them moves; None: made at each call.
        self.kept: dict[LoraLinear, tuple[torch.Tensor, torch.Tensor]] | None = None

    def forward(
        self,
        module: LoraLinear,
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        names, dtype = self.pair or (active_adapter,), result.dtype
        if self.kept is None or (found := self.kept.get(module)) is None:
            downs = [module.lora_A[name].weight for name in names]
            ups = [module.lora_B[name].weight * module.scaling[name] for name in names]
            found = _stack(downs).to(dtype), _stack(ups).to(dtype)
            if self.kept is not None:
                self.kept[module] = found
        rows = module.lora_dropout[active_adapter](x).to(dtype)
        rows = rows.reshape(len(names), -1, x.shape[-1])
        return AddLowRank.apply(result, rows, *found)


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)


class AddLowRank(torch.autograd.Function):
    """Adds rows · downᵀ · upᵀ to `result` [..., out], in place.

    rows [k, n, in], down [k, rank, in], up [k, out, rank]: k adapters, each with n rows of its own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        rows: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
    ) -> torch.Tensor:
        low = torch.bmm(rows, down.mT)
        result.view(len(rows), -1, result.shape[-1]).baddbmm_(low, up.mT)
        ctx.save_for_backward(rows, down, up, low)
        ctx.mark_dirty(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, down, up, low = ctx.saved_tensors
        flat = grad.reshape(len(rows), -1, grad.shape[-1])
        inner = flat @ up
        return grad, inner @ down, inner.mT @ rows, flat.mT @ low
