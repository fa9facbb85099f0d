"""From a file or a hub dataset to the ids of train, validation, test and judge.

A row is recognised, normalised to a prompt (messages) and what answers it has (texts), encoded, and
put on one side of the split by a digest of its prompt: the same prompt is on the same side in every
stage, in every dataset, for ever. What is dropped is counted by reason.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_recipes.data.names import guess
from rlhf_recipes.data.rows import (
    Example,
    Written,
    answered,
    as_example,
    feedback,
    labelled,
    pairs,
    unique_prompts,
    written,
)
from rlhf_recipes.data.shapes import ALONE, SHAPES, Row
from rlhf_recipes.data.splits import load_split
from rlhf_recipes.data.tokens import Tokens, ids
from rlhf_recipes.data.turns import BAD, Unusable
from rlhf_recipes.errors import DataError
from rlhf_recipes.recipe.fields import suggest
from rlhf_recipes.store.digests import digest

BATCH = 1000  # rows that are tokenized together
NEEDS = (
    "sft needs answers; dpo pairs; reward and judge pairs or labels; kto labels; the rest prompts: "
    "see `columns` and `test_fraction`"
)
COPY = "copy of an earlier row"  # dropped where `dedup` asks for it
ASKED_FOR = (BAD, COPY)  # reasons for dropping that are nothing wrong with the rows


@dataclass
class Sides:
    """Rows on their sides. `judge` is the part of `train` that the reward model never sees."""

    train: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    judge: list[Example] = field(default_factory=list)

    def put(self, side: str, example: Example, judged: bool) -> None:
        getattr(self, side).append(example)
        if side == "train" and judged:
            self.judge.append(example)

    @property
    def reward_train(self) -> list[Example]:
        """The training rows that the reward model learns from: all but the judge's."""
        kept = {id(example) for example in self.judge}
        return [example for example in self.train if id(example) not in kept]


@dataclass
class Data(Sides):
    """A dataset on its sides."""

    # Answers that a label calls bad: for the kinds that learn from labels.
    bad: Sides = field(default_factory=Sides)
    dropped: Counter[str] = field(default_factory=Counter)
    rows: int = 0  # read, dropped ones included
    tested: set[str] = field(default_factory=set)  # the prompts of the test side
    # Of each reason for dropping, the first row: its number, its columns, what can be done.
    first: dict[str, tuple[int, dict[str, Any], str]] = field(default_factory=dict)
    read_as: dict[str, None] = field(default_factory=dict)  # what is not plain in the files
    columns: Counter[tuple[str, str]] = field(default_factory=Counter)  # ours, and the file's
    unused: Counter[str] = field(default_factory=Counter)  # columns with something to read
    named: set[str] = field(default_factory=set)  # every column of the files

    @contextlib.contextmanager
    def counted(self, table: Any, number: int, columns: dict[str, Any]) -> Iterator[None]:
        """Count a row, and with its reason where it is dropped; say where an error was met."""
        self.rows += 1
        try:
            yield
        except Unusable as reason:
            self.dropped[str(reason)] += 1
            self.first.setdefault(str(reason), (number, columns, reason.way))
        except DataError as error:
            raise DataError(f"{table.path}, row {number}: {error.message}", error.hint) from None

    def spoken(self) -> list[str]:
        """How the rows were read, a line for each thing that a person may not expect."""
        said = [*self.read_as]
        other = [f"{ours} from {theirs}" for ours, theirs in self.columns if ours != theirs]
        said += [f"columns: {', '.join(other)}"] if other else []
        said += [f"columns that are not used: {', '.join(self.unused)}"] if self.unused else []
        return said

    def judged(self, side: str) -> list[Example]:
        """A side's rows with those that a label calls bad: "reward_train" is a side, too."""
        return [*getattr(self, side), *getattr(self.bad, side)]

    @property
    def rejected(self) -> list[Example]:
        """Training rows with an answer that is worse than another one, or bad."""
        return pairs(self.train) or self.bad.train

    def learned(self, learns_from: str, columns: Sequence[str] = ()) -> list[Example]:
        """The rows that a kind learns from, by its `learns_from`; or that it asks about.

        `columns` are those that the stage's rules name: they tell two equal prompts apart.
        """
        match learns_from:
            case "answers":
                # Not the judge's pairs: it would judge a policy that was taught what it knows.
                judged = (e for e in self.judge if e.labelled or e.rejected_ids is not None)
                aside = {id(example) for example in judged}
                return [e for e in answered(self.train) if id(e) not in aside]
            case "pairs":
                return pairs(self.reward_train)
            case "labels":
                return labelled(self.judged("reward_train"))
            case "feedback":
                return feedback(self.judged("reward_train"))
            case "judge_feedback":
                return feedback(self.judged("judge"))
            case "every_prompt":
                return unique_prompts([*self.train, *self.validation, *self.test], columns)
            case "":
                return []
            case "prompts":
                return unique_prompts(self.train, columns)
            case "test_prompts":
                return unique_prompts(self.test, columns)
        raise ValueError(f"no rows are called {learns_from!r}")


