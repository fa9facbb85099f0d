"""From a file or a hub dataset to the ids of train, validation, test and judge.

A row is recognised, normalised to a prompt (messages) and its answers (texts), encoded once, and
put on one side of the split by a digest of its prompt: the same prompt is on the same side in every
stage, in every dataset, for ever. What is dropped is counted by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_recipes.errors import DataError
from rlhf_recipes.identity import digest
from rlhf_recipes.sources import dataset_commit
from rlhf_recipes.tokens import Messages, Tokens, encode

SHAPES = """\
  prompt + chosen + rejected        texts, or lists of {role, content}
  chosen + rejected                 lists of {role, content} that share their first turns
  conversations + chosen + rejected ShareGPT: lists of {from, value}
  prompt + completion, or messages  demonstrations, for SFT alone"""

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class Unusable(Exception):
    """A row that is dropped; its text is the reason, and the reason is what is counted."""


@dataclass(frozen=True)
class Example:
    """One row, encoded. A demonstration has no rejected answer."""

    prompt: str  # the last user turn, for people
    prompt_ids: list[int]
    chosen_ids: list[int]  # ends in EOS
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

    @property
    def reward_train(self) -> list[Example]:
        """The training pairs that the reward model learns from: all but the judge's."""
        kept = {id(example) for example in self.judge}
        return [example for example in self.train if id(example) not in kept]


def load_data(table: Any, tokens: Tokens) -> Data:
    """Read, encode and split one [dataset] table (`recipe.DatasetTable`).

    Raises DataError where no row fits a shape that is understood, or more than half are bad.
    """
    data = Data()
    sides = [(_load_split(table, table.split or "train"), None)]
    if table.test_split:
        sides.append((_load_split(table, table.test_split), "test"))
    kept: list[tuple[str, str, Example]] = []
    for rows, side in sides:
        for row in rows:
            data.rows += 1
            try:
                prompt, example = _example(row, table, tokens)
            except Unusable as reason:
                data.dropped[str(reason)] += 1
                continue
            kept.append((side or _side(prompt, table), prompt, example))
            if table.max_rows and side is None and len(kept) == table.max_rows:
                break
    _check_share(data, sides[0][0].column_names, table)
    tested = {prompt for side, prompt, _ in kept if side == "test"}
    for side, prompt, example in kept:
        if side != "test" and prompt in tested:
            data.dropped["prompt is in the test split"] += 1
            continue
        getattr(data, side).append(example)
        if side == "train" and _fraction("judge", prompt) < table.judge_fraction:
            data.judge.append(example)
    return data


def unique_prompts(examples: Iterable[Example]) -> list[Example]:
    """The first example of each prompt, in order."""
    return list({tuple(e.prompt_ids): e for e in reversed(list(examples))}.values())[::-1]


def _side(prompt: str, table: Any) -> str:
    """train, validation or test, by a digest of the prompt."""
    place = _fraction("split", prompt)
    test = 0.0 if table.test_split else table.test_fraction
    if place < test:
        return "test"
    return "validation" if place < test + table.validation_fraction else "train"


def _fraction(purpose: str, prompt: str) -> float:
    """A number in [0, 1) that depends on the prompt's text alone."""
    return int(digest([purpose, prompt])[:13], 16) / 16**13


def _load_split(table: Any, split: str) -> Any:
    """A `datasets.Dataset`. Local files go through the builder that their suffix names."""
    from datasets import load_dataset

    words = {"name": table.name, "data_dir": table.data_dir, "data_files": table.data_files}
    if not table.is_local:
        return load_dataset(table.path, split=split, revision=dataset_commit(table), **words)
    builder = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if table.file.suffix in builder:
        return load_dataset(builder[table.file.suffix], data_files=str(table.file), split=split)
    return load_dataset(str(table.file), split=split, **words)


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
    if rejected is not None and chosen == rejected:
        raise Unusable("both answers are the same")
    texts = [*(turn["content"] for turn in prompt), chosen, rejected or ""]
    if any(tokens.has_specials(text) for text in texts):
        raise Unusable("text contains a special token")
    if not chosen.strip() or (rejected is not None and not rejected.strip()):
        raise Unusable("empty answer")
    key = "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
    shown = prompt[-1]["content"]
    if table.system is not None and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": table.system}, *prompt]
    prompt_ids, chosen_ids = encode(tokens, prompt, chosen)
    rejected_ids = encode(tokens, prompt, rejected)[1] if rejected is not None else None
    if len(prompt_ids) > table.max_prompt_tokens:
        raise Unusable(f"prompt over {table.max_prompt_tokens} tokens")
    if max(len(chosen_ids), len(rejected_ids or ())) > table.max_answer_tokens:
        raise Unusable(f"answer over {table.max_answer_tokens} tokens")
    return key, Example(shown, prompt_ids, chosen_ids, rejected_ids)


def understand(row: Mapping[str, Any]) -> tuple[Messages, str, str | None]:
    """`normalise`, with a row that has a shape's keys and not its contents Unusable too."""
    try:
        return normalise(row)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise Unusable("no shape that is understood") from error


def normalise(row: Mapping[str, Any]) -> tuple[Messages, str, str | None]:
    """Prompt, chosen and rejected answer of a row in any shape of SHAPES. Raises Unusable."""
    if row.get("chosen") is not None and row.get("rejected") is not None:
        return _preference(row)
    if row.get("prompt") is not None and row.get("completion") is not None:
        prompt = _messages(row["prompt"])
        return _ends_on_user(prompt), _last_answer(row["completion"]), None
    turns = row.get("messages") or row.get("conversations")
    if turns:
        *prompt, answer = _messages(turns)
        return _ends_on_user(prompt), _answer(answer), None
    raise Unusable("no shape that is understood")


def _preference(row: Mapping[str, Any]) -> tuple[Messages, str, str]:
    chosen, rejected = row["chosen"], row["rejected"]
    given = row.get("conversations") or row.get("prompt")
    if given:
        return _ends_on_user(_messages(given)), _last_answer(chosen), _last_answer(rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise Unusable("no prompt")
    chosen, rejected = _messages(chosen), _messages(rejected)
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("the two answers are to different prompts")
    return _ends_on_user(chosen[:-1]), _answer(chosen[-1]), _answer(rejected[-1])


def _messages(value: Any) -> Messages:
    """A text, or turns in either spelling, as [{role, content}]."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    turns = []
    for turn in [value] if isinstance(value, Mapping) else value:
        if "from" in turn:
            role = SHAREGPT_ROLES.get(turn["from"], turn["from"])
            turns.append({"role": role, "content": turn["value"]})
        else:
            turns.append({"role": turn["role"], "content": turn["content"]})
        if not isinstance(turns[-1]["content"], str):
            raise Unusable("a turn is not text")
    return turns


def _ends_on_user(prompt: Messages) -> Messages:
    if not prompt or prompt[-1]["role"] != "user":
        raise Unusable("the prompt does not end on the user's turn")
    if not prompt[-1]["content"].strip():
        raise Unusable("empty prompt")
    return prompt


def _last_answer(value: Any) -> str:
    """The answer itself, where `chosen` is a text, a turn, or the whole conversation."""
    return value if isinstance(value, str) else _answer(_messages(value)[-1])


def _answer(turn: Mapping[str, str]) -> str:
    if turn["role"] != "assistant":
        raise Unusable("the answer is not the assistant's turn")
    return turn["content"]
