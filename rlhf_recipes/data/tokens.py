"""The tokenizer contract and the one `encode()` that every stage takes its ids from.

Settled once, before the first stage: a chat template, the end-of-turn token as EOS, and a pad token
that has a row in the embedding. Stock trainers each settle these for themselves, and their ids
differ by a trailing newline that is then the token scored (TRL-facts 27 in LOG.md).
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import TemplateError

from rlhf_recipes.data.turns import Messages
from rlhf_recipes.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For a base model that brings none. Only tokens that exist already, so nothing has to be learned
# before SFT starts; an answer ends in EOS. BOS comes first where the tokenizer itself writes it.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)

# What tokenizers call a token that is there to be padded with, best first.
PAD_CANDIDATES = (
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|endoftext|>",
    "<|finetune_right_pad_id|>",
    "<|vision_pad|>",
    "<|padding|>",
    "<unk>",
    "<|end_of_text|>",
    "</s>",
)


THINK = "<think>"
NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
TODAY = date(2024, 7, 26)  # as Llama's templates have it where they are not told the date

# What a template may take for the trial in `settle`; a useful one takes a ten-thousandth of it.
TEMPLATE_SECONDS = 5
TEMPLATE_BYTES = 2**30
RESIZE = "give it a row for each token first: `resize_token_embeddings(len(tokenizer))`"
OWN_TEMPLATE = 'chat_template = "plain" in [model] does without it'


class _OutOfTime(BaseException):
    """Not an Exception: jinja passes over those, and tries another way."""


@dataclass(frozen=True)
class Tokens:
    """A settled tokenizer. `specials` are the texts that no row may contain."""

    tokenizer: PreTrainedTokenizerBase
    eos_id: int
    pad_id: int
    specials: tuple[str, ...]
    rows: int  # of the model's embedding

    def has_specials(self, text: str) -> bool:
        return any(special in text for special in self.specials)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def settle(tokenizer: PreTrainedTokenizerBase, vocabulary: int, template: str = "own") -> Tokens:
    """Give `tokenizer` a template, EOS and pad, in place.

    `template` is "own" or "plain". `vocabulary` is the number of rows of the model's embedding: an
    id beyond it is an IndexError. A template may be a stranger's program: transformers sandboxes
    it, and here it is tried once, within limits of time and memory. Raises ModelError where the
    end of a turn is beyond the embedding, or where the template fails the trial.
    """
    named = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if template == "own" and any(Path(name).name != name for name in named):
        what = "the model's chat templates have names that no file of its folder can have"
        raise ModelError(what, OWN_TEMPLATE)
    if tokenizer.chat_template is None or template == "plain":
        first = "{{ bos_token }}" if _starts_with_bos(tokenizer) else ""
        tokenizer.chat_template = first + PLAIN_TEMPLATE
    with _trial("the model's chat template", OWN_TEMPLATE):
        tokenizer.eos_token = _end_of_turn(tokenizer)
        tokenizer.pad_token = _pad_token(tokenizer, vocabulary)
    tokenizer.padding_side = "left"
    specials = tuple(sorted(special_tokens(tokenizer)))
    return Tokens(tokenizer, tokenizer.eos_token_id, tokenizer.pad_token_id, specials, vocabulary)


def try_template(tokenizer: PreTrainedTokenizerBase, whose: str) -> None:
    """Raise ModelError where a template from elsewhere fails a first conversation."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    with _trial(whose, "name a model whose template takes a user's and an assistant's turn"):
        render(tokenizer, turns)


@contextlib.contextmanager
def _trial(whose: str, hint: str) -> Iterator[None]:
    """Limits on a template's first run, and a line for each way to fail."""
    try:
        with _bounded():
            yield
    except TemplateError as error:
        raise ModelError(f"{whose} fails: {error}", hint) from error
    except (_OutOfTime, MemoryError) as error:
        what = "does not end" if isinstance(error, _OutOfTime) else "takes all memory"
        raise ModelError(f"{whose} {what}", hint) from None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    added = (t.content for t in tokenizer.added_tokens_decoder.values() if t.special)
    return {*tokenizer.all_special_tokens, *added}


def encode(tokens: Tokens, prompt: Messages, answer: Any = None) -> tuple[list, list]:
    """Ids of a prompt, generation prompt included, and of its answer, EOS included.

    Raises as `texts` and `ids` do.
    """
    asked, *said = texts(tokens, prompt, *(() if answer is None else (answer,)))
    prompt_ids, *answer_ids = ids(tokens, [asked, *said])
    return prompt_ids, [*answer_ids[0], tokens.eos_id] if said else []


def texts(tokens: Tokens, prompt: Messages, *answers: Any) -> list[str]:
    """What is tokenized of a prompt, generation prompt included, and of answers to it.

    Each is tokenized apart, as in a rollout: PPO appends what it samples to exactly these prompt
    ids, so SFT and the reward model see the ids that PPO will see. An answer is a text, or an
    assistant's turn with thoughts, which reads as the template writes it; EOS is not part of it.
    Raises TemplateError where the template does not take the turns.
    """
    asked = render(tokens.tokenizer, prompt, add_generation_prompt=True)
    said = [
        one if isinstance(one, str) else _written(tokens, prompt, asked, one) for one in answers
    ]
    if asked.rstrip().endswith(THINK):  # the template has begun the thoughts
        said = [one.lstrip().removeprefix(THINK).lstrip("\n") for one in said]
    return [asked, *said]


