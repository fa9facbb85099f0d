"""The verdict's rules about policies: did each become better, at what price, or what went wrong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

from rlhf_recipes.findings import Finding, Found, interval, percent, said
from rlhf_recipes.recipe.tables import INDEPENDENT
from rlhf_recipes.report.facts import Facts, number
from rlhf_recipes.stats import Share

# A win rate whose interval holds a half is open where it is that wide, or itself from there on.
WIDE, PERHAPS = 0.2, 0.55
HIGH_KL = 50.0  # nats an answer: over-optimised policies were seen from there (arXiv 2403.17031)
OVER = 1.5  # times what its guard allows, on prompts that the guard does not see
STILL = 0.5  # nats an answer: under it a policy has hardly moved
LITTLE = 0.5  # of what the best of most answers gains
SAME = 0.5  # of the answers: one answer to more prompts, or more answers as before
FEWEST, SOME = 8, 30  # answers to say that of; and of a part of them
SHRUNK = 0.2  # of the length of the policy before's answers
WORDLESS = 2.0  # tokens, the end's included
ALIKE = 0.5  # of the distinct 2-grams that the policy before had
REPEATING = 0.3  # of an answer's 3-grams
ENDING = 0.5  # of the answers; under it most are cut off
CUT_MORE = 0.15  # more of the answers cut off than before
UPDATES = 3  # fewer say nothing of a value model
ALONE = ": it may err where the reward model errs, so this is not yet a success"
OWN = ": it did what it was paid for, and this is not yet a success"
TRAINED = "that it was trained on"
OTHER_BASE = f"{INDEPENDENT} on another base"  # with `evaluation.judge_model`
OUTSIDE = "Name another base in `evaluation.judge_model`, or a rule in `judge`; or ask people."
# With 95 % intervals of the bootstrap.
MORE_PROMPTS = "200 prompts tell 60 % from chance in four cases of five, 780 tell 55 %."


def _trained(facts: Facts) -> Iterator[tuple[str, str, str, str]]:
    """Each policy after SFT: its name, its start's, and what a sentence calls them."""
    imitating = [stage.name for stage in facts.making("policy", learns_from="answers")]
    for name, start in facts.starts().items():
        if name not in imitating:
            yield name, start, facts.title(name), facts.title(start)


def went_far(facts: Facts) -> Found:
    """Farther than its scores mean anything, or as far as a guard let it."""
    for name, _, who, start in _trained(facts):
        kl, why = facts.number(f"{name}.kl"), str(facts.results.get(f"{name}.stopped") or "")
        guard = facts.of(name, "guard") or {}
        limit = min(OVER * (number(guard, "max_kl") or HIGH_KL), HIGH_KL)
        if kl is not None and kl > limit:
            text = f"{who} went {kl:.1f} nats an answer away from {start}, over {limit:g}: so far "
            text += "from what it has been judged on, its scores mean little."
            yield Finding("fault", name, text, f"{facts.slower(name)}.")
            if why.startswith("KL"):
                continue
        if why:
            updates, kept = facts.number(f"{name}.updates"), facts.number(f"{name}.kept_update")
            text = f"{who}'s guard stopped it after update {updates or 0:.0f}: {why}."
            if kept is not None and kept != updates:
                text += f" The policy of update {kept:.0f} was kept."
            level = "doubt" if why.startswith("KL") else "fault"
            yield Finding(level, name, text, f"{facts.slower(name)}.")