def load_data(
    table: Any, tokens: Tokens, tested: Iterable[str] = (), columns: Sequence[str] = ()
) -> Data:
    """Read, encode and split a [dataset] table (`tables.DatasetTable`), with what it holds.

    No prompt in `tested`, another dataset's, comes on another side than test; judged rows of such a
    prompt come on that side. Examples keep `columns` of their rows. Raises DataError where a column
    is not there, no row fits a shape, or more than half are bad.
    """
    data, tables, tested = Data(), (table, *table.more), {*tested}
    test_fraction = 0.0 if any(one.test_split for one in tables) else table.test_fraction
    kept: list[tuple[str, str, Example]] = []
    bad: list[tuple[str, str, Example]] = []
    for one in tables:
        read = _read(one, tokens, columns)
        of_tests = tested if one.judged else ()
        for rows, found in ((kept, read.kept), (bad, read.called_bad)):
            for side, prompt, example in found:
                side = "test" if prompt in of_tests else side
                rows.append((side or _side(prompt, test_fraction, table), prompt, example))
        data.rows += read.rows
        data.dropped += read.dropped
        data.columns += read.columns
        data.unused += read.unused
        data.read_as |= read.read_as
        data.named |= read.named
        data.first = read.first | data.first
    data.tested = {*tested, *(prompt for side, prompt, _ in (*kept, *bad) if side == "test")}
    kinds = {example.chosen_ids is None for _, _, example in (*kept, *bad) if example.labelled}
    for rows, sides in ((kept, data), (bad, data.bad)):
        for side, prompt, example in rows:
            if len(kinds) == 1:  # labels of one kind alone tell nothing apart
                example = replace(example, labelled=False)
            if side == "test" or prompt not in data.tested:
                sides.put(side, example, _fraction("judge", prompt) < table.judge_fraction)
            elif sides is data:
                data.dropped["prompt is in the test split"] += 1
    return data


Sided = tuple[str | None, str, Example]  # "test" where a table's test split says so; the prompt


@dataclass
class _Read(Data):
    """One table's usable rows, before they are put on their sides."""

    kept: list[Sided] = field(default_factory=list)
    called_bad: list[Sided] = field(default_factory=list)


def _read(table: Any, tokens: Tokens, keep: Sequence[str]) -> _Read:
    """The usable rows of one table, and what became of all."""
    data, left_out, seen = _Read(), 0, set[str]()
    sides: list[tuple[str, str | None]] = [(table.split or "train", None)]
    sides += [(table.test_split, "test")] if table.test_split else []
    found: dict[str, None] = {}  # the columns, in order
    for split, side in sides:
        rows = enumerate(load_split(table, split, data.read_as), 1)
        for number, row, made in _encoded(rows, table, tokens, keep):
            columns = row.columns
            found |= dict.fromkeys(columns)
            with data.counted(table, number, columns):
                if isinstance(made, Exception):
                    raise made
                prompt, example = made
                if table.dedup:
                    whole = (example.chosen_ids, example.rejected_ids, example.labelled)
                    if (one := digest([prompt, *whole, repr(example.row)])) in seen:
                        raise Unusable(COPY)
                    seen.add(one)
                if not (example.chosen_ids or example.rejected_ids) and row.unused():
                    data.first.setdefault(ALONE, (number, columns, guess(columns)))
                data.columns.update(row.used.items())
                data.unused.update(row.unused())
                if table.weight and _fraction("weight", prompt) >= table.weight:
                    left_out += 1
                    continue
                if example.chosen_ids is None and example.rejected_ids is not None:
                    data.called_bad.append((side, prompt, example))
                    raise Unusable(BAD)  # for all but those who learn from labels
                data.kept.append((side, prompt, example))
            if table.max_rows and side is None and len(data.kept) == table.max_rows:
                break
    named = {name for name in (table.columns or {}).values() if name}
    if lacking := sorted(named - found.keys()):
        what = f"has no column {', '.join(lacking)}; its columns are {', '.join(found)}"
        raise DataError(f"{table.path} {what}")
    check_share(data, table)
    data.named = {*found}
    data.dropped["beyond the dataset's weight"] = left_out
    return data


