"""A reward model that does not read the policy's ids: it is told the conversation anew, as text.

`score()` hands it the policy's ids, as any reward model. The prompt is found again among those that
were encoded; the answer is decoded as judges and people see it, without special tokens. The text is
what its own chat template writes of the two, or the two side by side where it has no template.

- An answer that ended is a whole turn, with what the template writes after one. An answer that was
  cut off ends with its last word: the template's end of turn would say that it is finished.
- Thoughts that the policy's template has begun keep their opening mark.
- What is longer than the model reads is cut by its tokenizer, and counted (`cut` of `read`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_recipes.data.rows import Example
from rlhf_recipes.data.tokens import THINK, Tokens, encode, render
from rlhf_recipes.data.turns import Messages
from rlhf_recipes.errors import ModelError
from rlhf_recipes.models.load import load_config
from rlhf_recipes.models.role import Role

Prompts = Mapping[tuple[int, ...], Messages]  # by their ids, as the policy reads them
NO_LIMIT = 10**9  # tokenizers say 1e30 where they know none


class Retold(Role):
    """A sequence classifier of any architecture, with one label and a tokenizer of its own."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        source: Path,
        dtype: torch.dtype,
        tokens: Tokens,
        prompts: Prompts,
    ):
        super().__init__(model, None, dtype)
        self.tokenizer, self.source, self.tokens = tokenizer, source, tokens
        self.read = self.cut = 0  # answers, and those that were too long with their prompt
        self.prompts = prompts
        self.lengths = sorted({len(prompt) for prompt in prompts}, reverse=True)
        limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 0))
        self.most = min((int(n) for n in limits if n and n < NO_LIMIT), default=NO_LIMIT)

    @property
    def told(self) -> str:
        """What became of long answers; nothing where all were read whole."""
        if not self.cut:
            return ""
        what = f"{self.cut} of {self.read} answers were cut, with their prompts, to the"
        return f"{what} {self.most} tokens that {self.source.name} reads"

    def scored(self, ids: torch.Tensor, mask: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        rows = [
            row[kept.bool()].tolist()
            for row, kept in zip(ids.cpu(), _until(mask, last).cpu(), strict=True)
        ]
        told = [self._encoded(row) for row in rows]
        # A batch needs the pad token that the model looks for, as it pools the last other token.
        pad = self.tokenizer.pad_token_id
        alike = pad is not None and pad == getattr(self.lm.config, "pad_token_id", None)
        size = len(told) if alike else 1
        parts = [self._logits(told[at : at + size]) for at in range(0, len(told), size)]
        return torch.cat(parts).float().to(ids.device)

    def _logits(self, told: list[dict[str, Any]]) -> torch.Tensor:
        given = told[0]
        if len(told) > 1:
            given = self.tokenizer.pad(told, padding_side="right")
        else:
            given = {name: [value] for name, value in told[0].items()}
        words = {name: torch.tensor(value, device=self.lm.device) for name, value in given.items()}
        return self.lm(**words).logits[:, 0]

    def _encoded(self, row: list[int]) -> dict[str, Any]:
        """What the model reads of a prompt and an answer, both in the policy's ids."""
        texts, special = self.texts(row)
        words = {"add_special_tokens": special, "verbose": False}
        given = self.tokenizer(*texts, **words)
        self.read += 1
        if len(given["input_ids"]) > self.most:
            self.cut += 1
            given = self.tokenizer(*texts, **words, truncation=True, max_length=self.most)
        return dict(given)

    def texts(self, row: list[int]) -> tuple[tuple[str, ...], bool]:
        """The text, or prompt and answer, and whether the tokenizer adds its special tokens."""
        heads = (tuple(row[:length]) for length in self.lengths)  # a talk may begin another
        prompt = next(head for head in heads if head in self.prompts)
        turns, ended = self.prompts[prompt], row[-1] == self.tokens.eos_id
        said = spoken(self.tokens, list(prompt), row[len(prompt) :])
        if self.tokenizer.chat_template is None:
            return ("\n\n".join(turn["content"] for turn in turns), said), True
        whole = [*turns, {"role": "assistant", "content": said}]
        try:
            if ended:
                return (render(self.tokenizer, whole),), False
            if not said.strip():
                return (render(self.tokenizer, turns, add_generation_prompt=True),), False
            return (render(self.tokenizer, whole, continue_final_message=True),), False
        except TemplateError as error:
            what = f"the chat template of the reward model {self.source} refuses a conversation"
            raise ModelError(f"{what}: {str(error)[:80]}", "name one that takes it") from error


def spoken(tokens: Tokens, prompt: list[int], answer: list[int]) -> str:
    """An answer as text. Thoughts that the template has begun keep their opening mark."""
    said = tokens.decode(answer)
    return f"{THINK}\n{said}" if tokens.decode(prompt).rstrip().endswith(THINK) else said


def reread(
    answered: Sequence[tuple[Example, Sequence[int]]], tokens: Tokens, judge: Tokens, source: Path
) -> tuple[list[tuple[list[int], list[int]]], int]:
    """Prompts and a policy's answers in the ids of the model in `source`, as it was trained.

    `tokens` are the policy's. An answer that was cut off has no EOS there either. Last, how many
    were longer than the model has positions: those lose their ends.
    """
    config = load_config(source).get_text_config()
    most, rows = getattr(config, "max_position_embeddings", None) or NO_LIMIT, []
    cut = 0
    for example, answer in answered:
        said = spoken(tokens, example.prompt_ids, list(answer))
        ids, own = encode(judge, example.turns, said)
        whole = ids + (own if answer[-1] == tokens.eos_id else own[:-1])
        cut += len(whole) > most
        rows.append((whole[: min(len(ids), most)], whole[len(ids) : most]))
    return rows, cut


def _until(mask: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """`mask` [batch, length] without what follows position `last` [batch]."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return mask * (places[None, :] <= last[:, None])
