"""From a run's facts to its plots: what each shows, and what that means in a line.

A chart yields its plot where the run has the numbers for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from rlhf_recipes.findings import percent, points
from rlhf_recipes.recipe.kinds import KINDS
from rlhf_recipes.recipe.rewards import LOGGED
from rlhf_recipes.report import svg
from rlhf_recipes.report.facts import Facts, Stage, number
from rlhf_recipes.report.svg import BAD, BASE, MUTED, PPO, SFT, Plot
from rlhf_recipes.stats import Share

LEAST = 4  # points: a curve of fewer says nothing
ROUGH = 0.2  # of the tokens clipped, in an update


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Where a curve begins and ends: the mean of a tenth."""
    few = svg.tenth(values)
    return fmean(values[:few]), fmean(values[-few:])


def went(values: Sequence[float], form: str = ".2f") -> str:
    """rose from 1.00 to 2.00"""
    first, last = ends(values)
    told = f"{'rose' if last > first else 'fell'} from {first:{form}} to {last:{form}}"
    if f"{first:{form}}" == f"{last:{form}}":
        told = f"stayed at {last:{form}}"
    return told.replace("-", "−").replace("%", " %")


def _alt(what: str, xs: Sequence[float], ys: Sequence[float], form: str = ".2f") -> str:
    least, most = f"{min(ys):{form}}", f"{max(ys):{form}}"
    over = f"from step {xs[0]:.0f} to {xs[-1]:.0f} {what} {went(ys, form)}"
    return f"A line: {over}; the least is {least}, the most {most}.".replace("-", "−")


# ---- policies -----------------------------------------------------------------------------------


def who_wins(facts: Facts, name: str, start: str) -> Iterator[Plot]:
    """Every way of counting that there is: by whom, among which answers."""
    rows: list[tuple[str, Share, str]] = []
    among = {"": "all", "_ended": "both ended", "_like_length": "like length"}
    judges = {"judge_": ("judge", PPO), "judge2_": ("2nd judge", PPO), "": ("reward", BASE)}
    for by, (whose, colour) in judges.items():
        for which, words in among.items():
            count = f"{name}.{which[1:]}_pairs" if which else "evaluation.prompts"
            if share := facts.share(f"{name}.{by}win_rate{which}", count):
                rows.append((f"{whose}, {words} {share.count}", share, colour))
    if not rows:
        return
    who, other, share = facts.plain_title(name), facts.plain_title(start), rows[0][1]
    told = f"{who}'s answers are preferred to {other}'s on {percent(share.value)} of the prompts"
    said = "; ".join(f"by the {label}: {_between(share)}" for label, share, _ in rows)
    alt = f"Shares of prompts on which {who} wins against {other}, ties one half, {said}."
    note = "Ties count one half; bars hold the share in 95 of 100 repetitions. The dotted line is "
    note += "a half: neither is preferred."
    yield svg.ranges(Plot(f"wins-{name}", told, alt, note), rows)


def _between(share: Share) -> str:
    return f"{percent(share.value)} ({100 * share.low:.0f} to {100 * share.high:.0f})"


def price(facts: Facts, name: str, by: str) -> Iterator[Plot]:
    """Gain against KL, beside what taking the best of n answers gains, where that was measured."""
    gain, kl = facts.number(f"{name}.{by}_gain"), facts.number(f"{name}.kl")
    if gain is None or kl is None:
        return
    around = [facts.number(f"{name}.{by}_gain_{end}") for end in ("low", "high")]
    low, high = (gain if end is None else end for end in around)
    whose, unit = "the judge", "gain, the judge's points"
    if by == "score":
        whose, unit = facts.scorer, "gain, units of the reward"
    who, best = facts.plain_title(name), []
    if facts.best_of.get("against") == name:
        columns = [facts.best_of.get(key) or [] for key in ("n", "kl", f"{by}_gain")]
        best = [row for row in zip(*columns, strict=False) if None not in row]
    if not best:
        return
    told = f"By {whose}, {who} gained {gain:+.2f} at {kl:.1f} nats"
    if min(best[-1][1:]) > 0:
        most, dear, much = best[-1]
        told = f"By {whose}, {who} gained {percent(gain / much)} of what the best of {most} "
        told += f"answers does, at {kl / dear:.1f} times the KL"
    points = "; ".join(f"best of {n}: {g:+.2f} at {k:.2f}" for n, k, g in best)
    alt = f"Gain by {whose} against KL. {who}: {gain:+.2f} at {kl:.2f} nats. {points}"
    note = f"Upper left is better: more gain for less distance. {facts.tempered('evaluation')}"
    told, alt = told.replace("-", "−"), alt.replace("-", "−").strip()
    plot = Plot(f"price-{by}-{name}", told, alt, note.strip())
    with plot.drawn(height=240) as axes:
        axes.axhline(0, color=MUTED, linewidth=1)
        counts, nats, gains = zip(*best, strict=True)
        axes.plot(nats, gains, "o-", color=SFT, markersize=4)
        for n, at, gained in best[1:-1]:
            svg.say(axes, str(n), (at, gained), (0, 6), ha="center", color=SFT)
        svg.say(axes, f"best of {counts[-1]}", best[-1][1:], (9, -3), va="center", color=SFT)
        axes.plot([kl, kl], [low, high], color=PPO, linewidth=5, alpha=0.35)
        axes.plot([kl], [gain], "D", color=PPO, markersize=8)
        left = kl < max([kl, *nats]) / 3
        svg.say(axes, who, (kl, gain), (9 if left else -9, 0), ha="left" if left else "right",
                va="center", color=PPO, fontweight="bold")  # fmt: skip
        axes.set_xlim(left=0)
        svg.house(axes, "KL, nats an answer", unit)
    yield plot


