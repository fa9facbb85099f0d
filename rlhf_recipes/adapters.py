"""One frozen base with named adapters, and every adapter switch; `passes.py` runs them.

With LoRA the policy, the reference, the reward model and the value model are adapters on the same
base: `Base.open` adds one and hands out a `Role` that sees the base through it. With `lora = false`
each role is a model of its own. Nothing else in the project knows which of the two it is.

PEFT's own switches flip `requires_grad`: flipped between forward and backward, gradients are
dropped (TRL-facts 33). `Role.active` therefore sets the active adapter on the LoRA layers and
touches nothing else; who is trainable is decided once, in `open`. A forward and its backward run
under the same `active`, so that a checkpointed layer recomputes under the adapter it ran with.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf_recipes import models
from rlhf_recipes.errors import lost
from rlhf_recipes.passes import score

ADAPTER = "adapter_model.safetensors"
HEAD = "head.safetensors"
UNIT = "unit.json"


class Base:
    """The base model of a run, read from disk once.

    `lora` holds LoraConfig's keywords, or is None: then every role loads weights of its own.
    """

    def __init__(self, load: Any, lora: dict[str, Any] | None, dtype: torch.dtype):
        self._load = load  # load(source folder or None for the base itself) -> PreTrainedModel
        self.lora = lora
        self.dtype = dtype
        self.lm: PreTrainedModel | None = load(None) if lora is not None else None
        self.peft: PeftModel | None = None
        self._layers: list[BaseTunerLayer] = []
        self._lean = LeanLora()

    def open(
        self,
        name: str,
        source: Path | None,
        *,
        seed: int,
        trainable: bool = False,
        adapter: bool = False,
    ) -> Role:
        """A role that starts from the output folder `source`, or from the base where it is None.

        `name` is the adapter's; `seed` fixes what is not read from `source`. With LoRA and neither
        a source nor training, the role is the bare base itself, unless an `adapter` is asked for.
        """
        if self.lora is None:
            lm = self._load(source)
            lm.requires_grad_(trainable)
            return Role(lm, None, self.dtype)
        if source is None and not trainable and not adapter:
            return Role(self.lm, None, self.dtype, self._layers, self._lean)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._add(name)
        if source is not None:
            state = load_file(source / ADAPTER, device=str(self.lm.device))
            set_peft_model_state_dict(self.peft, state, adapter_name=name)
        for key, parameter in self.peft.named_parameters():
            if f".{name}." in key:
                parameter.requires_grad_(trainable)
        return Role(self.lm, name, self.dtype, self._layers, self._lean)

    def close(self, *roles: Role) -> None:
        """Take the roles' adapters off the base, and what a stock trainer hung on it.

        A role that is a model of its own is gone.
        """
        for role in roles:
            role.lm.gradient_checkpointing_disable()
            # accelerate wraps `forward` and SFTTrainer's chunked loss replaces it, both on the
            # instance, and neither takes it back: the next stage would run their code. And a model
            # marked as prepared is not wrapped again: the next stage's logits would be bfloat16.
            for module in (role.lm, self.peft):
                if module is not None:
                    for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
                        module.__dict__.pop(name, None)
            # Enabling checkpointing hangs a hook here each time; DPOTrainer does so at every step.
            role.lm.get_input_embeddings()._forward_hooks.clear()
            role.lm.eval()
            if role.adapter is not None:
                for layer in self._layers:
                    layer._active_adapter = []
                self.peft.base_model.delete_adapter(role.adapter)
            if role.lm is not self.lm:
                models.empty(role.lm)

    def _add(self, name: str) -> None:
        config = LoraConfig(task_type="CAUSAL_LM", **self.lora)
        if self.peft is None:
            self.peft = get_peft_model(self.lm, config, adapter_name=name)
            self._layers.extend(m for m in self.lm.modules() if isinstance(m, BaseTunerLayer))
        else:
            self.peft.add_adapter(name, config)
            self.peft.active_adapter = name  # what PeftModel.forward looks up, and no more
        for layer in self._layers:
            if type(layer) is LoraLinear and name not in layer.lora_variant:
                layer.lora_variant[name] = self._lean
                layer.cast_input_dtype_enabled = False

    def save(self, role: Role, folder: Path) -> None:
        """Write the role's weights and head as safetensors, with what loads them again."""
        if self.lora is None:
            role.lm.save_pretrained(folder)
        else:
            state = get_peft_model_state_dict(self.peft, adapter_name=role.adapter)
            if not all(tensor.isfinite().all() for tensor in state.values()):
                raise lost("weights")
            save_file({k: v.contiguous() for k, v in sorted(state.items())}, folder / ADAPTER)
            config = self.peft.peft_config[role.adapter].to_dict()
            # PEFT writes this set in hash order, so two equal runs would give two files.
            config["target_modules"] = sorted(config["target_modules"])
            config["inference_mode"] = True
            config["base_model_name_or_path"] = None  # PEFT tells a base's first adapter alone
            text = json.dumps(config, indent=2, sort_keys=True, default=sorted)
            (folder / "adapter_config.json").write_text(text)
        if role.score is not None:
            save_file({"score.weight": role.score.weight.data.contiguous()}, folder / HEAD)


