"""From a file or a hub dataset to the ids of train, validation, test and judge.

A row is recognised, normalised to a prompt (messages) and what answers it has (texts), encoded, and
put on one side of the split by a digest of its prompt: the same prompt is on the same side in every
stage, in every dataset, for ever. What is dropped is counted by reason.
"""

from __future__ import annotations

import glob
import os.path
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from rlhf_recipes import untrusted
from rlhf_recipes.errors import DataError, ModelError, machine_error
from rlhf_recipes.identity import digest
from rlhf_recipes.sources import dataset_place
from rlhf_recipes.tokens import Messages, Tokens, encode

SHAPES = """\
  prompt + chosen + rejected        texts, or lists of {role, content}
  chosen + rejected                 lists of {role, content} that share their first turns, or texts
                                    that do: "\\n\\nHuman: …\\n\\nAssistant: …"
  conversations + chosen + rejected ShareGPT: lists of {from, value}
  prompt + response_a + response_b + winner   a, b or tie
  prompt + completion, or messages  demonstrations: answers for SFT, prompts for PPO
  prompt                            for PPO and the evaluation"""

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's and HH-RLHF's, in lower case
TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)


class Unusable(Exception):
    """A row that is dropped; its text is the reason, and the reason is what is counted."""


@dataclass(frozen=True)
class Example:
    """One row, encoded. A demonstration has no rejected answer, a prompt alone has none at all."""

    prompt: str  # the last user turn, for people
    prompt_ids: list[int]
    chosen_ids: list[int] | None  # ends in EOS
    rejected_ids: list[int] | None  # ends in EOS


@dataclass
class Data:
    """A dataset on its sides. `judge` is the part of `train` that the reward model never sees."""

    train: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    judge: list[Example] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    rows: int = 0  # read, dropped ones included
    tested: set[str] = field(default_factory=set)  # the prompts of the test side

    @property
    def reward_train(self) -> list[Example]:
        """The training pairs that the reward model learns from: all but the judge's."""
        kept = {id(example) for example in self.judge}
        return [example for example in self.train if id(example) not in kept]


def load_data(table: Any, tokens: Tokens, tested: Iterable[str] = ()) -> Data:
    """Read, encode and split a [dataset] table (`tables.DatasetTable`), with what it holds.

    No prompt in `tested`, another dataset's, comes on another side than test. Raises DataError
    where a column is not there, no row fits a shape, or more than half are bad.
    """
    data, tables = Data(), (table, *table.more)
    test_fraction = 0.0 if any(one.test_split for one in tables) else table.test_fraction
    kept: list[tuple[str, str, Example]] = []
    for one in tables:
        rows, read = _read(one, tokens)
        kept += [
            (side or _side(prompt, test_fraction, table), prompt, e) for side, prompt, e in rows
        ]
        data.rows += read.rows
        data.dropped += read.dropped
    data.tested = {*tested, *(prompt for side, prompt, _ in kept if side == "test")}
    for side, prompt, example in kept:
        if side != "test" and prompt in data.tested:
            data.dropped["prompt is in the test split"] += 1
            continue
        getattr(data, side).append(example)
        if side == "train" and _fraction("judge", prompt) < table.judge_fraction:
            data.judge.append(example)
    return data


def _read(table: Any, tokens: Tokens) -> tuple[list[tuple[str | None, str, Example]], Data]:
    """The usable rows of one table, and what became of all; "test" for those of its test split."""
    data, kept, left_out = Data(), [], 0
    sides = [(_load_split(table, table.split or "train"), None)]
    if table.test_split:
        sides.append((_load_split(table, table.test_split), "test"))
    names, found = table.columns or {}, sides[0][0].column_names
    if lacking := sorted(set(names.values()) - set(found)):
        what = f"has no column {', '.join(lacking)}; its columns are {', '.join(found)}"
        raise DataError(f"{table.path} {what}")
    for rows, side in sides:
        for row in rows:
            data.rows += 1
            try:
                named = {ours: row.get(theirs) for ours, theirs in names.items()}
                prompt, example = _example(row | named, table, tokens)
            except Unusable as reason:
                data.dropped[str(reason)] += 1
                continue
            if table.weight and _fraction("weight", prompt) >= table.weight:
                left_out += 1
                continue
            kept.append((side, prompt, example))
            if table.max_rows and side is None and len(kept) == table.max_rows:
                break
    _check_share(data, found, table)
    data.dropped["beyond the dataset's weight"] = left_out
    return kept, data


