"""A reward model with a tokenizer of its own is told the conversation as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    pipeline,
)

from rlhf_recipes.data.tokens import Tokens, encode, settle
from rlhf_recipes.errors import ModelError, RecipeError
from rlhf_recipes.models.retold import Retold
from rlhf_recipes.models.reward_model import check_foreign, open_foreign
from rlhf_recipes.models.sampling import score_ids
from rlhf_recipes.pipeline import runner
from rlhf_recipes.recipe.load import load_recipe
from tests.helpers.architectures import COMMON, VOCABULARY, byte_tokenizer
from tests.helpers.roles import make_base
from tests.helpers.tiny import word_tokenizer

pytestmark = pytest.mark.train

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}"
    "{% if m.role == 'assistant' %}<|endoftext|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TALKS = [
    [{"role": "user", "content": "red"}],
    [{"role": "system", "content": "cow"}, {"role": "user", "content": "gold cat"}],
    [  # the first one's, gone on
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "pig"},
    ],
]
ANSWERS = ["blue grey pink blue grey pink", "owl owl owl", "fox"]


def classifier(
    folder: Path, kind: str = "bert", template: str | None = TEMPLATE, **more: Any
) -> Path:
    words = COMMON | {"vocab_size": VOCABULARY + 1, "num_labels": 1, "pad_token_id": 257, **more}
    config = AutoConfig.for_model(kind, **words)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer = byte_tokenizer(pad_token="[PAD]", model_max_length=more.get("reads", 128))
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tokens() -> Tokens:
    return settle(word_tokenizer(), 32)


@pytest.fixture
def rows(tokens: Tokens) -> list[tuple[list[int], list[int]]]:
    return [encode(tokens, *both) for both in zip(TALKS, ANSWERS, strict=True)]


def opened(folder: Path, tiny_model: Path, tokens: Tokens) -> Retold:
    prompts = {tuple(encode(tokens, talk)[0]): talk for talk in TALKS}
    found = open_foreign(folder, make_base(tiny_model), tokens, lambda: prompts)
    assert isinstance(found, Retold)
    return found


def piped(folder: Path, texts: list[Any]) -> list[float]:
    """What transformers' own pipeline says."""
    asked = pipeline("text-classification", str(folder), function_to_apply="none", device="cpu")
    return [asked(text, top_k=1)[0]["score"] for text in texts]


def written(folder: Path, talk: list[dict[str, str]], answer: str) -> str:
    whole = [*talk, {"role": "assistant", "content": answer}]
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(whole, tokenize=False)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_it_scores_as_transformers_pipeline_does(
    tiny_model: Path, tmp_path: Path, tokens: Tokens, rows: Any, kind: str
) -> None:
    folder = classifier(tmp_path / kind, kind)
    texts = [written(folder, *both) for both in zip(TALKS, ANSWERS, strict=True)]
    assert texts[1] == "system: cow\nuser: gold cat\nassistant: owl owl owl<|endoftext|>\n"
    expected = piped(folder, texts)
    for batch in (1, 3):
        found = score_ids(opened(folder, tiny_model, tokens), rows, tokens.pad_id, batch)
        assert found.tolist() == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) == 3


def test_an_answer_that_was_cut_off_gets_no_end_of_turn(
    tiny_model: Path, tmp_path: Path, tokens: Tokens, rows: Any
) -> None:
    folder = classifier(tmp_path / "bert")
    reward = opened(folder, tiny_model, tokens)
    cut = [(prompt, answer[:-1]) for prompt, answer in rows]
    begun = [reward.texts([*prompt, *answer])[0][0] for prompt, answer in cut]
    whole = [reward.texts([*prompt, *answer])[0][0] for prompt, answer in rows]
    assert begun[0] == f"user: red\nassistant: {ANSWERS[0]}"
    assert whole == [f"{text}<|endoftext|>\n" for text in begun]
    assert reward.texts(rows[0][0])[0][0] == "user: red\nassistant: "  # nothing was said
    found = score_ids(reward, cut, tokens.pad_id, 2).tolist()
    assert found == pytest.approx(piped(folder, begun), abs=1e-5)
    assert found != pytest.approx(piped(folder, whole), abs=1e-2)


