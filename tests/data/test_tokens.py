"""The tokenizer contract: end of turn as EOS, a pad that is free, one `encode()`."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlhf_recipes.data.tokens import encode, settle
from rlhf_recipes.errors import ModelError

pytestmark = pytest.mark.train

ASK = [{"role": "user", "content": "red cat"}]


def test_end_of_turn_is_eos_and_pad_is_another_token(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"  # as SmolLM2 ships it
    tokens = settle(tokenizer, 32)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token == "<|endoftext|>"
    assert (tokens.eos_id, tokens.pad_id) == (2, 0)


def test_the_turn_ends_where_the_template_ends_it(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.eos_token = "<|endoftext|>"  # as many instruct models ship it
    tokenizer.pad_token = "<unk>"
    tokens = settle(tokenizer, 32)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokens.pad_id == 3


def test_a_base_model_gets_a_plain_template_of_tokens_it_has(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    size = len(tokenizer)
    tokens = settle(tokenizer, 32)
    prompt, answer = encode(tokens, ASK, "blue dog")
    assert len(tokenizer) == size
    assert answer[-1] == tokens.eos_id == 2
    assert tokens.decode(answer) == "blue dog"

    own = AutoTokenizer.from_pretrained(tiny_model)  # one that is not to be used
    plain = settle(own, 32, "plain")
    assert own.chat_template == tokenizer.chat_template
    assert encode(plain, ASK, "blue dog") == (prompt, answer)


def test_no_free_pad_is_an_error_that_says_where_to_set_one(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ModelError, match="no token is free to pad with.*tokenizer_config.json"):
        settle(tokenizer, 0)  # every id lies beyond a vocabulary of nothing


def test_ids_are_the_prompts_and_the_answers_that_ppo_would_join(tiny_model: Path) -> None:
    tokens = settle(AutoTokenizer.from_pretrained(tiny_model), 32)
    prompt, answer = encode(tokens, ASK, "blue dog")
    assert tokens.tokenizer.decode(prompt + answer) == (
        "<|im_start|> user red cat <|im_end|> <|im_start|> assistant blue dog <|im_end|>"
    )
    assert answer[-1] == tokens.eos_id and tokens.eos_id not in answer[:-1]
    assert encode(tokens, ASK)[0] == prompt
    assert tokens.has_specials("a <|im_start|> b") and not tokens.has_specials("im_start")
