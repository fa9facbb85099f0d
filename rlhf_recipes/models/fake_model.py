"""A fake-tensor model that tracks live bytes by purpose: weights, gradients, KV cache and so on.

A stage's own passes run on the model; its tensors have a shape and no content.
"""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from rlhf_recipes.models import attention
from rlhf_recipes.models import load as models
from rlhf_recipes.models.base import Base
from rlhf_recipes.models.role import Role
from rlhf_recipes.recipe.load import Recipe

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: of it, and of its scales
INT8 = 1.0
STATES = {"sgd": 0, "adafactor": 0, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2}  # bytes a weight
WEIGHTS, ADAPTERS, OPTIMIZER, GRADIENTS = "weights", "adapters", "optimizer", "gradients"
CACHE, ACTIVATIONS, LOGITS_ROLE = "KV cache", "activations", "logits"
Held = Counter  # bytes by role


class Lengths(NamedTuple):
    """The most tokens of a prompt, of a prompt with an answer, and of an answer."""

    prompt: int
    row: int
    answer: int
    validation: int  # prompts, at most


class Tracker(TorchDispatchMode):
    """Counts the bytes of tensors that live, and what they were when they were most."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.now: Held = Counter()
        self.most: Held = Counter()
        self._held: dict[int, tuple[str, int]] = {}
        self.kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                large = tensor.ndim and tensor.shape[-1] == self.vocabulary
                self.see(tensor, LOGITS_ROLE if large else ACTIVATIONS)
        return out

    def see(self, tensor: torch.Tensor, role: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._held:
            self._held[key] = (role, storage.nbytes())
            self.now[role] += storage.nbytes()
            weakref.finalize(storage, self._gone, key)
            if self.now.total() > self.most.total():
                self.most = Counter(self.now)

    def move(self, tensor: torch.Tensor, role: str) -> None:
        """Count it under another role."""
        key = tensor.untyped_storage()._cdata
        was, count = self._held[key]
        self._held[key] = (role, count)
        self.now[was] -= count
        self.now[role] += count

    def rename(self, was: str, role: str, count: int) -> None:
        """Of what was held when it was most, count up to so many bytes in all under `role`."""
        count = min(self.most[was], max(0, count - self.most[role]))
        self.most[was] -= count
        self.most[role] += count

    def _gone(self, key: int) -> None:
        role, count = self._held.pop(key)
        self.now[role] -= count

    def begin(self) -> None:
        self.most = Counter(self.now)


@dataclass(frozen=True)
class Sim:
    """A stage as the rule looks at it: on a model without content, its tensors counted."""

    recipe: Recipe
    name: str  # the stage's
    foreign_reward: bool  # what scores is a model from elsewhere
    lengths: Lengths
    card: bool  # on an accelerator
    config: Any

    @property
    def options(self) -> Mapping[str, Any]:
        return self.recipe.table(self.name).options

    @property
    def dtype(self) -> torch.dtype:
        name = self.recipe.model.dtype
        return torch.bfloat16 if self.card and name == "auto" else models.compute_dtype(name)

    @property
    def vocabulary(self) -> int:
        return self.config.get_text_config().vocab_size

    @contextlib.contextmanager
    def model(
        self, *names: str, trained: Sequence[str] = (), quantized: bool = True, lora: bool = True
    ) -> Iterator[tuple[Tracker, list[Role]]]:
        """The roles of these names on one base, those of `trained` with gradient and optimizer.

        Beside them, where rewards come from elsewhere, a model as large as the base.
        """
        words, roles = self.recipe.lora if lora else None, []
        dtype = torch.float32 if lora and words is None else self.dtype
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = Base(lambda _: self._load(dtype), words, self.dtype)
            for name in names:
                role = base.open(name, None, seed=0, trainable=name in trained, adapter=True)
                if name in ("reward", "value"):
                    role.add_head(models.new_head(role.lm, bias=True))
                    role.score.requires_grad_(name in trained)
                roles.append(role)
            if self.foreign_reward:
                roles.append(Role(self._load(self.dtype), None, self.dtype))
        bits = self.recipe.model.quantization if quantized else "none"
        if bits != "none":
            for layer in base._layers:  # PEFT has a way of its own beside packed weights
                layer.lora_variant.clear()
                layer.cast_input_dtype_enabled = True
        tracker = Tracker(self.vocabulary)
        with FakeTensorMode(), tracker, _attention(self.card), torch.random.fork_rng():
            self._fill(roles, bits, tracker)
            for name, role in zip(names, roles, strict=False):
                if name in trained:
                    self._learner(role, tracker)
            tracker.begin()
            yield tracker, roles

    def _load(self, dtype: torch.dtype) -> Any:
        lm = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        return lm.requires_grad_(False).eval()

    def _fill(self, roles: list[Role], bits: str, tracker: Tracker) -> None:
        """The tensors of the meta device become ones that count."""
        made: dict[nn.Parameter, nn.Parameter] = {}
        for role in roles:
            heads = {id(module) for module in (role.lm.get_output_embeddings(), role.score)}
            for name, module in role.named_modules():
                own = ADAPTERS if "lora_" in name or module is role.score else WEIGHTS
                for key, weight in module._parameters.items():
                    if weight is None or not weight.is_meta:
                        continue
                    if weight not in made:
                        packed = bits != "none" and type(module) is nn.Linear and own == WEIGHTS
                        if packed and id(module) not in heads:
                            filled = _packed(module, weight, bits, self.dtype)
                        else:
                            filled = torch.empty(weight.shape, dtype=weight.dtype)
                            filled = nn.Parameter(filled, weight.requires_grad)
                        tracker.move(filled, own)
                        made[weight] = filled
                    module._parameters[key] = made[weight]
                for key, buffer in module._buffers.items():
                    if buffer is not None and buffer.is_meta:
                        module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)

    def _learner(self, role: Role, tracker: Tracker) -> None:
        """Optimizer state and, where a step has several backwards, the gradients between them."""
        table = self.recipe.table(self.name)
        options = table.options
        states = STATES.get(options["optim"], 8)
        for weight in role.trainable():
            weight.data = weight.data.float()
            tracker.move(weight, ADAPTERS if role.adapter else WEIGHTS)
            held = [(OPTIMIZER, torch.empty(weight.numel() * states, dtype=torch.uint8))]
            if options["gradient_accumulation_steps"] > 1:
                weight.grad = torch.empty_like(weight)
                held.append((GRADIENTS, weight.grad))
            weight.register_post_accumulate_grad_hook(lambda w: tracker.move(w.grad, GRADIENTS))
            if table.extras.get("keep") == "best" and role.score is None:
                held.append((OPTIMIZER, torch.empty_like(weight)))  # the best so far
            for what, tensor in held:
                tracker.move(tensor, what)
                tracker.kept.append(tensor)
        if options["gradient_checkpointing"]:
            words = {"use_reentrant": False}
            role.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=words)
            role.lm.train()


def _packed(layer: nn.Linear, weight: nn.Parameter, bits: str, dtype: torch.dtype) -> nn.Parameter:
    """A linear layer's weight in 4 or 8 bit; it is unpacked where it is used, and let go of."""
    count = weight.numel() * (NF4 if bits == "4bit" else INT8)
    shape = weight.shape

    class Unpacked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
            return rows.to(dtype) @ torch.empty(shape, dtype=dtype).mT

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad @ torch.empty(shape, dtype=dtype)

    layer.forward = Unpacked.apply
    return nn.Parameter(torch.empty(math.ceil(count), dtype=torch.uint8), requires_grad=False)


