"""Text for people: one line of it, cut to a width, without secrets; times, sizes and tables."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Sequence
from typing import Any

# The password of a URL; tokens of Hugging Face, OpenAI, Anthropic, GitHub, GitLab, Slack, AWS.
SECRET = re.compile(
    r"(?<=://)[^\s/@:]*:[^\s/@]+(?=@)|\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|gh[opsu]_\w{20,}"
    r"|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abp]-[\w-]{20,}|AKIA[A-Z0-9]{16})"
)
SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY|JUDGE_KEY)$")
SECRET_LENGTH = 12  # a shorter value is a word of some other meaning


def masked(text: str) -> str:
    """`text` without the passwords and tokens in it: those known by shape, and this process's."""
    text = SECRET.sub("***", text)
    for name, value in os.environ.items():
        if len(value) >= SECRET_LENGTH and SECRET_NAME.search(name) and not value.startswith("/"):
            text = text.replace(value, "***")
    return text


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_].*?(?:\x07|\x1b\\|$)|.)", re.DOTALL)


def plain(text: str) -> str:
    """Hostile text as one printable line: no control sequence, no line break, no bidi trick."""
    text = " ".join(ESCAPES.sub("", text).split())
    return text if text.isprintable() else "".join(c for c in text if c.isprintable())


def duration(seconds: float) -> str:
    """3 s · 2 min 05 s · 1 h 02 min"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def size(count: float) -> str:
    """999 B · 17.6 MB"""
    units = ["B", "kB", "MB", "GB"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.{max(3, len(str(int(count))))}g} {units[0]}"


MARKED = re.compile(r"( *)([✓✗?·→]) ")
COLOURS = {"✓": 32, "✗": 31, "?": 33, "→": 36}
ASCII = str.maketrans(
    {"✓": "+", "✗": "x", "·": "-", "→": "->", "…": "...", "–": "-", "−": "-", "±": "+/-"}
    | {"×": "x", "▸": ">", "⏎": "\\n", "—": "-", "½": "1/2", "≥": ">="}
)


def dressed(said: str, width: int, colours: bool) -> str:
    """`said` for a terminal: lines that begin with a mark are wrapped under their own text.

    Other lines are those of tables, and stay as they are.
    """
    lines = []
    for line in said.split("\n"):
        if not (marked := MARKED.match(line)):
            lines.append(line)
            continue
        indent, mark = marked.groups()
        # A finding's text may begin after a column of its own: "✗ rows       …".
        first = re.match(r" *. \S+ {2,}", line) or marked
        words: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
        hang = " " * min(len(first[0]), width // 3)
        line = line.replace(" %", "\xa0%")  # a number keeps its unit
        line = "\n".join(textwrap.wrap(line, max(width, 20), subsequent_indent=hang, **words))
        line = line.replace("\xa0%", " %")
        if colours and mark in COLOURS:
            line = line.replace(mark, f"\x1b[{COLOURS[mark]}m{mark}\x1b[0m", 1)
        lines.append(line)
    return "\n".join(lines)


def writable(said: str, encoding: str) -> str:
    """`said` with signs that the encoding has: "->" for "→" in ASCII."""
    try:
        said.encode(encoding)
    except UnicodeEncodeError:
        return said.translate(ASCII).encode(encoding, "replace").decode(encoding)
    return said


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Aligned columns, those of `right` to the right; nothing in them can move the cursor."""
    rows = [[plain(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        sides = [">" if place in right else "<" for place in range(len(row))]
        cells = [f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
