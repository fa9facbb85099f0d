"""Runs of one recipe side by side: the mean of each setting over its seeds, and how sure it is."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rlhf_recipes.findings import MARKS, Finding, interval, percent, points
from rlhf_recipes.report.compare import rulers
from rlhf_recipes.report.facts import Facts
from rlhf_recipes.report.html import TEMPLATES, page
from rlhf_recipes.report.run_page import SHARES
from rlhf_recipes.report.svg import PPO, Plot, ranges
from rlhf_recipes.report.verdict import verdict
from rlhf_recipes.stats import Share, over_seeds
from rlhf_recipes.store.files import write_text
from rlhf_recipes.store.layout import MANIFEST, REPORT
from rlhf_recipes.text import cut, duration, plain

WIDEST = 30  # characters of a setting beside a chart
WINS = {"judge_win_rate": "by the judge", "win_rate": "by the reward model"}  # the best there is
METHOD = "the mean over seeds and, in brackets, Student's 95 % interval of it"


class Mean(NamedTuple):
    """Over the seeds of a setting; without an interval where there is one seed."""

    value: float
    ends: tuple[float, float] | None
    count: int  # type: ignore[assignment]  # of seeds; tuple's own method is not used

    def said(self, times: int = 1, form: str = ".2f", unit: str = "") -> str:
        ends = [f"{times * end:{form}}" for end in self.ends or ()]
        around = f" ({' to '.join(ends)})" if ends else ""
        return f"{times * self.value:{form}}{unit}{around}".replace("-", "−")


def mean(values: Sequence[float | None]) -> Mean | None:
    found = [value for value in values if value is not None]
    return Mean(fmean(found), over_seeds(found), len(found)) if found else None


@dataclass(frozen=True)
class Trial:
    """A run of a sweep: what it was set to, beside its seed."""

    setting: str
    seed: str
    folder: Path

    @cached_property
    def facts(self) -> Facts:
        return Facts(self.folder)

    @cached_property
    def found(self) -> list[Finding]:
        return verdict(self.facts) if (self.folder / MANIFEST).is_file() else []

    @property
    def outcome(self) -> str:
        return str(self.facts.manifest.get("outcome", "not begun"))

    @property
    def done(self) -> bool:
        return self.outcome == "finished"

    @property
    def state(self) -> str:
        """The mark of its verdict; else its outcome."""
        first = self.found[0].level if self.found else "note"
        return MARKS[first] if self.done else self.outcome

    def seconds(self) -> tuple[float, float]:
        """Of the stages that it computed itself, and of those that other runs did."""
        records = [stage.record for stage in self.facts.stages]
        own = [r.get("run") == self.folder.name for r in records]
        took = [float(r.get("seconds", 0.0)) for r in records]
        mine = sum(seconds for seconds, here in zip(took, own, strict=True) if here)
        return mine, sum(took) - mine


class Sweep:
    """The runs of a sweep, as their folders have them now."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.trials = trials
        self.settings: dict[str, dict[str, Trial]] = {}  # and in each, a run by its seed
        for trial in trials:
            self.settings.setdefault(trial.setting, {})[trial.seed] = trial
        self.done = [trial for trial in trials if trial.done]
        names = [name for trial in self.done for name in _policies(trial.facts)]
        self.policies = [*dict.fromkeys(names)] or [""]
        keys = {key for trial in self.done for key in trial.facts.results}
        self.key = next(
            (key for key in WINS if any(f"{name}.{key}" in keys for name in self.policies)),
            "win_rate",
        )

    def mean(self, setting: str, key: str) -> Mean | None:
        runs = [trial for trial in self.settings[setting].values() if trial.done]
        made = mean([trial.facts.number(key) for trial in runs])
        if made and made.ends and _is_share(key):
            low, high = made.ends
            made = made._replace(ends=(max(low, 0.0), min(high, 1.0)))
        return made

    def gain(self, setting: str, key: str) -> str:
        """The difference from the first setting, of runs with the same seed."""
        first, *_ = self.settings
        if setting == first:
            return ""
        pairs = [
            (trial.facts.number(key), other.facts.number(key))
            for seed, trial in self.settings[setting].items()
            if (other := self.settings[first].get(seed)) and trial.done and other.done
        ]
        made = mean([now - then for now, then in pairs if now is not None and then is not None])
        if made is None:
            return "—"
        return points(made.value, *made.ends) if made.ends else f"{100 * made.value:+.1f} points"

    def rows(self) -> list[list[str]]:
        """The table: a row for each setting and policy."""
        several = len(self.policies) > 1
        rows = [["setting", *["policy"] * several, "seeds", f"preferred {WINS[self.key]}"]]
        rows[0] += ["against the first", "KL", "verdict of each seed", "time"]
        for setting, runs in self.settings.items():
            states = ", ".join(f"{seed} {trial.state}" for seed, trial in runs.items())
            own, shared = (
                sum(part) for part in zip(*map(Trial.seconds, runs.values()), strict=True)
            )
            time = duration(own) + (f", {duration(shared)} shared" if shared else "")
            for name in self.policies:
                key = f"{name}.{self.key}"
                wins, kl = self.mean(setting, key), self.mean(setting, f"{name}.kl")
                count = f"{wins.count} of {len(runs)}" if wins else f"0 of {len(runs)}"
                cells = [setting, *[name] * several, count, _said(key, wins)]
                rows.append([*cells, self.gain(setting, key), _said("kl", kl), states, time])
                states = time = ""  # each run's, not each policy's
        return rows

    def shared(self) -> str:
        """What sharing stages saved."""
        stages = [stage for trial in self.trials for stage in trial.facts.stages if stage.record]
        took = {stage.folder: float(stage.record.get("seconds", 0.0)) for stage in stages}
        every = sum(took[stage.folder] for stage in stages)
        text = f"{len(took)} stages took {duration(sum(took.values()))}"
        if len(stages) == len(took):
            return text
        return f"{text}; without sharing, {len(stages)} would have taken {duration(every)}"

    def rulers(self) -> list[str]:
        """Why win rates of different settings do not compare, from runs with one seed."""
        found: dict[str, None] = {}
        first, *others = self.settings.values()
        for runs in others:
            same = [seed for seed, one in first.items() if one.done and _done(runs.get(seed))]
            if same:
                found |= dict.fromkeys(rulers([first[same[0]].folder, runs[same[0]].folder]))
        return [*found]

    def numbers(self) -> list[list[str]]:
        """Every number of the policies and reward models, a row each, and a column a setting."""
        said = tomllib.loads((TEMPLATES / "policies.toml").read_text(encoding="utf-8"))
        keys = {"reward.accuracy": "reward model's accuracy", "judge.accuracy": "judge's accuracy"}
        for name in self.policies:
            keys |= {f"{name}.{key}": f"{name}: {words}" for key, words in said.items()}
        rows = [["", *self.settings]]
        for key, words in keys.items():
            cells = [_said(key, self.mean(setting, key)) for setting in self.settings]
            if set(cells) != {"—"}:
                rows.append([words, *cells])
        return rows

    def told(self) -> dict[str, Any]:
        """For a program to read."""
        runs = [
            {"name": trial.folder.name, "setting": trial.setting, "seed": trial.seed}
            | {"outcome": trial.outcome, "verdict": [asdict(line) for line in trial.found[:1]]}
            for trial in self.trials
        ]
        return {"table": self.rows(), "not_comparable": self.rulers(), "runs": runs}

    def plots(self) -> list[Plot]:
        """The win rates with their intervals, a chart a policy."""
        made = []
        for name in self.policies:
            means = {s: self.mean(s, f"{name}.{self.key}") for s in self.settings}
            rows = [
                (f"{cut(s, WIDEST)} n={one.count}", _share(one), PPO)
                for s, one in means.items()
                if one
            ]
            if rows:
                title = f"{name} preferred to its start, {WINS[self.key]}: the mean over seeds"
                told = [f"{label}: {percent(s.value)} ({interval(s)})" for label, s, _ in rows]
                note = (
                    "Bars hold the mean over seeds in 95 of 100 repetitions. The dotted line is a"
                )
                note += " half: neither is preferred."
                made.append(ranges(Plot(f"sweep-{name}", title, "; ".join(told), note), rows))
        return made


