"""One frozen base with named adapters; every adapter switch, one `score()`, one `logprobs()`.

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
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf_recipes import models

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

    def open(
        self,
        name: str,
        source: Path | None,
        *,
        seed: int,
        trainable: bool = False,
    ) -> Role:
        """A role that starts from the output folder `source`, or from the base where it is None.

        `name` is the adapter's; `seed` fixes what is not read from `source`. With LoRA and neither
        a source nor training, the role is the bare base itself.
        """
        if self.lora is None:
            lm = self._load(source)
            lm.requires_grad_(trainable)
            return Role(lm, None, self.dtype)
        if source is None and not trainable:
            return Role(self.lm, None, self.dtype, self._layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._add(name)
        if source is not None:
            state = load_file(source / ADAPTER, device=str(self.lm.device))
            set_peft_model_state_dict(self.peft, state, adapter_name=name)
        for key, parameter in self.peft.named_parameters():
            if f".{name}." in key:
                parameter.requires_grad_(trainable)
        return Role(self.lm, name, self.dtype, self._layers)

    def close(self, *roles: Role) -> None:
        """Take the roles' adapters off the base, and what a stock trainer hung on it."""
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

    def _add(self, name: str) -> None:
        config = LoraConfig(task_type="CAUSAL_LM", **self.lora)
        if self.peft is None:
            self.peft = get_peft_model(self.lm, config, adapter_name=name)
            self._layers.extend(m for m in self.lm.modules() if isinstance(m, BaseTunerLayer))
        else:
            self.peft.add_adapter(name, config)
            self.peft.active_adapter = name  # what PeftModel.forward looks up, and no more

    def save(self, role: Role, folder: Path) -> None:
        """Write the role's weights and head as safetensors, with what loads them again."""
        if self.lora is None:
            role.lm.save_pretrained(folder)
        else:
            state = get_peft_model_state_dict(self.peft, adapter_name=role.adapter)
            save_file({k: v.contiguous() for k, v in sorted(state.items())}, folder / ADAPTER)
            config = self.peft.peft_config[role.adapter].to_dict()
            # PEFT writes this set in hash order, so two equal runs would give two files.
            config["target_modules"] = sorted(config["target_modules"])
            config["inference_mode"] = True
            text = json.dumps(config, indent=2, sort_keys=True, default=sorted)
            (folder / "adapter_config.json").write_text(text)
        if role.score is not None:
            save_file({"score.weight": role.score.weight.data.contiguous()}, folder / HEAD)


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
    ):
        super().__init__()
        self.lm = lm
        self.adapter = adapter
        self.dtype = dtype
        self.score: nn.Linear | None = None
        self.config = lm.config
        self._layers = layers

    def add_head(self, head: nn.Linear) -> Role:
        """Make this a reward or value model."""
        self.score = head
        self.config = models.config_with_one_label(self.lm)
        return self

    @property
    def generation_config(self) -> GenerationConfig:
        return self.lm.generation_config

    @contextlib.contextmanager
    def active(self, *, autocast: bool = True) -> Iterator[None]:
        """Run the base under this role's adapter, in this role's compute dtype.

        No `autocast` around a stock trainer's steps, which bring their own: until the outermost
        one ends, torch keeps its 16-bit copies of the trainable weights as they were at first.
        """
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self._layers]
        for layer in self._layers:
            layer._active_adapter = [self.adapter]
            layer._disable_adapters = self.adapter is None
        mixed = autocast and self.dtype != torch.float32  # one that is off is an outermost one too
        cast = (
            torch.autocast(self.lm.device.type, self.dtype) if mixed else contextlib.nullcontext()
        )
        try:
            with cast:
                yield
        finally:
            for layer, (name, disabled) in zip(self._layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = name, disabled

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


def score(role: Role, ids: torch.Tensor, mask: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The reward [batch] of whole sequences: the head at position `last` [batch], which is EOS.

    One function serves the reward stage, PPO and the evaluation, so what PPO is scored by is what
    was trained. `ids` and `mask` are [batch, length], padded on either side. Call under `active`.
    """
    hidden = role.hidden(ids, mask)
    rows = torch.arange(len(ids), device=ids.device)
    return role.heads(hidden[rows, last])


def values(role: Role, ids: torch.Tensor, mask: torch.Tensor, answer: int) -> torch.Tensor:
    """The value [batch, answer] before each of the last `answer` tokens. Call under `active`."""
    return role.heads(role.hidden(ids, mask)[:, -answer - 1 : -1])


def logits(
    role: Role, ids: torch.Tensor, mask: torch.Tensor, answer: int, temperature: float
) -> torch.Tensor:
    """Logits [batch, answer, vocabulary] of the last `answer` tokens, float32, at `temperature`.

    Prompt positions get none: with a vocabulary of 150,000 they would be most of the memory
    (TRL-facts 19). Call under `active`.
    """
    positions, before = (mask.cumsum(1) - 1).clamp(min=0), ids.shape[1] - answer
    out = role.lm(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        # Not a count: that keeps the last position too, and dropping it copies the logits again.
        logits_to_keep=torch.arange(before - 1, before + answer - 1, device=ids.device),
    )
    return out.logits.float().div_(temperature)


def logprobs(
    role: Role, ids: torch.Tensor, mask: torch.Tensor, answer: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy, each [batch, answer], of the last `answer` tokens of `ids`.

    The policy's old and new and the reference's log-probabilities all come from here, so that
    equal weights give a KL of exactly 0 and a ratio of exactly 1. Call under `active`.
    """
    log_p = torch.log_softmax(logits(role, ids, mask, answer, temperature), dim=-1)
    chosen = log_p.gather(-1, ids[:, -answer:].unsqueeze(-1)).squeeze(-1)
    with torch.no_grad():
        entropy = -log_p.exp().mul_(log_p).sum(-1)
    return chosen, entropy