def test_what_it_cannot_read_whole_is_cut_and_counted(
    tiny_model: Path, tmp_path: Path, tokens: Tokens, rows: Any
) -> None:
    """A byte a token."""
    folder = classifier(tmp_path / "bert", reads=51)
    reward = opened(folder, tiny_model, tokens)
    found = score_ids(reward, rows, tokens.pad_id, 3).tolist()
    said = "2 of 3 answers were cut, with their prompts, to the 51 tokens that bert reads"
    assert reward.told == said
    texts = [written(folder, *both) for both in zip(TALKS, ANSWERS, strict=True)]
    begun = [byte_tokenizer().decode(reward.tokenizer(text)["input_ids"][:51]) for text in texts]
    assert found == pytest.approx(piped(folder, begun), abs=1e-5)


def test_without_a_template_it_reads_prompt_and_answer_side_by_side(
    tiny_model: Path, tmp_path: Path, tokens: Tokens, rows: Any
) -> None:
    folder = classifier(tmp_path / "bert", template=None)
    found = score_ids(opened(folder, tiny_model, tokens), rows[:1], tokens.pad_id, 2).tolist()
    assert found == pytest.approx(
        piped(folder, [{"text": "red", "text_pair": ANSWERS[0]}]), abs=1e-5
    )


def test_thoughts_that_the_policy_s_template_began_keep_their_mark(
    tiny_model: Path, tmp_path: Path
) -> None:
    plain = byte_tokenizer()
    plain.chat_template = (
        "{{ messages[0].content }}\n{% if add_generation_prompt %}<think>{% endif %}"
    )
    tokens = settle(plain, VOCABULARY)
    prompt, answer = encode(tokens, TALKS[0], "hm</think>blue")
    prompts = {tuple(prompt): TALKS[0]}
    folder = classifier(tmp_path / "bert")
    reward = open_foreign(folder, make_base(tiny_model), tokens, lambda: prompts)
    assert isinstance(reward, Retold)
    [text], _ = reward.texts([*prompt, *answer])
    assert text == "user: red\nassistant: <think>\nhm</think>blue<|endoftext|>\n"


def test_a_folder_that_gives_no_score_gets_a_line(
    tiny_recipe: Path, tmp_path: Path, tokens: Tokens
) -> None:
    two = classifier(tmp_path / "two", num_labels=2)
    with pytest.raises(ModelError, match=r"two gives 2 numbers an answer, not one \(name"):
        check_foreign(two, tokens)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match="adapter is an adapter, not a whole model: .*merge_and"):
        load_recipe(tiny_recipe, set=[f"ppo.reward_model={adapter}"])
    AutoConfig.for_model("xglm", num_labels=1).save_pretrained(tmp_path / "xglm")
    with pytest.raises(ModelError, match="xglm is a xglm, which gives no score"):
        check_foreign(tmp_path / "xglm", tokens)
    wrong = classifier(tmp_path / "wrong", template="{{ raise_exception('no') }}")
    with pytest.raises(ModelError, match="chat template of the reward model .*wrong fails: no"):
        check_foreign(wrong, tokens)


@pytest.mark.usefixtures("stages_alone")
def test_ppo_and_the_evaluation_score_through_it(
    tiny_model: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    folder = classifier(tmp_path / "bert")
    words = ['stages=["sft", "ppo"]', f"ppo.reward_model={folder}", "ppo.total_episodes=16"]
    words += ["ppo.minimum_accuracy=0", "evaluation.best_of=2", "evaluation.prompts=6"]
    recipe = load_recipe(tiny_recipe, set=[*words, f"evaluation.judge={folder}"])
    outcome = runner.run(recipe, runs=tmp_path / "runs")
    assert outcome.results["ppo.updates"] == 1 and "best_of.2.score_gain" in outcome.results
    [file] = (tmp_path / "runs" / ".stages").glob("evaluation-*/output/answers.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    texts = []
    for row in rows:
        talk = [{"role": "user", "content": row["prompt"]}]
        text = written(folder, talk, row["answers"]["sft"])
        texts.append(text if row["ended"]["sft"] else text.removesuffix("<|endoftext|>\n"))
    expected = pytest.approx(piped(folder, texts), abs=1e-3)
    assert [row["scores"]["sft"] for row in rows] == expected
    assert [row["judged"]["sft"] for row in rows] == expected
