"""One row: its texts become the ids of a prompt and its answers."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2 import TemplateError

from rlhf_recipes.data.compared import compare
from rlhf_recipes.data.shapes import Row, further, margin, understand
from rlhf_recipes.data.tokens import Tokens, texts
from rlhf_recipes.data.turns import Messages, Unusable

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")  # the fields of ids


class Ids:
    """A field of token ids: a list to who reads it, and held in 4 bytes an id.

    Python's own numbers take 36 bytes each: 2.4 GB of 60,000 pairs with 1,100 tokens.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, row: Any, owner: type) -> list[int] | None:
        if row is None:
            raise AttributeError(self.name)  # so that `dataclass` finds no default
        held = vars(row)[self.name]
        return None if held is None else held.tolist()

    def __set__(self, row: Any, ids: Any) -> None:
        compact = ids is None or isinstance(ids, array)
        vars(row)[self.name] = ids if compact else array("i", ids)


def _ids() -> Any:
    return Ids()


@dataclass(frozen=True)
class Example:
    """One row, encoded. A demonstration has no rejected answer, a prompt alone has none at all, and
    a row that a label calls bad has no chosen one."""

    prompt: str  # the last user turn, for people
    prompt_ids: list[int] = _ids()
    chosen_ids: list[int] | None = _ids()  # ends in EOS
    rejected_ids: list[int] | None = _ids()  # ends in EOS
    labelled: bool = False  # a label calls its one answer good or bad
    margin: float | None = None  # by how much the chosen answer is better, where the row says so
    weight: float = 1.0  # of the pair in a reward model's loss
    # The further pairs of a row that rates several answers. The pair above is the widest apart.
    others: tuple[Example, ...] = ()
    turns: Messages = field(default_factory=list, compare=False, repr=False)  # the prompt's
    row: Mapping[str, Any] = field(default_factory=dict)  # the columns that rules name

    def packed(self, name: str) -> bytes:
        """A field of ids in 4 bytes an id, to tell rows apart by; empty where it has none."""
        held = vars(self)[name]
        return b"" if held is None else held.tobytes()

    def count(self, name: str) -> int:
        """How many ids a field has, without a list of them."""
        return len(vars(self)[name] or ())


def answered(examples: Iterable[Example]) -> list[Example]:
    return [example for example in examples if example.chosen_ids is not None]


def pairs(examples: Iterable[Example]) -> list[Example]:
    return [e for e in examples if e.chosen_ids is not None and e.rejected_ids is not None]


def labelled(examples: Iterable[Example]) -> list[Example]:
    """Each answer by itself: good ones as chosen, bad ones as rejected. A pair gives two."""
    rows = list(examples)
    good = [replace(e, rejected_ids=None) for e in rows if e.chosen_ids is not None]
    return good + [replace(e, chosen_ids=None) for e in rows if e.rejected_ids is not None]


def judged(examples: Iterable[Example]) -> tuple[list[Example], list[Example]]:
    """Pairs of answers to one prompt, and the labelled answers that are in none.

    The labelled answers of a prompt that has both kinds are a row of pairs.
    """
    rows = list(examples)
    found, alone = pairs(rows), []
    by_prompt: dict[bytes, list[Example]] = defaultdict(list)
    for example in rows:
        if example.labelled:
            by_prompt[example.packed("prompt_ids")].append(example)
    for group in by_prompt.values():
        good = [example.chosen_ids is not None for example in group]
        texts = [example.chosen_ids or example.rejected_ids for example in group]
        both = [
            replace(group[a], rejected_ids=texts[b], labelled=False, weight=weight)
            for a, b, _, weight in compare(good)
            if texts[a] != texts[b]
        ]
        found += [replace(both[0], others=(*both[1:],))] if both else []
        alone += group if len(set(good)) == 1 else []
    return found, alone


def feedback(examples: Iterable[Example]) -> list[Example]:
    """What a reward model learns from: every pair, and labelled answers that are in none.

    Beside pairs, labelled answers of one kind alone are left out: they say nothing about the other.
    """
    found, alone = judged(examples)
    every = [pair for one in found for pair in (one, *one.others)]
    kinds = {example.chosen_ids is None for example in alone}
    return every + (alone if not every or len(kinds) > 1 else [])


