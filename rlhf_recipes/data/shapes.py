"""The shapes that rows come in: which columns hold the prompt, the answers, and what was preferred.

The names are those that people's files have: TRL's, Alpaca's, ShareGPT's, OpenAI's, the arenas' and
the rated lists of UltraFeedback and Nectar. Case and spaces in a name do not count.
"""

from __future__ import annotations

import contextlib
import math
import os.path
import re
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_recipes.data.labels import (
    GOOD,
    NO_LABEL,
    VERDICT,
    is_good,
    parsed,
    preferred,
    says,
    word_of,
)
from rlhf_recipes.data.names import NAMES, guess, plain_name, wordy
from rlhf_recipes.data.turns import (
    TRANSCRIPT,
    WHO,
    Messages,
    Unusable,
    as_messages,
    readable,
    unfolded,
)

SHAPES = """\
  prompt + chosen + rejected        texts, or lists of {role, content}
  chosen + rejected                 lists of {role, content} that share their first turns, or texts
                                    that do: "\\n\\nHuman: …\\n\\nAssistant: …"
  conversations + chosen + rejected ShareGPT: lists of {from, value}
  prompt + response_a + response_b + winner   a, b or tie
  prompt + responses + scores       several answers, or ranks: a reward model learns from each pair
                                    that they tell apart, other stages from the best and the worst
  Argilla's and Label Studio's JSON, and OASST's message trees
  prompt + completion, or messages  demonstrations: answers for SFT, prompts for PPO; with a label,
                                    those that it calls good
  prompt                            for PPO and the evaluation
  Alpaca's instruction, input and output, and question, query, answer, response are known as well"""

STEMS = ("response", "conversation", "answer", "completion", "output", "human_ref")
# Inside one of several answers: its text, and what says how good it is.
TEXTS = ("response", "text", "content", "answer", "output", "completion", "value")
POINTS = ("overall_score", "score", "rating")
ALONE = "a prompt alone, though other columns hold texts"
MEDIA = re.compile(r"(image|video|audio)s?")

Shaped = tuple[Messages, Any, Any]


class Row:
    """A row's columns by their plain names; `used` notes which of the file's are what.

    `named` is the recipe's `columns`: ours = the file's, or "" for none.
    """

    def __init__(self, columns: Mapping[str, Any], named: Mapping[str, str] | None = None):
        self.named = named or {}
        self.columns = {name: value for name, value in columns.items() if name}
        self.rated: list[tuple[Any, float]] = []  # of several answers the best, the worst, others
        self.pair: tuple[Any, Any] | None = None  # the two to compare, where that is settled
        self.used: dict[str, str] = {}
        self.theirs = {plain_name(name): name for name in columns} | dict(self.named)
        for ours, theirs in self.named.items():
            self.theirs[ours] = (
                theirs if theirs in columns else self.theirs.get(plain_name(theirs), "")
            )

    def __contains__(self, name: str) -> bool:
        return self.columns.get(self.theirs.get(name, "")) is not None

    def take(self, ours: str, where: Callable[[Any], object] | None = None) -> Any:
        """The first value that there is under our name, or under what files call it."""
        for name in (ours,) if ours in self.named else NAMES.get(ours, (ours,)):
            if name in self and (not where or where(self.columns[self.theirs[name]])):
                self.used[ours] = self.theirs[name]
                return self.columns[self.theirs[name]]
        return None

    def unused(self) -> list[str]:
        """The columns that hold something, and are not part of the row."""
        used = {name for names in self.used.values() for name in names.split(" + ")}
        held = ((name, value) for name, value in self.columns.items() if name not in used)
        return [name for name, value in held if value is not None and value not in ("", [], {})]


def normalise(row: Row) -> Shaped:
    """Prompt, chosen and rejected answer of a row in any shape of SHAPES; None is what it lacks.

    An answer that a label calls bad is a rejected one without a chosen one.

    An answer is a text, or the assistant's turn where it holds thoughts beside its text. Raises
    Unusable, what `understand` catches, and DataError for a label that says nothing.
    """
    if media := next((name for name in row.columns if MEDIA.fullmatch(plain_name(name))), None):
        if row.columns[media]:
            raise Unusable(f"a picture or a sound beside the text (column {media})")
    chosen, rejected = _compared(row)
    if chosen is None:
        rejected = row.take("rejected")
        beside = rejected is None and any(name in row for name in NAMES["completion"])
        chosen = row.take("chosen", where=_no_label if beside else None)
        chosen = row.take("completion") if chosen is None else chosen
    given, chosen, rejected = _rounds(_asked(row), chosen, rejected)
    if chosen is None:
        turns = row.take("messages") or row.take("conversations")
        *given, last = as_messages(turns or given)
        if last["role"] == "user" or not turns:
            return _prompt(row, [*given, last]), None, None
        chosen = last
    elif not given and _is_text(chosen):
        given, chosen, rejected = _common_start(row, chosen, rejected)
    good = rejected is not None or _is_good(row)
    if _is_text(given) and all(
        isinstance(one, str) and one.startswith(given) for one in (chosen, rejected)
    ):
        chosen, rejected = (one.removeprefix(given).lstrip() for one in (chosen, rejected))
    prompt, answer = _answer(as_messages(given), chosen)
    if rejected is not None:
        other, rejected = _answer(as_messages(given), rejected)
        if other != prompt:
            raise Unusable("the two answers are to different prompts")
    prompt = _prompt(row, prompt)
    return (prompt, answer, rejected) if good else (prompt, None, answer)