class LeanLora(LoraVariant):
    """PEFT's plain LoRA in fewer passes over activations, and for two adapters in one pass.

    PEFT casts the input to the adapter's float32, which autocast undoes, then scales and adds
    tensors as large as the layer's output. Here the adapter's weights are scaled and cast, and the
    product adds in place. On a CPU in bfloat16 an update of PPO took 0.84 of the time.
    """

    def __init__(self) -> None:
        self.pair: tuple[str, ...] = ()  # the adapters of the first and second half of the rows

    def forward(
        self,
        module: LoraLinear,
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        **_: Any,
    ) -> torch.Tensor:
        names, dtype = self.pair or (active_adapter,), result.dtype
        downs = [module.lora_A[name].weight for name in names]
        ups = [module.lora_B[name].weight * module.scaling[name] for name in names]
        rows = module.lora_dropout[active_adapter](x).to(dtype)
        rows = rows.reshape(len(names), -1, x.shape[-1])
        return AddLowRank.apply(result, rows, _stack(downs).to(dtype), _stack(ups).to(dtype))


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


class Role(nn.Module):
    """A language model in one part: policy, reference, reward or value.

    `lm` is the whole model under the adapter `adapter` (None: as it is), `score` its scalar head.
    The attributes `base_model_prefix`, `backbone` and `score` are those that TRL's PPOTrainer asks
    of a value and a reward model.
    """

    base_model_prefix = "backbone"
    is_gradient_checkpointing = False  # PPOTrainer reads it and never acts on it

    def __init__(
        self,
        lm: PreTrainedModel,
        adapter: str | None,
        dtype: torch.dtype,
        layers: Sequence[BaseTunerLayer] = (),
        lean: LeanLora | None = None,
    ):
        super().__init__()
        self.lm = lm
        self.adapter = adapter
        self.dtype = dtype
        self.score: nn.Linear | None = None
        self.config = lm.config
        self._layers = layers
        self._lean = lean or LeanLora()

    def add_head(self, head: nn.Linear) -> Role:
        """Make this a reward or value model."""
        self.score = head
        self.config = models.config_with_one_label(self.lm)
        return self

    @property
    def generation_config(self) -> GenerationConfig:
        return self.lm.generation_config

    @contextlib.contextmanager
    def active(self, *, beside: Role | None = None, autocast: bool = True) -> Iterator[None]:
        """Run the base under this role's adapter, in this role's compute dtype.

        With `beside`, the second half of a batch's rows runs under that role's adapter.

        No `autocast` around a stock trainer's steps, which bring their own: until the outermost
        one ends, torch keeps its 16-bit copies of the trainable weights as they were at first.
        """
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self._layers]
        for layer in self._layers:
            layer._active_adapter = [self.adapter]
            layer._disable_adapters = self.adapter is None
        pair_before = self._lean.pair
        self._lean.pair = (self.adapter, beside.adapter) if beside is not None else ()
        mixed = autocast and self.dtype != torch.float32  # one that is off is an outermost one too
        cast = (
            torch.autocast(self.lm.device.type, self.dtype) if mixed else contextlib.nullcontext()
        )
        try:
            with cast:
                yield
        finally:
            self._lean.pair = pair_before
            for layer, (name, disabled) in zip(self._layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = name, disabled

    def pairs_with(self, other: Role) -> bool:
        """Whether `active(beside=other)` is to be had: two plain LoRA adapters on one base."""
        if self.adapter is None or other.adapter is None:
            return False
        return all(
            layer.lora_variant.get(role.adapter) is self._lean
            for layer in self._layers
            for role in (self, other)
        )

    def trainable(self) -> list[nn.Parameter]:
        """The weights that an optimizer may move, head included."""
        own = [p for p in self.lm.parameters() if p.requires_grad and self.adapter is None]
        if self.adapter is not None:
            own = [
                p
                for key, p in self.lm.named_parameters()
                if f".{self.adapter}." in key and p.requires_grad
            ]
        return own + (list(self.score.parameters()) if self.score is not None else [])

    def backbone(self, **kwargs: Any) -> Any:
        """The model without its language head."""
        return getattr(self.lm, self.lm.base_model_prefix)(**kwargs)

    def hidden(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Last hidden states [batch, length, size] of `ids` padded on either side."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = self.backbone(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False
        )
        return out.last_hidden_state

    def heads(self, hidden: torch.Tensor) -> torch.Tensor:
        """The scalar head on `hidden` [..., size], always in float32: one number a position."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.score(hidden.float()).squeeze(-1)

    # ---- what RewardTrainer calls ---------------------------------------------------------------

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_: Any
    ) -> SequenceClassifierOutput:
        """RewardTrainer's logits [batch, 1], by `score()`, for right-padded ids."""
        last = attention_mask.sum(1) - 1
        with self.active():
            logits = score(self, input_ids, attention_mask, last)
        return SequenceClassifierOutput(logits=logits.unsqueeze(-1))

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        self.lm.gradient_checkpointing_enable(**kwargs)

    def add_model_tags(self, tags: Any) -> None:
        """Nothing to tag: what is exported writes its own card."""