# ---- curves -------------------------------------------------------------------------------------


# Of PPO: how it is called, its form, the guard that watches it, its unit.
CURVES = {
    "score": ("the score", "+.2f", "", "units of the reward"),
    "KL": ("the KL", ".1f", "max_kl", "nats an answer"),
    "val/entropy_per_token": ("entropy", ".2f", "min_entropy", "nats a token"),
    "length": ("length", ".0f", "min_length", "tokens"),
    "loss/value_avg": ("the value model's loss", ".2f", "", "units squared"),
    "val/explained_variance": ("the explained variance", ".2f", "", "1 is all, 0 the mean"),
    "policy/clipfrac_avg": ("the clipped share", ".1%", "", "of the tokens"),
}


def ppo(facts: Facts, stage: Stage) -> Iterator[Plot]:
    """Score, KL, entropy, length, value loss and clip share, with the guards."""
    guard = facts.of(stage.name, "guard") or {}
    kept, last = facts.number(f"{stage.name}.kept_update"), facts.number(f"{stage.name}.updates")
    logged = dict.fromkeys(key for row in stage.curve for key in row if key.startswith(LOGGED))
    parts = {
        key: (f"the reward {key.removeprefix(LOGGED)}", "+.2f", "", "reward") for key in logged
    }
    for key, (what, form, watch, unit) in (CURVES | parts).items():
        xs, ys = stage.series(key)
        if len(xs) < LEAST:
            continue
        name = f"{stage.name}-{key.replace('/', '-')}"
        note = facts.tempered(stage.name) if key == "KL" else ""
        plot = Plot(name, _meaning(key, ys, form), _alt(what, xs, ys, form), note)
        with plot.drawn() as axes:
            # The points are looks at validation prompts.
            svg.line(axes, xs, ys, PPO, "update", unit, stage.series(f"eval/{key}"))
            bound = number(guard, watch) or 0.0  # of all but the KL a share of what it was at first
            limit = bound if key == "KL" else bound * ends(ys)[0]
            if bound and limit < 4 * max(ys):
                axes.axhline(limit, color=BAD, linestyle=(0, (5, 3)), linewidth=1.2)
                at = {"xycoords": ("axes fraction", "data"), "ha": "right", "color": BAD}
                told = f"guard {bound:g}" if key == "KL" else "guard"
                svg.say(axes, told, (1, limit), (0, 2), va="bottom", **at)
            if kept and kept != last:
                axes.axvline(kept, color=MUTED, linestyle=":", linewidth=1.4)
                at = {"xycoords": ("data", "axes fraction"), "ha": "center"}
                svg.say(axes, "kept", (kept, 1), (0, 2), va="bottom", **at)
            if key == "val/explained_variance":
                axes.axhline(0, color=MUTED, linewidth=1)
            elif key != "score" and key not in parts:
                axes.set_ylim(bottom=0)
            if form == ".1%":
                svg.percents(axes.yaxis)
        yield plot


