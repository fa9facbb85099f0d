"""Prompts and answers as padded tensors with explicit lengths; sampling; scores of whole lists.

Masks are built from the lengths and handed along. They are never found again from `ids != pad`:
where pad and EOS are one token, that loses the EOS (TRL-facts 13).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import GenerationConfig

from rlhf_recipes.models.role import Role, score
from rlhf_recipes.store.digests import derive_seed

Ids = Sequence[int]


@dataclass(frozen=True)
class Sequences:
    """Prompts padded on the left, answers padded on the right, P + R columns."""

    ids: torch.Tensor  # [batch, P + R]
    mask: torch.Tensor  # [batch, P + R], 1 on tokens
    lengths: torch.Tensor  # [batch], tokens of the answer, EOS included
    answer: int  # R

    def __getitem__(self, rows: torch.Tensor | slice) -> Sequences:
        return Sequences(self.ids[rows], self.mask[rows], self.lengths[rows], self.answer)

    def __len__(self) -> int:
        return len(self.ids)

    def trimmed(self) -> Sequences:
        """Without the columns that are padding in every row.

        One answer column more than the longest is kept where there is one: the state after its EOS.
        """
        before = self.ids.shape[1] - self.answer
        first = int(self.mask.any(0).int().argmax())
        answer = min(int(self.lengths.max()) + 1, self.answer)
        columns = slice(first, before + answer)
        return Sequences(self.ids[:, columns], self.mask[:, columns], self.lengths, answer)

    @property
    def last(self) -> torch.Tensor:
        """The column [batch] of each answer's last token, which is what is scored."""
        return self.ids.shape[1] - self.answer + self.lengths - 1


def join(
    prompts: Sequence[Ids],
    answers: Sequence[Ids],
    pad: int,
    device: torch.device,
    width: int = 0,
) -> Sequences:
    """One batch of prompts and answers, of at least `width` answer columns."""
    before = max(len(prompt) for prompt in prompts)
    answer = max(width, *(len(ids) for ids in answers))
    ids = torch.full((len(prompts), before + answer), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (prompt, reply) in enumerate(zip(prompts, answers, strict=True)):
        span = slice(before - len(prompt), before + len(reply))
        ids[i, span] = torch.tensor([*prompt, *reply])
        mask[i, span] = 1
    lengths = torch.tensor([len(ids) for ids in answers])
    return Sequences(ids.to(device), mask.to(device), lengths.to(device), answer)


def sampling(length: int, temperature: float, *, eos: int, pad: int) -> GenerationConfig:
    """Draw from the whole distribution at `temperature`, with nothing that would bend it."""
    return GenerationConfig(
        max_new_tokens=length,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=eos,
        pad_token_id=pad,
        use_cache=True,
    )


@torch.no_grad()
def sample(
    policy: Role,
    prompts: Sequence[Ids],
    *,
    length: int,
    temperature: float,
    eos: int,
    pad: int,
    batch: int,
    seed: int,
) -> list[list[int]]:
    """An answer to each prompt, at most `length` tokens, cut after its EOS.

    Sampled from the whole distribution at `temperature`; each batch is seeded by its place, so the
    same weights give the same answers whatever ran before. Prompts of like length share a batch.
    """
    settings = sampling(length, temperature, eos=eos, pad=pad)
    answers: list[list[int]] = [[]] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), batch):
        part = order[start : start + batch]
        rows = join([prompts[i] for i in part], [[]] * len(part), pad, policy.lm.device)
        with policy.active(), torch.random.fork_rng():
            torch.manual_seed(derive_seed(seed, "sample", start))
            out = policy.lm.generate(
                input_ids=rows.ids, attention_mask=rows.mask, generation_config=settings
            )
        for i, ids in zip(part, out[:, rows.ids.shape[1] :].tolist(), strict=True):
            answers[i] = _until(ids, eos)
    return answers


def _until(ids: list[int], eos: int) -> list[int]:
    return ids[: ids.index(eos) + 1] if eos in ids else ids


@torch.no_grad()
def score_ids(
    reward: Role,
    rows: Sequence[tuple[Ids, Ids]],
    pad: int,
    batch: int,
    tell: Callable[[int], object] = lambda count: None,
) -> torch.Tensor:
    """The reward [rows] of (prompt ids, answer ids), the longest first for the sake of padding.

    `tell` hears of so many rows more after each batch.
    """
    scores = torch.empty(len(rows))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    with reward.active():
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            prompts, answers = zip(*(rows[i] for i in part), strict=True)
            batch_ = join(prompts, answers, pad, reward.lm.device)
            scores[part] = score(reward, batch_.ids, batch_.mask, batch_.last).cpu()
            tell(len(part))
    return scores