def collapsed(facts: Facts) -> Found:
    """One answer to all, alike answers, the same words again and again, or hardly any."""
    for name, before, who, start in _trained(facts):
        keys = ("distinct_2", "repetition", "length")
        now, again, length = (facts.number(f"{name}.{key}") for key in keys)
        then, once, long = (facts.number(f"{before}.{key}") or 0.0 for key in keys)
        (same, text), (was, _) = _commonest(facts, name), _commonest(facts, before)
        if same > max(SAME, 2 * was):
            what = f"{who} gives {percent(same)} of the prompts one answer: “{text}”"
        elif length is not None and (length < SHRUNK * long or length < WORDLESS <= long):
            what = f"{who}'s answers shrank to {length:.1f} tokens, from {start}'s {long:.1f}"
        elif now is not None and now < ALIKE * then:
            what = f"{who}'s answers became alike: of their word pairs {percent(now)} are said for "
            what += f"the first time, of {start}'s {percent(then)}"
        elif again is not None and again > max(REPEATING, 2 * once):
            what = f"{who}'s answers repeat themselves: {percent(again)} of an answer's 3-grams "
            what += f"were said in it before, {percent(once)} of {start}'s"
        else:
            continue
        stage = facts.stage(name)
        if stage and (entropy := stage.series("val/entropy_per_token")[1]):
            what += f"; entropy went from {entropy[0]:.2f} to {entropy[-1]:.2f} nats a token"
        change = f"{facts.slower(name)}; and see what its reward asks for."
        yield Finding("fault", name, f"{what}.", change)


def _commonest(facts: Facts, name: str) -> tuple[float, str]:
    """The share of the prompts that get a policy's commonest answer, and its beginning."""
    given = [str((row.get("answers") or {}).get(name)) for row in facts.answers]
    if len(given) < FEWEST:
        return 0.0, ""
    [(text, count)] = Counter(given).most_common(1)
    return count / len(given), text[:60]


def never_ends(facts: Facts) -> Found:
    """The first policy most of whose answers are cut off; later ones that end fewer than before."""
    for name, before in facts.starts().items():
        now, then = (facts.number(f"{p}.ended") for p in (name, before))
        if now is None:
            continue
        sampling = [stage.name for stage in facts.making("policy", explores=True)]
        ppo = name if name in sampling else next(iter(sampling), "")
        text = f"{percent(now)} of {facts.title(name)}'s answers end within their tokens"
        own, asked = (facts.of(one, "response_length") for one in (ppo, "evaluation"))
        where = "evaluation" if not ppo or asked not in (None, own) else ppo
        room = facts.setting(where, "response_length")
        if before != "base" and then is not None:
            text += f", {percent(then)} of {facts.title(before)}'s"
        cure = f"Raise {facts.setting(name, 'missing_eos_penalty')}, or {room}."
        if name != ppo:
            cure = f"Raise {facts.steps(name)}; or {room}, where good answers are longer."
        if now < ENDING:
            yield Finding("fault", name, f"Only {text}: most are cut off.", cure)
            return
        if before != "base" and then is not None and now < then - CUT_MORE:
            yield Finding("doubt", name, f"{text}: more are cut off.", cure)


def drawn_elsewhere(facts: Facts) -> Found:
    """Answers that vLLM drew: a run that is resumed or repeated has others."""
    for name, _, who, _ in _trained(facts):
        apart = facts.number(f"{name}.sampler_apart")
        if apart is not None:
            text = f"{who} learned from answers by vLLM, whose log-probabilities were {apart:.1g} "
            text += "a token from the trainer's. If it is resumed or repeated, its weights differ."
            yield Finding("note", name, text)


def blind_critic(facts: Facts) -> Found:
    """A value model that never foresaw the returns better than their mean does."""
    for stage in facts.making("policy", explores=True):
        name, foreseen = stage.name, stage.series("val/explained_variance")[1]
        if len(foreseen) >= UPDATES and max(foreseen) <= 0:
            text = f"{facts.title(name)}'s value model never foresaw the returns better than their "
            text += f"mean: its explained variance is {max(foreseen):.2f} at most, in "
            text += f"{len(foreseen)} updates. Its advantages are noisier than the returns."
            change = f"Raise {facts.setting(name, 'value_warmup_epochs')} or "
            change += f"{facts.setting(name, 'value_learning_rate')}."
            yield Finding("doubt", name, text.replace("-", "−"), change)


# ---- who wins -----------------------------------------------------------------------------------


def hardly_moved(facts: Facts) -> Found:
    """A policy that is nearly its start, whoever judged: a win over itself proves nothing."""
    for name, _, who, start in _trained(facts):
        if told := still(facts, name, start):
            text = f"{who} has hardly moved: {told}. Whether it is better cannot be told."
            change = f"Raise {facts.setting(name, 'learning_rate')} or give it more steps."
            yield Finding("doubt", name, text, change)


