"""Policies of a run to talk to: all on one base in memory, asked alike, under the same draws."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.generation.streamers import BaseStreamer

from rlhf_recipes.data.tokens import Messages, Tokens, encode
from rlhf_recipes.models.role import Role
from rlhf_recipes.models.sampling import sampling
from rlhf_recipes.pipeline.export import shared_of
from rlhf_recipes.store.digests import derive_seed


class Speakers:
    """`roles` are policies by name; `room` is how many tokens a conversation may have."""

    def __init__(self, run_folder: Path, outputs: Mapping[str, Path | None]) -> None:
        self.session = session = shared_of(run_folder)
        self.recipe, self.tokens = session.recipe, session.tokens
        self.roles: dict[str, Role] = {
            name: session.base.open(f"policy-{name}", out, seed=0) for name, out in outputs.items()
        }
        config = next(iter(self.roles.values())).lm.config.get_text_config()
        context = getattr(config, "max_position_embeddings", sys.maxsize)
        length = min(self.recipe.dataset.max_answer_tokens, context // 2)
        self.room = context - length
        heat = self.recipe.asked_with("temperature")
        self.settings = sampling(length, heat, eos=self.tokens.eos_id, pad=self.tokens.pad_id)
        system = self.recipe.dataset.system
        self.start = [] if system is None else [{"role": "system", "content": system}]

    def refused(self, message: str) -> str:
        """Why nobody can be asked that; "" where they can."""
        if self.tokens.has_specials(message):
            return "not sent: it contains a special token of the model"
        if len(self.prompt([{"role": "user", "content": message}])) > self.room:
            return f"not sent: at most {self.room} tokens are read"
        return ""

    def prompt(self, turns: Messages) -> list[int]:
        return encode(self.tokens, [*self.start, *turns])[0]

    def say(self, name: str, prompt: list[int], asked: int, streamer: BaseStreamer) -> None:
        """The `asked`-th answer, token by token to `streamer`; all draw it under one seed."""
        role = self.roles[name]
        ids: Any = torch.tensor([prompt], device=role.lm.device)
        torch.manual_seed(derive_seed(self.recipe.seed, "chat", asked))
        with role.active():
            role.lm.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self.settings,
                streamer=streamer,
            )


class Writer(BaseStreamer):
    """Writes an answer, as it comes, to a place of a list, which other threads read."""

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
