"""The verdict's rule about a list of rewards: which of them paid for the gain, and which fell."""

from __future__ import annotations

from rlhf_recipes.findings import Finding, Found
from rlhf_recipes.recipe.rewards import PART
from rlhf_recipes.report.facts import Facts


def which_paid(facts: Facts) -> Found:
    """Each reward of a policy and of its start on the test prompts, and what the difference pays.

    One that falls as the sum rises is worth a look: so a policy looks that games another.
    """
    for stage in facts.making("policy", explores=True):
        name, start = stage.name, facts.starts()[stage.name]
        told, fell = list[str](), list[str]()
        for one in facts.rewards(name):
            gain = f"{name}.{PART}{one.name}_gain"
            keys = (f"{start}.{PART}{one.name}_score", f"{name}.{PART}{one.name}_score")
            found = [facts.number(key) for key in (*keys, gain, f"{gain}_low", f"{gain}_high")]
            numbers = [number for number in found if number is not None]
            if len(numbers) < len(found):
                continue
            then, now, *gains = numbers
            pays, low, high = (one.weight * number for number in gains)
            low, high = sorted((low, high))
            says = f"{then:.2f} → {now:.2f} (pays {pays:+.2f}, {low:.2f} to {high:.2f})"
            told.append(f"`{one.name}` {says.replace('-', '−')}")
            fell += [f"`{one.name}`"] if high < 0 else []
        text = f"{facts.title(start)} → {facts.title(name)}, by each reward on the test prompts: "
        text += f"{', '.join(told)}."
        if fell and (facts.number(f"{name}.score_gain") or 0.0) > 0:
            change = f"Read some answers. Raise the weight of {fell[0]}, if it is meant to count."
            yield Finding(
                "doubt", name, f"{text} The sum rose, and {', '.join(fell)} fell.", change
            )
        elif told:
            yield Finding("note", name, text)


RULES = (which_paid,)