def write(trials: Sequence[Trial], title: str, file: Path) -> Sweep:
    """Write the page of a sweep to `file`, with links to each run's report."""
    sweep = Sweep(trials)
    links = {t.folder: os.path.relpath(t.folder / REPORT, file.parent) for t in trials}
    values: dict[str, Any] = {
        "title": plain(title),
        "sweep": sweep,
        "trials": trials,
        "links": {f: link for f, link in links.items() if (f / REPORT).is_file()},
        "method": METHOD,
        "most": max(len(runs) for runs in sweep.settings.values()),
    }
    write_text(file, page("sweep.html", values))
    return sweep


def _policies(facts: Facts) -> list[str]:
    """What a recipe is about: the policies after SFT, or else the last."""
    every = [stage.name for stage in facts.making("policy")]
    imitating = [stage.name for stage in facts.making("policy", learns_from="answers")]
    return [name for name in every if name not in imitating] or every[-1:]


def _done(trial: Trial | None) -> bool:
    return trial is not None and trial.done


def _is_share(key: str) -> bool:
    return any(one in key.rpartition(".")[2] for one in SHARES)


def _share(one: Mean) -> Share:
    low, high = one.ends or (one.value, one.value)
    return Share(one.value, low, high, one.count)


def _said(key: str, one: Mean | None) -> str:
    if one is None:
        return "—"
    if "win_rate" in key:
        around = f" ({interval(_share(one))})" if one.ends else ""
        return percent(one.value) + around
    return one.said(100, ".1f", " %") if _is_share(key) else one.said()
