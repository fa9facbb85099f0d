"""From a run's facts to its plots: what each shows, and what that means in a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlhf_recipes import plots
from rlhf_recipes.facts import Facts, Share, Stage, number
from rlhf_recipes.findings import percent, title
from rlhf_recipes.plots import BASE, PPO, SFT, Plot

LEAST = 4  # points: a curve of fewer says nothing
ROUGH = 0.2  # of the tokens clipped, in an update
UNITS = "gain, units of the reward"


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Where a curve begins and ends: the mean of a tenth."""
    few = max(1, len(values) // 10)
    return plots.mean(values[:few]), plots.mean(values[-few:])


def _went(values: Sequence[float], form: str = ".2f") -> str:
    """rose from 1.00 to 2.00"""
    first, last = ends(values)
    verb = "rose" if last > first else "fell"
    text = f"{verb} from {first:{form}} to {last:{form}}"
    return text.replace("-", "−").replace("%", " %")


def _alt(what: str, xs: Sequence[float], ys: Sequence[float], form: str = ".2f") -> str:
    least, most = f"{min(ys):{form}}", f"{max(ys):{form}}"
    over = f"from step {xs[0]:.0f} to {xs[-1]:.0f} {what} {_went(ys, form)}"
    return f"A line: {over}; the least is {least}, the most {most}.".replace("-", "−")


# ---- policies -----------------------------------------------------------------------------------


def who_wins(facts: Facts, name: str, start: str) -> Plot | None:
    """Every way of counting that there is: by whom, among which answers."""
    rows: list[tuple[str, float, float, float, str]] = []
    among = {"": "all", "_ended": "both ended", "_like_length": "like length"}
    judges = {"judge_": ("judge", PPO), "judge2_": ("2nd judge", PPO), "": ("reward", SFT)}
    for by, (whose, colour) in judges.items():
        for which, words in among.items():
            count = f"{name}.{which[1:]}_pairs" if which else "evaluation.prompts"
            share = facts.share(f"{name}.{by}win_rate{which}", count)
            if share:
                rows.append(_row(f"{whose}, {words}", share, colour))
    if not rows:
        return None
    label, value, low, high, _ = rows[0]
    who, other = title(facts, name).strip("`"), title(facts, start).strip("`")
    told = f"{who}'s answers are preferred to {other}'s on {percent(value)} of the prompts"
    said = "; ".join(f"by the {row[0]}: {_between(row)}" for row in rows)
    return plots.ranges(
        f"wins-{name}",
        told,
        f"Shares of prompts on which {who} wins against {other}, ties one half, {said}.",
        rows,
        "Ties count one half; bars hold the share in 95 of 100 repetitions. The dotted line is a "
        "half: neither is preferred.",
    )


def _between(row: tuple[str, float, float, float, str]) -> str:
    _, value, low, high, _ = row
    return f"{percent(value)} ({100 * low:.0f} to {100 * high:.0f})"


def price(facts: Facts, name: str, by: str) -> Plot | None:
    """Gain against KL, beside what taking the best of n answers gains."""
    gain, kl = facts.number(f"{name}.{by}_gain"), facts.number(f"{name}.kl")
    if gain is None or kl is None:
        return None
    around = [facts.number(f"{name}.{by}_gain_{end}") for end in ("low", "high")]
    whose = "the judge" if by == "judge" else "the reward model"
    who = title(facts, name).strip("`")
    told, best, label = f"By {whose}, {who} gained {gain:+.2f} at {kl:.1f} nats", [], ""
    known = facts.best_of or {}
    if known.get("against") == name:
        columns = [known.get(key) or [] for key in ("n", "kl", f"{by}_gain")]
        best = [row for row in zip(*columns, strict=False) if None not in row]
    if best:
        most, dear, much = best[-1]
        label = f"best of {most}"
        if much > 0 and dear > 0:
            told = f"By {whose}, {who} gained {percent(gain / much)} of what the best of {most} "
            told += f"answers does, at {kl / dear:.1f} times the KL"
    path = _path(facts, name) if by == "score" else []
    points = "; ".join(f"best of {n}: {g:+.2f} at {k:.2f}" for n, k, g in best)
    alt = f"Gain by {whose} against KL. {who}: {gain:+.2f} at {kl:.2f} nats. {points}"
    note = "Upper left is better: more gain for less distance."
    if path:
        note += " Small dots: each update on its training prompts."
    return plots.price(
        f"price-{by}-{name}",
        told.replace("-", "−"),
        alt.replace("-", "−").strip(),
        best=best,
        policies=[(who, kl, gain, *(gain if end is None else end for end in around))],
        path=path,
        best_of=label,
        y=UNITS if by == "score" else "gain, the judge's points",
        note=note,
    )


def _path(facts: Facts, name: str) -> list[tuple[float, float]]:
    """KL and gain over the first update as PPO went."""
    stage = facts.stage(name)
    (_, kl), (_, scores) = (stage.series(key) for key in ("KL", "score")) if stage else ((), ())
    every = -(-len(kl) // plots.POINTS) or 1
    return [(k, s - scores[0]) for k, s in list(zip(kl, scores, strict=False))[::every]]


# ---- curves -------------------------------------------------------------------------------------


def ppo(facts: Facts, stage: Stage) -> list[Plot]:
    """Score, KL, entropy, length, value loss and clip share, with the guards."""
    made, guard = [], facts.of(stage.name, "guard") or {}
    kept, last = facts.number(f"{stage.name}.kept_update"), facts.number(f"{stage.name}.updates")
    mark = (kept, "kept") if kept and kept != last else None

    def add(key: str, form: str, limit=None, look="", **words: Any) -> None:
        xs, ys = stage.series(key)
        if len(xs) < LEAST:
            return
        first, last = ends(ys)
        plot = plots.curve(
            f"{stage.name}-{key.replace('/', '-')}",
            _meaning(key, ys, form),
            _alt(CURVES[key], xs, ys, form),
            [(xs, ys, PPO)],
            x="update",
            limit=limit(first) if limit else None,
            mark=mark,
            points=stage.series(look) if look else None,
            from_0=key != "score",
            **words,
        )
        made.append(plot)

    def floor(key: str) -> Callable[[float], tuple[float, str] | None]:
        share = number(guard, key)
        return lambda first: (share * first, "guard") if share else None

    most = number(guard, "max_kl")
    add("score", "+.2f", look="eval/score")
    add("KL", ".1f", lambda _: (most, f"guard {most:g}") if most else None)
    add("val/entropy_per_token", ".2f", floor("min_entropy"))
    add("length", ".0f", floor("min_length"))
    add("loss/value_avg", ".2f")
    add("policy/clipfrac_avg", ".1%", percent=True)
    return made


CURVES = {
    "score": "the score",
    "KL": "the KL",
    "val/entropy_per_token": "entropy",
    "length": "length",
    "loss/value_avg": "the value model's loss",
    "policy/clipfrac_avg": "the clipped share",
}


def _meaning(key: str, values: Sequence[float], form: str) -> str:
    """What a curve of PPO's says, in a line."""
    (first, last), went = ends(values), _went(values, form)
    change = last / first if first else 1.0
    if key == "score":
        return f"The score {went}"
    if key == "KL":
        return f"It moved {last:.1f} nats an answer away from its start"
    if key == "val/entropy_per_token":
        start = "Its choices stay open" if change > 0.5 else "Its choices narrow"
        return f"{start}: entropy {went} nats a token"
    if key == "length":
        verb = "grow" if change > 4 / 3 else "shrink" if change < 3 / 4 else "keep their length"
        return f"Answers {verb}: from {first:.0f} to {last:.0f} tokens"
    if key == "loss/value_avg":
        start = "learns to foresee the score" if change < 0.9 else "does not learn"
        return f"The value model {start}: its loss {went}"
    start = "Updates are gentle" if last < ROUGH else "Updates are rough"
    return f"{start}: {100 * last:.1f} % of the tokens are clipped"


def loss(facts: Facts, stage: Stage) -> Plot | None:
    """Of SFT, DPO or a reward model: on the rows it trained on, and on those it did not."""
    xs, ys = stage.series("loss")
    if len(xs) < LEAST:
        return None
    before = facts.number(f"{stage.name}.validation_loss_before")
    after = facts.number(f"{stage.name}.validation_loss")
    points, told, note = None, f"The training loss {_went(ys)}", ""
    alt = _alt("the loss", xs, ys)
    if before is not None and after is not None:
        points = ([0.0, xs[-1]], [before, after])
        told = f"On rows it did not see, the loss {_went([before, after])}"
        note = "Line: the rows it trains on. Dots: validation rows, before and after."
        alt += f" Two points: validation {before:.2f} before, {after:.2f} after."
    return plots.curve(
        f"{stage.name}-loss", told, alt, [(xs, ys, SFT)], x="step", points=points, note=note
    )


# ---- reward models ------------------------------------------------------------------------------


def accuracy(facts: Facts, name: str) -> Plot | None:
    rows: list[tuple[str, float, float, float, str]] = []
    whole = facts.share(f"{name}.accuracy", f"{name}.test_pairs")
    shorter = facts.share(f"{name}.shorter_accuracy", f"{name}.shorter_pairs")
    if whole is None:
        return None
    rows.append(_row("all", whole, PPO))
    if shorter:
        rows.append(_row("shorter preferred,", shorter, PPO))
    alone = facts.share(f"{name}.length_accuracy", f"{name}.test_pairs")
    if alone:
        rows.append(_row("length alone,", alone, BASE))
    said = "; ".join(f"{row[0]}: {_between(row)}" for row in rows)
    told = f"It ranks {percent(whole.value)} of {whole.count} pairs right"
    if alone:
        told += f"; by length alone it would be {percent(alone.value)}"
    note = "Pairs that nothing was trained on. Bars hold the share in 95 of 100 repetitions."
    return plots.ranges(f"{name}-accuracy", told, f"Shares ranked right, {said}.", rows, note)


def _row(label: str, share: Share, colour: str) -> tuple[str, float, float, float, str]:
    return (f"{label} {share.count}", share.value, share.low, share.high, colour)


def margins(name: str, stage: Stage) -> Plot | None:
    values = stage.evidence.get("margins")
    values = [v for v in values or () if isinstance(v, int | float)]
    if len(values) < LEAST:
        return None
    wrong, middle = sum(v < 0 for v in values), sorted(values)[len(values) // 2]
    told = f"In the middle pair the better answer leads by {middle:.1f} units; {wrong} of "
    told += f"{len(values)} are the wrong way round"
    alt = f"A histogram of the margins of {len(values)} test pairs: the least is {min(values):.1f},"
    alt += f" the middle {middle:.1f}, the most {max(values):.1f}; {wrong} are below 0."
    x = "score of the chosen answer over the rejected, units"
    told, alt = told.replace("-", "−"), alt.replace("-", "−")
    return plots.histogram(f"{name}-margins", told, alt, values, x)


def calibration(facts: Facts, name: str, stage: Stage) -> Plot | None:
    bins = []
    for row in stage.evidence.get("calibration") or ():
        said, right, pairs = (number(row, key) for key in ("said", "right", "pairs"))
        if said is not None and right is not None and pairs:
            bins.append((said, right, int(pairs)))
    if len(bins) < 2:
        return None
    count = sum(pairs for *_, pairs in bins)
    sure = sum(said * pairs for said, _, pairs in bins) / count
    right = sum(right * pairs for _, right, pairs in bins) / count
    off = facts.number(f"{name}.calibration_error")
    told = "It is about as sure as it should be"
    if abs(sure - right) > 0.05:
        told = f"It is {'surer' if sure > right else 'less sure'} than it should be"
    if off is not None:
        told += f": off by {percent(off)} on average"
    alt = "; ".join(f"{percent(s)} sure, {percent(r)} right, {n} pairs" for s, r, n in bins)
    return plots.calibration(f"{name}-calibration", told, f"{alt}.", bins)


def learning(stage: Stage) -> Plot | None:
    """A reward model's accuracy on the pairs that it trains on."""
    xs, ys = stage.series("accuracy")
    if len(xs) < LEAST:
        return None
    told = f"On the pairs it trains on, accuracy {_went(ys, '.0%')}"
    return plots.curve(
        f"{stage.name}-learning", told, _alt("accuracy", xs, ys, ".0%"), [(xs, ys, PPO)],
        x="step", percent=True, limit=(0.5, "chance"),
    )  # fmt: skip
