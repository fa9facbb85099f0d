"""One row: its shape is recognised, and its texts become the ids of a prompt and its answers."""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from rlhf_recipes.data.tokens import Messages, Tokens, encode

SHAPES = """\
  prompt + chosen + rejected        texts, or lists of {role, content}
  chosen + rejected                 lists of {role, content} that share their first turns, or texts
                                    that do: "\\n\\nHuman: …\\n\\nAssistant: …"
  conversations + chosen + rejected ShareGPT: lists of {from, value}
  prompt + response_a + response_b + winner   a, b or tie
  prompt + completion, or messages  demonstrations: answers for SFT, prompts for PPO
  prompt                            for PPO and the evaluation"""
SPEAKERS = {"human": "user", "gpt": "assistant"}  # ShareGPT's and HH-RLHF's, in lower case
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


def answered(examples: Iterable[Example]) -> list[Example]:
    return [example for example in examples if example.chosen_ids is not None]


def pairs(examples: Iterable[Example]) -> list[Example]:
    return [example for example in examples if example.rejected_ids is not None]


def sequences(example: Example, learns_from: str) -> list[int]:
    """The lengths of what a row gives to read: a prompt, with an answer, or with either of two."""
    prompt, chosen, rejected = example.prompt_ids, example.chosen_ids, example.rejected_ids
    if learns_from in ("prompts", "test_prompts"):
        return [len(prompt)]
    answers = [chosen] if learns_from == "answers" else [chosen, rejected]
    return [] if None in answers else [len(prompt) + len(ids) for ids in answers]


def unique_prompts(examples: Iterable[Example]) -> list[Example]:
    """The first example of each prompt, in order."""
    return list({tuple(e.prompt_ids): e for e in reversed(list(examples))}.values())[::-1]


def encoded(row: Mapping[str, Any], table: Any, tokens: Tokens) -> tuple[str, Example]:
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
            who = SPEAKERS.get(turn["from"], turn["from"])
            turns.append({"role": who, "content": turn["value"]})
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
