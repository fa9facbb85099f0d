"""The report's plots: SVG to stand inside a page, coloured by the page's own variables.

A page that allows nothing takes no `style` attribute, no metadata and no link: matplotlib's SVG is
rewritten into plain attributes. Each plot says in words what it shows, for who does not see it.
"""

from __future__ import annotations

import io
import logging
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Stand-ins that matplotlib knows for the page's colours, which differ by light and dark.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
PPO, SFT, BASE, BAD = "#040404", "#050505", "#060606", "#070707"
NAMES = {INK: "ink", MUTED: "muted", GRID: "grid", PPO: "ppo", SFT: "sft", BASE: "base", BAD: "bad"}
POINTS = 300  # of a curve: more cannot be told apart
RC = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "text.color": MUTED,
    "text.parse_math": False,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.prop_cycle": f"cycler('color', ['{PPO}'])",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 2,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Plot:
    title: str  # what it means
    alt: str  # what is to be seen, in words
    svg: str
    note: str = ""


class Canvas:
    """Axes to draw on, and after the block what was drawn."""

    axes: Axes
    svg: str = ""


@contextmanager
def canvas(name: str, alt: str, width: int = 330, height: int = 210) -> Iterator[Canvas]:
    """Points are the SVG's units. `name` is the plot's own on its page: ids are made of it."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its font cache
    import matplotlib
    from matplotlib.figure import Figure

    made, drawn = Canvas(), io.BytesIO()
    with matplotlib.rc_context(RC | {"svg.hashsalt": name}):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        made.axes = figure.add_subplot()
        yield made
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    made.svg = _plain(drawn.getvalue(), alt)


def _plain(drawn: bytes, alt: str) -> str:
    root = ET.fromstring(drawn)
    named = set(re.findall(r'(?:url\(|href=")#([^)"]+)', drawn.decode()))
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": alt}
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        for child in list(element):
            if child.tag.endswith(("}metadata", "}style")):
                element.remove(child)
        plain = {}
        for key, value in element.attrib.items():
            if key == "style":
                plain |= _attributes(value)
            elif key != "id" or value in named:
                plain[key.rpartition("}")[2]] = value
        element.attrib = plain
    return re.sub(r"#0[1-7]0[1-7]0[1-7]", _variable, ET.tostring(root, encoding="unicode"))


def _attributes(style: str) -> dict[str, str]:
    """The declarations of a `style` attribute as attributes; the letters are the page's."""
    pairs = [part.partition(":")[::2] for part in style.split(";") if part.strip()]
    plain = {key.strip(): value.strip() for key, value in pairs}
    if "font" in plain:
        size = re.search(r"([\d.]+)px", plain.pop("font"))
        plain["font-size"] = size[1] if size else "11"
    plain.pop("font-family", None)
    return plain


def _variable(colour: re.Match[str]) -> str:
    return f"var(--{NAMES[colour[0]]})" if colour[0] in NAMES else colour[0]


# ---- shapes -------------------------------------------------------------------------------------


def curve(
    name: str,
    title: str,
    alt: str,
    lines: Sequence[tuple[Sequence[float], Sequence[float], str]],
    *,
    x: str,
    limit: tuple[float, str] | None = None,
    mark: tuple[float, str] | None = None,
    points: tuple[Sequence[float], Sequence[float]] | None = None,
    note: str = "",
    percent: bool = False,
    from_0: bool = False,
) -> Plot:
    """Lines of (x, y, colour); a dashed `limit` across, a dotted `mark` down, single `points`."""
    with canvas(name, alt) as made:
        axes = made.axes
        for xs, ys, colour in lines:
            axes.plot(*_thin(xs, ys), color=colour)
        if points and points[0]:
            axes.plot(*points, "o", color=INK, markersize=5)
        if limit and limit[0] < 4 * max(max(ys) for _, ys, _ in lines):
            axes.axhline(limit[0], color=BAD, linestyle=(0, (5, 3)), linewidth=1.2)
            axes.annotate(
                limit[1], (1, limit[0]), xycoords=("axes fraction", "data"), color=BAD,
                ha="right", va="bottom", xytext=(0, 2), textcoords="offset points", fontsize=10,
            )  # fmt: skip
        if mark:
            axes.axvline(mark[0], color=MUTED, linestyle=":", linewidth=1.4)
            axes.annotate(
                mark[1], (mark[0], 1), xycoords=("data", "axes fraction"), fontsize=10,
                ha="center", va="bottom", xytext=(0, 2), textcoords="offset points",
            )  # fmt: skip
        if from_0:
            axes.set_ylim(bottom=0)
        if percent:
            _percents(axes.yaxis)
        _plot_house(axes, x)
    return Plot(title, alt, made.svg, note)


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
    return [mean(xs[part]) for part in parts], [mean(ys[part]) for part in parts]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def ranges(
    name: str,
    title: str,
    alt: str,
    rows: Sequence[tuple[str, float, float, float, str]],
    note: str = "",
) -> Plot:
    """A row for each (label, share, low, high, colour), against one half."""
    with canvas(name, alt, height=70 + 26 * len(rows)) as made:
        axes = made.axes
        for at, (_, value, low, high, colour) in enumerate(rows):
            y = len(rows) - 1 - at
            axes.plot([low, high], [y, y], color=colour, linewidth=5, alpha=0.35)
            axes.plot([value], [y], "o", color=colour, markersize=8)
        axes.axvline(0.5, color=MUTED, linestyle=":", linewidth=1.4)
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        _plot_house(axes, "")
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        axes.set_yticks(range(len(rows)), [label for label, *_ in reversed(rows)])
        axes.set_xticks([0, 0.5, 1])
        _percents(axes.xaxis)
    return Plot(title, alt, made.svg, note)


