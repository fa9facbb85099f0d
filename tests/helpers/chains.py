"""Stages run by hand, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rlhf_recipes.models.base import Base
from rlhf_recipes.stages import contract
from rlhf_recipes.stages.contract import StageContext, StageResult
from rlhf_recipes.stages.session import Session


@dataclass
class Silent:
    """A Progress that keeps what it is told."""

    samples: list[tuple[str, str]] = field(default_factory=list)
    updates: list[dict[str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def update(self, done: int, total: int, **numbers: float) -> None:
        if numbers:
            self.updates.append(numbers)

    def resume(self, done: int) -> None:
        self.updates.clear()

    def sample(self, prompt: str, answer: str, **numbers: float) -> None:
        self.samples.append((prompt, answer))

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass
class Chain:
    """Runs stages by hand, each in a folder of its own."""

    recipe: Any
    folder: Path
    outputs: dict[str, Path] = field(default_factory=dict)
    progress: Silent = field(default_factory=Silent)

    def __post_init__(self) -> None:
        self.session = Session(self.recipe, {})

    def run(self, name: str, inputs: Mapping[str, str], kind: str | None = None) -> StageResult:
        folder = self.folder / name
        for part in ("work", "output"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        kind = kind or name
        given = {role: self.outputs[stage] for role, stage in inputs.items()}
        context = StageContext(name, kind, self.recipe, folder, given, self.progress, self.session)
        result = contract.module_of(kind).run(context)
        self.outputs[name] = folder / "output"
        return result

    def train(self) -> dict[str, StageResult]:
        return {
            "sft": self.run("sft", {}),
            "reward": self.run("reward", {"policy": "sft"}),
            "ppo": self.run("ppo", {"policy": "sft", "reward_model": "reward"}),
        }

    def all(self) -> dict[str, StageResult]:
        return self.train() | {"evaluation": self.evaluate({"sft": "sft", "ppo": "ppo"})}

    def evaluate(self, policies: Mapping[str, str], name: str = "evaluation") -> StageResult:
        inputs = {f"policy:{shown}": stage for shown, stage in policies.items()}
        return self.run(name, {**inputs, "reward_model": "reward"}, kind="evaluation")


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def differs(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    assert a.keys() == b.keys()
    return {name for name in a if not torch.equal(a[name], b[name])}


def base_weights(base: Base) -> dict[str, torch.Tensor]:
    named = base.lm.named_parameters()
    return {n.replace(".base_layer", ""): p.detach().clone() for n, p in named if "lora_" not in n}
