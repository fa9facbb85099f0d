"""What the pages share: one style, escaped text, a policy that forbids scripts and loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup, escape

from rlhf_recipes.findings import MARKS
from rlhf_recipes.text import duration, size

TEMPLATES = Path(__file__).parent / "templates"
STYLE = (TEMPLATES / "style.css").read_text(encoding="utf-8")
SHOWN = 1500  # characters of a text; a page stays under 2 MB
# Bidi overrides and control characters: they would let a text look like another.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# A path of this machine, up to its last part: in quotes with spaces in it, else without.
PLACES = re.compile(
    r"""(?<=["'])(?:~|/)[^"'\n]*/(?=[^"'/\n]+["'])"""
    r"""|(?<![\w./])(?:~[\w.-]*/(?:[^\s"'`<>]*/)?|/(?!/)[^\s"'`<>]*/)(?=[^\s"'/])"""
)


ENVIRONMENT = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=ChainableUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    finalize=lambda value: UNSEEN.sub("", value) if type(value) is str else value,
)


def page(template: str, values: dict[str, Any], made_from: str = "") -> str:
    """A template of this house, filled in. Every text in `values` comes out as text."""
    return ENVIRONMENT.get_template(template).render(values, made_from=made_from)


def placeless(text: Any) -> str:
    """`text` with the last part alone of each path: a page is for others, too."""
    return PLACES.sub("…/", str(text))


def _words(text: str, places: bool = False) -> Markup:
    text = UNSEEN.sub("", text)
    text = str(escape(text if places else placeless(text))).replace(" %", "\u00a0%")
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", text))


def cut(text: Any, most: int = SHOWN) -> str:
    over = len(text := str(text)) - most
    return text[:most] + (f" … ({over:,} characters more)" if over > 0 else "")


FILTERS: dict[str, Any] = {"words": _words, "cut": cut, "placeless": placeless}
ENVIRONMENT.filters |= FILTERS | {"size": size, "duration": duration}
ENVIRONMENT.globals |= {"style": Markup(STYLE), "marks": MARKS}