def _encoded(
    rows: Iterable[tuple[int, dict[str, Any]]], table: Any, tokens: Tokens, keep: Sequence[str]
) -> Iterator[tuple[int, Row, tuple[str, Example] | Exception]]:
    """Each row with its number, and its canonical prompt and example, or why there is none.

    Texts are tokenized many at a time, which takes a fraction of what one at a time takes. The next
    rows are read meanwhile.
    """
    rows, before = iter(rows), tuple[Any, ...]()
    with ThreadPoolExecutor(1) as pool:
        while True:
            batch = [
                (n, Row(columns, table.columns)) for n, columns in itertools.islice(rows, BATCH)
            ]
            made: list[Any] = []
            for _, row in batch:
                try:
                    made.append(written(row, table, tokens))
                except (Unusable, DataError) as error:
                    made.append(error)
            texts = [text for one in made if isinstance(one, Written) for text in one.texts]
            coming = pool.submit(ids, tokens, texts)
            if before:
                yield from _examples(*before, table, tokens, keep)
            if not batch:
                return
            before = batch, made, coming


def _examples(
    batch: Sequence[tuple[int, Row]],
    made: Sequence[Any],
    coming: Future[list[list[int]]],
    table: Any,
    tokens: Tokens,
    keep: Sequence[str],
) -> Iterator[tuple[int, Row, tuple[str, Example] | Exception]]:
    """`_encoded`, of rows whose texts are made and whose ids are coming."""
    found = iter(coming.result())
    for (number, row), one in zip(batch, made, strict=True):
        if isinstance(one, Written):
            own = list(itertools.islice(found, len(one.texts)))
            try:
                kept = {k: v for k in keep if (v := row.columns.get(k)) is not None}
                row.used |= {name: name for name in kept if name not in row.used}
                one = one.key, as_example(one, own, table, tokens, kept)
            except Unusable as error:
                one = error
        yield number, row, one


def lacking(names: Iterable[str], columns: Iterable[str]) -> str:
    """Of `columns`, which no row has, in a phrase; empty where rows have each."""
    gone = [f'no row has the column "{c}"{suggest(c, names)}' for c in columns if c not in {*names}]
    return f"{gone[0]}, which a rule names; there are {', '.join(sorted(names))}" if gone else ""


def _side(prompt: str, test: float, table: Any) -> str:
    """train, validation or test, by a digest of the prompt."""
    place = _fraction("split", prompt)
    if place < test:
        return "test"
    return "validation" if place < test + table.validation_fraction else "train"


def _fraction(purpose: str, prompt: str) -> float:
    """A number in [0, 1) that depends on the prompt's text alone."""
    return int(digest([purpose, prompt])[:13], 16) / 16**13


def check_share(data: Data, table: Any) -> None:
    causes = Counter({why: n for why, n in data.dropped.items() if why not in ASKED_FOR})
    if data.rows == 0:
        raise DataError(f"{table.path} holds no rows")
    if causes.total() * 2 > data.rows:
        reasons = ", ".join(f"{n} × {why}" for why, n in causes.most_common(3))
        most = causes.most_common(1)[0][0]
        number, columns, way = data.first[most]
        held = "; ".join(f"{name}: {_cut(value)}" for name, value in list(columns.items())[:8])
        raise DataError(
            f"{table.path}: {causes.total()} of {data.rows} rows are unusable ({reasons}); "
            f"row {number} has {held}",
            f"{way}{way and '; or '}the shapes that are understood:\n{SHAPES}"
            if most.startswith("no ")
            else way or "nothing can be learned from such a row: take them out, or mend them",
        )


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:56]} …"