def _meaning(key: str, values: Sequence[float], form: str) -> str:
    """What a curve of PPO's says, in a line."""
    (first, last), moved = ends(values), went(values, form)
    change = last / first if first else 1.0
    if key == "score" or key.startswith(LOGGED):
        return f"The {key if key == 'score' else f'reward {key.removeprefix(LOGGED)}'} {moved}"
    if key == "KL":
        return f"It moved {last:.1f} nats an answer away from its start, at the end"
    if key == "val/entropy_per_token":
        start = "Its choices stay open" if change > 0.5 else "Its choices narrow"
        return f"{start}: entropy {moved} nats a token"
    if key == "length":
        verb = "grow" if change > 4 / 3 else "shrink" if change < 3 / 4 else "keep their length"
        return f"Answers {verb}: from {first:.0f} to {last:.0f} tokens"
    if key == "loss/value_avg":
        start = "learns to foresee the score" if change < 0.9 else "does not learn"
        return f"The value model {start}: its loss {moved}"
    if key == "val/explained_variance":
        start = "foresees the returns" if last > 0 else "foresees the returns worse than their mean"
        return f"The value model {start}: explained variance {moved}"
    start = "Updates are gentle" if last < ROUGH else "Updates are rough"
    return f"{start}: the clipped share of the tokens {moved}"


def loss(facts: Facts, stage: Stage) -> Iterator[Plot]:
    """Of SFT, DPO or a reward model: on the rows it trained on, and on those it did not."""
    xs, ys = stage.series("loss")
    if len(xs) < LEAST:
        return
    before = facts.number(f"{stage.name}.validation_loss_before")
    after = facts.number(f"{stage.name}.validation_loss")
    plot = Plot(f"{stage.name}-loss", f"The training loss {went(ys)}", _alt("the loss", xs, ys))
    plot.note = svg.MEANS
    points: svg.Curve = ([], [])
    kind = KINDS[stage.kind]
    unit = "nats a token" if kind.learns_from == "answers" else "nats a pair"
    colour = PPO if kind.makes == "policy" and kind.learns_from != "answers" else SFT
    if kind.makes != "policy":
        colour = MUTED
    if before is not None and after is not None:
        points = ([0.0, xs[-1]], [before, after])
        plot.title = f"On rows it did not see, the loss {went([before, after])}"
        plot.note = "Line: the rows it trains on. Dots: validation rows, before and after."
        plot.alt += f" Two points: validation {before:.2f} before, {after:.2f} after."
    with plot.drawn() as axes:
        svg.line(axes, xs, ys, colour, "step", unit, points, means=not points[0])
    yield plot


def compared(stage: Stage) -> Iterator[Plot]:
    """Of DPO or KTO: what it told of as it went, on the rows that it trained on."""
    for key, form in {"margin": "+.2f", "accuracy": ".0%"}.items():
        xs, ys = stage.series(key)
        if len(xs) < LEAST:
            continue
        told = f"The margin of its training rows {went(ys, form)}"
        if key == "accuracy":
            told = f"Training pairs whose better answer it prefers: the share {went(ys, form)}"
        plot = Plot(f"{stage.name}-{key}", told, _alt(f"the {key}", xs, ys), svg.MEANS)
        unit = "nats times beta" if key == "margin" else "of the pairs"
        with plot.drawn() as axes:
            svg.line(axes, xs, ys, PPO, "step", unit, ([], []))
            if key == "accuracy":
                svg.percents(axes.yaxis)
        yield plot


# ---- reward models ------------------------------------------------------------------------------


def accuracy(facts: Facts, name: str) -> Iterator[Plot]:
    whole = facts.share(f"{name}.accuracy", f"{name}.test_pairs")
    shorter = facts.share(f"{name}.shorter_accuracy", f"{name}.shorter_pairs")
    alone = facts.share(f"{name}.length_accuracy", f"{name}.test_pairs")
    if whole is None:
        return
    told = f"It ranks {percent(whole.value)} of {whole.count} pairs right"
    if alone:
        told += f"; by length alone it would be {percent(alone.value)}"
    shares = {"all": whole, "shorter preferred,": shorter, "length alone,": alone}
    there = [(f"{label} {share.count}", share) for label, share in shares.items() if share]
    rows = [(label, share, BASE if share is alone else PPO) for label, share in there]
    said = "; ".join(f"{label}: {_between(share)}" for label, share, _ in rows)
    note = "Pairs that nothing was trained on. Bars hold the share in 95 of 100 repetitions."
    plot = Plot(f"{name}-accuracy", told, f"Shares ranked right, {said}.", note)
    yield svg.ranges(plot, rows)


