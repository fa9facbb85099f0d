"""The text of the recipe that `init` writes: settings, each with a comment that is true of it."""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_recipes.pipeline.look import Looked
from rlhf_recipes.recipe.fields import fields_for
from rlhf_recipes.recipe.kinds import kind_of
from rlhf_recipes.recipe.rewards import RULES
from rlhf_recipes.stats import wilson
from rlhf_recipes.text import plain

TESTED, FEWEST_TESTED, MOST_TESTED = 200, 0.02, 0.25  # prompts, and shares of all
ASKED = 256  # most prompts of the evaluation: more cost time, and little is won
VALIDATED = 30  # fewer prompts choose the best policy by luck
STEPS = 60  # of a trained stage, at least: else it reads its rows twice
ANSWER = 128  # tokens, where the file has no answers
AT_ONCE = 8  # rows: more keep a device hardly busier, and take memory
ROOM = 1.25  # times the longest answer
WIDTH, MARGIN = 100, 34
TITLES = {"sft": "SFT", "reward": "reward model"}


@dataclass(frozen=True)
class Rates:
    """Settings that go by the number of weights, and the recipe that they are from."""

    weights: float  # up to
    sft: float
    reward: float
    sampled: float  # PPO, RLOO, GRPO
    kl_coef: float
    offline: float  # DPO, KTO
    source: str
    only: tuple[str, ...] = ()  # the kinds of stage that the source has; none: all

    def why(self, kind: str) -> str:
        return self.source if not self.only or kind in self.only else UNMEASURED


UNMEASURED = "not measured at this size"
AT_1M = "as in `methods`, measured at a million weights"
AT_135M = "about as in `chat`, measured at 135 million weights"
RATES = (
    Rates(20e6, 1e-3, 1e-3, 1e-3, 0.2, 1e-3, AT_1M),
    Rates(400e6, 1e-4, 1e-4, 1e-4, 0.1, 5e-5, AT_135M, ("sft", "reward", "ppo")),
    Rates(math.inf, 2e-4, 1e-4, 5e-5, 0.1, 2e-5, UNMEASURED),
)


class Sizes:
    """What follows from the model's size."""

    def __init__(self, weights: int | None, method: str) -> None:
        self.weights, self.method = weights, method
        self.rates = next(one for one in RATES if (weights or math.inf) <= one.weights)

    @property
    def tiny(self) -> bool:
        return self.weights is not None and self.weights <= RATES[0].weights


Settings = dict[str, Any]


@dataclass
class Plans:
    """All that the recipe's text is made from."""

    looked: Looked
    sizes: Sizes
    here: bool  # whether lengths are those of the model's own tokenizer
    card: bool
    given: float | None  # bytes of the card that is named
    config: Any
    memory: str = ""  # whose memory the batch sizes are for
    tested: int | None = None  # prompts, counted
    trained: int | None = None
    validated: int | None = None
    changes: Settings = field(default_factory=dict)  # "ppo.…" = …, in place of the first choice

    def change(self, changes: Mapping[str, Any]) -> None:
        self.changes |= {k: True if v == "true" else v for k, v in changes.items()}

    def lost(self, changes: Mapping[str, Any]) -> float:
        """The share of rows that lower limits would drop."""
        over = [
            length > changes.get(f"dataset.max_{what}_tokens", math.inf)
            for what in ("prompt", "answer")
            for length in _lengths(self, what)
        ]
        return sum(over) / self.looked.used

    @property
    def stages(self) -> list[str]:
        kind, found = kind_of(self.sizes.method), []
        if self.looked.holds != "prompts":
            found.append("sft")
        if self.scored:
            found.append("reward")
        return [*found, kind.name] if kind.name not in found else found

    @property
    def scored(self) -> bool:
        """Whether a reward model is trained, rather than a rule written."""
        needs = "reward_model" in kind_of(self.sizes.method).roles
        return needs and self.judged

    @property
    def judged(self) -> bool:
        return self.looked.holds in ("pairs", "labels")


# ---- the whole


def bare(file: Path, model: str) -> str:
    """Enough to open the model and the rows."""
    return (
        f'stages = ["sft"]\n[model]\nname = {_toml(model)}\n[dataset]\npath = {_toml(str(file))}\n'
    )


def recipe(plans: Plans, model: str, called: str, file: str) -> str:
    stages = plans.stages
    tables: dict[str, list[tuple[str, Any, str]]] = {
        "": [
            ("title", f"{plain(Path(file).name)}: {plain(called)} by {_called(stages[-1])}", ""),
            ("stages", stages, "in this order; the evaluation closes"),
            ("seed", 42, "another seed gives another policy"),
        ],
        "model": _model(plans, model),
        "dataset": _dataset(plans, file),
        **{name: _stage(plans, name) for name in stages},
        "evaluation": _evaluation(plans),
    }
    for key, value in plans.changes.items():
        table, _, name = key.partition(".")
        known = [row[0] for row in tables[table]]
        if name not in known:
            tables[table].append((name, value, "so that it fits"))
    parts = [_header(plans, file)]
    for table, rows in tables.items():
        lines = [f"[{table}]"] if table else []
        for name, value, why in rows:
            value = plans.changes.get(f"{table}.{name}", value)
            lines += _line(name, value, why or _why(plans, name, value))
        parts.append("\n".join(lines))
    return "\n\n".join(parts).replace("\n\n", "\n", 1) + "\n"


