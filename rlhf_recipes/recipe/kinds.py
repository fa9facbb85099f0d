"""Every fact about a kind of stage, in one light place: no torch in here.

A new kind is its file under `stages/`, one `Kind` below, its fields in `tools/fields.toml`, the
files that `python -m tools.make_fields` writes, and its tests. The stage's module exports `run`,
`trial`, `work` and `memory` (and `answer_length` where the kind samples): see
`stages/contract.py`. No other module asks for a kind by its name where `makes`, `samples`,
`learns_from` or `roles` answers the question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_recipes.errors import UsageError
from rlhf_recipes.recipe.fields import Field, Keys, fields_of

LORA, BITSANDBYTES = "peft:LoraConfig", "transformers:BitsAndBytesConfig"
# Kinds and names of the stages that no recipe lists: [evaluation] asks for them.
JUDGE, EVALUATION, BEST_OF = "judge", "evaluation", "best_of"
REWARD = "reward"  # whose table the judge's settings are in, where no stage makes a reward model
# What serves a role: a stage whose kind makes this.
ROLES = {
    "policy": "policy",
    "reward_model": "reward_model",
    "reference": "policy",
    "against": "policy",
    "answers": "answers",
}
# Roles that nothing serves unless the recipe names it.
NAMED = ("reference", "against")
FROM_DATASET = "dataset"  # what `pairs` calls the rows of [dataset]


@dataclass(frozen=True)
class Kind:
    name: str
    version: int  # goes up when the same settings would give another result
    module: str  # it describes the stage: see stages/contract.py
    config: str  # whose fields the stage's table passes on; "": no recipe has a table of the kind
    makes: str  # policy | reward_model | answers | judgements | numbers
    # answers | pairs | labels | feedback | judge_feedback | prompts | every_prompt | test_prompts;
    # "" where it reads no rows
    learns_from: str
    roles: tuple[str, ...] = ("policy",)  # of ROLES
    wants: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # a role only where key = …
    samples: bool = False  # asks a policy for answers
    extras: Keys = field(default_factory=dict)  # our own keys, each with its effect on the result
    listed: bool = True  # a recipe's `stages` may name it
    reads: tuple[str, ...] = ()  # the keys of [evaluation] that determine its result
    # What its config calls a setting that PPO has under another name.
    calls: Mapping[str, str] = field(default_factory=dict)
    borrows: tuple[str, ...] = ()  # keys of the last policy that samples, where `reads` has none

    @property
    def compares(self) -> bool:
        """Whether judgements of `label` stages before it are among the rows that it learns from."""
        return self.learns_from in ("pairs", "labels", "feedback", "judge_feedback")

    @property
    def explores(self) -> bool:
        """Whether it trains a policy on answers that this policy samples: PPO and its kin."""
        return self.samples and self.makes == "policy"


@dataclass(frozen=True)
class Limits:
    """`[ppo.guard]`. Over-optimised policies were seen at a KL of 50 to 85 (arXiv 2403.17031)."""

    max_kl: float = field(default=25.0, metadata={"range": "above 0", "effect": "result"})  # nats
    # Shares of the first update's: entropy a token, and mean length.
    min_entropy: float = field(default=0.1, metadata={"range": "from 0 to 1", "effect": "result"})
    min_length: float = field(default=0.2, metadata={"range": "from 0 to 1", "effect": "result"})
    # In units of the reward.
    max_score_drop: float = field(default=1.5, metadata={"range": "above 0", "effect": "result"})


MINIMUM_ACCURACY = 0.55  # on test pairs, for a policy to train against a reward model
_RATE = Field(("float",), range="above 0")  # None: the stage's learning_rate
_ACCURACY = Field(("float",), MINIMUM_ACCURACY, range="from 0 to 1", effect="neutral")
_ON_POLICY: Keys = {
    "rewards": Field(("list[str | dict]",), effect="source"),  # recipe/rewards.py
    "keep": Field(("str",), "best", choices=("best", "last")),
    # None: as the reward stage has it, MINIMUM_ACCURACY of a model from elsewhere.
    "minimum_accuracy": replace(_ACCURACY, default=None),
    "guard": fields_of(Limits),
}
_PPO: Keys = {
    "value_learning_rate": _RATE,
    "value_warmup_epochs": Field(("int",), 0, range="at least 0"),
    **_ON_POLICY,
}
# None: the rows of [dataset], and the judgements of every `label` before.
_PAIRS: Keys = {"pairs": Field(("list[str]",), effect="source")}
_PENALTY = Field(("float",), 1.0, range="at least 0")  # else it learns to talk until cut off
_COUNT = Field(("int",), range="at least 1")
_SAMPLE: Keys = {
    "prompts": replace(_COUNT, default=400),
    "skip": Field(("int",), 0, range="at least 0"),
    "answers": Field(("int",), 2, range="at least 1"),
    # None: as the next stage that explores has them.
    "temperature": Field(("float",), range="above 0"),
    "response_length": _COUNT,
    # "unsure": training pairs that a reward model is least sure of come first.
    "choose": Field(("str",), "all", choices=("all", "unsure")),
    "count": _COUNT,  # of the items, of each side in proportion; None: all
}
_LABEL: Keys = {
    "by": Field(("str",), "people", choices=("people", "model", "rule")),
    "rule": Field(("str", "dict"), effect="source"),  # as a judge of [evaluation]
    # by = "model": a folder or hub id; with `url`, that server's name for it. `principles`: a file.
    "model": Field(("str",), effect="source"),
    "url": Field(("str",), effect="neutral"),
    "principles": Field(("str",), effect="source"),
    "question": Field(("str",)),
    "reasons": Field(("bool",), False),
    "samples": Field(("int",), 1, range="at least 1"),
    "tie": Field(("float",), 0.1, range="at least 0 and below 1"),
    "people": Field(("int",), 0, range="at least 0"),  # items that people judge first
    "minimum_agreement": Field(("float",), range="from 0 to 1", effect="neutral"),
    "budget": Field(("float",), range="above 0", effect="neutral"),
    "price": Field(("list[float]",), effect="neutral"),
    "concurrency": Field(("int",), 8, range="at least 1", effect="neutral"),
    # Judgements of the training and of the test side that people have to make before it ends.
    "minimum": Field(("int",), 100, range="at least 1", effect="neutral"),
    "minimum_test": Field(("int",), 20, range="at least 0", effect="neutral"),
    "votes": Field(("int",), 1, range="at least 1", effect="neutral"),
    "guideline": Field(("str",), effect="neutral"),
    "strength": Field(("bool",), False, effect="neutral"),
}
_REWARD = Kind(
    REWARD,
    version=8,
    module="rlhf_recipes.stages.reward",
    config="trl:RewardConfig",
    makes="reward_model",
    learns_from="feedback",  # pairs, rankings and labels
    extras={
        "head_learning_rate": _RATE,
        "minimum_accuracy": _ACCURACY,
        "use_margin": Field(("bool",), False),
        **_PAIRS,
    },
)
_EVALUATION = Kind(
    EVALUATION,
    version=7,
    module="rlhf_recipes.stages.evaluate",
    config="",
    makes="numbers",
    learns_from="test_prompts",
    samples=True,
    listed=False,
    reads=("prompts", "response_length", "temperature"),
)

_RLOO = Kind(
    "rloo",
    version=1,
    module="rlhf_recipes.stages.rloo",
    config="trl:RLOOConfig",
    makes="policy",
    learns_from="prompts",
    roles=("policy", "reward_model", "reference"),
    samples=True,
    extras={**_ON_POLICY, "missing_eos_penalty": _PENALTY},
    calls={
        "response_length": "max_completion_length",
        "kl_coef": "beta",
        "cliprange": "epsilon",
        "num_ppo_epochs": "num_iterations",
        "local_rollout_forward_batch_size": "per_device_eval_batch_size",
    },
)

KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "sft",
            version=5,
            module="rlhf_recipes.stages.sft",
            config="trl:SFTConfig",
            makes="policy",
            learns_from="answers",
        ),
        _REWARD,
        Kind(
            "ppo",
            version=5,
            module="rlhf_recipes.stages.ppo.trainer",
            config="rlhf_recipes.stages.ppo.config:PPOConfig",
            makes="policy",
            learns_from="prompts",
            roles=("policy", "reward_model", "reference"),
            samples=True,
            extras=_PPO,
        ),
        Kind(
            "dpo",
            version=5,
            module="rlhf_recipes.stages.dpo",
            config="trl:DPOConfig",
            makes="policy",
            learns_from="pairs",
            roles=("policy", "reference"),
            extras=_PAIRS,
        ),
        Kind(
            "kto",
            version=4,
            module="rlhf_recipes.stages.kto",
            config="trl:KTOConfig",
            makes="policy",
            learns_from="labels",
            roles=("policy", "reference"),
            extras=_PAIRS,
        ),
        _RLOO,
        replace(
            _RLOO,
            name="grpo",
            module="rlhf_recipes.stages.grpo",
            config="trl:GRPOConfig",
        ),
        Kind(
            "sample",
            version=2,
            module="rlhf_recipes.stages.sample",
            config="",
            makes="answers",
            learns_from="every_prompt",
            roles=("policy", "against", "reward_model"),
            wants={"reward_model": ("choose", "unsure")},
            samples=True,
            extras=_SAMPLE,
            borrows=("response_length", "temperature"),
        ),
        Kind(
            "label",
            version=1,
            module="rlhf_recipes.stages.label",
            config="",
            makes="judgements",
            learns_from="",
            roles=("answers",),
            extras=_LABEL,
        ),
        replace(
            _REWARD, name=JUDGE, version=9, learns_from="judge_feedback", roles=(), listed=False
        ),
        _EVALUATION,
        replace(
            _EVALUATION,
            name=BEST_OF,
            version=5,
            module="rlhf_recipes.stages.best_of",
            reads=(*_EVALUATION.reads, "best_of"),
            borrows=("missing_eos_penalty",),
        ),
    )
}


def kind_of(name: str) -> Kind:
    """Raises UsageError for a kind that this version does not know."""
    if name not in KINDS:
        known = f"this version knows {', '.join(KINDS)}"
        raise UsageError(f"{name!r} is not a kind of stage", known)
    return KINDS[name]


def listed() -> list[str]:
    """The kinds that a recipe's `stages` may name."""
    return [name for name, kind in KINDS.items() if kind.listed]


def makes(kind: str, what: str) -> bool:
    """Whether stages of this kind make a policy, a reward model or numbers; no for any unknown.

    For manifests: an older or newer version may have written them.
    """
    return kind in KINDS and KINDS[kind].makes == what


def extras_of(kind: Kind, written: Mapping[str, Any], learning_rate: float) -> dict[str, Any]:
    """The kind's own keys as written, else their defaults; rates default to `learning_rate`."""
    found: dict[str, Any] = {}
    for key, one in kind.extras.items():
        if isinstance(one, Field):
            found[key] = written.get(key, learning_rate if one is _RATE else one.default)
        else:
            inner = {name: f.default for name, f in one.items() if isinstance(f, Field)}
            found[key] = inner | written.get(key, {})
    return found
