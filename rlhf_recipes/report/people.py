"""What people said of the evaluation's answers, blind, and which scorer agrees with them.

It is in `people.json` in the run's folder, which `feedback/winrate.py` writes. `results.json` holds
what the stages found, and these numbers are not a stage's.
"""

from __future__ import annotations

from rlhf_recipes.findings import Finding, Found, said
from rlhf_recipes.report.facts import Facts, number
from rlhf_recipes.report.policy_rules import still
from rlhf_recipes.stats import Share

# What answers.jsonl calls what a policy's answer may be chosen by, and what the table calls it.
SCORERS = {"judged": "the judge", "judged2": "the second judge", "tokens": "the longer answer"}
PART = "reward."
FIELDS = ("value", "low", "high", "count")  # of a share
AGREEING = {"each other": "people with each other", "themselves": "people with themselves"}


def preferred(facts: Facts) -> Found:
    """The policy against its start, by people who did not know which is which."""
    name, start = facts.people.get("policy"), facts.people.get("start")
    share = facts.share(f"{name}.people_win_rate", f"{name}.people_pairs")
    if not share or not isinstance(start, str):
        return
    text = f"People prefer {facts.title(str(name))} to {facts.title(start)} in "
    text += f"{said(share, 'pairs')}, blind"
    if both := facts.people.get("both_bad"):
        text += f"; in {both} of them both answers are bad"
    if share.low > 0.5:
        level = "good" if still(facts, str(name), start) else "success"
        yield Finding(level, str(name), f"{text}.")
    elif share.high < 0.5:
        yield Finding(
            "fault", str(name), f"{text}: it became worse.", f"{facts.slower(str(name))}."
        )
    else:
        more = "`rlhf-recipes label RUN --evaluate --pairs 200` asks of more pairs."
        yield Finding("doubt", str(name), f"{text}: this may be chance.", more)


def table(facts: Facts) -> list[list[str]]:
    """How often each scorer chooses the answer that people prefer; and people among themselves."""
    rows, names = [], {"scores": facts.scorer, **SCORERS, **AGREEING}
    for by, found in (facts.people.get("agreement") or {}).items():
        held = found if isinstance(found, dict) else {}
        value, low, high, count = (number(held, key) for key in FIELDS)
        if value is None or low is None or high is None or count is None:
            continue
        share = Share(value, low, high, int(count))
        called = names.get(by, f"{by.removeprefix(PART)}, a part of the reward")
        rows.append([called, said(share, "pairs")])
    return [["", "agrees with people on"], *rows] if rows else []


RULES = (preferred,)