def _header(plans: Plans, file: str) -> str:
    looked, made = plans.looked, " → ".join(map(_called, plans.stages))
    what = {
        "pairs": "pairs of a better and a worse answer",
        "labels": "answers that are called good or bad",
        "answers": "prompts with an answer each",
        "prompts": "prompts alone",
    }[looked.holds]
    said = [
        f"Written by `rlhf-recipes init` from {Path(file).name}: {looked.used:,} of its "
        f"{looked.rows:,} rows can be used, as {what}, to {len(looked.asked):,} different prompts.",
        f"Stages: {made}, then the evaluation.",
    ]
    if plans.memory:
        said.append(f"Batch sizes: by the memory rule, for {plans.memory}.")
    if not plans.here:
        said.append(
            "The model was not on this machine: lengths are estimated at three characters a token."
            + ("" if plans.memory else " Batch sizes are small ones that fit most machines.")
            + " After `rlhf-recipes fetch`, init writes exact ones."
        )
    said.append("Nothing here has been run. `rlhf-recipes plan` says what it takes.")
    lines = [line for one in said for line in textwrap.wrap(one, WIDTH - 2)]
    return "\n".join(f"# {plain(line)}" for line in lines)


def _called(stage: str) -> str:
    return TITLES.get(stage, stage.upper())


# ---- tables


def _model(plans: Plans, model: str) -> list[tuple[str, Any, str]]:
    rows: list[tuple[str, Any, str]] = [("name", model, "")]
    if plans.sizes.tiny:
        rows.append(("dtype", "float32", "so small that a 16-bit dtype would save nothing"))
    elif plans.given is not None:
        rows.append(("dtype", "bfloat16", "cards from Ampere on compute in it"))
    return rows


def _dataset(plans: Plans, file: str) -> list[tuple[str, Any, str]]:
    looked, count = plans.looked, len(plans.looked.asked)
    rows: list[tuple[str, Any, str]] = [("path", file, "")]
    if looked.columns:
        rows.append(("columns", looked.columns, "ours = the file's: see that they are right"))
    rows += [(f"max_{what}_tokens", _limit(plans, what), "") for what in ("prompt", "answer")]
    share = min(MOST_TESTED, max(FEWEST_TESTED, math.ceil(100 * TESTED / count) / 100))
    rows.append(("test_fraction", share, "of the prompts: for the evaluation alone"))
    return rows


def _stage(plans: Plans, name: str) -> list[tuple[str, Any, str]]:
    kind, rates = kind_of(name), plans.sizes.rates
    if kind.explores:
        return _sampled(plans, name)
    rate = rates.sft if name == "sft" else rates.reward
    if name == plans.sizes.method and name != "sft":
        rate = rates.offline
    rows = _rows(plans, name)
    batch = 16 if rows >= 2000 else 8
    epochs = 1 if rows / batch >= STEPS else 2
    what = "pairs" if kind.learns_from == "pairs" or plans.looked.holds == "pairs" else "answers"
    what = "answers" if name == "sft" else what
    steps = f"about {math.ceil(rows / batch) * epochs:,} steps in all, over {rows:,} {what}"
    return [
        ("learning_rate", rate, rates.why(name)),
        ("num_train_epochs", epochs, steps),
        *_batch(plans, batch, what, "a step"),
    ]


def _rows(plans: Plans, name: str) -> int:
    """About how many rows a stage learns from: the judge has a quarter of those that judge."""
    trained = plans.trained or round(0.95 * plans.looked.used)
    return round(0.75 * trained) if plans.judged else trained


