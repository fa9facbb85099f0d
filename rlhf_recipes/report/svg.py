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
POINTS = 300  # of a curve: more cannot be told apart
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
    def drawn(self, height: int = 210) -> Iterator[Axes]:
        """Axes to draw on; after the block the plot is made. Points are the SVG's units."""
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its font cache
        import matplotlib
        from matplotlib.figure import Figure

        drawn = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": self.name}, STYLE):
            figure = Figure(figsize=(330 / 72, height / 72), dpi=72, layout="constrained")
            yield figure.add_subplot()
            figure.savefig(drawn, format="svg", metadata=NOTHING)
        self.svg = _inline(drawn.getvalue(), self.alt)


def _inline(drawn: str, alt: str) -> str:
    """An SVG file as an element of the page: named for who does not see it, in the page's colours.

    Ids of groups go, since they repeat on a page of several plots. So does the style sheet, since
    it would apply to the whole page.
    """
    svg = f'<svg role="img" aria-label="{escape(alt)}"' + drawn.partition("<svg")[2]
    svg = re.sub(r'(?<=<g) id="[^"]*"|<style.*?</style>', "", svg, flags=re.DOTALL)
    for colour, name in NAMES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


# ---- shapes -------------------------------------------------------------------------------------


def curve(
    plot: Plot,
    xs: Sequence[float],
    ys: Sequence[float],
    colour: str,
    x: str,
    *,
    limit: tuple[float, str] | None = None,
    mark: tuple[float, str] | None = None,
    points: tuple[Sequence[float], Sequence[float]] = ((), ()),
    percent: bool = False,
    from_0: bool = False,
) -> Plot:
    """A line; a dashed `limit` across, a dotted `mark` down, single `points`."""
    with plot.drawn() as axes:
        axes.plot(*_thin(xs, ys), color=colour)
        if points[0]:
            axes.plot(*points, "o", color=INK, markersize=5)
        if limit and limit[0] < 4 * max(ys):
            axes.axhline(limit[0], color=BAD, linestyle=(0, (5, 3)), linewidth=1.2)
            at = {"xycoords": ("axes fraction", "data"), "ha": "right", "color": BAD}
            _say(axes, limit[1], (1, limit[0]), (0, 2), va="bottom", fontsize=10, **at)
        if mark:
            axes.axvline(mark[0], color=MUTED, linestyle=":", linewidth=1.4)
            at = {"xycoords": ("data", "axes fraction"), "ha": "center"}
            _say(axes, mark[1], (mark[0], 1), (0, 2), va="bottom", fontsize=10, **at)
        if from_0:
            axes.set_ylim(bottom=0)
        if percent:
            _percents(axes.yaxis)
        _plot_house(axes, x)
    return plot


def _say(axes: Axes, text: str, at: Point, off: Point, **words: Any) -> None:
    axes.annotate(text, at, xytext=off, textcoords="offset points", **words)


def _plot_house(axes: Axes, x: str, y: str = "") -> None:
    axes.grid(False, axis="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(length=0)
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=6)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.margins(x=0.02)


def _percents(axis: Any) -> None:
    axis.set_major_formatter(lambda share, _: f"{100 * share:.3g} %")


def _thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most POINTS of a line, each the mean of its neighbours."""
    size = -(-len(xs) // POINTS)
    parts = [slice(at, at + size) for at in range(0, len(xs), size)]
    return [fmean(xs[part]) for part in parts], [fmean(ys[part]) for part in parts]


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
        _plot_house(axes, "")
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        axes.set_yticks(range(len(rows)), [label for label, *_ in reversed(rows)])
        axes.set_xticks([0, 0.5, 1])
        _percents(axes.xaxis)
    return plot


def histogram(plot: Plot, values: Sequence[float], x: str) -> Plot:
    """Those under 0 in the colour of what is wrong."""
    with plot.drawn() as axes:
        reach = max(map(abs, values)) or 1.0
        half = min(24, max(8, len(values) // 6)) // 2
        width = reach / half  # an edge stands at 0
        edges = [-reach + at * width for at in range(2 * half + 1)]
        edges = [edge for edge in edges if edge + width > min(values) - 1e-9]
        wrong, right = [v for v in values if v < 0], [v for v in values if v >= 0]
        axes.hist([wrong, right], edges, color=[BAD, PPO], stacked=True, rwidth=0.92)
        axes.axvline(0, color=MUTED, linestyle=":", linewidth=1.4)
        _plot_house(axes, x, "pairs")
    return plot


def calibration(plot: Plot, bins: Sequence[tuple[float, float, int]]) -> Plot:
    """How sure it was against how often it was right, for bins of (said, right, pairs)."""
    with plot.drawn() as axes:
        said, right, pairs = zip(*bins, strict=True)
        low = 0.0 if min(said + right) < 0.5 else 0.5
        axes.plot([low, 1], [low, 1], color=MUTED, linestyle=":", linewidth=1.4)
        axes.plot(said, right, color=PPO, linewidth=1.2, alpha=0.5)
        sizes = [20 + 180 * count / max(pairs) for count in pairs]
        axes.scatter(said, right, sizes, color=PPO, linewidths=0)
        axes.set_xlim(low - 0.02, 1.03)
        axes.set_ylim(low - 0.05, 1.06)
        _plot_house(axes, "how sure it was", "how often right")
        _percents(axes.xaxis)
        _percents(axes.yaxis)
    return plot


def price(
    plot: Plot,
    best: Sequence[tuple[int, float, float]],
    policy: tuple[str, float, float, float, float],
    y: str,
) -> Plot:
    """Gain against KL: best-of-n as (n, KL, gain), a policy as (label, KL, gain, low, high)."""
    with plot.drawn(height=240) as axes:
        axes.axhline(0, color=MUTED, linewidth=1)
        counts, nats, gains = zip(*best, strict=True) if best else ((), (), ())
        if best:
            axes.plot(nats, gains, "o-", color=SFT, markersize=4)
            for n, at, gained in best[1:]:
                _say(axes, str(n), (at, gained), (0, 6), ha="center", color=SFT, fontsize=10)
            _say(axes, f"best of {counts[-1]}", best[-1][1:], (9, -3), va="center", color=SFT)
        label, kl, gain, low, high = policy
        axes.plot([kl, kl], [low, high], color=PPO, linewidth=5, alpha=0.35)
        axes.plot([kl], [gain], "D", color=PPO, markersize=8)
        left = kl < max([kl, *nats]) / 3
        _say(axes, label, (kl, gain), (9 if left else -9, 0), ha="left" if left else "right",
             va="center", color=PPO, fontweight="bold")  # fmt: skip
        axes.set_xlim(left=0)
        _plot_house(axes, "KL, nats an answer", y)
    return plot