def answered(examples: Iterable[Example]) -> list[Example]:
    return [example for example in examples if example.chosen_ids is not None]


def pairs(examples: Iterable[Example]) -> list[Example]:
    return [example for example in examples if example.rejected_ids is not None]


def unique_prompts(examples: Iterable[Example]) -> list[Example]:
    """The first example of each prompt, in order."""
    return list({tuple(e.prompt_ids): e for e in reversed(list(examples))}.values())[::-1]


def _side(prompt: str, test: float, table: Any) -> str:
    """train, validation or test, by a digest of the prompt."""
    place = _fraction("split", prompt)
    if place < test:
        return "test"
    return "validation" if place < test + table.validation_fraction else "train"


def _fraction(purpose: str, prompt: str) -> float:
    """A number in [0, 1) that depends on the prompt's text alone."""
    return int(digest([purpose, prompt])[:13], 16) / 16**13


def _load_split(table: Any, split: str) -> Any:
    """A `datasets.Dataset`. Raises DataError where a file holds no rows, or asks for more."""
    try:
        return _read_split(table, split)
    except Exception as error:
        if isinstance(error, (DataError, ModelError)) or machine_error(error):
            raise
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).partition("\n")[0]
        raise DataError(
            f"{table.path} cannot be read: {reason[:200]}", "look at its files"
        ) from error


def _read_split(table: Any, split: str) -> Any:
    """Local files go through the builder that their suffix names."""
    from datasets import load_dataset_builder

    place = dataset_place(table)
    builder = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if place.suffix in builder:
        made = load_dataset_builder(builder[place.suffix], data_files=glob.escape(str(place)))
        mode = None
    else:
        words = {"name": table.name, "data_dir": table.data_dir, "data_files": table.data_files}
        if isinstance(table.data_files, dict) and split in table.data_files:
            words["data_files"] = {split: table.data_files[split]}  # others may have other columns
        untrusted.check_description(place)
        made = load_dataset_builder(str(place), **words)
        # What `datasets` keeps of a folder is found by its name and patterns alone, not by its
        # bytes: a folder of ours is read anew. A snapshot's name is its commit.
        mode = "reuse_cache_if_exists" if table.is_local else None
    untrusted.check_reader(place, type(made).__module__)
    untrusted.check_files(place, *(made.config.data_files or {}).values())
    made.download_and_prepare(download_mode=mode)
    rows = made.as_dataset(split=split)
    return rows.select_columns(untrusted.plain_columns(rows.features.to_dict()))


def _check_share(data: Data, columns: list[str], table: Any) -> None:
    dropped = sum(data.dropped.values())
    if data.rows == 0:
        raise DataError(f"{table.path} holds no rows")
    if dropped * 2 > data.rows:
        reasons = ", ".join(f"{n} × {why}" for why, n in data.dropped.most_common(3))
        raise DataError(
            f"{table.path}: {dropped} of {data.rows} rows are unusable ({reasons}); "
            f"its columns are {', '.join(columns)}",
            f"the shapes that are understood:\n{SHAPES}",
        )


# ---- one row ------------------------------------------------------------------------------------


def _example(row: Mapping[str, Any], table: Any, tokens: Tokens) -> tuple[str, Example]:
    """The canonical text of the row's prompt, and the row encoded. Raises Unusable."""
    prompt, chosen, rejected = understand(row)
    answers = [answer for answer in (chosen, rejected) if answer is not None]
    if len(answers) == 2 and chosen == rejected:
        raise Unusable("both answers are the same")
    if any(tokens.has_specials(t) for t in (*(turn["content"] for turn in prompt), *answers)):
        raise Unusable("text contains a special token")
    if not all(answer.strip() for answer in answers):
        raise Unusable("empty answer")
    key = "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    shown = prompt[-1]["content"]
    if table.system is not None and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": table.system}, *prompt]
    try:
        prompt_ids, chosen_ids = encode(tokens, prompt, chosen)
    except TemplateError as error:  # roles that do not alternate, a system message, …
        raise Unusable(f"the chat template refuses it: {str(error)[:80]}") from error
    rejected_ids = encode(tokens, prompt, rejected)[1] if rejected is not None else None
    if len(prompt_ids) > table.max_prompt_tokens:
        raise Unusable(f"prompt over {table.max_prompt_tokens} tokens")
    if max(len(chosen_ids), len(rejected_ids or ())) > table.max_answer_tokens:
        raise Unusable(f"answer over {table.max_answer_tokens} tokens")
    return key, Example(shown, prompt_ids, chosen_ids or None, rejected_ids)