def _batch(plans: Plans, batch: int, what: str, each: str) -> list[tuple[str, Any, str]]:
    # KTO takes its KL from the answers that are in memory together.
    least = 4 if plans.sizes.method == "kto" else 1
    rows = least if plans.config is None else min(batch, 64 if plans.sizes.tiny else AT_ONCE)
    return [
        ("per_device_train_batch_size", rows, f"{what} in memory at once"),
        ("gradient_accumulation_steps", batch // rows, f"× the line above: {what} {each}"),
        ("gradient_checkpointing", plans.config is None, ""),
    ]


def _sampled(plans: Plans, name: str) -> list[tuple[str, Any, str]]:
    kind, rates = kind_of(name), plans.sizes.rates
    fields = fields_for(kind.config)
    update, updates = (64, 100) if plans.card else (32, 40)
    rows: list[tuple[str, Any, str]] = []
    if not plans.scored:
        rows.append(("rewards", _rules(plans), PLACEHOLDER))
    if "num_generations" in fields:
        rows += [
            ("num_generations", 4, "answers to a prompt, compared with one another"),
            ("generation_batch_size", update, "answers an update"),
            ("max_steps", 2 * updates, f"of the optimizer, two an update: {updates} updates"),
            *_batch(plans, update // 2, "answers", "an optimizer step"),
        ]
    else:
        rows += [
            ("total_episodes", updates * update, f"answers in all: {updates} updates of {update}"),
            *_batch(plans, update, "answers", "an update"),
            ("num_ppo_epochs", 2, "passes over an update's answers"),
            ("num_mini_batches", 2, "optimizer steps a pass"),
        ]
    rows += [
        (kind.calls.get("response_length", "response_length"), _response(plans), ROOM_WHY),
        ("temperature", 1.0 if plans.sizes.tiny else 0.7, "of the samples, here and in the test"),
        ("learning_rate", rates.sampled, rates.why(name)),
        (
            kind.calls.get("kl_coef", "kl_coef"),
            rates.kl_coef,
            "the price of a nat: more stays closer",
        ),
    ]
    if (few := _validated(plans)) < VALIDATED:
        about = "about " if plans.validated is None else ""
        why = f"{about}{few} validation prompts are too few to choose the best policy by"
        rows += [("keep", "last", why), ("eval_strategy", "no", "so they are not asked")]
    return rows


PLACEHOLDER = f"a placeholder: write here what a good answer is, by {', '.join(RULES)}"
ROOM_WHY = "tokens; a quarter beyond the longest answer: room to learn to end"


def _rules(plans: Plans) -> list[dict[str, Any]]:
    return [{"rule": "words", "at_most": 40}, {"rule": "repetition", "ngram_size": 3}]


def _evaluation(plans: Plans) -> list[tuple[str, Any, str]]:
    tested = plans.tested or round(_share(plans) * len(plans.looked.asked))
    rows: list[tuple[str, Any, str]] = [("prompts", max(1, min(ASKED, tested)), "")]
    if not kind_of(plans.stages[-1]).explores:
        rows.append(("response_length", _response(plans), ROOM_WHY))
    if plans.judged:
        rows.append(("judge", "independent", "a second reward model, trained on other pairs"))
    elif kind_of(plans.stages[-1]).explores:
        rows.append(("judge", _rules(plans)[0], "the same placeholder: write another, if you can"))
    return rows


# ---- numbers


def _share(plans: Plans) -> float:
    rows = {name: value for name, value, _ in _dataset(plans, "")}
    return rows["test_fraction"]


def _validated(plans: Plans) -> int:
    expected = round(0.05 * len(plans.looked.asked))
    return expected if plans.validated is None else plans.validated


def _lengths(plans: Plans, what: str) -> list[int]:
    return sorted(plans.looked.prompts if what == "prompt" else plans.looked.answers)


def _limit(plans: Plans, what: str) -> int:
    """The longest row's, in eights; where few are much longer than all others, without those."""
    lengths = _lengths(plans, what)
    most, usual = lengths[-1], lengths[int(0.98 * (len(lengths) - 1))]
    if most <= 1:  # prompts alone
        most = usual = ANSWER
    limit = 8 * math.ceil((most if most <= 1.5 * usual else usual) / 8)
    positions = getattr(plans.config, "max_position_embeddings", None) or math.inf
    share = 0.5 if what == "prompt" else 0.5 / ROOM
    return int(min(limit, max(8, positions * share)))


def _response(plans: Plans) -> int:
    answer = plans.changes.get("dataset.max_answer_tokens", _limit(plans, "answer"))
    return 4 * math.ceil(ROOM * answer / 4)


# ---- comments and lines


def _why(plans: Plans, name: str, value: Any) -> str:
    """What to say of a setting whose comment goes by its value."""
    if name == "gradient_checkpointing":
        if value:
            return "recomputes activations: slower, and much smaller"
        return "it fits without; true takes less memory and more time"
    if found := re.fullmatch(r"max_(prompt|answer)_tokens", name):
        lengths = _lengths(plans, found[1])
        over, about = sum(n > value for n in lengths), "" if plans.here else "about "
        if lengths[-1] <= 1:
            return "no answers in the file to go by"
        said = f"the longest {found[1]} has {about}{lengths[-1]}"
        return said + (
            f"; {over:,} of {len(lengths):,} rows are longer and dropped" if over else ""
        )
    if name == "prompts":
        low, high = wilson(0.5, value)
        of = "the whole test side" if plans.tested == value else "of the test side"
        return f"{of}: a win rate of 50 % is right to ±{100 * (high - low) / 2:.0f} points"
    return ""


def _line(name: str, value: Any, why: str) -> list[str]:
    written = f"{name} = {_toml(value)}"
    if not why:
        return [written]
    first = max(MARGIN, len(written) + 2)
    lines = textwrap.wrap(plain(why), max(WIDTH - first - 2, 30))
    if first > 56:
        return [*(f"# {line}" for line in textwrap.wrap(plain(why), WIDTH - 2)), written]
    return [f"{written:<{first}}# {lines[0]}", *(f"{'':<{first}}# {line}" for line in lines[1:])]


def _toml(value: Any) -> str:
    if isinstance(value, float):
        short = re.sub(r"e-0?", "e-", f"{value:.0e}")
        return short if value < 0.01 and float(short) == value else repr(value)
    if isinstance(value, Mapping):
        return f"{{ {', '.join(f'{k} = {_toml(v)}' for k, v in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)