def ids(tokens: Tokens, texts: list[str]) -> list[list[int]]:
    """The ids of each text. Raises ModelError where a token has no row in the model's embedding."""
    found = _tokenized(tokens.tokenizer, texts) if texts else []
    larger = len(tokens.tokenizer) > tokens.rows
    beyond = next((i for one in found for i in one if i >= tokens.rows), None) if larger else None
    if beyond is not None:
        count, token = len(tokens.tokenizer) - tokens.rows, tokens.tokenizer.decode([beyond])
        what = f"{count} tokens more than the model's embedding has rows ({tokens.rows:,})"
        raise ModelError(f"the tokenizer has {what}, and {token!r} is in use", RESIZE)
    return found


def _tokenized(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The tokenizer's ids, in 0.8 of its time: without offsets and masks, which nobody asks for."""
    words = {"add_special_tokens": False}
    if tokenizer.is_fast and len(texts) > 1:
        # The first by its own way, which also unsets padding and truncation; and to compare.
        [first] = tokenizer(texts[:1], **words)["input_ids"]
        found = [one.ids for one in tokenizer.backend_tokenizer.encode_batch_fast(texts, **words)]
        if found[0] == first:
            return found
    return tokenizer(texts, **words)["input_ids"]


def _written(tokens: Tokens, prompt: Messages, before: str, turn: dict[str, str]) -> str:
    """What the template writes for an answer with thoughts, from the generation prompt on."""
    whole = render(tokens.tokenizer, [*prompt, turn])
    thoughts = next(text for name, text in turn.items() if name not in ("role", "content"))
    if not whole.startswith(before) or thoughts.strip() not in whole:
        raise TemplateError("it has no place for an answer's thoughts")
    said, text = whole[len(before) :], turn["content"].strip()
    return said[: said.rindex(text) + len(text)]


def render(tokenizer: PreTrainedTokenizerBase, turns: Messages, **words: Any) -> str:
    """The text of a conversation by the model's template; TemplateError where it fails on these.

    A template that writes today's date writes TODAY: a run over midnight, a resumed one and a
    cached stage see the same prompts.
    """
    template = tokenizer.chat_template
    if isinstance(template, str) and "strftime_now" in template:
        words["chat_template"] = NOW.sub(lambda call: repr(TODAY.strftime(call[2])), template)
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **words)
    except (TemplateError, MemoryError):
        raise
    except Exception as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Time, where this is the main thread, and memory, on Linux, for what runs in here."""
    import resource

    def stop(*_: object) -> NoReturn:
        raise _OutOfTime

    timed = threading.current_thread() is threading.main_thread()
    before, limits = None, resource.getrlimit(resource.RLIMIT_AS)
    try:
        if timed:
            before = signal.signal(signal.SIGALRM, stop)
            signal.setitimer(signal.ITIMER_REAL, TEMPLATE_SECONDS)
        with contextlib.suppress(OSError, ValueError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            most = pages * resource.getpagesize() + TEMPLATE_BYTES
            if limits[0] == resource.RLIM_INFINITY:
                resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
        yield
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _starts_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text's ids start with BOS, as those of Gemma, Llama and Mistral do.

    Without it Gemma-7B has a perplexity of 5.9e9, with it 3.46 (lm-evaluation-harness#1465).
    """
    return tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1]


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The special token that the template writes after an assistant's turn, else the EOS."""
    mark = "ANSWER-ENDS-HERE"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}]
    rest = render(tokenizer, turns).rpartition(mark)[2].lstrip()
    for token in sorted(special_tokens(tokenizer), key=len, reverse=True):
        if rest.startswith(token):
            return token
    if tokenizer.eos_token is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token and its chat template ends no turn",
            "set `eos_token` in the model folder's tokenizer_config.json",
        )
    return tokenizer.eos_token


def _pad_token(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> str:
    """A token with a row in the embedding: one that is free where there is one, else EOS.

    EOS serves as well, for masks come from lengths (`models.sampling`), as TRL's collators make
    them. GPT-2, Falcon and phi-2 have no other special token.
    """
    vocab = tokenizer.get_vocab()
    used = render(tokenizer, [{"role": "user", "content": "?"}], add_generation_prompt=True)
    for token in (tokenizer.pad_token, *PAD_CANDIDATES):
        free = token in vocab and vocab[token] < vocabulary
        if free and token not in (tokenizer.eos_token, tokenizer.bos_token) and token not in used:
            return token
    if (eos := vocab[tokenizer.eos_token]) >= vocabulary:
        what = f"token {eos}, and the model's embedding has {vocabulary:,} rows"
        raise ModelError(f"the end of a turn, {tokenizer.eos_token!r}, is {what}", RESIZE)
    return tokenizer.eos_token
