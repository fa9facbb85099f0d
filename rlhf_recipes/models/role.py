"""A role of the base model, and its forward passes: `score`, `values`, `logits`, `logprobs`, and
two in one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf_recipes.models import load as models
from rlhf_recipes.models.lean_lora import LeanLora

LARGE = 2**16  # words of a vocabulary, from where on logits are made in parts
PART = 2**25  # logits at a time: 128 MiB in float32
_WRITES_MORE: set[type] = set()  # models whose logits are not what their heads say


def score(role: Role, ids: torch.Tensor, mask: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """The reward [batch] of whole sequences: the head at position `last` [batch], which is EOS.

    One function serves the reward stage, PPO and the evaluation, so what PPO is scored by is what
    was trained. `ids` and `mask` are [batch, length], padded on either side. Call under `active`.
    """
    return role.scored(ids, mask, last)


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
    return _logits(role, ids, mask, answer).float().div_(temperature)


def logprobs(
    role: Role, ids: torch.Tensor, mask: torch.Tensor, answer: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy, each [batch, answer], of the last `answer` tokens of `ids`.

    The policy's old and new and the reference's log-probabilities all come from here, so that
    equal weights give a KL of exactly 0 and a ratio of exactly 1. Call under `active`.
    """
    return _picked(role.lm, lambda: _logits(role, ids, mask, answer), ids[:, -answer:], temperature)