@contextlib.contextmanager
def _attention(card: bool) -> Iterator[None]:
    """On an accelerator torch's own, which is also what counts where there is none here."""
    attention.use()
    longest, attention.LONGEST = attention.LONGEST, 0 if card else attention.LONGEST
    try:
        yield
    finally:
        attention.LONGEST = longest


# ---- the parts of stages


def ids_of(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, length, dtype=torch.long), torch.ones(rows, length, dtype=torch.long)


def learning(tracker: Tracker, loss: Callable[[], torch.Tensor]) -> Iterator[Held]:
    """Forward and backward."""
    tracker.begin()
    total = loss()
    yield tracker.most
    tracker.begin()
    total.backward()
    yield tracker.most


def training(
    sim: Sim, tracker: Tracker, role: Role, loss: Callable[[int], torch.Tensor], each: int = 1
) -> Iterator[Held]:
    """A step, of `each` sequences a row; and what is evaluated between the steps and after them."""
    rows = sim.options["per_device_train_batch_size"]
    yield from learning(tracker, lambda: loss(each * rows))
    role.lm.eval()
    for weight in role.lm.parameters():
        weight.grad = None
    tracker.kept = [tensor for tensor in tracker.kept if tensor.dtype == torch.uint8]
    tracker.begin()
    with torch.no_grad():
        loss(sim.options["per_device_eval_batch_size"])
    yield tracker.most


def sampling(tracker: Tracker, policy: Role, rows: int, lengths: Lengths) -> Iterator[Held]:
    """The prompts, and the last token of the longest answers."""

    def read(new: int, length: int, cache: Any = None) -> Any:
        words = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        ids, mask = ids_of(rows, new)[0], ids_of(rows, length)[1]
        with policy.active(), torch.no_grad():
            return policy.lm(input_ids=ids, attention_mask=mask, **words)

    def kept(cache: Any) -> list[torch.Tensor]:
        leaves = tree_leaves([vars(layer) for layer in cache.layers])
        return [tensor for tensor in leaves if isinstance(tensor, torch.Tensor)]

    tracker.begin()
    first = kept(read(lengths.prompt, lengths.prompt).past_key_values)
    tracker.rename(ACTIVATIONS, CACHE, sum(tensor.nbytes for tensor in first))
    del first
    yield tracker.most
    cache = read(lengths.row - 1, lengths.row - 1).past_key_values
    for tensor in kept(cache):
        tracker.move(tensor, CACHE)
    tracker.begin()
    logits = read(1, lengths.row, cache).logits[:, -1].float()
    torch.multinomial(torch.softmax(logits / 0.7, -1), 1)
    # A step writes keys and values anew, one layer after another.
    tracker.rename(ACTIVATIONS, CACHE, sum(tensor.nbytes for tensor in kept(cache)))
    yield tracker.most