def understand(row: Row) -> Shaped:
    """`normalise`, with a row that has a shape's keys and not its contents Unusable too."""
    try:
        return normalise(row)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise Unusable("no shape that is understood", guess(row.columns)) from error


def further(row: Row) -> list[tuple[Any, float]]:
    """Of a row that rates several answers, those between the best and the worst, with their points.

    One that cannot be used is left out.
    """
    found = []
    for answer, points in row.rated[2:]:
        row.pair = row.rated[0][0], answer
        with contextlib.suppress(Unusable):
            found.append((understand(row)[2], points))
    return found


def margin(row: Row) -> float | None:
    """By how much the chosen answer is better: the row's own number, or that of the two scores."""
    given, better, worse = (row.take(n) for n in ("margin", "score_chosen", "score_rejected"))
    with contextlib.suppress(TypeError, ValueError):
        number = float(better) - float(worse) if given is None else float(given)
        return number if math.isfinite(number) else None
    return None


# ---- prompts


def _asked(row: Row) -> Any:
    """What stands before the answers: a text or turns; [] where no column holds it."""
    if given := row.take("conversations"):
        return given
    given = row.take("prompt")
    if given is None and (given := row.take("messages", where=_asks)) is None:
        return []
    called = plain_name(row.used.get("prompt", ""))
    if called == "instruction" and (more := row.take("input", where=_has_words)):
        given = f"{given}\n\n{more}"
        row.used["prompt"] += f" + {row.used.pop('input')}"
    if past := row.take("history", where=lambda value: isinstance(value, list)):
        said = [turn for asked, answer in past for turn in (("user", asked), ("assistant", answer))]
        given = [{"role": role, "content": text} for role, text in said] + as_messages(given)
    return given


def _prompt(row: Row, prompt: Messages) -> Messages:
    """`prompt` with the row's system message, where it is one that can be answered."""
    if not prompt:
        raise Unusable("no prompt")
    if prompt[-1]["role"] != "user":
        raise Unusable("the prompt does not end on the user's turn")
    if not prompt[-1]["content"].strip():
        raise Unusable("empty prompt")
    if not all(turn["content"].strip() for turn in prompt):
        raise Unusable("an empty turn before the answer")
    if prompt[0]["role"] != "system" and (system := row.take("system", where=_has_words)):
        return [{"role": "system", "content": system}, *prompt]
    return prompt


def _asks(value: Any) -> bool:
    """Whether these are turns that wait for an answer."""
    return as_messages(value)[-1]["role"] == "user"


def _no_label(value: Any) -> bool:
    """Whether this may be an answer beside another: accepted = true is a label."""
    return not says(value)