def sequences(example: Example, learns_from: str) -> list[int]:
    """The lengths of what a row gives to read: a prompt, with an answer, or with either of two."""
    prompt, *answers = (
        example.count(name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    if example.labelled and learns_from.endswith("feedback"):
        learns_from = "labels"
    if learns_from.endswith(("prompt", "prompts")):
        return [prompt]
    if learns_from == "labels":
        return [prompt + answer for answer in answers if answer]
    answers = answers[:1] if learns_from == "answers" else answers
    return [prompt + answer for answer in answers] if all(answers) else []


def unique_prompts(examples: Iterable[Example], columns: Sequence[str] = ()) -> list[Example]:
    """The first example of each prompt and what these columns hold beside it, in order."""
    last = {
        (e.packed("prompt_ids"), *(repr(e.row.get(name)) for name in columns)): e
        for e in reversed(list(examples))
    }
    return list(last.values())[::-1]


@dataclass(frozen=True)
class Written:
    """A row as texts, before they are tokenized."""

    key: str  # the canonical text of its prompt
    prompt: str  # the last user turn, for people
    turns: Messages  # the prompt's
    texts: list[str]  # of the prompt and its answers, chosen first
    labelled: bool = False
    bad: bool = False  # the only answer is one that a label calls bad
    margin: float | None = None
    points: tuple[float, ...] = ()  # of each answer, where several are rated


def written(row: Row, table: Any, tokens: Tokens) -> Written:
    """The row's texts by the model's template. Raises Unusable."""
    prompt, chosen, rejected = understand(row)
    answers = [answer for answer in (chosen, rejected) if answer is not None]
    if len(answers) == 2 and chosen == rejected:
        raise Unusable("both answers are the same")
    if any(tokens.has_specials(t) for turn in (*prompt, *answers) for t in _texts(turn)):
        way = "take a template's marks out of the texts: the model's template adds them"
        raise Unusable("text contains a special token", way)
    if not all(_texts(answer)[-1].strip() for answer in answers):
        raise Unusable("empty answer")
    points = [point for _, point in row.rated[:2]]
    for answer, point in further(row):
        if all(t.strip() and not tokens.has_specials(t) for t in _texts(answer)):
            answers.append(answer)
            points.append(point)
    key = "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    shown = prompt[-1]["content"]
    if table.system is not None and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": table.system}, *prompt]
    try:
        bad = chosen is None and rejected is not None
        by = "label" in row.used, bad, None if bad or points else margin(row), (*points,)
        return Written(key, shown, prompt, texts(tokens, prompt, *answers), *by)
    except TemplateError as error:  # roles that do not alternate, a system message, …
        way = 'turns that it takes: see the model\'s card; or chat_template = "plain" in [model]'
        raise Unusable(f"the chat template refuses it: {str(error)[:80]}", way) from error


def as_example(
    row: Written, found: Sequence[list[int]], table: Any, tokens: Tokens, kept: Mapping[str, Any]
) -> Example:
    """The row with the ids of its texts, and its columns `kept`.

    Raises Unusable where its texts are too long.
    """
    prompt, *answers = found
    answers = [[*answer, tokens.eos_id] for answer in answers]
    for what, most, count in (
        ("prompt", table.max_prompt_tokens, len(prompt)),
        ("answer", table.max_answer_tokens, max(map(len, answers[:2]), default=0)),
    ):
        if count > most:
            way = f"--set dataset.max_{what}_tokens=N keeps longer ones, for memory and time"
            raise Unusable(f"{what} over {most} tokens", way)
    both = [*[None] * row.bad, *answers[:2], None, None][:2]
    about = (row.labelled, row.margin)
    example = Example(row.prompt, prompt, *both, *about, turns=row.turns, row=kept)
    if not row.points:
        return example
    fits = [place for place, ids in enumerate(answers) if len(ids) <= table.max_answer_tokens]
    every = [
        replace(
            example,
            chosen_ids=chosen,
            rejected_ids=rejected,
            margin=pair.margin,
            weight=pair.weight,
        )
        for pair in compare([row.points[place] for place in fits])
        for chosen, rejected in [(answers[fits[pair.better]], answers[fits[pair.worse]])]
        if chosen != rejected
    ]
    if not every:
        raise Unusable("both answers are the same")
    return replace(every[0], others=(*every[1:],))


def _texts(said: Any) -> list[str]:
    """What is said in a turn or an answer: thoughts, and last its text."""
    if isinstance(said, str):
        return [said]
    thoughts = [text for name, text in said.items() if name not in ("role", "content")]
    return [*thoughts, said["content"]]
