"""The processes that compute a stage together, and what they tell each other.

One process is a group of one, which sends nothing. A launcher (torchrun, accelerate launch) makes a
larger group, and `join` joins it. Every process comes to every call below, in the same order. No
torch in here before that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from rlhf_recipes.errors import StageError

if TYPE_CHECKING:
    import torch

Value = TypeVar("Value")
PATIENCE = timedelta(hours=1)  # for a process that computes alone what the others wait for
PART = 2**24  # numbers in one message of gradients
ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_FSDP": "FSDP"}


def join() -> None:
    """Join the group that a launcher made of this process, if it made one.

    Raises StageError where the launcher wants the model sharded.
    """
    for variable, engine in ENGINES.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            what = f"the launcher asks for {engine}: stages run with a whole model in each process"
            raise StageError(what, "use a configuration of accelerate without it, or torchrun")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and size() == 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def leave() -> None:
    """The last call of a process whose stage is done."""
    if size() > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def size() -> int:
    dist: Any = sys.modules.get("torch.distributed")
    return dist.get_world_size() if dist and dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return sys.modules["torch.distributed"].get_rank() if size() > 1 else 0


def share(items: Sequence[Value]) -> Sequence[Value]:
    """This process's part of a list: every n-th, since neighbours are of like length."""
    return items[rank() :: size()]


def at_once(most: int, count: int) -> int:
    """How many of `count` rows to compute together: at most `most`, some for each process."""
    return most if size() == 1 else max(1, min([*everyone(most), -(-count // size())]))


def everyone(value: Value) -> list[Value]:
    """What each process holds, by its number."""
    if size() == 1:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def first(does: Callable[[], Value]) -> Value:
    """What the first process makes of it. The others are told, and do nothing."""
    if size() == 1:
        return does()
    import torch.distributed as dist

    told = [does() if rank() == 0 else None]
    dist.broadcast_object_list(told, src=0)
    return told[0]  # type: ignore[return-value]


def any_of(flag: bool) -> bool:
    return any(everyone(flag))


def add(tensors: Sequence[torch.Tensor]) -> None:
    """Each tensor becomes its sum over the group."""
    if size() == 1:
        return
    import torch
    import torch.distributed as dist

    for some in _messages(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in some])
        dist.all_reduce(flat)
        for tensor, part in zip(some, flat.split([t.numel() for t in some]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _messages(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The tensors in order, cut where a message would be over PART numbers."""
    found: list[list[torch.Tensor]] = []
    for tensor in tensors:
        if not found or sum(t.numel() for t in found[-1]) + tensor.numel() > PART:
            found.append([])
        found[-1].append(tensor)
    return found


def add_gradients(weights: Sequence[torch.nn.Parameter], part: float = 1.0) -> None:
    """Each weight's gradient becomes its sum over the group, times `part`.

    A weight that has a gradient in no process keeps none.
    """
    if size() == 1:
        return
    import torch

    held = [weight.grad is not None for weight in weights]
    found = [
        weight
        for weight, has in zip(weights, zip(*everyone(held), strict=True), strict=True)
        if any(has)
    ]
    for weight in found:
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
    grads = [weight.grad for weight in found if weight.grad is not None]
    add(grads)
    for grad in grads if part != 1.0 else ():
        grad.mul_(part)


def check_same(weights: Sequence[torch.Tensor], when: str) -> None:
    """Raise StageError where the processes hold different weights: one learned apart."""
    if size() == 1:
        return
    import torch

    bits = [
        weight.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64) for weight in weights
    ]
    found = everyone(torch.stack(bits).tolist() if bits else [])
    if apart := [number for number, sums in enumerate(found) if sums != found[0]]:
        what = f"process {apart[0]} has other weights than process 0 {when}"
        raise StageError(what, "this is a bug in rlhf-recipes; please report it with the recipe")
