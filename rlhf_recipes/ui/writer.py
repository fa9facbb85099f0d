"""An answer as it comes, token by token. Imports torch."""

from __future__ import annotations

import torch
from transformers.generation.streamers import BaseStreamer

from rlhf_recipes.data.tokens import Tokens


class Writer(BaseStreamer):
    """Writes to a place of a list, which other threads read."""

    def __init__(self, texts: list[str], place: int, tokens: Tokens) -> None:
        self.texts, self.place, self.tokens = texts, place, tokens
        self.ids: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        if value.dim() > 1:
            return  # the prompt
        self.ids += value.tolist()
        self.texts[self.place] = self.tokens.decode(self.ids).rstrip("\ufffd")  # half a character

    def end(self) -> None:
        self.texts[self.place] = self.tokens.decode(self.ids)