def still(facts: Facts, name: str, start: str) -> str:
    """How little a policy moved, in a phrase; empty where it moved, or its start was kept."""
    same, kl = facts.number(f"{name}.unchanged"), facts.number(f"{name}.kl")
    if facts.number(f"{name}.kept_update") == 0:
        return ""
    told = []
    if same is not None and same > SAME:
        told.append(f"{percent(same)} of its answers are {start}'s word for word")
    if kl is not None and kl < STILL:
        told.append(f"its KL is {kl:.2f} nats, under {STILL:g}")
    return ", and ".join(told)


def _wins(facts: Facts, name: str, by: str = "", over: str = "") -> Share | None:
    return facts.share(f"{name}.{by}win_rate{over}", "evaluation.prompts")


def judges(facts: Facts, name: str, over: str = "") -> Iterator[tuple[Share, str, bool]]:
    """The win rates by judges that a policy was not trained against, and what each is called.

    But those of a judge that ranks test pairs no better than chance, or than length does. Last,
    whether the judge is of another make than the reward model. The independent judge is not: on
    smoke's answers to a prompt, its scores and the reward model's correlate by 0.7 to 0.8.
    """
    trained = facts.share("judge.accuracy", "judge.test_pairs")
    alone = facts.number("judge.length_accuracy") or 0.0
    blind = trained and (trained.low <= 0.5 or trained.value <= alone)
    own = {INDEPENDENT: INDEPENDENT, facts.reward_model(name): "the reward model's own folder"}
    for one in facts.rewards(name):
        spec = "python:" + (one.rule or ":".join(one.code or ()))
        own[spec] = f"{_called(spec)} {TRAINED}"
    for by, spec in zip(("judge_", "judge2_"), [*_specs(facts), "", ""], strict=False):
        share = _wins(facts, name, by, over)
        if share and not (blind and spec in (INDEPENDENT, OTHER_BASE)):
            called = own.get(spec) if spec not in ("", INDEPENDENT) else None
            yield share, called or _called(spec), spec not in own


def _specs(facts: Facts) -> list[str]:
    """The judges, as the recipe names them; rules as "python:…", and OTHER_BASE."""
    asked = facts.recipe.get("evaluation") or {}
    specs = asked.get("judge") or []
    found = [_spec(one) for one in (specs if isinstance(specs, list) else [specs])]
    elsewhere = asked.get("judge_model")
    return [OTHER_BASE if one == INDEPENDENT and elsewhere else one for one in found]


def judges_called(facts: Facts) -> list[str]:
    """What a sentence calls the judges of a run's evaluation."""
    return [_called(spec) for spec in _specs(facts) if spec != "none"]


def _spec(judge: Any) -> str:
    rule = judge.get("rule") or judge.get("python") if isinstance(judge, dict) else ""
    return f"python:{rule}" if rule else str(judge)


def _called(judge: str) -> str:
    if judge == INDEPENDENT:
        return "a second reward model on the same base"
    if judge == OTHER_BASE:
        return "a second reward model on another base"
    if judge.startswith("python:"):
        return f"the rule `{judge.rpartition('/')[2].removeprefix('python:')}`"
    return "a judge it was not trained against"


def _open(share: Share) -> bool:
    """Whether more prompts might show a gain."""
    wide = share.high - share.low > WIDE or share.value >= PERHAPS
    return share.low <= 0.5 <= share.high and wide


