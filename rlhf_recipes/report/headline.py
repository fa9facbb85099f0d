"""The top of a report: the result for who knows none of the words, who judged, and the price."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_recipes.findings import Finding, interval, percent
from rlhf_recipes.report.facts import Facts, number
from rlhf_recipes.report.html import TEMPLATES
from rlhf_recipes.report.policy_rules import HIGH_KL, STILL, TRAINED, judges, still
from rlhf_recipes.stats import Share
from rlhf_recipes.text import duration

SAYS = {
    "fault": "Something is wrong.",
    "success": "It worked.",
    "doubt": "It cannot be told yet.",
}
ENDED = {"waiting": "People have to judge first.", "failed": "The run ended early."}
BLIND = "people who did not know whose answer is whose"


@dataclass(frozen=True)
class Headline:
    says: str  # It worked.
    result: str = ""  # empty where no policy was judged
    judged: str = ""
    price: str = ""


@dataclass(frozen=True)
class Judged:
    share: Share
    by: str  # as a sentence calls the judge
    apart: bool  # of another make than what the policy was trained against
    cases: str = "prompts"


def headline(facts: Facts, found: Sequence[Finding]) -> Headline:
    """In agreement with the verdict `found`, whose first finding decides what it says."""
    level, about = (found[0].level, found[0].about) if found else ("", "")
    if (outcome := facts.manifest.get("outcome")) != "finished":
        left = "The run is running." if facts.running() else "The run is not finished."
        return Headline(ENDED.get(str(outcome), left))
    starts, count = facts.starts(), [name for name in facts.starts() if _judged(facts, name)]
    name = about if about in count else (count[-1] if count else "")
    says = SAYS.get(level, "The run is done.")
    if not name:
        return Headline(says, "" if level in SAYS else "No judge has compared its answers.")
    judged = _judged(facts, name)
    if level == "success":
        judged = [one for one in judged if one.apart and one.share.low > 0.5] or judged
    if level == "good" and judged[0].share.low > 0.5:
        says = "It looks better, but that is not proven."
    result = _result(facts, name, starts[name], level, judged[0])
    return Headline(says, result, _by(facts, name, judged[0]), _price(facts, name, starts[name]))


def _judged(facts: Facts, name: str) -> list[Judged]:
    """What a policy's answers were preferred by: people, then other judges, then its own."""
    found = []
    if share := facts.share(f"{name}.people_win_rate", f"{name}.people_pairs"):
        found.append(Judged(share, BLIND, True, "pairs"))
    others = [Judged(share, by, apart) for share, by, apart in judges(facts, name)]
    found += sorted(others, key=lambda one: not one.apart)
    if share := facts.share(f"{name}.win_rate", "evaluation.prompts"):
        found.append(Judged(share, f"{facts.scorer} {TRAINED}", False))
    return found


def times(share: float) -> str:
    """9 times in 10: in tenths where the share is near one."""
    if share in (0, 1):
        return "every time" if share else "not once"
    tenths = round(10 * share)
    near = abs(10 * share - tenths) < 0.2 and 0 < tenths < 10
    count, of = (tenths, 10) if near else (min(max(round(100 * share), 1), 99), 100)
    return f"{count} time{'s' if count > 1 else ''} in {of}"


def _result(facts: Facts, name: str, start: str, level: str, judged: Judged) -> str:
    share = judged.share
    only = "only " if share.high < 0.5 else ""
    text = f"On {share.count} {judged.cases} it had never seen, the new model's answer was "
    text += f"preferred {only}{times(share.value)}."
    if level == "fault" and not only:
        return f"{text} That does not count while something is wrong."
    if level == "doubt" and still(facts, name, start):
        return f"{text} It hardly differs from {facts.title(start)}."
    if share.low <= 0.5 <= share.high:
        return f"{text} That may be chance."
    return text + (" The list below begins with what speaks against it." * (level == "doubt"))


def _by(facts: Facts, name: str, judged: Judged) -> str:
    aside = ""
    if judged.by.startswith("the rule") and judged.apart:
        aside = ", which was written down before the training"
    elif judged.by.endswith("on the same base"):
        aside = ", which may err as the reward model errs"
    who, start = facts.title(name), facts.title(facts.starts()[name])
    share = f"{percent(judged.share.value)} ({interval(judged.share)}) of {judged.share.count}"
    text = f"Judged by {judged.by}{aside}. {who}'s answers were preferred to {start}'s in {share} "
    return f"{text}{judged.cases}. 50 % would mean no difference."


def _price(facts: Facts, name: str, start: str) -> str:
    who, other = facts.title(name), facts.title(start)
    kl, told = facts.number(f"{name}.kl"), []
    if kl is not None:
        told.append(f"{who} moved {kl:.1f} nats away from {other}. Under {STILL:g} it has hardly")
        told[-1] += f" moved; over {HIGH_KL:g} its scores mean little."
    long, before = (facts.number(f"{one}.length") for one in (name, start))
    if long is not None and before is not None:
        told.append(f"Its answers have {long:.0f} tokens, {other}'s {before:.0f}.")
    seconds = sum(number(stage.record, "seconds") or 0.0 for stage in facts.stages)
    return " ".join(["The price:", *told, f"The run took {duration(seconds)}."])


def meanings(text: str) -> dict[str, str]:
    """The words of the trade that `text` has, with what each means; all of them for no text."""
    said: dict[str, str] = tomllib.loads((TEMPLATES / "words.toml").read_text(encoding="utf-8"))
    return {word: said[word] for word in said if not text or re.search(rf"\b{word}\b", text)}
