"""What a run left on disk, as one object: all that the verdict, the report and the card look at.

Any file may be missing or damaged: a run that failed, an older version's, a stage cleaned away.
What cannot be read is empty, and nothing here raises for it.
"""

from __future__ import annotations

import contextlib
import json
import math
import tomllib
from pathlib import Path
from statistics import fmean
from typing import Any

from rlhf_recipes.recipe.kinds import KINDS, makes
from rlhf_recipes.recipe.rewards import Term, terms
from rlhf_recipes.stats import Share, wilson
from rlhf_recipes.store import files, layout, locks

Json = dict[str, Any]
SCORES = {"scores": "score", "judged": "judge", "judged2": "2nd judge"}  # in answers.jsonl
PEOPLE = "people.json"  # in a run's folder: what people said of its evaluation
SMALL = 30  # cases: a bootstrap of fewer is too sure of itself
TYPES = {
    **dict.fromkeys(("stages", "overrides", "margins", "calibration", "worst", "points"), list),
    **dict.fromkeys(("error", "versions", "hardware", "dropped", "results", "agreement"), dict),
}


class Stage:
    """A stage of a run. Raises KeyError and TypeError for a damaged `entry` of the manifest."""

    def __init__(self, entry: Json, runs: Path) -> None:
        self.name, self.kind = str(entry["name"]), str(entry["kind"])
        self.did = str(entry.get("outcome", ""))  # "ran", "cached" or "not run"
        self.folder = layout.entry_folder(runs, entry)
        record = layout.read_record(self.folder) or {}  # empty where the stage is not complete
        self.record = record if record.get("key") == entry.get("key") else {}
        self.data = _json(self.folder / "data.json")  # what became of its rows
        self.curve = lines(self.folder / "metrics.jsonl")
        self.evidence = _json(self.folder / "output" / "evidence.json")  # of a reward model
        self.labels = _json(self.folder / "output" / "curve.json")  # what more labels gave it

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a number that it told of as it went."""
        found = [(number(row, "step"), number(row, key)) for row in self.curve]
        kept = [(x, y) for x, y in found if x is not None and y is not None]
        return [x for x, _ in kept], [y for _, y in kept]


class Facts:
    """What is to be had of a run; its manifest is there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, _json(folder / layout.MANIFEST)
        self.recipe: Json = {}  # every key with its value
        with contextlib.suppress(OSError, ValueError, RecursionError):
            self.recipe = tomllib.loads((folder / "resolved.toml").read_text(encoding="utf-8"))
        self.results = _json(folder / "results.json")
        self.stages: list[Stage] = []
        for entry in self.manifest.get("stages", []):
            with contextlib.suppress(KeyError, TypeError):
                self.stages.append(Stage(entry, folder.parent))
        outputs = {stage.kind: stage.folder / "output" for stage in self.stages if stage.record}
        self.answers = lines(outputs.get("evaluation", folder) / "answers.jsonl")
        # They count for the evaluation that they name: another one's answers may be others.
        people, keys = _json(folder / PEOPLE), [one.record.get("key") for one in self.stages]
        self.people = people if people.get("evaluation") in keys else {}
        self.results |= self.people.get("results", {})
        self.best_of = _json(outputs.get("best_of", folder) / "best_of.json")

    def number(self, key: str) -> float | None:
        return number(self.results, key)

    def share(self, key: str, count: str) -> Share | None:
        """A share of the results with its interval: the one that was measured, or Wilson's."""
        value, of = self.number(key), self.number(count)
        if value is None or not of or not 0 <= value <= 1:
            return None
        low, high = self.number(f"{key}_low"), self.number(f"{key}_high")
        least, most = wilson(value, int(of))
        if low is None or high is None:
            low, high = least, most
        elif of < SMALL or low == high:
            low, high = min(low, least), max(high, most)
        return Share(value, low, high, int(of))

    def within_prompts(self, one: str, other: str) -> tuple[float | None, int]:
        """The correlation of two kinds of score of the answers, each less its prompt's mean.

        With the number of prompts that have both scores of two answers or more.
        """
        xx = yy = xy = 0.0
        prompts = 0
        for row in self.answers:
            told, also = row.get(one), row.get(other)
            if not isinstance(told, dict) or not isinstance(also, dict):
                continue
            both = [(number(told, who), number(also, who)) for who in told]
            pairs = [(a, b) for a, b in both if a is not None and b is not None]
            if len(pairs) > 1:
                prompts += 1
                a, b = (fmean(values) for values in zip(*pairs, strict=True))
                xx += sum((x - a) ** 2 for x, _ in pairs)
                yy += sum((y - b) ** 2 for _, y in pairs)
                xy += sum((x - a) * (y - b) for x, y in pairs)
        return (xy / math.sqrt(xx * yy) if xx and yy else None), prompts

    def both_best(self, key: str, one: str, other: str) -> tuple[int, int]:
        """To how many prompts two policies' answers both have the best score, and of how many."""
        told = [row[key] for row in self.answers if isinstance(row.get(key), dict)]
        both = [(number(each, one), number(each, other)) for each in told]
        pairs = [(a, b) for a, b in both if a is not None and b is not None]
        best = max((max(pair) for pair in pairs), default=0.0)
        return sum(min(pair) == best for pair in pairs), len(pairs)

    def learned_from(self, stage: str) -> str:
        """How much a stage learned from: pairs, labels, rows or, in PPO, answers of its own."""
        labels = [self.number(f"{stage}.{kind}") or 0 for kind in ("good", "bad")]
        if any(labels):
            pairs = self.number(f"{stage}.pairs")
            return f"{sum(labels):,.0f} labels" + (f", {pairs:,.0f} pairs" if pairs else "")
        for key, what in {"pairs": "pairs", "rows": "rows", "episodes": "answers"}.items():
            if (count := self.number(f"{stage}.{key}")) is not None:
                return f"{count:,.0f} {what}"
        return "—"

    def of(self, stage: str, key: str) -> Any:
        """A setting of a stage, as resolved, by PPO's name for it."""
        table = self.recipe.get(stage)
        return table.get(self.called(stage, key)) if isinstance(table, dict) else None

    def called(self, stage: str, key: str) -> str:
        """What the stage's kind calls a setting that PPO has as `key`."""
        table = self.recipe.get(stage)
        kind = table.get("kind", stage) if isinstance(table, dict) else ""
        return KINDS[kind].calls.get(key, key) if kind in KINDS else key

    def rewards(self, stage: str) -> list[Term]:
        """The list of rewards that a stage trained on; empty where its recipe has none."""
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            return terms(self.of(stage, "rewards"))
        return []

    def reward_model(self, stage: str) -> str | None:
        listed = [one.model for one in self.rewards(stage) if one.model]
        return self.of(stage, "reward_model") or next(iter(listed), None)

    @property
    def scorer(self) -> str:
        """What the evaluation's scores are of: what was optimised last."""
        last = [stage.name for stage in self.making("policy", explores=True)][-1:]
        rules = [one for name in last for one in self.rewards(name) if not one.model]
        return "the rewards" if rules else "the reward model"

    def stage(self, name: str) -> Stage | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    def making(self, what: str, **about: Any) -> list[Stage]:
        """The stages that make a policy, a reward model or numbers.

        `about` are attributes that their kinds must have, such as `explores=True`.
        """
        found = [stage for stage in self.stages if makes(stage.kind, what)]
        for key, value in about.items():
            found = [stage for stage in found if getattr(KINDS[stage.kind], key) == value]
        return found

    def starts(self) -> dict[str, str]:
        """Each policy that was trained, and the one it started from."""
        names = [stage.name for stage in self.making("policy")]
        before = dict(zip(names, ["base", *names], strict=False))
        return {name: self.of(name, "policy") or before[name] for name in names}

    def tempered(self, stage: str) -> str:
        """What a KL is of, where `stage` samples at another temperature than 1."""
        explorers = [one.name for one in self.making("policy", explores=True)]
        heat = self.of(stage, "temperature")
        if stage == "evaluation" and heat is None:  # as the stage does: answers.asked
            heat = self.of(explorers[-1], "temperature") if explorers else 0.7
        if heat in (None, 1):
            return ""
        return f"KL is that of the policies at temperature {heat:g}, as they are sampled."

    def running(self) -> bool:
        """Whether a process is at it: its manifest was written as it began."""
        with contextlib.suppress(OSError):
            return self.manifest.get("outcome") == "unfinished" and locks.held(self.folder)
        return False

    @staticmethod
    def scored(row: Json, who: str) -> str:
        """Each scorer's number of a policy's answer."""
        told = [(words, row.get(key)) for key, words in SCORES.items()]
        found = [(words, number(one, who)) for words, one in told if isinstance(one, dict)]
        said = [f"{words} {value:.2f}" for words, value in found if value is not None]
        return " · ".join(said).replace("-", "−")

    # ---- how sentences name what stands here; words in `…` are keys

    def title(self, name: str) -> str:
        """A stage: by its kind, where that is its name."""
        if name == "base":
            return "the base model"
        stage = self.stage(name)
        short = stage and name == stage.kind and makes(name, "policy")
        return name.upper() if short else f"`{name}`"

    def plain_title(self, name: str) -> str:
        return self.title(name).strip("`")

    def setting(self, stage: str, key: str) -> str:
        value = self.of(stage, key)
        now = f" ({value:g} now)" if isinstance(value, int | float) else ""
        return f"`{stage}.{self.called(stage, key)}`{now}"

    def steps(self, stage: str) -> str:
        limited = (self.of(stage, "max_steps") or -1) > 0
        return self.setting(stage, "max_steps" if limited else "num_train_epochs")

    def leash(self, stage: str) -> str:
        """The setting that holds a policy near its start."""
        return self.setting(stage, "beta" if self.of(stage, "kl_coef") is None else "kl_coef")

    def slower(self, stage: str) -> str:
        """What keeps a policy nearer to its start."""
        return f"Raise {self.leash(stage)} or lower {self.setting(stage, 'learning_rate')}"


def number(values: Json, key: str) -> float | None:
    value = values.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        return None
    return float(value)


def _json(file: Path) -> Json:
    """A file of ours, less what has another type there than we give it."""
    found: Json = {}
    with contextlib.suppress(OSError):
        found = files.read_json(file) or {}
    return {key: value for key, value in found.items() if isinstance(value, TYPES.get(key, object))}


def lines(file: Path) -> list[Json]:
    """The objects of a file of a JSON object a line; a line that a kill cut is left out."""
    found = []
    with contextlib.suppress(OSError):
        for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
            with contextlib.suppress(ValueError, RecursionError):
                if isinstance(value := json.loads(line), dict):
                    found.append(value)
    return found
