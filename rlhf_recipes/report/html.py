"""What the pages share: one style, escaped text, a policy that forbids scripts and loads."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup, escape

from rlhf_recipes.findings import MARKS
from rlhf_recipes.text import duration, size

TEMPLATES = Path(__file__).parent / "templates"
SHOWN = 1500  # characters of a text; a page stays under 2 MB
# Bidi overrides and control characters: they would let a text look like another.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@functools.cache
def style() -> str:
    """The one style sheet."""
    return (TEMPLATES / "style.css").read_text(encoding="utf-8")


def page(template: str, values: dict[str, Any], made_from: str = "") -> str:
    """A template of this house, filled in. Every text in `values` comes out as text."""
    return _environment().get_template(template).render(values, made_from=made_from)


@functools.cache
def _environment() -> Environment:
    def words(text: str) -> Markup:
        text = str(escape(UNSEEN.sub("", text)))
        return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", text))

    def cut(text: Any) -> str:
        over = len(text := str(text)) - SHOWN
        return text[:SHOWN] + (f" … ({over:,} characters more)" if over > 0 else "")

    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: UNSEEN.sub("", value) if type(value) is str else value,
    )
    made.filters |= {"words": words, "cut": cut, "size": size, "duration": duration}
    made.globals |= {"style": Markup(style()), "marks": MARKS}
    return made
