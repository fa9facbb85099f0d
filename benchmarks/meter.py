"""Seconds, bytes and numbers of a PPO run, taken at the end of each update, alike on every side."""

from __future__ import annotations

import gc
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class Meter:
    """Made once all is imported and before anything is loaded; writes at the last update."""

    def __init__(self, file: Path):
        self.file = file
        self.imported = peak_bytes()
        self.ends = [time.perf_counter()]
        self.updates: list[dict[str, float]] = []

    def update_ended(self, last: bool, **numbers: float) -> None:
        self.ends.append(time.perf_counter())
        self.updates.append(numbers)
        if last:
            self.file.write_text(json.dumps(self.found(), indent=2))

    def found(self) -> dict[str, Any]:
        ends = self.ends
        return {
            "loading_and_first_update": ends[1] - ends[0],
            "seconds": [b - a for a, b in zip(ends[1:], ends[2:], strict=False)],
            **held_bytes(),
            "peak_bytes": peak_bytes(),
            "peak_bytes_after_imports": self.imported,
            "gpu_peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
            "gpu_reserved_bytes": (
                torch.cuda.max_memory_reserved() if torch.cuda.is_available() else 0
            ),
            "threads": torch.get_num_threads(),
            "updates": self.updates,
        }


class MeterCallback(TrainerCallback):
    """A meter for TRL's PPOTrainer, which ends each update with `on_log`, then `on_step_end`."""

    def __init__(self, file: str):
        self.meter = Meter(Path(file))
        self.logged: dict[str, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logged = logs

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.meter.update_ended(state.global_step == state.max_steps, **self.logged)


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def held_bytes() -> dict[str, int]:
    """Bytes of all live parameters, buffers and optimizer states, each storage counted once.

    Found among all live objects, so that nothing a side keeps is left out. `type(thing)`, for lazy
    modules answer `isinstance` by importing themselves.
    """
    weights: dict[int, int] = {}
    states: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.nn.Module):
            _add(weights, [*thing._parameters.values(), *thing._buffers.values()])
        elif issubclass(type(thing), torch.optim.Optimizer):
            for state in thing.state.values():
                _add(states, state.values())
    return {"weights_bytes": sum(weights.values()), "optimizer_bytes": sum(states.values())}


def _add(sizes: dict[int, int], values: Any) -> None:
    for value in values:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