def winning(facts: Facts) -> Found:
    """By the reward model, and by the judges that it was not trained against."""
    warned = False  # that the judge is on the same base: once is enough
    for name, _, who, start in _trained(facts):
        if still(facts, name, start):
            continue
        wins, kl = _wins(facts, name), facts.number(f"{name}.kl")
        own, judged = facts.reward_model(name), list(judges(facts, name))
        own = own or (name if facts.rewards(name) else None)
        price = f", at {kl:.1f} nats" if kl is not None else ""
        if gained := wins is not None and wins.low > 0.5:
            text = f"{who} beat {start} on {said(wins, 'prompts')} by {facts.scorer}"
            text += f"{' that it was trained against' if own else ''}{price}."
            other = 'No other judge to rely on: `evaluation.judge = "independent"` trains one'
            other += ", with `dataset.judge_fraction` over 0."
            level, change = ("good", "") if judged or own == name else ("doubt", other)
            yield Finding(level, name, text, change)
        elif wins and not _open(wins):
            yield _no_gain(facts, name, f"{who} wins against {start}", wins, facts.scorer)
        elif wins is None and judged and not any(share.low > 0.5 for share, *_ in judged):
            share, called, _ = judged[0]
            if share.high >= 0.5 and not _open(share):
                yield _no_gain(facts, name, f"{who} wins against {start}", share, called)
        outside = any(apart for *_, apart in judged)
        for share, called, apart in judged:
            if share.low > 0.5:
                text = f"{who} beat {start} on {said(share, 'prompts')} by {called}{price}"
                why, change = ("", "") if outside or warned else (ALONE, OUTSIDE)
                why = why and (OWN if called.endswith(TRAINED) else why)
                warned = warned or not outside
                level = "success" if apart else "good"
                yield Finding(level, name, f"{text}{why}.", change)
            elif wins and own and gained:
                if share.high < wins.low and (same := _both_best(facts, name, called)):
                    text = f"{called} gave both answers its best score on {same} prompts: "
                    text += f"it cannot say that {who}'s are better than {start}'s."
                    change = "Take a judge that asks for more, or ask people."
                    yield Finding("doubt", name, f"{text[0].upper()}{text[1:]}", change)
                elif share.high < wins.low and not _open(share):
                    text = f"{who} beat {start} on {percent(wins.value)} of {wins.count} prompts "
                    its = facts.scorer.replace("the", "its")
                    text += f"by {its}, and on {percent(share.value)} ({interval(share)}) by "
                    text += f"{called}: it learned to please {its}, not to answer better."
                    more = "or give the reward model more pairs, of such answers"
                    more = more if own != name else "or reward what its answers lack"
                    yield Finding("fault", own, text, f"{facts.slower(name)}; {more}.")
            elif share.high < 0.5:
                text = f"{who} wins against {start} on {said(share, 'prompts')} by {called}: "
                yield Finding("fault", name, f"{text}it became worse.", f"{facts.slower(name)}.")
        yield from _only_by_length(facts, name, f"{who} wins against {start}")
        shares = [(wins, facts.scorer)] if wins else []
        shares += [(share, called) for share, called, _ in judged]
        yield from _too_few_prompts(facts, f"{who} wins against {start}", shares)


def _both_best(facts: Facts, name: str, called: str) -> str:
    """ "90 of 102", where a judge gave both answers its best score to most prompts."""
    start = facts.starts().get(name, "")
    for key, spec in zip(("judged", "judged2"), _specs(facts), strict=False):
        same, count = facts.both_best(key, name, start)
        if _called(spec) == called and same > count / 2:
            return f"{same} of {count}"
    return ""


def _no_gain(facts: Facts, name: str, versus: str, wins: Share, called: str) -> Finding:
    """None that even the reward model sees; or none that a judge does, where there is none."""
    text, change = f"{versus} on {said(wins, 'prompts')} by {called}", facts.slower(name)
    if facts.number(f"{name}.kept_update") == 0:
        text += ": no update beat its start on the validation prompts, so its start was kept."
    elif wins.high < 0.5:
        text += ": training made it worse."
    else:
        text += ": it gained nothing that can be told."
        change = f"Give it more steps, or lower {facts.leash(name)}"
    return Finding("fault", name, text, f"{change}.")


def _only_by_length(facts: Facts, name: str, versus: str) -> Found:
    """A gain that is gone among answers of like length, or among those that ended."""
    parts = {
        "like_length": ("of like length", "its gain is in their length"),
        "ended": ("that both ended", "no gain"),
    }
    for by, called in (("judge_", "the judge"), ("judge2_", "the second judge")):
        share = _wins(facts, name, by)
        for part, (words, so) in parts.items() if share and share.low > 0.5 else ():
            few = facts.share(f"{name}.{by}win_rate_{part}", f"{name}.{part}_pairs")
            if few and few.count >= SOME and few.value < 0.5:
                text = f"Among answers {words}, {versus} on {said(few, 'prompts')} by {called}: "
                yield Finding("doubt", name, f"{text}{so}.", "Read some of them side by side.")


