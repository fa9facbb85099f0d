"""Runs over one another: their curves on one plot, and their answers to the same prompts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from rlhf_recipes.recipe.kinds import KINDS
from rlhf_recipes.report import charts, svg
from rlhf_recipes.report.facts import Facts, Json, Stage
from rlhf_recipes.report.svg import BAD, BASE, PPO, SFT, Plot
from rlhf_recipes.store.digests import digest
from rlhf_recipes.text import plain

# As lines on one plot: a colour and a dash, so that nobody needs the colours.
LOOKS = [(PPO, "-"), (SFT, "--"), (BASE, "-."), (BAD, ":")]
OTHERS = {"loss": ("the loss", ".2f", "nats"), "margin": ("the margin", "+.2f", "")}
SHOWN = ("score", "KL", "val/entropy_per_token", "length")  # of charts.CURVES
FEW = 6  # prompts


def curves(runs: Sequence[Facts]) -> Iterator[Plot]:
    """What the same stages of several runs told of, and their last policies; not one shared stage.

    Lines beyond four look like the first again.
    """
    groups: dict[str, list[Stage | None]] = {}
    last = [[*facts.starts()][-1:] for facts in runs]
    if len({tuple(name) for name in last}) > 1:
        pairs = zip(runs, last, strict=True)
        groups["the last policy"] = [f.stage(name[0]) if name else None for f, name in pairs]
    names = dict.fromkeys(stage.name for facts in runs for stage in facts.stages[::-1])
    groups |= {name: [facts.stage(name) for facts in runs] for name in names}
    for title, stages in groups.items():
        if len({stage.folder for stage in stages if stage}) > 1:
            yield from _of(title, runs, stages)


def _of(title: str, runs: Sequence[Facts], stages: Sequence[Stage | None]) -> Iterator[Plot]:
    explores = any(stage and stage.kind in KINDS and KINDS[stage.kind].explores for stage in stages)
    keys = {key: (*charts.CURVES[key][:2], charts.CURVES[key][3]) for key in SHOWN}
    for key, (what, form, unit) in (keys if explores else OTHERS).items():
        told = [
            (plain(facts.folder.resolve().name), *stage.series(key))
            for facts, stage in zip(runs, stages, strict=True)
            if stage and len(stage.series(key)[0]) >= charts.LEAST
        ]
        if len(told) < 2:
            continue
        said = "; ".join(f"{name} {charts.went(ys, form)}" for name, _, ys in told)
        name = f"over-{title}-{key}".replace("/", "-").replace(" ", "-")
        plot = Plot(
            name,
            f"{what[0].upper()}{what[1:]} of {title}",
            f"Lines over one another, {what}: {said}.",
        )
        with plot.drawn(height=240) as axes:
            for (name, xs, ys), (colour, dash) in zip(told, itertools.cycle(LOOKS), strict=False):
                x = "update" if explores else "step"
                words = {"linestyle": dash, "label": name}
                svg.line(axes, xs, ys, colour, x, unit, ([], []), means=False, **words)
            axes.legend(frameon=False, labelcolor="linecolor", fontsize=10)
        yield plot


def answers(runs: Sequence[Facts]) -> list[Json]:
    """Prompts that every run's last policy was asked, drawn by their digests, and the answers."""
    last = [[*facts.starts()][-1:] for facts in runs]
    tables = [
        {str(row.get("prompt")): row for row in facts.answers if _answered(row, name)}
        for facts, name in zip(runs, last, strict=True)
    ]
    shared = [prompt for prompt in tables[0] if all(prompt in table for table in tables)]
    shown = []
    for prompt in sorted(shared, key=digest)[:FEW]:
        whose = [
            {
                "who": f"{plain(facts.folder.resolve().name)} · {name}",
                "text": table[prompt]["answers"][name],
                "scored": facts.scored(table[prompt], name),
            }
            for facts, [name], table in zip(runs, last, tables, strict=True)
        ]
        shown.append({"prompt": prompt, "answers": whose})
    return shown


def _answered(row: Json, last: list[str]) -> bool:
    given = row.get("answers")
    return isinstance(given, dict) and bool(last) and isinstance(given.get(last[0]), str)
