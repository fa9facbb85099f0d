"""The report of a run: one HTML file that needs and loads nothing else, made from files alone.

What prompts, answers, titles and paths hold comes out as text: the templates escape all they are
given, and the page's own policy lets it run and load nothing.
"""

from __future__ import annotations

import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf_recipes.findings import Finding, interval
from rlhf_recipes.recipe.kinds import KINDS, makes
from rlhf_recipes.report import answers, card, charts, people
from rlhf_recipes.report.facts import Facts, Stage, number
from rlhf_recipes.report.headline import headline, meanings
from rlhf_recipes.report.html import STYLE, TEMPLATES, page
from rlhf_recipes.report.verdict import verdict
from rlhf_recipes.store.digests import digest
from rlhf_recipes.store.files import to_json, write_text
from rlhf_recipes.store.layout import REPORT
from rlhf_recipes.store.provenance import versions

NUMBERS = tomllib.loads((TEMPLATES / "policies.toml").read_text(encoding="utf-8"))
SHARES = "accuracy win_rate ended repetition distinct_2 unchanged calibration_error".split()


def write(folder: Path, *, again: bool = True) -> list[Finding]:
    """Write a run's report.html, and its model's card; return its verdict.

    Without `again`, a report that was made from the same stays: a run that finds all done is quick.
    """
    facts = Facts(folder)
    found, source = verdict(facts), made_from(facts)
    if again or source not in _text(folder / REPORT):
        write_text(folder / REPORT, page("report.html", values(facts, found), source))
    card.write(facts, found, policies(facts))
    return found


def model_card(folder: Path, stage: str, **about: Any) -> str:
    """The card of a stage's model, for where it goes without the run; `about` as `card.text`."""
    facts = Facts(folder)
    return card.text(facts, verdict(facts), policies(facts), stage, **about)


def made_from(facts: Facts) -> str:
    """A digest of what a report shows; a complete stage's files follow from its record."""
    outcome = [facts.manifest.get(key) for key in ("outcome", "error")]
    stages = [[s.name, s.record.get("started"), len(s.curve)] for s in facts.stages]
    shown = [facts.results, facts.people, facts.recipe, _text(facts.folder / "recipe.toml"), stages]
    return digest(to_json([versions(), STYLE, outcome, *shown]))


# ---- a run --------------------------------------------------------------------------------------


def values(facts: Facts, found: list[Finding]) -> dict[str, Any]:
    """What the template of a report is filled with."""
    name, starts = facts.folder.resolve().name, facts.starts()
    trained = [(name, start) for name, start in starts.items() if f"{name}.length" in facts.results]
    last = trained[-1] if trained else None
    base, hub = card.named((facts.recipe.get("model") or {}).get("name"))
    prices = [charts.price(facts, last[0], by) for by in ("judge", "score")] if last else []
    ways = [*charts.who_wins(facts, *last), *chain(*prices)] if last else []
    explored = facts.making("policy", explores=True)
    rewards = [s for s in facts.stages if makes(s.kind, "reward_model") or s.evidence]
    imitated, compared = list[Any](), list[Any]()
    for stage in facts.making("policy", explores=False):
        if KINDS[stage.kind].learns_from == "answers":
            imitated.append((stage, [*charts.loss(facts, stage)]))
        else:
            compared.append((stage, [*charts.loss(facts, stage), *charts.compared(stage)]))
    return {
        **vars(facts),
        "name": name,
        "facts": facts,
        "found": found,
        "top": (top := headline(facts, found)),
        "meanings": meanings(" ".join([*vars(top).values(), *(one.text for one in found)])),
        "model": base if hub or base == "unknown" else f"{base} (a local folder)",
        "seconds": {s.name: number(s.record, "seconds") or 0.0 for s in facts.stages},
        "last": last,
        "cases": answers.cases(facts, *last) if last else [],
        "every": answers.every(facts, *last) if last else [],
        "ways": ways,
        "policies": policies(facts),
        "asides": {_said(facts, words): aside for words, aside in NUMBERS.values()},
        "judges": people.table(facts),
        "ppo": [(s, [*charts.ppo(facts, s)]) for s in explored if s.curve],
        "rewards": [_reward(facts, s) for s in rewards],
        "losses": [one for one in imitated if one[1]],
        "compared": [one for one in compared if one[1]],
        "text": _text(facts.folder / "recipe.toml"),
        "resolved": _text(facts.folder / "resolved.toml"),
    }


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")[:60_000]
    except OSError:
        return ""


def policies(facts: Facts) -> list[list[str]]:
    """A row a number and a column a policy; the base has none of what is against a start."""
    starts = {"base": "", **facts.starts()}
    names = [name for name in starts if f"{name}.length" in facts.results]
    if not names:
        return []
    heads = [f"{name}, against {starts[name]}" if starts[name] else name for name in names]
    rows = [["", *heads]]
    for key, (words, _) in NUMBERS.items():
        cells = [_cell(facts, f"{name}.{key}") for name in names]
        if any(cells):
            rows.append([_said(facts, words), *(cell or "—" for cell in cells)])
    return rows


def _said(facts: Facts, words: str) -> str:
    return words.replace("the reward model", facts.scorer)


def _cell(facts: Facts, key: str) -> str:
    value, low, high = (facts.number(key + end) for end in ("", "_low", "_high"))
    share = facts.share(key, "evaluation.prompts") if "win_rate" in key else None
    if share:
        return f"{100 * share.value:.0f}\u00a0% ({interval(share)})"
    if value is None:
        return ""
    kind = key.rpartition(".")[2]
    sign = "+" if kind.endswith("gain") else ""
    form = sign + (".1%" if kind in SHARES else ".1f" if kind == "length" else ".2f")
    between = "" if low is None or high is None else f" ({low:{form}} to {high:{form}})"
    text = f"{value:{form}}{between}"
    return text.replace("-", "−").replace("%", "\u00a0%")


def _reward(facts: Facts, stage: Stage) -> dict[str, Any]:
    """What is known of a reward model; PPO's folder holds the evidence of one from elsewhere."""
    name = stage.name
    if not makes(stage.kind, "reward_model"):
        name = "foreign" if "foreign.accuracy" in facts.results else "reward"
    plots = [*charts.accuracy(facts, name), *charts.margins(name, stage)]
    plots += [*charts.calibration(facts, name, stage), *charts.labels(stage)]
    plots += charts.loss(facts, stage) if makes(stage.kind, "reward_model") else ()
    return {"name": name, "plots": plots, "worst": stage.evidence.get("worst")}
