"""The report's plots: SVG to stand inside a page, coloured by the page's own variables.

Each plot says in words what it shows, for who does not see it.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from markupsafe import escape

from rlhf_recipes.stats import Share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-ins that matplotlib knows for the page's colours, which differ by light and dark.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
PPO, SFT, BASE, BAD = "#040404", "#050505", "#060606", "#070707"
NAMES = {INK: "ink", MUTED: "muted", GRID: "grid", PPO: "ppo", SFT: "sft", BASE: "base", BAD: "bad"}
Point = tuple[float, float]
Curve = tuple[Sequence[float], Sequence[float]]  # steps and values
POINTS = 300  # of a curve: more cannot be told apart
WIDTH = 290  # of a plot where it is narrowest on a page, in its pixels: text keeps its size
MEANS = "The title compares the two dark marks: the means of the first and the last tenth."
STYLE = Path(__file__).with_suffix(".mplstyle")
NOTHING = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # of metadata


@dataclass
class Plot:
    name: str  # its own on its page: ids are made of it
    title: str  # what it means
    alt: str  # what is to be seen, in words
    note: str = ""
    svg: str = ""

    @contextmanager
    def drawn(self, height: int = 200) -> Iterator[Axes]:
        """Axes to draw on; after the block the plot is made. Points are the SVG's units."""
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its font cache
        import matplotlib
        from matplotlib.figure import Figure

        drawn = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": self.name}, STYLE):
            figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, layout="constrained")
            yield figure.add_subplot()
            figure.savefig(drawn, format="svg", metadata=NOTHING)
        # Ids of groups repeat on a page of several plots; a style sheet applies to the whole page.
        svg = re.sub(r'(?<=<g) id="[^"]*"|<style.*?</style>', "", drawn.getvalue(), flags=re.DOTALL)
        for colour, name in NAMES.items():
            svg = svg.replace(colour, f"var(--{name})")
        self.svg = f'<svg role="img" aria-label="{escape(self.alt)}"' + svg.partition("<svg")[2]


# ---- shapes -------------------------------------------------------------------------------------


def tenth(values: Sequence[float]) -> int:
    return max(1, len(values) // 10)


def line(
    axes: Axes,
    xs: Sequence[float],
    ys: Sequence[float],
    colour: str,
    x: str,
    y: str,
    points: Curve,
    means: bool = True,
    **words: Any,
) -> None:
    """At most POINTS of a curve, each the mean of its neighbours; single `points`; its `means`."""
    size = -(-len(xs) // POINTS)
    parts = [slice(at, at + size) for at in range(0, len(xs), size)]
    thinned = [[fmean(values[part]) for part in parts] for values in (xs, ys)]
    axes.plot(*thinned, color=colour, **words)
    if points[0]:
        axes.plot(*points, "o", color=INK, markersize=5)
    few = tenth(ys)
    for part in (slice(few), slice(-few, None)) if means else ():
        axes.plot([xs[part][0], xs[part][-1]], [fmean(ys[part])] * 2, color=INK, linewidth=3.5)
    house(axes, x, y)


def say(axes: Axes, text: str, at: Point, off: Point, **words: Any) -> None:
    axes.annotate(text, at, xytext=off, textcoords="offset points", **words)


def house(axes: Axes, x: str, y: str = "") -> None:
    axes.locator_params(axis="y", nbins=4)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.margins(x=0.02)


def percents(axis: Any) -> None:
    axis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")


def ranges(plot: Plot, rows: Sequence[tuple[str, Share, str]]) -> Plot:
    """A row for each (label, share, colour), against one half."""
    with plot.drawn(height=70 + 26 * len(rows)) as axes:
        for row, (_, share, colour) in enumerate(rows, 1):
            y = len(rows) - row
            axes.plot([share.low, share.high], [y, y], color=colour, linewidth=5, alpha=0.35)
            axes.plot([share.value], [y], "o", color=colour, markersize=8)
        axes.axvline(0.5, color=MUTED, linestyle=":", linewidth=1.4)
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        house(axes, "")
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        axes.set_yticks(range(len(rows)), [label for label, *_ in reversed(rows)])
        axes.set_xticks([0, 0.5, 1])
        percents(axes.xaxis)
    return plot
