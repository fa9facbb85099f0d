"""Prompts and answers as padded tensors with explicit lengths; sampling; scores of whole lists.

Masks are built from the lengths and handed along. They are never found again from `ids != pad`:
where pad and EOS are one token, that loses the EOS (TRL-facts 13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad as pad_left
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhf_recipes import group
from rlhf_recipes.models.role import Role, score
from rlhf_recipes.store.digests import derive_seed

Ids = Sequence[int]
DRAWN = 64  # rows that one generator draws for, in the order of their prompts' lengths
SAMPLED = 64  # rows sampled together on a CPU; by the memory rule too
TOKENS = 2**15  # of those rows, prompts included: 4.3 GB of keys and values in an 8B model
MOST = 256  # rows sampled together on a card: on an H200 256 took as long as 16 (LOG, 2026-11-27)
FREE = 0.8  # of a card's free memory, for sampling
LOOSE = 1.25  # a cache is copied as it grows, a layer at a time
READ = 32  # bytes a prompt token and hidden unit: the activations of a layer in 16 bit


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

    def alike(self, size: int) -> tuple[torch.Tensor, ...]:
        """The rows in chunks of like length: by the whole length or by the answer's, whichever
        leaves less padding in trimmed chunks. Prompts and answers are padded apart."""
        whole = self.mask.sum(1)
        orders = [key.argsort() for key in (whole, self.lengths * self.ids.shape[1] + whole)]
        chunks = [order.split(size) for order in orders]
        return min(chunks, key=lambda some: sum(self[c].trimmed().ids.numel() for c in some))

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


def sampling(
    length: int, temperature: float | None, *, eos: int, pad: int, static: bool = False
) -> GenerationConfig:
    """Draw from the whole distribution at `temperature`, with nothing that would bend it.

    Without a temperature the most likely token is taken, which `Draws` makes a draw of. `static`: a
    cache of one size, with which `generate` compiles the steps on a card.
    """
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=length,
        **(how if temperature is not None else {"do_sample": False}),
        eos_token_id=eos,
        pad_token_id=pad,
        use_cache=True,
        cache_implementation="static" if static else None,
    )


def held_at_once(count: int, tokens: int) -> int:
    """Rows of so many `tokens` that are sampled together on a CPU, of `count`."""
    return max(1, min(SAMPLED, count, TOKENS // tokens))


@torch.no_grad()
def rows_at_once(policy: Role, prompt: int, answer: int, count: int) -> int:
    """How many of `count` answers to sample together: prompts and answers of so many tokens.

    A step of sampling on a card takes as long for 256 rows as for 16, so there the free memory
    decides: by the bytes of the model's own cache, or of reading the prompts if that takes more.
    Rounded down to a power of two, so that a little less free memory changes no batch.
    """
    if not torch.cuda.is_available():
        return held_at_once(count, prompt + answer)
    with policy.active():
        one = torch.ones((1, 1), dtype=torch.long, device=policy.lm.device)
        cache = policy.lm(input_ids=one, use_cache=True).past_key_values
    held = [t for t in tree_leaves([vars(layer) for layer in cache.layers]) if torch.is_tensor(t)]
    token, text = sum(tensor.nbytes for tensor in held), policy.config.get_text_config()
    reading = prompt * (token + READ * text.hidden_size)
    row = max(LOOSE * (prompt + answer) * token, reading) + 16 * text.vocab_size  # float32 logits
    free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    fits = max(1, int(FREE * (free - torch.cuda.memory_allocated()) / row))
    return min(2 ** (fits.bit_length() - 1), MOST, count)


class Draws(LogitsProcessor):
    """Divides probabilities by noise: the largest is then a draw, as `torch.multinomial` makes it.

    The noise of a row depends on `seed`, its place and the step alone. `rows` is the batch's part
    of all `count` rows; what a batch has beyond them repeats its first row. `picked` gets the
    log-probabilities of the tokens, a step at a time.
    """

    def __init__(
        self,
        temperature: float,
        seed: int,
        rows: slice,
        count: int,
        device: torch.device,
        picked: list[torch.Tensor] | None = None,
    ) -> None:
        self.temperature, self.picked = temperature, picked
        self.blocks = []
        for start in range(rows.start - rows.start % DRAWN, rows.stop, DRAWN):
            generator = torch.Generator(device).manual_seed(derive_seed(seed, "sample", start))
            size = min(DRAWN, count - start)
            part = slice(max(rows.start - start, 0), min(rows.stop - start, size))
            self.blocks.append((generator, size, part))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = [
            scores.new_empty(size, scores.shape[1]).exponential_(generator=generator)[part]
            for generator, size, part in self.blocks
        ]
        drawn = torch.cat(noise)
        if beyond := len(scores) - len(drawn):
            drawn = torch.cat([drawn, drawn[:1].expand(beyond, -1)])
        chances = torch.softmax(scores / self.temperature, dim=-1)
        if self.picked is None:
            return chances.div_(drawn)
        found = chances / drawn
        self.picked.append(chances.gather(1, found.argmax(1, keepdim=True))[:, 0].log())
        return found


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
    width: int = 0,
    picked: list[list[float]] | None = None,
) -> list[list[int]]:
    """An answer to each prompt, at most `length` tokens, cut after its EOS.

    Sampled from the whole distribution at `temperature`. Prompts of like length share a batch. What
    is drawn does not depend on the batch, nor on what ran before. With a `width`, every batch has
    that many columns of prompts and `batch` rows, and a cache of one size. `picked` gets the
    log-probabilities of each answer's tokens. In a group each process samples a part, and has all.
    """
    settings = sampling(length, None, eos=eos, pad=pad, static=width > 0)
    mine: dict[int, tuple[list[int], list[float]]] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batch = group.at_once(batch, len(prompts))
    for start in group.share(range(0, len(prompts), batch)):
        part, device = order[start : start + batch], policy.lm.device
        asked = [prompts[i] for i in part]
        asked += asked[:1] * (batch - len(part) if width else 0)
        rows = join(asked, [[]] * len(asked), pad, device)
        if (short := width - rows.ids.shape[1]) > 0:
            ids, mask = (
                pad_left(t, (short, 0), value=v) for t, v in ((rows.ids, pad), (rows.mask, 0))
            )
            rows = replace(rows, ids=ids, mask=mask)
        place, steps = slice(start, start + len(part)), list[torch.Tensor]()
        seen = steps if picked is not None else None
        draws = Draws(temperature, seed, place, len(prompts), device, seen)
        with policy.active(still=True):
            out = policy.lm.generate(
                input_ids=rows.ids,
                attention_mask=rows.mask,
                generation_config=settings,
                logits_processor=LogitsProcessorList([draws]),
            )
        numbers = torch.stack(steps, 1).tolist() if steps else [[]] * len(asked)
        for i, ids, own in zip(part, out[:, rows.ids.shape[1] :].tolist(), numbers, strict=False):
            answer = _until(ids, eos)
            mine[i] = (answer, own[: len(answer)])
    found = {i: answer for some in group.everyone(mine) for i, answer in some.items()}
    if picked is not None:
        picked.extend(found[i][1] for i in range(len(prompts)))
    return [found[i][0] for i in range(len(prompts))]


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
    """The reward [rows] of (prompt ids, answer ids).

    `tell` hears of so many rows more after each batch.
    """
    mine = []
    for part, found in _batches(reward, rows, pad, batch):
        mine.append((part, score(reward, found.ids, found.mask, found.last).cpu()))
        tell(len(part))
    if others := len(rows) - sum(len(part) for part, _ in mine):
        tell(others)
    return _whole(mine, torch.empty(len(rows)))


@torch.no_grad()
def states_of(reward: Role, rows: Sequence[tuple[Ids, Ids]], pad: int, batch: int) -> torch.Tensor:
    """The states [rows, size] that the head reads, at the end of (prompt ids, answer ids)."""
    mine = []
    for part, found in _batches(reward, rows, pad, batch):
        hidden = reward.hidden(found.ids, found.mask)
        last = hidden[torch.arange(len(part), device=hidden.device), found.last]
        mine.append((part, last.float().cpu()))
    return _whole(mine, torch.empty(len(rows), reward.config.get_text_config().hidden_size))


def _whole(mine: list[tuple[list[int], torch.Tensor]], whole: torch.Tensor) -> torch.Tensor:
    """`whole`, with what each process of the group found for its places."""
    for part, found in (one for some in group.everyone(mine) for one in some):
        whole[part] = found
    return whole


def _batches(
    reward: Role, rows: Sequence[tuple[Ids, Ids]], pad: int, batch: int
) -> Iterator[tuple[list[int], Sequences]]:
    """Places of this process's share of `rows` and what stands there, the longest first for the
    sake of padding."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    batch = group.at_once(batch, len(rows))
    with reward.active():
        for start in group.share(range(0, len(order), batch)):
            part = order[start : start + batch]
            prompts, answers = zip(*(rows[i] for i in part), strict=True)
            yield part, join(prompts, answers, pad, reward.lm.device)