def understand(row: Mapping[str, Any]) -> tuple[Messages, str | None, str | None]:
    """`normalise`, with a row that has a shape's keys and not its contents Unusable too."""
    try:
        return normalise(row)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Unusable("no shape that is understood") from error


def normalise(row: Mapping[str, Any]) -> tuple[Messages, str | None, str | None]:
    """Prompt, chosen and rejected answer of a row in any shape of SHAPES; None is what it lacks.

    Raises Unusable, and what `understand` catches.
    """
    row = {key: value for key, value in row.items() if value is not None}
    if {"response_a", "response_b", "winner"} <= row.keys():
        row["chosen"], row["rejected"] = _by_winner(row)
    given = row.get("conversations") or row.get("prompt") or []
    chosen, rejected = row.get("chosen", row.get("completion")), row.get("rejected")
    if "completion" in row and row.get("label") in (False, 0):  # nothing here learns from it yet
        raise Unusable("an answer that its label calls bad")
    if chosen is None:
        turns = row.get("messages") or row.get("conversations")
        *given, last = _messages(turns or given)
        if last["role"] == "user" or not turns:
            return _ends_on_user([*given, last]), None, None
        chosen, rejected = last, None
    elif not given and isinstance(chosen, str) and not TRANSCRIPT.match(chosen):
        given, chosen, rejected = _common_start(row)
    prompt, answer = _answer(_messages(given), chosen)
    if rejected is not None:
        other, rejected = _answer(_messages(given), rejected)
        if other != prompt:
            raise Unusable("the two answers are to different prompts")
    return _ends_on_user(prompt), answer, rejected


def _by_winner(row: Mapping[str, Any]) -> tuple[Any, Any]:
    winner = str(row["winner"]).strip().lower()
    if winner.startswith(("tie", "both", "neither")):
        raise Unusable("a tie")
    winner = winner.removeprefix("model_").removeprefix("response_")
    order = {"a": 1, "1": 1, "1.0": 1, "b": -1, "2": -1, "2.0": -1}  # 1.0: a column with gaps
    if winner not in order:
        raise Unusable("the winner is not a, b or tie")
    return (row["response_a"], row["response_b"])[:: order[winner]]


def _common_start(row: Mapping[str, Any]) -> tuple[str, str, str]:
    """TRL's implicit prompt: the words that both texts begin with, if no other column may be it."""
    answers = row["chosen"], row["rejected"]
    start = re.match(r"(.*\s)?", os.path.commonprefix(answers), re.DOTALL)[0]
    others = [value for key, value in row.items() if key not in ("chosen", "rejected")]
    if not start.strip() or any(isinstance(value, str | list) for value in others):
        raise Unusable("no prompt")
    return start.strip(), *(answer[len(start) :] for answer in answers)


def _messages(value: Any) -> Messages:
    """A text, a transcript, or turns in either spelling, as [{role, content}]."""
    if isinstance(value, str) and TRANSCRIPT.match(value):
        text = value.strip().removesuffix("\n\nAssistant:")
        _, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
        said = zip(parts[::2], parts[1::2], strict=True)
        value = [{"from": who.lower(), "value": what.strip()} for who, what in said]
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    turns = []
    for turn in [value] if isinstance(value, Mapping) else value:
        if "from" in turn:
            turns.append({"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]})
        else:
            turns.append({"role": turn["role"], "content": turn["content"]})
        if not isinstance(turns[-1]["content"], str):
            raise Unusable("a turn is not text")
    return turns


def _ends_on_user(prompt: Messages) -> Messages:
    if not prompt:
        raise Unusable("no prompt")
    if prompt[-1]["role"] != "user":
        raise Unusable("the prompt does not end on the user's turn")
    if not prompt[-1]["content"].strip():
        raise Unusable("empty prompt")
    return prompt


def _answer(given: Messages, value: Any) -> tuple[Messages, str]:
    """Prompt and answer, where `value` is a text, a turn, or turns: all, or those after `given`."""
    if isinstance(value, str) and not TRANSCRIPT.match(value):
        return given, value
    *own, answer = _messages(value)
    if answer["role"] != "assistant":
        raise Unusable("the answer is not the assistant's turn")
    if own and own[0]["role"] == "assistant":
        own = [*given, *own]
    return max(given, own, key=len), answer["content"]
