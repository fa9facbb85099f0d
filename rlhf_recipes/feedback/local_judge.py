"""A judge that runs here: a causal model's next-token logits of the two names, or its text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError

from rlhf_recipes.data.tokens import encode, ids, render, settle
from rlhf_recipes.data.turns import Messages
from rlhf_recipes.errors import ModelError
from rlhf_recipes.feedback.calls import Ask
from rlhf_recipes.feedback.prompt import BEGUN, NAMES, in_one_turn
from rlhf_recipes.feedback.reading import Reply, from_text
from rlhf_recipes.models.load import (
    compute_dtype,
    empty,
    load_causal_lm,
    load_config,
    load_tokenizer,
)
from rlhf_recipes.models.role import Role, logits
from rlhf_recipes.models.sampling import join, sample
from rlhf_recipes.sources import trust
from rlhf_recipes.store.digests import derive_seed

TOKENS = 2**13  # of the prompts that are read together
REASONS = 512  # tokens of a reply with reasons, at most
COLD = 1e-4  # a temperature at which the likeliest token is drawn
Kept = list[tuple[Ask, Reply]]


class LocalJudge:
    """A model in a folder. Nothing leaves this machine."""

    broke = False  # it costs nothing

    def __init__(
        self,
        folder: Path,
        write: Callable[[Ask, str, Sequence[str]], Messages],
        *,
        mode: str,
        temperature: float,
        quantization: str = "none",
        dtype: str = "auto",
        name: str = "",
    ) -> None:
        """Raises ModelError where the folder has no model whose names are single tokens."""
        trust.check_model(folder)
        trust.check_tokenizer(folder)
        config = load_config(folder).get_text_config()
        self.tokens = settle(load_tokenizer(folder), config.vocab_size)
        self.most = getattr(config, "max_position_embeddings", None) or 2**31
        self.write, self.mode, self.name = write, mode, name or folder.name
        self.temperature = temperature
        turns: Messages = [{"role": "user", "content": "?"}]
        if mode == "logits" and self._names(turns) is None:
            hint = "reasons = true reads the text of its replies instead"
            raise ModelError(f"1 and 2 are not single tokens of {self.name}", hint)
        kind = compute_dtype(dtype)
        lm = load_causal_lm(folder, dtype=kind, quantization=quantization)
        self.role = Role(lm, None, kind)

    def close(self) -> None:
        empty(self.role.lm)

    def ask(self, asks: Sequence[Ask], keep: Callable[[Kept], Any]) -> None:
        """`keep` takes the calls of each batch. Long ones come first."""
        length = 1 if self.mode == "logits" else REASONS
        held = [(ask, self._ids(self.write(ask, self.mode, self.tokens.specials))) for ask in asks]
        fit = [(ask, f) for ask, f in held if f is not None and len(f[0]) + length <= self.most]
        long = Reply(error=f"longer than the judge's {self.most} tokens")
        keep([(ask, long) for ask, f in held if f is None or len(f[0]) + length > self.most])
        fit.sort(key=lambda one: -len(one[1][0]))
        read = self._logits if self.mode == "logits" else self._texts
        while fit:
            count = max(1, TOKENS // (len(fit[0][1][0]) + length))
            part, fit = fit[:count], fit[count:]
            began = time.monotonic()
            replies = read([ask for ask, _ in part], [found for _, found in part])
            seconds = (time.monotonic() - began) / len(part)
            about = {"model": self.name, "seconds": seconds}
            both = zip(part, replies, strict=True)
            keep([(ask, r.but(**about, tokens_in=len(ids))) for (ask, (ids, _)), r in both])

    def _ids(self, turns: Messages) -> tuple[list[int], tuple[int, int]] | None:
        """A prompt's ids, and those of the names; a template may take no system turn."""
        for form in (turns, in_one_turn(turns)):
            try:
                if self.mode == "logits":
                    return self._names(form)
                return encode(self.tokens, form)[0], (0, 0)
            except TemplateError:
                continue
        return None

    def _names(self, turns: Messages) -> tuple[list[int], tuple[int, int]] | None:
        """The ids of a prompt up to the name, and of each name; None where it is not one token.

        The reply is begun with "Better:", after which a space may be a token of its own.
        """
        asked = render(self.tokens.tokenizer, turns, add_generation_prompt=True)
        for space in (" ", ""):
            one, two = ids(self.tokens, [f"{asked}{BEGUN}{space}{name}" for name in NAMES])
            if one[:-1] == two[:-1] and one[-1] != two[-1]:
                return one[:-1], (one[-1], two[-1])
        return None

    @torch.no_grad()
    def _logits(self, asks: list[Ask], found: list[Any]) -> list[Reply]:
        prompts, names = zip(*found, strict=True)
        rows = join(prompts, [one[:1] for one in names], self.tokens.pad_id, self.role.lm.device)
        with self.role.active():
            said = logits(self.role, rows.ids, rows.mask, 1, 1.0)[:, 0]
        chances = torch.log_softmax(said.double(), -1)
        replies = []
        for row, (first, second) in zip(chances, names, strict=True):
            mass = float(row[[first, second]].exp().sum())
            replies.append(Reply(float(row[first] - row[second]), mass=mass, tokens_out=0))
        return replies

    def _texts(self, asks: list[Ask], found: list[Any]) -> list[Reply]:
        eos, replies = self.tokens.eos_id, []
        said = sample(
            self.role,
            [prompt for prompt, _ in found],
            length=REASONS,
            temperature=self.temperature or COLD,
            eos=eos,
            pad=self.tokens.pad_id,
            batch=len(found),
            seed=derive_seed(
                0, *(place for ask in asks for place in (ask.item.id, ask.first, ask.sample))
            ),
        )
        for one in said:
            text, ended = self.tokens.decode(one), one[-1:] == [eos]
            verdict = from_text(text) if ended else None
            why = None if verdict else "no verdict in it" if ended else "cut off"
            replies.append(Reply(None, verdict, why, reason=text, tokens_out=len(one)))
        return replies
