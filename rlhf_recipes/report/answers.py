"""The answers before and after: which won, by whom, which words differ, and which to show."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Any

from markupsafe import Markup, escape

from rlhf_recipes.report.facts import Facts, Json, number
from rlhf_recipes.report.html import SHOWN, UNSEEN, cut
from rlhf_recipes.report.people import SCORERS
from rlhf_recipes.store.digests import digest

WORD = re.compile(r"\S+")
ALIKE = 0.3  # of the words: two answers that share fewer are read whole
SHORT = 500  # characters of a text, where all prompts are shown
PICKED = 8  # answers, where no scorer can order them
ROOM = 900_000  # characters of all of them: a page stays under 2 MB


def differing(before: str, after: str) -> tuple[Markup, Markup]:
    """Both texts, with the words in <del> and <ins> that the other one has not."""
    texts = [UNSEEN.sub("", text) for text in (before, after)]
    words = [[*WORD.finditer(text)] for text in texts]
    one, other = ([word[0] for word in own] for own in words)
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    if matcher.ratio() < ALIKE:
        return Markup(escape(texts[0])), Markup(escape(texts[1]))
    made = []
    for side, tag in enumerate(("del", "ins")):
        text, own, parts, done = texts[side], words[side], [], 0
        for kind, *ends in matcher.get_opcodes():
            first, last = ends[2 * side : 2 * side + 2]
            if kind != "equal" and first < last:
                start, end = own[first].start(), own[last - 1].end()
                parts += [escape(text[done:start]), Markup(f"<{tag}>"), escape(text[start:end])]
                parts.append(Markup(f"</{tag}>"))
                done = end
        made.append(Markup("").join([*parts, escape(text[done:])]))
    return made[0], made[1]


def _gains(facts: Facts, row: Json, name: str, start: str) -> dict[str, float]:
    """By how much each scorer prefers a policy's answer to its start's."""
    found = {}
    for key, who in {**SCORERS, "scores": facts.scorer}.items():
        if key != "tokens" and isinstance(row.get(key), dict):
            now, then = number(row[key], name), number(row[key], start)
            if now is not None and then is not None:
                found[who] = now - then
    return found


def preferred(facts: Facts, row: Json, name: str, start: str) -> str:
    """Which of the two answers won, and by whom."""
    given, gains = row["answers"], _gains(facts, row, name, start)
    if given.get(name) == given.get(start) is not None:
        return "Both answers are the same."
    told = []
    for policy, sign in ((name, 1), (start, -1)):
        by = [who for who, gain in gains.items() if sign * gain > 0]
        if by:
            title = facts.plain_title(policy)
            told.append(f"{title}'s is preferred by {' and '.join(by)}.")
    even = [who for who, gain in gains.items() if not gain]
    if even:
        have = "have" if len(even) > 1 else "has"
        told.append(f"{' and '.join(even).capitalize()} {have} no difference.")
    return " ".join(told)


def _case(facts: Facts, row: Json, name: str, start: str, most: int) -> Json:
    """A row as a template shows it; texts are cut to `most` characters."""
    given = {who: cut(text, most) for who, text in row["answers"].items()}
    texts: dict[str, Any] = dict(given)
    if name in given and start in given:
        texts[start], texts[name] = differing(given[start], given[name])
    first = next(iter(_gains(facts, row, name, start).values()), 0.0)
    return {
        "row": row,
        "prompt": cut(row.get("prompt"), most),
        "texts": texts,
        "said": preferred(facts, row, name, start),
        "won": name if first > 0 else start if first < 0 else "",
    }


def _sorted(facts: Facts, name: str, start: str) -> list[tuple[float, Json]]:
    """Each row with what was gained in it, the least first."""
    found = []
    for row in facts.answers:
        if isinstance(row.get("answers"), dict):
            scores = row.get("scores") or row.get("judged") or {}
            gain = 0.0
            if isinstance(scores, dict):
                gain = (number(scores, name) or 0.0) - (number(scores, start) or 0.0)
            found.append((gain, row))
    return sorted(found, key=lambda one: one[0])


def cases(facts: Facts, name: str, start: str) -> list[Json]:
    """Two each of the best, the worst and the middle by gain, and two drawn by their digest.

    Where nothing scored them, all are drawn.
    """
    rows = _sorted(facts, name, start)
    half = len(rows) // 2
    by = next((facts.scorer if row.get("scores") else "the judge" for _, row in rows
               if row.get("scores") or row.get("judged")), "")  # fmt: skip
    picks = {"best": rows[-2:][::-1], "worst": rows[:2], "median": rows[half - 1 : half + 1]}
    shown: list[Json] = []
    for label, chosen in {**(picks if by else {}), "drawn by lot": _drawn(rows)}.items():
        fresh = [one for one in chosen if not any(one[1] is other["row"] for other in shown)]
        for gain, row in fresh[: 2 if by else PICKED]:
            told = {"label": label, "gain": gain, "by": by}
            shown.append(_case(facts, row, name, start, SHOWN) | told)
    return shown


def _drawn(rows: list[tuple[float, Json]]) -> list[tuple[float, Json]]:
    return sorted(rows, key=lambda one: digest(str(one[1].get("prompt"))))


def every(facts: Facts, name: str, start: str) -> list[Json]:
    """As many rows as there is room for, drawn by their digest; the largest gain first.

    Of the answers there are the policy's and its start's.
    """
    kept, room = [], ROOM
    for gain, row in _drawn(_sorted(facts, name, start)):
        few = {who: row["answers"][who] for who in (start, name) if who in row["answers"]}
        one = _case(facts, {**row, "answers": few}, name, start, SHORT)
        room -= len(one["prompt"]) + sum(map(len, one["texts"].values())) + 400  # its tags
        if room < 0:
            break
        kept.append((gain, one))
    return [one for _, one in sorted(kept, key=lambda one: -one[0])]