def _too_few_prompts(facts: Facts, versus: str, shares: list[tuple[Share, str]]) -> Found:
    asked, wanted = facts.number("evaluation.prompts"), facts.of("evaluation", "prompts")
    no_more = asked and isinstance(wanted, int) and asked < wanted
    key = ("dataset", "test_fraction") if no_more else ("evaluation", "prompts")
    for share, called in shares:
        if _open(share):
            text = f"{versus} on {said(share, 'prompts')} by {called}: too few prompts to tell."
            more = f"Raise {facts.setting(*key)}: {MORE_PROMPTS}"
            yield Finding("doubt", "evaluation", text, more)


def judges_agree(facts: Facts) -> Found:
    """How far each judge's scores follow the reward model's among a prompt's answers."""
    if "reward model" not in facts.scorer:
        return
    for key, spec in zip(("judged", "judged2"), _specs(facts), strict=False):
        follows, prompts = facts.within_prompts("scores", key)
        if follows is not None:
            text = "Among a prompt's answers, the scores of the reward model and of "
            text += f"{_called(str(spec))} correlate by {follows:.2f} ({prompts} prompts)."
            yield Finding("note", "evaluation", text.replace("-", "−"))


def over_base(facts: Facts) -> Found:
    """The last policy against the model that all began with."""
    starts = facts.starts()
    for name in [*starts][-1:]:
        over = "_over_base" if starts[name] != "base" else ""
        own = [(share, facts.scorer)] if (share := _wins(facts, name, "", over)) else []
        for share, called in [both[:2] for both in judges(facts, name, over)] or own:
            text = f"{facts.title(name)} wins against the base model on {said(share, 'prompts')} "
            if share.low > 0.5:
                yield Finding("good", name, f"{text}by {called}.")
            elif share.high < 0.5:
                change = "Its demonstrations or its reward do not ask for what is judged here."
                yield Finding("doubt", name, f"{text}by {called}: it became worse.", change)
            else:
                yield Finding("note", name, f"{text}by {called}: no difference to tell.")


def against_best_of(facts: Facts) -> Found:
    """The last policy's gain and price as shares of those of the best of most answers."""
    policy = str(facts.best_of.get("against", ""))
    counts = [key.split(".")[1] for key in facts.results if key.startswith("best_of.")]
    most = max((int(count) for count in counts if count.isdecimal()), default=0)
    kl, least = facts.number(f"{policy}.kl"), facts.number(f"best_of.{most}.kl")
    for by, called in (("judge", "the judge"), ("score", facts.scorer)):
        ours, theirs = f"{policy}.{by}_gain", f"best_of.{most}.{by}_gain"
        gain, best = facts.number(ours), facts.number(theirs)
        if gain is not None and best and best > 0 and kl is not None and least:
            who, start = (facts.title(str(name)) for name in (policy, facts.best_of.get("policy")))
            share = "nothing"
            if gain > 0:
                # As if the two gains were apart: on the same prompts they err together.
                half = 1.96 * math.hypot(_error(facts, ours), _error(facts, theirs)) * gain / best
                low, high = max(0.0, gain / best - half), gain / best + half
                share = f"{percent(gain / best)} ({100 * low:.0f}–{100 * high:.0f})"
            text = f"By {called}, {who} gained {share} of what taking the best of "
            text += f"{most} of {start}'s answers does, at {kl / least:.1f} times its KL."
            yield Finding("doubt" if gain < LITTLE * best else "note", policy, text)
            return


def _error(facts: Facts, key: str) -> float:
    """The standard error of a number, as a share of it; 0 where it has no interval."""
    value, low, high = (facts.number(f"{key}{end}") for end in ("", "_low", "_high"))
    return (high - low) / 3.92 / value if value and low is not None and high is not None else 0.0


RULES = (
    went_far,
    collapsed,
    never_ends,
    blind_critic,
    hardly_moved,
    drawn_elsewhere,
    winning,
    judges_agree,
    over_base,
    against_best_of,
)
