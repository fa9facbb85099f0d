"""What must hold before a policy's first step: it reads its answers as it did when it sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from rlhf_recipes.errors import StageError
from rlhf_recipes.models.role import Role
from rlhf_recipes.stages.ppo.losses import Rollout, Rows

# What rounding may do to the policy's reading of its own answers in another batch shape: the most
# of an approxkl, and of the share of tokens that are clipped; and of one log-probability.
ROUNDING = {torch.float32: (1e-6, 1e-3), torch.bfloat16: (0.02, 0.5), torch.float16: (1e-3, 0.1)}
REPORT = "this is a bug in rlhf-recipes; please report it with the recipe"


def rounding(policy: Role) -> tuple[float, float]:
    """Of ROUNDING. Products of 8 bit hang on who shares them, and TF32 keeps ten bits."""
    tf32 = policy.lm.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
    coarse = tf32 or getattr(policy.lm, "is_loaded_in_8bit", False)
    return ROUNDING[torch.bfloat16 if coarse else policy.dtype]


def reference(policy: Role, rollout: Rollout) -> None:
    """At the first update policy and reference are one: their KL is 0, but for rounding."""
    apart = ((rollout.logprobs - rollout.ref_logprobs) * rollout.mask).abs().max().item()
    if apart > rounding(policy)[1]:
        what = f"log-probs differ by {apart} at the first update"
        raise StageError(
            f"the reference is not the policy that the stage starts from: {what}", REPORT
        )


def unmoved(
    step: Mapping[str, Any],
    policy: Role,
    rows: Rows,
    reread: Callable[[bool, Rows], None],
    whole_answers: bool = False,
) -> None:
    """Before its first step the policy reads its answers as it did when it sampled them.

    `reread(learning, rows)` has it read them as it learns, or as it samples. Where `whole_answers`
    are clipped, their share says nothing: rounding adds up over an answer's tokens.
    """
    kl, clipped = (float(step[f"policy/{name}_avg"]) for name in ("approxkl", "clipfrac"))
    most = max(kl, 0.0 if whole_answers else clipped)
    if most > rounding(policy)[0]:  # what is not a number is the guard's to say
        what = "the policy gives its answers other probabilities in learning than in sampling"
        numbers = f"approxkl {kl:.2g}, {clipped:.0%} clipped before the first step"
        raise StageError(f"{what}: {numbers}; {_first_apart(policy, rows, reread)}", REPORT)


def _first_apart(policy: Role, rows: Rows, reread: Callable[[bool, Rows], None]) -> str:
    """The first module whose output in training is not that of a rollout."""
    outputs: list[dict[str, torch.Tensor]] = []
    for learning in (True, False):
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str, out: Any, seen: dict[str, torch.Tensor] = seen) -> None:
            out = out[0] if isinstance(out, tuple) else out
            if isinstance(out, torch.Tensor):
                seen.setdefault(name, out.float())

        hooks = [
            module.register_forward_hook(lambda _, __, out, name=name, keep=keep: keep(name, out))
            for name, module in policy.lm.named_modules()
        ]
        reread(learning, rows)
        for hook in hooks:
            hook.remove()
        outputs.append(seen)
    differ = (n for n, out in outputs[1].items() if not torch.allclose(out, outputs[0][n]))
    return f"the first module that differs is {next(differ, 'none, asked again')}"
