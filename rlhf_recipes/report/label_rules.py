"""The verdict's rule about labels: more of them, a clearer guideline, or neither.

A reward model cannot agree with people more often than they agree with themselves.
"""

from __future__ import annotations

from rlhf_recipes.findings import Finding, Found, points, said
from rlhf_recipes.report.facts import Facts, number
from rlhf_recipes.stats import Share

FEWEST = 20  # items asked again: fewer say nothing
STEADY = 0.75  # self-agreement: below that, much of what is not learned is noise
FAR = 0.05  # of accuracy below self-agreement
SMALL = 0.01  # of accuracy: a gain that is surely less is not worth an hour of labels


def no_person(facts: Facts) -> Found:
    """Judgements that no person made: what is learned is what a model or a rule prefers."""
    for stage in facts.making("judgements"):
        by, name = facts.results.get(f"{stage.name}.by"), stage.name
        if by not in ("model", "rule"):
            continue
        judge = f"`{facts.results.get(f'{name}.judge_model')}`" if by == "model" else "a rule"
        text = f"Every pair of `{name}` was judged by {judge}, and by no person: "
        text += "all that learns from it learns what that judge prefers."
        share = facts.share(f"{name}.agreement", f"{name}.agreement_pairs")
        if share:
            pairs = said(share, "pairs that both had judged")
            text += f" As the stage ran, it agreed with people in {pairs}."
        change = f"`{name}.people = 60` asks people about 60 of them first."
        yield Finding("note", name, text, "" if share or by == "rule" else change)


def label_on(facts: Facts) -> Found:
    """For each reward model that learned from a `label` stage: what to do next."""
    before = ""
    for stage in facts.stages:
        before = stage.name if stage.kind == "label" else before
        keys = ("gain", "gain_low", "gain_high")
        gain = [n for key in keys if (n := number(stage.labels, key)) is not None]
        share = facts.share(f"{stage.name}.accuracy", f"{stage.name}.test_pairs")
        if not before or len(gain) < len(keys) or share is None:
            continue
        people = facts.of(before, "by") == "people"
        itself = facts.share(f"{before}.self_agreement", f"{before}.asked_again")
        text = f"You agree with yourself in {said(itself, 'asked again')}. " if itself else ""
        text += f"`{stage.name}` agrees with {'you' if people else 'the labels'} in "
        text += f"{said(share, 'test pairs')}. The last half of its pairs gave {points(*gain)}."
        yield Finding("note", stage.name, text, _next(facts, before, itself, share, gain))


def _next(facts: Facts, label: str, itself: Share | None, share: Share, gain: list[float]) -> str:
    steady = itself.value if itself and itself.count >= FEWEST else None
    if steady is not None and steady < STEADY:
        guideline = f"`{label}.guideline`"
        return f"Make {guideline} clearer: people judge the same pair in two ways."
    far = steady is not None and steady - share.value > FAR
    # The curve is of a plainer model than the reward model: it decides where nothing else does.
    if far and gain[2] > SMALL or steady is None and gain[1] > 0:
        left = (facts.number(f"{label}.items") or 0) - (facts.number(f"{label}.judged") or 0)
        queue = f"the next {left:.0f} pairs are in its queue" if left > 0 else "sample more first"
        return f"Label on: {queue} (`rlhf-recipes label`)."
    if far:
        return "More labels give next to nothing here: try a larger model, or more steps."
    for policy in facts.making("policy", explores=True):
        rates = [facts.number(f"{policy.name}.{by}win_rate") for by in ("people_", "judge_", "")]
        told = next((rate for rate in rates if rate is not None), None)
        if told is not None and told < 0.5:
            title = facts.title(policy.name)
            return f"Look at {title}: it loses to its start, and its labels are not the cause."
    return ""


RULES = (label_on, no_person)
