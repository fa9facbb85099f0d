"""The tokenizer contract: end of turn as EOS, a pad with a row, one `encode()`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from rlhf_recipes.data.tokens import Tokens, encode, ids, render, settle
from rlhf_recipes.errors import ModelError
from tests.helpers.architectures import VOCABULARY, byte_tokenizer
from tests.helpers.tiny import TEMPLATE

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


def test_an_end_of_turn_beyond_the_embedding_is_an_error_that_counts_its_rows() -> None:
    said = "is token 256, and the model's embedding has 256 rows .*resize_token_embeddings"
    with pytest.raises(ModelError, match=said):
        settle(byte_tokenizer(), 256)


def test_a_template_s_date_is_the_same_on_every_day(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"
    settle(tokenizer, 32)
    assert render(tokenizer, ASK) == "26 Jul 2024 red cat"


THOUGHTS = "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
THOUGHTFUL = TEMPLATE.replace("{{ m['content'] }}", THOUGHTS + "{{ m['content'] }}")


def test_thoughts_are_written_as_the_template_writes_them_and_begun_once() -> None:
    def said(template: str, answer: Any) -> str:
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        tokens = settle(tokenizer, VOCABULARY)
        _, ids = encode(tokens, ASK, answer)
        assert ids[-1] == tokens.eos_id and tokens.eos_id not in ids[:-1]
        return tokenizer.decode(ids[:-1])

    turn = {"role": "assistant", "content": "blue", "reasoning_content": "hm"}
    assert said(THOUGHTFUL, turn) == "<think>\nhm\n</think>\n\nblue"
    assert said(THOUGHTFUL, "blue") == "blue"
    begun = THOUGHTFUL.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    assert said(begun, "<think>\nhm\n</think>blue") == "hm\n</think>blue"
    with pytest.raises(TemplateError, match="no place for an answer's thoughts"):
        said(TEMPLATE, turn)


def test_ids_are_the_prompts_and_the_answers_that_ppo_would_join(tiny_model: Path) -> None:
    tokens = settle(AutoTokenizer.from_pretrained(tiny_model), 32)
    prompt, answer = encode(tokens, ASK, "blue dog")
    assert tokens.tokenizer.decode(prompt + answer) == (
        "<|im_start|> user red cat <|im_end|> <|im_start|> assistant blue dog <|im_end|>"
    )
    assert answer[-1] == tokens.eos_id and tokens.eos_id not in answer[:-1]
    assert encode(tokens, ASK)[0] == prompt
    assert tokens.has_specials("a <|im_start|> b") and not tokens.has_specials("im_start")


def test_where_eos_is_the_only_special_token_it_is_padded_with() -> None:
    """As GPT-2, Falcon and phi-2 ship it; or with a pad token of its own that is EOS."""
    for words in ({}, {"pad_token": "<|endoftext|>"}):
        tokens = settle(byte_tokenizer(**words), VOCABULARY)
        assert tokens.eos_id == tokens.pad_id == 256
        prompt, answer = encode(tokens, ASK, "blue")
        assert 256 not in prompt and answer.count(256) == 1 and answer[-1] == 256


def test_a_pad_token_without_a_row_in_the_embedding_is_not_used() -> None:
    """As scripts leave it that add "[PAD]" and do not resize the model."""
    tokens = settle(byte_tokenizer(pad_token="[PAD]"), VOCABULARY)
    assert tokens.tokenizer.get_vocab()["[PAD]"] == 257 == VOCABULARY
    assert tokens.eos_id == tokens.pad_id == 256
    assert tokens.has_specials("a [PAD] b")  # such rows are dropped: that id has no row
    assert settle(byte_tokenizer(pad_token="[PAD]"), VOCABULARY + 1).pad_id == 257  # resized


@pytest.mark.parametrize("template", ["own", "plain"])
def test_bos_stands_first_and_once_where_the_tokenizer_writes_it(template: str) -> None:
    """Gemma, Llama and Mistral bases do; their own scripts would tokenize a text that way."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer(bos_token="<bos>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    assert tokenizer("a")["input_ids"] == [bos, *tokenizer("a", add_special_tokens=False).input_ids]
    tokens = settle(tokenizer, len(tokenizer), template)
    prompt, answer = encode(tokens, ASK, "blue")
    assert prompt[0] == bos and prompt.count(bos) == 1 and bos not in answer
    later = [*ASK, {"role": "assistant", "content": "blue"}, *ASK]
    assert encode(tokens, later)[0].count(bos) == 1
    asked = tokenizer.apply_chat_template(ASK, add_generation_prompt=True)  # as its users ask it
    assert asked["input_ids"] == prompt


def test_a_token_without_a_row_is_an_error_where_a_text_uses_it() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>", "<call>"])
    tokens = settle(tokenizer, VOCABULARY)
    assert encode(tokens, ASK, "blue")
    said = r"2 tokens more than the model's embedding has rows \(257\), and '<call>' is in use"
    for prompt, answer in ((ASK, "a <call>"), ([{"role": "user", "content": "<call>"}], None)):
        with pytest.raises(ModelError, match=said):
            encode(tokens, prompt, answer)


def test_many_texts_have_the_ids_that_each_has_by_the_tokenizers_own_way() -> None:
    """Also where a tokenizer was saved with padding and truncation on."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding()
    texts = ["red 12's <|im_end|>", "", " red", "é 🦊 1", "red " * 40]
    tokens = Tokens(tokenizer, 2, 0, (), 300)
    found = ids(tokens, texts)
    assert found == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    assert len(found[-1]) > 40