def margins(name: str, stage: Stage) -> Iterator[Plot]:
    values = stage.evidence.get("margins") or []
    if len(values) < LEAST:
        return
    wrong, middle = sum(v < 0 for v in values), sorted(values)[len(values) // 2]
    told = f"In the middle pair the better answer leads by {middle:.1f} units; {wrong} of "
    told += f"{len(values)} are the wrong way round"
    alt = f"A histogram of the margins of {len(values)} test pairs: the least is {min(values):.1f},"
    alt += f" the middle {middle:.1f}, the most {max(values):.1f}; {wrong} are below 0."
    plot = Plot(f"{name}-margins", told.replace("-", "−"), alt.replace("-", "−"))
    with plot.drawn() as axes:
        reach = max(map(abs, values)) or 1.0
        half = min(24, max(8, len(values) // 6)) // 2
        width = reach / half  # an edge stands at 0
        edges = [-reach + at * width for at in range(2 * half + 1)]
        edges = [edge for edge in edges if edge + width > min(values) - 1e-9]
        negative, right = [v for v in values if v < 0], [v for v in values if v >= 0]
        axes.hist([negative, right], edges, color=[BAD, PPO], stacked=True, rwidth=0.92)
        axes.axvline(0, color=MUTED, linestyle=":", linewidth=1.4)
        svg.house(axes, "lead of the chosen answer, units", "pairs")
    yield plot


def labels(stage: Stage) -> Iterator[Plot]:
    """Accuracy of a linear head by the pairs that it was fitted on."""
    keys = ("pairs", "accuracy", "low", "high")
    rows = [[number(point, key) for key in keys] for point in stage.labels.get("points") or ()]
    known = [[value for value in row if value is not None] for row in rows]
    gain = [number(stage.labels, key) for key in ("gain", "gain_low", "gain_high")]
    told = [value for value in gain if value is not None]
    if len(known) < 2 or any(len(row) < len(keys) for row in known) or len(told) < len(gain):
        return
    counts, values, lows, highs = map(list, zip(*known, strict=True))
    title = f"The last half of the pairs gave {points(*told)}"
    said = "; ".join(f"{n:.0f} pairs: {percent(value)}" for n, value, *_ in known)
    note = "A linear head on the states from before the training, in ten draws of the pairs. The "
    note += "band holds the share in 95 of 100 repetitions."
    plot = Plot(f"{stage.name}-labels", title, f"Shares ranked right: {said}.", note)
    with plot.drawn() as axes:
        axes.fill_between(counts, lows, highs, color=PPO, alpha=0.2, linewidth=0)
        axes.plot(counts, values, "o-", color=PPO)
        svg.house(axes, "training pairs", "test pairs ranked right")
        svg.percents(axes.yaxis)
    yield plot


def calibration(facts: Facts, name: str, stage: Stage) -> Iterator[Plot]:
    """How sure it was against how often it was right."""
    full = [row for row in stage.evidence.get("calibration") or () if row["pairs"]]
    if len(full) < 2:
        return
    said, right, pairs = ([row[key] for row in full] for key in ("said", "right", "pairs"))
    over = fmean(said, pairs) - fmean(right, pairs)
    off = facts.number(f"{name}.calibration_error")
    told = "It is about as sure as it should be"
    if abs(over) > 0.05:
        told = f"It is {'surer' if over > 0 else 'less sure'} than it should be"
    if off is not None:
        told += f": off by {percent(off)} on average"
    bins = zip(said, right, pairs, strict=True)
    alt = "; ".join(f"{percent(s)} sure, {percent(r)} right, {n} pairs" for s, r, n in bins)
    plot = Plot(f"{name}-calibration", told, f"{alt}.")
    with plot.drawn() as axes:
        low = 0.0 if min(said + right) < 0.5 else 0.5
        axes.plot([low, 1], [low, 1], color=MUTED, linestyle=":", linewidth=1.4)
        axes.plot(said, right, color=PPO, linewidth=1.2, alpha=0.5)
        sizes = [20 + 180 * count / max(pairs) for count in pairs]
        axes.scatter(said, right, sizes, color=PPO, linewidths=0)
        axes.set_xlim(low - 0.02, 1.03)
        axes.set_ylim(low - 0.05, 1.06)
        svg.house(axes, "how sure it was", "how often right")
        svg.percents(axes.xaxis)
        svg.percents(axes.yaxis)
    yield plot