def _has_words(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_text(value: Any) -> bool:
    value = unfolded(value)
    return isinstance(value, str) and not TRANSCRIPT.match(value)


def _common_start(row: Row, *answers: Any) -> tuple[str, str, str]:
    """TRL's implicit prompt: the words that both texts begin with, if no other column may be it."""
    start = re.match(r"(.*\s)?", os.path.commonprefix(answers), re.DOTALL)[0]
    if not start.strip() or any(map(wordy, map(row.columns.get, row.unused()))):
        raise Unusable("no prompt", guess(row.columns))
    return start.strip(), *(answer[len(start) :] for answer in answers)


# ---- answers


def _answer(given: Messages, value: Any) -> tuple[Messages, Any]:
    """Prompt and answer, where `value` is a text, a turn, or turns: all, or those after `given`."""
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        value = value[0]  # of several rejected ones, the first
    if _is_text(value):
        return given, readable(unfolded(value))
    *own, answer = as_messages(value)
    if answer["role"] != "assistant":
        raise Unusable("the answer is not the assistant's turn")
    if own and own[0]["role"] == "assistant":
        own = [*given, *own]
    return max(given, own, key=_said), answer if len(answer) > 2 else answer["content"]


def _said(turns: Messages) -> int:
    return sum(turn["role"] != "system" for turn in turns)


def _is_good(row: Row) -> bool:
    """Whether an answer may be learned, by its label where the file gives one."""
    label = row.take("label")
    if label is None and "completion" in row.used:
        label = row.take("chosen", where=says)
        if label is not None:
            row.used["label"] = row.used.pop("chosen")
    if label is not None:
        return is_good(label)
    names = () if "label" in row.named else NAMES["label"]
    if any(plain_name(name) in names for name in row.columns):
        raise Unusable("an answer whose label is empty", NO_LABEL)
    return True


def _compared(row: Row) -> tuple[Any, Any]:
    """Chosen and rejected of a row that compares answers."""
    if all(any(name in row for name in NAMES[ours]) for ours in ("chosen", "rejected")):
        return None, None
    return row.pair or _by_winner(row) or _by_rank(row) or (None, None)


def _rounds(given: Any, *answers: Any) -> tuple[Any, ...]:
    """Prompt and answers, also where a prompt is a list of texts, as an arena exports its rounds.

    Each answer is then a list as long, or where the list holds one text, that text's answer.
    """
    asked, *said = [parsed(one) if isinstance(one, str) else one for one in (given, *answers)]
    if not isinstance(asked, list) or not asked or not isinstance(asked[0], str):
        return given, *answers
    if len(asked) == 1:
        held = [
            one if isinstance(one, list) else [raw] for one, raw in zip(said, answers, strict=True)
        ]
        if all(len(one) == 1 and (one[0] is None or _is_text(one[0])) for one in held):
            return asked[0], *(one[0] for one in held)
    for one in said:
        if (
            not isinstance(one, list)
            or len(one) != len(asked)
            or not all(map(_is_text, asked + one))
        ):
            raise Unusable("rounds without a text")
    talks = [
        [
            {"role": role, "content": text}
            for both in zip(asked, one, strict=True)
            for role, text in zip(("user", "assistant"), both, strict=True)
        ]
        for one in said
    ]
    return [], *talks


def _by_winner(row: Row) -> tuple[Any, Any] | None:
    """The better and the worse of two answers, by a column that names the better."""
    ends = [(stem, a, b) for stem in STEMS for a, b in ("ab", "12", "01")]
    pairs = ((f"{stem}_{a}", f"{stem}_{b}", a, b) for stem, a, b in ends)
    both = [pair for pair in pairs if pair[0] in row and pair[1] in row]
    if not both:
        return None
    one, other, a, b = both[0]
    winner = row.take("winner")
    if winner is None:
        winner = _said_otherwise(row, a, b)
    if winner is None:
        if any(plain_name(name) in NAMES["winner"] for name in row.columns):
            return None  # not judged: a prompt
        told = (name for name, value in row.columns.items() if VERDICT.fullmatch(word_of(value)))
        named = f'{{winner = "{next(told, "…")}"}}'
        way = f"--set 'dataset.columns={named}' names the column that does"
        raise Unusable("two answers, and nothing says which is better", way)
    for mark in (a, b):  # a model's name
        if f"model_{mark}" in row and row.columns[row.theirs[f"model_{mark}"]] == winner:
            winner = mark
    try:
        order = preferred(winner, a, b)
    except ValueError:
        raise Unusable(f"the winner is not {a}, {b} or tie") from None
    if not order:
        raise Unusable("a tie")
    pair = row.take(one), row.take(other)
    return pair[::order]


def _said_otherwise(row: Row, a: str, b: str) -> Any:
    """The winner by a column for each outcome, or by the answers' scores; None where neither is."""
    for name in ("model_a", "model_b", "tie"):
        if says(row.take(f"winner_{name}")) in GOOD:
            return name
    scores = [row.take(f"score_{mark}") for mark in (a, b)]
    if (second := row.take("overall_preference")) is not None:  # below 0, the first is better
        scores = [0, second]
    if None in scores:
        return None
    one, other = map(float, scores)
    return "tie" if one == other else a if one > other else b


def _by_rank(row: Row) -> tuple[Any, Any] | None:
    """The best and the worst of several answers that are rated or ranked."""
    several = row.take("responses", where=_several)
    if several is None:
        return None
    scores, ranks = (row.take(name, where=_listed) for name in ("scores", "ranks"))
    if scores or ranks:
        points = [float(one) for one in scores or ranks]
    elif isinstance(several[0], Mapping):
        ranks = several[0].get("rank")
        said = ("rank",) if ranks is not None else POINTS
        held = [[one[name] for name in said if one.get(name) is not None] for one in several]
        points = [float(of_one[0]) for of_one in held]
    elif plain_name(row.used["responses"]) == "output":  # Alpaca's, best first
        points = [float(-place) for place in range(len(several))]
    else:
        way = "--set 'dataset.columns={scores = \"…\"}' names the column that rates them, or ranks"
        raise Unusable("several answers without scores or ranks", way)
    if ranks and not scores:
        points = [-point for point in points]
    if max(points) == min(points):
        raise Unusable("a tie")
    ends = [points.index(most(points)) for most in (max, min)]
    order = [*ends, *(place for place in range(len(several)) if place not in ends)]
    rated = [(_text_in(several[place]), points[place]) for place in order]
    if any(text is None for text, _ in rated[:2]):
        raise Unusable("an answer without text")
    row.rated = [(text, point) for text, point in rated if text is not None]
    return row.rated[0][0], row.rated[1][0]


def _text_in(one: Any) -> Any:
    """One of several answers, which may be an object that holds its text; None without one."""
    if not isinstance(one, Mapping):
        return one
    return next((one[name] for name in TEXTS if one.get(name) is not None), None)


def _listed(value: Any) -> bool:
    return isinstance(value, list)


def _several(value: Any) -> bool:
    """Whether these are answers to choose from, not one answer's turns."""
    return (
        isinstance(value, list)
        and len(value) > 1
        and not any(isinstance(one, Mapping) and any(who in one for who in WHO) for one in value)
    )