def histogram(name: str, title: str, alt: str, values: Sequence[float], x: str) -> Plot:
    """Those under 0 in the colour of what is wrong."""
    with canvas(name, alt) as made:
        reach = max(map(abs, values)) or 1.0
        count = min(24, max(8, len(values) // 6))
        width = 2 * reach / (2 * (count // 2))  # an edge stands at 0
        edges = [-reach + at * width for at in range(2 * (count // 2) + 1)]
        edges = [edge for edge in edges if edge + width > min(values) - 1e-9]
        wrong, right = [v for v in values if v < 0], [v for v in values if v >= 0]
        made.axes.hist([wrong, right], edges, color=[BAD, PPO], stacked=True, rwidth=0.92)
        made.axes.axvline(0, color=MUTED, linestyle=":", linewidth=1.4)
        _plot_house(made.axes, x, "pairs")
    return Plot(title, alt, made.svg)


def calibration(name: str, title: str, alt: str, bins: Sequence[tuple[float, float, int]]) -> Plot:
    """How sure it was against how often it was right, for bins of (said, right, pairs)."""
    with canvas(name, alt) as made:
        axes, most = made.axes, max(count for *_, count in bins)
        low = 0.0 if min(min(said, right) for said, right, _ in bins) < 0.5 else 0.5
        axes.plot([low, 1], [low, 1], color=MUTED, linestyle=":", linewidth=1.4)
        axes.plot([b[0] for b in bins], [b[1] for b in bins], color=PPO, linewidth=1.2, alpha=0.5)
        sizes = [20 + 180 * count / most for *_, count in bins]
        axes.scatter([b[0] for b in bins], [b[1] for b in bins], sizes, color=PPO, linewidths=0)
        axes.set_xlim(low - 0.02, 1.03)
        axes.set_ylim(low - 0.05, 1.06)
        _plot_house(axes, "how sure it was", "how often right")
        _percents(axes.xaxis)
        _percents(axes.yaxis)
    return Plot(title, alt, made.svg)


def price(
    name: str,
    title: str,
    alt: str,
    *,
    best: Sequence[tuple[int, float, float]],
    policies: Sequence[tuple[str, float, float, float, float]],
    path: Sequence[tuple[float, float]] = (),
    best_of: str = "",
    y: str,
    note: str = "",
) -> Plot:
    """Gain against KL: best-of-n as (n, KL, gain), policies as (label, KL, gain, low, high)."""
    with canvas(name, alt, height=240) as made:
        axes = made.axes
        axes.axhline(0, color=MUTED, linewidth=1)
        if path:
            axes.plot([p[0] for p in path], [p[1] for p in path], "o", color=PPO, alpha=0.25,
                      markersize=3.5, markeredgewidth=0)  # fmt: skip
        if best:
            axes.plot([b[1] for b in best], [b[2] for b in best], "o-", color=SFT, markersize=4)
            for n, kl, gain in best[1:]:
                axes.annotate(str(n), (kl, gain), xytext=(0, 6), textcoords="offset points",
                              ha="center", color=SFT, fontsize=10)  # fmt: skip
            axes.annotate(best_of, best[-1][1:], xytext=(9, -3), textcoords="offset points",
                          color=SFT, va="center")  # fmt: skip
        places = [*((kl, gain) for _, kl, gain, *_ in policies), *path]
        for label, kl, gain, low, high in policies:
            axes.plot([kl, kl], [low, high], color=PPO, linewidth=5, alpha=0.35)
            axes.plot([kl], [gain], "D", color=PPO, markersize=8)
            side = 1 if kl < max(k for k, _ in places) / 3 else -1
            axes.annotate(label, (kl, gain), xytext=(9 * side, 0), textcoords="offset points",
                          ha="left" if side > 0 else "right", va="center", color=PPO,
                          fontweight="bold")  # fmt: skip
        axes.set_xlim(left=0)
        _plot_house(axes, "KL, nats an answer", y)
    return Plot(title, alt, made.svg, note)
