"""Conversations as files spell them, as [{role, content}]: what cannot be a text is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import date, time
from typing import Any

from rlhf_recipes.data.labels import is_good, parsed

Messages = list[dict[str, str]]

TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
SPEAKERS = {
    "user": "human user prompter",
    "assistant": "gpt assistant chatgpt bot model ai bing bard",
    "system": "system developer",
    "tool": "tool tool_call tool_response function function_call observation ipython",
}
ROLES = {theirs: role for role, words in SPEAKERS.items() for theirs in words.split()}
WHO, WHAT = ("role", "from", "speaker", "author"), ("content", "value", "text", "message", "answer")
TEXT_PARTS = ("text", "input_text", "output_text")
THOUGHT = ("reasoning_content", "reasoning", "thinking")  # as templates call it
CUT = re.compile(r"\[?\s*(array\()?[\[{]+\s*['\"](role|from|content|value)['\"]\s*:")
PICTURE = re.compile(r"<(image|video|audio|img)>|\[IMG\]|<\|image\|>")
BAD = "an answer that its label calls bad"


class Unusable(Exception):
    """A row that is dropped; its text is the reason, and the reason is what is counted."""

    def __init__(self, reason: str, way: str = ""):
        super().__init__(reason)
        self.way = way  # what a person can do about it


def text_of(value: Any) -> Any:
    """A number, a date or a truth value as the text that stands in a file; all else as it is."""
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float | date | time) else value


def turns(value: Any) -> bool:
    """Whether a value is a list of turns, in some spelling."""
    return isinstance(value, list) and len(value) > 0 and all(map(_is_turn, value))


def _is_turn(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    said = any(what in value for what in (*WHAT, "tool_calls", "function_call"))
    return said and any(who in value for who in WHO)


def unfolded(value: Any) -> Any:
    """Turns that are stored as a text, or inside an object; all else as it is."""
    if isinstance(value, str):
        if "\r" in value and TRANSCRIPT.match(plain := value.replace("\r\n", "\n")):
            return plain
        held = parsed(value)
        inside = isinstance(held, Mapping) and _inside(held) is not None
        if turns(held) or _is_turn(held) or inside:
            return unfolded(held)
        if held is None and CUT.match(value):
            way = "write the rows as JSON lines: a cell of a table holds no lists"
            raise Unusable("messages as a text that is neither JSON nor a Python list", way)
        return value
    if isinstance(value, Mapping) and not any(who in value for who in WHO):
        inside = _inside(value) or next((value[name] for name in WHAT if name in value), None)
        return value if inside is None else unfolded(inside)
    return text_of(value)


def _inside(value: Mapping[str, Any]) -> Any:
    names = ("messages", "conversations", "conversation")
    return next((value[name] for name in names if value.get(name)), None)


def as_messages(value: Any) -> Messages:
    """A text, a transcript, or turns in any spelling, as [{role, content}].

    Raises Unusable, and KeyError or TypeError where it is neither.
    """
    value = unfolded(value)
    if isinstance(value, str) and TRANSCRIPT.match(value):
        text = value.strip().removesuffix("\n\nAssistant:")
        _, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
        said = zip(parts[::2], parts[1::2], strict=True)
        value = [{"from": who.lower(), "value": what.strip()} for who, what in said]
    if isinstance(value, str):
        return [{"role": "user", "content": readable(value)}]
    if isinstance(value, Mapping):
        many = any(isinstance(value.get(who), list) for who in WHO)  # a list's structs, as columns
        every = zip(*value.values(), strict=True) if many else [value.values()]
        value = [dict(zip(value, turn, strict=True)) for turn in every]
    if all(isinstance(one, Mapping) and {"input", "output"} <= one.keys() for one in value):
        sides = (("user", "input"), ("assistant", "output"))
        value = [{"role": role, "content": one[side]} for one in value for role, side in sides]
    said = [_turn(turn) for turn in value]
    if value and str(value[-1].get("weight")) in ("0", "0.0"):
        raise Unusable("the last turn has the weight 0: it is not to be learned")
    return [turn for turn in said if turn["role"] != "system" or turn["content"].strip()]


def _turn(turn: Mapping[str, Any]) -> dict[str, str]:
    who = [str(turn[name]).strip() for name in WHO if turn.get(name)][0]
    role = ROLES.get(who.lower(), who)
    if role == "tool" or turn.get("tool_calls") or turn.get("function_call"):
        raise Unusable("a tool call: none is learned yet")
    if turn.get("label") is not None and not is_good(turn["label"]):
        raise Unusable(BAD)
    content = next((turn[name] for name in WHAT if turn.get(name) is not None), None)
    thought = {name: turn[name] for name in THOUGHT if isinstance(turn.get(name), str)}
    thought = {name: text for name, text in thought.items() if text.strip()}
    return {"role": role, "content": readable(_text(content)), **thought}


def _text(content: Any) -> str:
    """A turn's text: a text, or parts that are all texts."""
    if isinstance(content, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        if any(part.get("type", "text") not in TEXT_PARTS for part in parts):
            raise Unusable("a turn with a picture or a sound")
        content = "".join(part["text"] for part in parts)
    content = text_of(content)
    if content is None:
        raise Unusable("a turn without text")
    if not isinstance(content, str):
        raise Unusable("a turn is not text")
    return content


def readable(text: str) -> str:
    """`text`. Raises Unusable where it stands for a picture, or is not Unicode."""
    if PICTURE.search(text):
        raise Unusable("a text with the place of a picture or a sound in it")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise Unusable("half a character of Unicode (a lone surrogate)")
    return text
