"""How answers are sampled: from a policy as it is, from a copy with merged adapters, or by vLLM.

A copy costs the memory of the layers that have adapters. A step of it is shorter: on a CPU, with
smoke's model and 64 rows, answers took 0.53 to 0.76 of the CPU time (LOG, 2026-11-27). On a card
its steps are compiled, with a cache of one size: there a step waits for launches.

The trainer reads each answer anew, so what a policy learns from never comes from here. How far the
two readings are apart is measured. A copy that is too far from its policy is let go of. A vLLM
server that is too far ends the stage.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import PreTrainedModel

from rlhf_recipes import group
from rlhf_recipes.errors import StageError
from rlhf_recipes.models.role import Role, logprobs
from rlhf_recipes.models.sampling import Ids, join, sample
from rlhf_recipes.models.vllm import Vllm

# Mean distance of a token's two log-probabilities. TF32 keeps ten bits.
APART = {torch.float32: 0.01, torch.bfloat16: 0.1, torch.float16: 0.1}
STEPS = 4_000  # of sampling, in a stage, from where on it is worth a minute of compiling
READ = 16  # of vLLM's answers, where no trainer reads them all
SHARE = 0.1  # of the distance at which vLLM is refused: beyond it the tokens are weighted


class Merged:
    """A policy's model with its adapters in its weights, as they were at the last `refresh`.

    Every weight that has no adapter is the policy's own.
    """

    def __init__(self, policy: Role):
        lm = policy.lm
        held = [*lm.parameters(), *lm.buffers()]
        self.lm = copy.deepcopy(lm, {id(tensor): tensor for tensor in held})
        self.layers: list[tuple[LoraLayer, nn.Linear]] = []
        for name, layer in policy.adapted():
            base = layer.get_base_layer()
            with torch.device(base.weight.device):
                linear = nn.Linear(1, 1, bias=False, dtype=policy.dtype)
            linear.weight = nn.Parameter(_merged(layer, policy), requires_grad=False)
            linear.in_features, linear.out_features = base.in_features, base.out_features
            linear.bias = base.bias
            self.lm.set_submodule(name, linear)
            self.layers.append((layer, linear))
        self.policy = policy
        self.role = Role(self.lm.eval(), None, torch.float32)  # no autocast: as it is stored

    @torch.no_grad()
    def refresh(self) -> None:
        for layer, linear in self.layers:
            linear.weight.copy_(_merged(layer, self.policy))


@torch.no_grad()
def _merged(layer: LoraLayer, policy: Role) -> torch.Tensor:
    whole = dequantize_module_weight(layer.get_base_layer()).float()
    return (whole + layer.get_delta_weight(policy.adapter).float()).to(policy.dtype)


class Sampler:
    """Samples from a policy that learns.

    Where a copy is asked for and fails, in whatever way, the policy itself is sampled; `tell` hears
    why. A card's steps are compiled where there are enough of `steps`, for prompts of at most
    `width` tokens. With an `engine`, all answers come from there.
    """

    def __init__(
        self,
        policy: Role,
        merge: bool = False,
        tell: Callable[[str], object] = lambda text: None,
        width: int = 0,
        steps: int = 0,
        engine: Vllm | None = None,
    ):
        self.policy, self.tell, self.engine = policy, tell, engine
        self.width, self.steps = width, steps
        self.copy: Merged | None = None
        self.static = False
        self.merge(merge)

    def merge(self, wanted: bool) -> None:
        """Have a copy, or none."""
        if wanted and self.copy is None and self.policy.merges():
            self.copy = Merged(self.policy)
        elif not wanted:
            self.copy = None
        self.static = self.steps >= STEPS and self.engine is None and compiles(self.role)

    @property
    def role(self) -> Role:
        return self.copy.role if self.copy else self.policy

    @property
    def told(self) -> str:
        """The choice, in a phrase."""
        if self.engine is not None:
            return self.engine.told
        how = "from a merged copy" if self.copy else "by the adapters"
        how = how if self.policy.adapter else "from the model itself"
        return how + ", its steps compiled" * self.static

    def limit(self) -> float:
        """Of the mean distance to the trainer's reading."""
        tf32 = self.policy.lm.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        dtypes = (torch.bfloat16,) if tf32 else (self.policy.dtype, self.policy.lm.dtype)
        return max(APART.get(dtype, 0.0) for dtype in dtypes)

    def far(self, apart: float) -> bool:
        """Whether the copy is let go of for this distance. Raises StageError where vLLM is."""
        if apart <= self.limit() or (self.copy is None and self.engine is None):
            return False
        if self.engine is not None:
            what = f"a token's log-probability is {apart:.2g} from the trainer's on average"
            what += f", over {self.limit():g}: it serves another model, or other numbers"
            raise StageError(f"vLLM at {self.engine.url}: {what}", f"as in: {self.engine.start}")
        self._without(f"its log-probabilities are {apart:.2g} from the trainer's")
        return True

    def sample(
        self, prompts: Sequence[Ids], *, picked: list[list[float]] | None = None, **words: Any
    ) -> list[list[int]]:
        """As `sampling.sample`. What is drawn does not depend on a copy, but for rounding."""
        if self.engine is not None:
            return self._elsewhere(prompts, picked, words)
        try:
            if self.copy is not None:
                self.copy.refresh()
            width = self.width if self.static else 0
            return sample(self.role, prompts, picked=picked, width=width, **words)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # A group would have to agree on it, and the other processes wait for answers.
            if (not self.static and self.copy is None) or group.size() > 1:
                raise
            why = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
            if self.static:
                self.static = False
                self.tell(f"sampling without compiled steps: {why}")
            else:
                self._without(why)
        if picked is not None:
            picked.clear()
        return self.sample(prompts, picked=picked, **words)

    @torch.no_grad()
    def _elsewhere(
        self, prompts: Sequence[Ids], picked: list[list[float]] | None, words: dict[str, Any]
    ) -> list[list[int]]:
        """By vLLM. Who does not ask for log-probabilities compares none: some are read here."""
        found = [] if picked is None else picked
        answers = self.engine.sample(prompts, picked=found, **words)
        if picked is None:
            heat, first = words["temperature"], slice(READ)
            rows = join(prompts[first], answers[first], words["pad"], self.policy.lm.device)
            with self.policy.active():
                read, _ = logprobs(self.policy, rows.ids, rows.mask, rows.answer, heat)
            self.far(apart(found, read))
        return answers

    def _without(self, why: str) -> None:
        self.merge(False)
        self.tell(f"sampling without a merged copy: {why}")


def apart(picked: list[list[float]], read: torch.Tensor) -> float:
    """Mean distance of a sampler's log-probabilities from the trainer's `read` [batch, R]."""
    rows = zip(picked, read.tolist(), strict=False)
    gaps = [abs(a - b) for mine, its in rows for a, b in zip(mine, its, strict=False)]
    return sum(gaps) / max(1, len(gaps))


def compiles(role: Role) -> bool:
    """Whether `generate` can decode with a cache of one size, and compile its steps."""
    lm: PreTrainedModel = role.lm
    return lm.device.type == "cuda" and role.adapter is None and lm._can_compile_fullgraph
