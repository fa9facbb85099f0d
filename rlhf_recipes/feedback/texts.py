"""A stranger's text as HTML for the page: Markdown without HTML, links or pictures, or plain.

Where two answers are much alike, the words in which they differ are marked.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from markdown_it import MarkdownIt
from markupsafe import Markup, escape

from rlhf_recipes.report.html import UNSEEN

RENDERED = 8_000  # characters; a longer text is shown as it is: rendering can be quadratic
SHOWN = 200_000  # characters: nobody reads more, and a browser takes seconds for it
ALIKE = 0.5  # the share of words in common from which on differences are marked
OPENS, CLOSES = "\ue000", "\ue001"  # around a word that differs, until the text is HTML
# A number may be a list's, and signs are Markdown's: a mark there would change what is shown.
WORD = re.compile(r"[^\W\d_]\w*")
MARKED = 600  # words of an answer; the comparison can be quadratic
MARKDOWN = MarkdownIt("js-default", {"html": False, "breaks": True}).disable(
    ["html_block", "html_inline", "image", "link", "autolink", "reference"]
)


@dataclass(frozen=True)
class Text:
    """What is shown of one text: as it is and, where that can be done, as Markdown."""

    plain: Markup
    rendered: Markup | None
    cut: int  # characters that are not shown


def text(value: str, marked: str | None = None) -> Text:
    """`marked` is `value` with OPENS and CLOSES around what is to be marked."""
    value = clean(value)
    source = value[:SHOWN] if marked is None else marked
    rendered = _marks(_markdown(source)) if len(value) <= RENDERED else None
    plain = _marks(str(escape(source)))
    return Text(plain, rendered, max(len(value) - SHOWN, 0))


def answers(values: Sequence[str]) -> list[Text]:
    """One answer, or two, with the words marked in which they differ."""
    values = [clean(value) for value in values]
    words = [list(itertools.islice(WORD.finditer(value), MARKED + 1)) for value in values]
    if len(values) != 2 or max(map(len, words)) > MARKED:
        return [text(value) for value in values]
    left, right = ([word[0] for word in own] for own in words)
    matcher = SequenceMatcher(None, left, right)
    if matcher.ratio() < ALIKE:
        return [text(value) for value in values]
    found = []
    for side, (value, own) in enumerate(zip(values, words, strict=True)):
        parts, end, other = [], 0, {*range(len(own))}
        for block in matcher.get_matching_blocks():
            other -= {*range(block[side], block[side] + block.size)}
        for place in sorted(other):
            start, stop = own[place].span()
            parts += [value[end:start], OPENS, value[start:stop], CLOSES]
            end = stop
        found.append(text(value, "".join([*parts, value[end:]])))
    return found


def clean(value: str) -> str:
    """Without what is not to be seen, and without the marks that are set here."""
    return UNSEEN.sub("", value).replace(OPENS, "").replace(CLOSES, "")


def _marks(html: str) -> Markup:
    return Markup(html.replace(OPENS, "<mark>").replace(CLOSES, "</mark>"))


def _markdown(source: str) -> str:
    tokens = MARKDOWN.parse(source)
    for token in tokens:  # no class of a language, no style of a column; the page has the one h1
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(int(token.tag[1]) + 1, 6)}"
        token.info, token.attrs = "", {k: v for k, v in token.attrs.items() if k == "start"}
    return MARKDOWN.renderer.render(tokens, MARKDOWN.options, {})