def logprobs_and_values(
    policy: Role,
    value: Role,
    ids: torch.Tensor,
    mask: torch.Tensor,
    answer: int,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`logprobs` of the policy and `values` of the value model in one pass over twice the rows.

    Call under `policy.active(beside=value)`.
    """
    lm, states = policy.lm, []
    twice = ids.repeat(2, 1), mask.repeat(2, 1)

    def both() -> torch.Tensor:
        hooks = [
            # Not on the base model: OPT calls the decoder inside.
            lm.get_decoder().register_forward_hook(
                lambda _, __, out: states.append(out.last_hidden_state[len(ids) :])
            ),
            # The language head is asked about the policy's rows alone.
            lm.get_output_embeddings().register_forward_pre_hook(
                lambda _, args: (args[0][: len(ids)],), prepend=True
            ),
        ]
        try:
            return _logits(policy, *twice, answer)
        finally:
            for hook in hooks:
                hook.remove()

    found = _picked(lm, both, ids[:, -answer:], temperature)
    return *found, value.heads(states[-1][:, -answer - 1 : -1])


def _logits(role: Role, ids: torch.Tensor, mask: torch.Tensor, answer: int) -> torch.Tensor:
    positions, before = (mask.cumsum(1) - 1).clamp(min=0), ids.shape[1] - answer
    out = role.lm(
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        # Not a count: that keeps the last position too, and dropping it copies the logits again.
        logits_to_keep=torch.arange(before - 1, before + answer - 1, device=ids.device),
    )
    return out.logits


def _picked(
    lm: PreTrainedModel, logits_of: Callable[[], torch.Tensor], chosen: torch.Tensor, heat: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`LogProb` of what `lm` writes. Of a large vocabulary, the logits are never there as a whole.

    Then the language head runs on some positions at a time, and in the backward once more. So many
    logits of 64 answers of 512 tokens would take 10 GB in 16 bit at 152,000 words.
    """
    head = lm.get_output_embeddings()
    words, seen = head.weight.shape[0], list[torch.Tensor]()
    plain = not isinstance(head, BaseTunerLayer) and type(lm) not in _WRITES_MORE
    if not plain or words < LARGE or chosen.numel() * words <= PART:
        return LogProb.apply(logits_of(), chosen, heat)

    def one_position(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        seen.append(args[0])
        return (args[0][:1, :1],)

    hooks = [
        head.register_forward_pre_hook(one_position),
        head.register_forward_hook(lambda _, __, out: seen.append(out)),
    ]
    try:
        out = logits_of()
    finally:
        for hook in hooks:
            hook.remove()
    hidden, said = seen
    if out is not said:  # it caps or scales what the head says
        _WRITES_MORE.add(type(lm))
        return LogProb.apply(logits_of(), chosen, heat)

    def some(states: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return LogProb.apply(head(states)[None], tokens[None], heat)

    count = max(1, PART // words)
    parts = zip(hidden.flatten(0, 1).split(count), chosen.flatten().split(count), strict=True)
    run = partial(checkpoint, some, use_reentrant=False) if torch.is_grad_enabled() else some
    picked, entropy = zip(*(run(*part) for part in parts), strict=True)
    return torch.cat(picked, 1).view_as(chosen), torch.cat(entropy, 1).view_as(chosen)


class LogProb(torch.autograd.Function):
    """Log-probability [batch, answer] of `chosen` under `logits`, and the entropy [batch, answer].

    As `log_softmax` and `gather` in float32, a row at a time: nothing as large as the logits is
    made beside them in the forward, and their gradient alone in the backward. The entropy has none.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, chosen: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        picked = torch.empty(chosen.shape, device=logits.device)
        entropy, total = torch.empty_like(picked), torch.empty_like(picked)
        for i, row in enumerate(logits):
            x = row.to(torch.float32, copy=True).div_(temperature)
            log_p = torch.log_softmax(x, -1)
            picked[i] = log_p.gather(-1, chosen[i, :, None])[:, 0]
            # What cannot be chosen has a log-probability of -inf, and 0 × -inf is no number.
            entropy[i] = -torch.linalg.vecdot(log_p.exp(), log_p.clamp_(min=-1e30))
            total[i] = x.gather(-1, chosen[i, :, None])[:, 0] - picked[i]
        ctx.save_for_backward(logits, chosen, total)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return picked, entropy

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, chosen, total = ctx.saved_tensors
        out, grad = torch.empty_like(logits), grad / ctx.temperature
        for i, row in enumerate(logits):
            x = row.to(torch.float32, copy=True).div_(ctx.temperature)
            p = x.sub_(total[i, :, None]).exp_().mul_(-grad[i, :, None])
            out[i] = p.scatter_add_(-1, chosen[i, :, None], grad[i, :, None])
        return out, None, None


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
    def active(
        self, *, beside: Role | None = None, autocast: bool = True, still: bool = False
    ) -> Iterator[None]:
        """Run the base under this role's adapter, in this role's compute dtype.

        With `beside`, the second half of a batch's rows runs under that role's adapter. `still`
        says that no weight moves meanwhile and no gradient is asked for.

        No `autocast` around a stock trainer's steps, which bring their own: until the outermost
        one ends, torch keeps its 16-bit copies of the trainable weights as they were at first.
        """
        before = [(layer._active_adapter, layer._disable_adapters) for layer in self._layers]
        for layer in self._layers:
            layer._active_adapter = [self.adapter]
            layer._disable_adapters = self.adapter is None
        pair_before = self._lean.pair
        self._lean.pair = (self.adapter, beside.adapter) if beside is not None else ()
        self._lean.kept = {} if still else None
        mixed = autocast and self.dtype != torch.float32  # one that is off is an outermost one too
        cast = (
            torch.autocast(self.lm.device.type, self.dtype) if mixed else contextlib.nullcontext()
        )
        try:
            with cast:
                yield
        finally:
            self._lean.pair, self._lean.kept = pair_before, None
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

    def adapted(self) -> list[tuple[str, BaseTunerLayer]]:
        """The layers that the role's adapter is on, by their names in `lm`."""
        held = [(n, m) for n, m in self.lm.named_modules() if isinstance(m, BaseTunerLayer)]
        return [(n, m) for n, m in held if self.adapter in getattr(m, "lora_A", ())]

    def merges(self) -> bool:
        """Whether a copy with the adapter in its weights computes the same, but for rounding.

        That is plain LoRA on linear layers of 16, 32 or 4 bit. Products of 8 bit are others.
        """
        layers = [layer for _, layer in self.adapted()]
        plain = all(
            layer.lora_variant.get(self.adapter) in (None, self._lean)
            and isinstance(layer.get_base_layer(), nn.Linear)
            and not layer.lora_bias.get(self.adapter)
            for layer in layers
        )
        others = [m for m in self.lm.modules() if isinstance(m, BaseTunerLayer)]
        packed = getattr(self.lm, "is_loaded_in_8bit", False)
        return bool(layers) and plain and len(layers) == len(others) and not packed

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

    def scored(self, ids: torch.Tensor, mask: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """What `score` gives. A model from elsewhere may have another way."""
        hidden = self.hidden(ids, mask)
        rows = torch.arange(len(ids), device=ids.device)
        return self.heads(hidden[rows, last])

    @property
    def told(self) -> str:
        """What a person should know of what was scored; mostly nothing."""
        return ""

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
