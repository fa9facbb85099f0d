"""What came of a run, in a few plain sentences: each from a stated rule, with its numbers.

A rule is a function from a run's facts to what it finds; those about policies are beside these. The
thresholds stand at the top. A share is held against its 95 % interval: "better than chance" is an
interval above one half, "cannot be told" one that holds a half and is wide.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_recipes.findings import LEVELS, Finding, Found, percent, said
from rlhf_recipes.recipe.kinds import JUDGE, REWARD
from rlhf_recipes.recipe.kinds import MINIMUM_ACCURACY as MINIMUM
from rlhf_recipes.report import label_rules, people, policy_rules, reward_rules
from rlhf_recipes.report.facts import Facts
from rlhf_recipes.stats import Share, wilson
from rlhf_recipes.store import history

TELLING = 0.65  # an interval from under a half to over this may hold a good reward model
FEWEST = 8  # pairs to say anything from
WEAK = 1.0  # units between the answers of a test pair: smoke and chat have 2.2
LEARNED = 0.01  # of the loss: what SFT has to take off it


def verdict(facts: Facts) -> list[Finding]:
    """What the rules found: faults first, in the order of the stages; then success, then doubts.

    Of what is good, a policy that won comes first if something is left to do for a success.
    """
    place = {stage.name: at for at, stage in enumerate(facts.stages)}
    rules = (*RULES, *people.RULES, *policy_rules.RULES, *reward_rules.RULES, *label_rules.RULES)
    found = [finding for rule in rules for finding in rule(facts)]
    found.sort(
        key=lambda f: (
            LEVELS.index(f.level),
            f.level == "good" and not f.change,
            place.get(f.about, len(place)),
        )
    )
    return found


# ---- the run itself -----------------------------------------------------------------------------


def ended(facts: Facts) -> Found:
    outcome, error = facts.manifest.get("outcome"), facts.manifest.get("error") or {}
    left = [stage.name for stage in facts.stages if stage.did == "not run"]
    stage, count = str(error.get("stage") or (left or [""])[0]), len(facts.stages)
    whole = [one for one in facts.stages if one.record]
    done = f"{len(whole)} of {count} stages are done"
    if outcome == "failed":
        why, hint = str(error.get("message") or "it failed"), str(error.get("hint") or "")
        yield Finding("fault", stage, f"The run ended early, {done}: {why}.", hint)
    elif outcome == "waiting":
        why, how = str(error.get("message")), f"Type `{error.get('hint')}`."
        yield Finding("doubt", stage, f"The run waits, {done}: {why}.", how)
    elif outcome == "finished" and left:
        yield Finding("note", stage, f"{', '.join(left)} did not run: it was told to stop before.")
    elif facts.running():
        at = next((one for one in facts.stages if not one.record), None)
        told = at and history.pace(at.folder)
        where = f"; {at.name} is at {told}" if at and told else ""
        yield Finding("doubt", at.name if at else stage, f"The run is running: {done}{where}.")
    elif outcome != "finished":
        again = "The same command goes on from what is finished and saved."
        yield Finding("doubt", stage, f"The run has not come to its end: {done}.", again)


# ---- SFT ----------------------------------------------------------------------------------------


def sft_loss(facts: Facts) -> Found:
    for stage in facts.making("policy", learns_from="answers"):
        name, trained = stage.name, stage.series("loss")[1]
        before = facts.number(f"{name}.validation_loss_before")
        after, whose = facts.number(f"{name}.validation_loss"), "validation"
        if (before is None or after is None) and stage.record and len(trained) > 3:
            before, after, whose = trained[0], trained[-1], "training"
        if before is None or after is None:
            continue
        text = f"{facts.title(name)}'s {whose} loss went from {before:.3f} to {after:.3f}"
        if after > before * (1 + LEARNED):
            fewer = f"Fewer {facts.steps(name)}, or lower {facts.setting(name, 'learning_rate')}."
            yield Finding("fault", name, f"{text}: it made the model worse.", fewer)
        elif after > before * (1 - LEARNED):
            more = f"Raise {facts.setting(name, 'learning_rate')} or {facts.steps(name)}; or "
            more += "leave it out, where the model before it answers so already."
            yield Finding("fault", name, f"{text}: it learned next to nothing.", more)
        else:
            yield Finding("good", name, f"{text}.")


# ---- reward models ------------------------------------------------------------------------------


def _measured(facts: Facts) -> Iterator[tuple[str, Share, str, str]]:
    """Each reward model: its name, its accuracy, how a sentence calls it, how grave its faults.

    The judge is the last.
    """
    found = [key.removesuffix(".accuracy") for key in facts.results if key.endswith(".accuracy")]
    names = sorted(found, key=lambda name: name == JUDGE)
    for name in names:
        share = facts.share(f"{name}.accuracy", f"{name}.test_pairs")
        own = "The independent judge" if name == JUDGE else "The reward model"
        more = len([other for other in names if other != JUDGE]) > 1 and name != JUDGE
        if share:
            yield name, share, own + f" `{name}`" * more, "doubt" if name == JUDGE else "fault"


def ranking(facts: Facts) -> Found:
    """Better than chance or not, or too few pairs to tell; and whether length is all it sees."""
    for name, share, who, level in _measured(facts):
        text = f"{who} ranks {_of_cases(facts, name, share)}"
        against, alone = _by_length(facts, name, share), facts.number(f"{name}.length_accuracy")
        if share.high < 0.5:
            why = "See whether `chosen` and `rejected` changed places, by `[dataset] columns`."
            yield Finding(level, name, f"{text}: worse than chance.", why)
        elif share.low <= 0.5 and share.high >= TELLING:
            more = f"More pairs, or a larger {facts.setting('dataset', 'test_fraction')}."
            yield Finding("doubt", name, f"{text}: too few pairs to tell it from chance.", more)
        elif not against and (share.low <= 0.5 or share.value < MINIMUM):
            yield _untrained(facts, name, level, text, chance=share.low <= 0.5)
        elif not against:
            text += f", length alone {percent(alone)}" if alone else ""
            if alone is None or alone < share.value:
                yield Finding("good", name, f"{text}.")
            else:
                change = "More pairs, or pairs of like length."
                yield Finding("doubt", name, f"{text}: it tells no more than length does.", change)
        if against:
            few, which = against
            text += f", and length alone {percent(alone or 0.5)}; where the {which} answer was "
            text += f"preferred, {said(few, 'pairs')}: it learned length. Look there first."
            change = "Give it pairs of like length, or as many whose shorter answer is the better "
            yield Finding(level, name, text, f"{change}one.")


def _of_cases(facts: Facts, name: str, share: Share) -> str:
    good, bad = (facts.number(f"{name}.test_{kind}") for kind in ("good", "bad"))
    if good and bad:
        of = f"good against {bad:.0f} bad test answers right"
        return said(share._replace(count=int(good)), of)
    return said(share, "test pairs right")


def weak_unit(facts: Facts) -> Found:
    """A reward model whose unit, the deviation of its scores, is more than what a pair differs by.

    kl_coef is a price in that unit: the weaker the model, the less a nat costs.
    """
    for stage in facts.making("reward_model", listed=True):
        name, margin = stage.name, facts.number(f"{stage.name}.margin")
        readers = [s.name for s in facts.making("policy", explores=True)]
        readers = [one for one in readers if facts.reward_model(one) == name]
        if margin is not None and margin < WEAK and readers:
            text = f"The chosen answer of a test pair leads by {margin:.2f} of `{name}`'s units, "
            text += f"under {WEAK:g}: its scores spread more than a better and a worse answer "
            text += f"differ, so {facts.title(readers[-1])} follows noise at a price that is low."
            change = f"Raise {facts.setting(readers[-1], 'kl_coef')}, or give it cleaner pairs."
            yield Finding("doubt", name, text, change)


def _untrained(facts: Facts, name: str, level: str, text: str, chance: bool) -> Finding:
    """No better than chance, or hardly, and not by too few pairs to tell."""
    stage = facts.stage(name)
    text += ": that is chance." if chance else ": hardly better than chance."
    seen = stage.series("accuracy")[1][-3:] if stage else []
    # A judge's settings are the last reward stage's, else those of [reward].
    rewards = [REWARD, *(other.name for other in facts.making("reward_model", listed=True))]
    table = rewards[-1] if name == JUDGE else name
    change = f"Raise {facts.setting(table, 'learning_rate')} or {facts.steps(table)}; and "
    change += "read some pairs: is the better answer the chosen one?"
    if seen and (trained := sum(seen) / len(seen)) > 0.8:
        text += f" Of its training pairs it ranked {percent(trained)} right: by heart."
        change = f"Give it more pairs, or fewer {facts.steps(table)}."
    elif seen:
        text += f" Nor did it learn its training pairs ({percent(trained)} right)."
    after = "What follows it learned from noise." if level == "fault" else "It is no judge."
    return Finding(level, name, f"{text} {after}", change)


def _by_length(facts: Facts, name: str, whole: Share) -> tuple[Share, str] | None:
    """The pairs in which length points the wrong way, where a reward model is misled by it.

    That is: it ranks most of those wrong, and most of the others right; and length is a cue, or the
    reward model no guess.
    """
    shorter = facts.share(f"{name}.shorter_accuracy", f"{name}.shorter_pairs")
    if shorter is None or whole.count <= shorter.count:
        return None
    rest = whole.count - shorter.count
    right = (whole.value * whole.count - shorter.value * shorter.count) / rest
    right = min(max(right, 0.0), 1.0)
    longer = Share(right, *wilson(right, rest), rest)
    few, many, which = shorter, longer, "shorter"
    if shorter.count > rest:
        few, many, which = longer, shorter, "longer"
    misled = few.count >= FEWEST and few.high < 0.5 < many.low
    alone = facts.number(f"{name}.length_accuracy") or 0.5
    cue = wilson(alone, whole.count)[0] > 0.5 or whole.low > 0.5
    return (few, which) if misled and cue else None


def gate_lowered(facts: Facts) -> Found:
    for stage in facts.making("policy", explores=True):
        least = facts.number(f"{stage.name}.minimum_accuracy")
        if least is None or least >= MINIMUM:
            continue
        names = (facts.reward_model(stage.name), "foreign", "reward")
        found = [facts.number(f"{name}.accuracy") for name in names]
        value = next((one for one in found if one is not None), None)
        text = f"The gate before {facts.title(stage.name)} was lowered to {least:g}, from "
        text += f"{MINIMUM:g}: its reward model "
        if value is None:
            yield Finding("doubt", stage.name, f"{text}was held against no test pairs.")
        else:
            text += f"ranks {percent(value)} of test pairs right."
            yield Finding("doubt" if value < MINIMUM else "note", stage.name, text)


RULES = (ended, sft_loss, ranking, weak_unit, gate_lowered)
