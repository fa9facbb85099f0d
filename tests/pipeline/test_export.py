"""What export writes, and that it is the run's policy when others read it back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomlkit
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlhf_recipes.data.tokens import render, settle
from rlhf_recipes.errors import ModelError, UsageError
from rlhf_recipes.pipeline import export as exports
from rlhf_recipes.pipeline import to_gguf
from rlhf_recipes.pipeline.modelfile import modelfile, turns_of
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages.session import Session
from tests.helpers.fake_hub import TOKEN, FakeHub
from tests.helpers.tiny import RECIPE, TEMPLATE, byte_tokenizer
from tests.helpers.told import told

pytestmark = pytest.mark.train

SHAPE: dict[str, Any] = {
    "vocab_size": 272, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.3, "eos_token_id": 2, "bos_token_id": None,
}  # fmt: skip
README = "---\nlicense: apache-2.0\n---\nA base model.\n"
ANSWERS = [
    {"prompt": f"question {i}\n```", "answers": {"base": "b", "sft": "s", "ppo": f"answer <{i}>"}}
    for i in range(9)
]


def tiny(config: Any, folder: Path) -> Path:
    """A model of this config with random weights, norms and biases too, and `byte_tokenizer`."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config)
    for weight in lm.parameters():
        if weight.dim() == 1:
            weight.data += 0.3 * torch.randn_like(weight)
    lm.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_pairs: Path) -> Path:
    """A finished run on a tiny Llama, whose stages were never trained but have their adapters."""
    home = tmp_path_factory.mktemp("export")
    model = tiny(LlamaConfig(**SHAPE, tie_word_embeddings=True), home / "base")
    (model / "README.md").write_text(README)
    (home / "tiny.toml").write_text(RECIPE.format(model=model, data=tiny_pairs))
    recipe = load_recipe(home / "tiny.toml")
    answers = "".join(json.dumps(row) + "\n" for row in ANSWERS)
    made = told(
        home,
        outputs={"evaluation": {"answers.jsonl": answers}},
        manifest={"recipe": str(home / "tiny.toml"), "model": {"content": "0" * 64}},
    )
    (made / "resolved.toml").write_text(tomlkit.dumps(recipe.resolved()))
    base = Session(recipe, {}).base
    for seed, stage in enumerate(["sft", "reward", "ppo"]):
        role = base.open(stage, None, seed=seed, trainable=True)
        for name, weight in role.lm.named_parameters():
            if "lora_B" in name:
                weight.data += 0.3 * torch.randn(weight.shape)
        output = next((home / "runs" / ".stages").glob(f"{stage}-*")) / "output"
        base.save(role, output)
        base.close(role)
    return made


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def logits(lm: Any) -> torch.Tensor:
    with torch.no_grad():
        return lm(torch.tensor([[1, 40, 70, 9, 30, 2], [5, 6, 7, 8, 9, 10]])).logits


def policy(run: Path, stage: str = "ppo") -> Any:
    session = exports.shared_of(run)
    return session.exported(exports.finished_stage(run, stage)[2])


def from_gguf(folder: Path, file: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )


def rounded(lm: Any, kind: str) -> Any:
    """`lm` with its matrices as they are once they were stored in `kind`."""
    form = GGMLQuantizationType[kind.upper()]
    for weight in lm.parameters():
        if weight.dim() == 2:
            stored = quants.dequantize(quants.quantize(weight.data.numpy(), form), form)
            weight.data = torch.tensor(stored)
    return lm


def texts(folder: Path) -> Iterator[tuple[str, bytes]]:
    return ((path.name, path.read_bytes()) for path in folder.rglob("*") if path.is_file())


# ---- safetensors and the card -------------------------------------------------------------------


def test_merged_weights_are_the_policy_and_the_card_says_what_was_measured(
    run: Path, out: Path
) -> None:
    from huggingface_hub import ModelCard

    said = exports.export(run_folder=run, folder=out)
    assert said.splitlines() == [
        f"{out} holds ppo (merged), ready for from_pretrained",
        "to share it: export again with --push YOUR-NAME/told-ppo",
    ]
    assert torch.allclose(
        logits(AutoModelForCausalLM.from_pretrained(out)), logits(policy(run)), atol=1e-5
    )
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o644}
    places = [str(run.parent.parent).encode(), b"/home/", b"/tmp/"]
    assert not [name for name, text in texts(out) for place in places if place in text]

    card = ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    found = {one.metric_type: one for one in card.data.eval_results}
    assert found["judge_win_rate"].metric_value == 0.71
    assert found["judge_win_rate"].metric_name == "judge win rate (95 %: 0.63 to 0.79)"
    assert found["kl"].metric_value == 6.2 and found["kl"].task_type == "text-generation"
    assert found["kl"].dataset_name == "pairs.jsonl, test prompts"
    text = card.text
    assert "The base model's licence is apache-2.0." in text
    assert "| preferred by the judge | — |" in text and "PPO beat SFT on 71 %" in text
    shown = [row for row in ANSWERS if f"````text\n{row['prompt']}\n````\n" in text]
    assert len(shown) == text.count("Answer:") == 3
    for row in shown:
        assert f"```text\n{row['answers']['ppo']}\n```\n" in text  # unedited: no escapes


def test_an_adapter_and_a_reward_model_have_cards_of_their_own(run: Path, out: Path) -> None:
    from huggingface_hub import ModelCard
    from peft import PeftModel

    exports.export(run_folder=run, folder=out, stage="sft", form="adapter")
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "peft" and "this is the model of `sft`" in card.text
    base = AutoModelForCausalLM.from_pretrained(run.parent.parent / "base")
    again = PeftModel.from_pretrained(base, out)
    assert torch.allclose(logits(again), logits(policy(run, "sft")), atol=1e-5)

    text = exports.run_page.model_card(run, "reward")
    assert "pipeline_tag: text-classification" in text and "reward model of `reward`" in text
    assert '"type": "accuracy"' in text and "licence is unknown here" in text


# ---- GGUF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", to_gguf.KINDS)
def test_a_gguf_read_back_is_the_policy(run: Path, out: Path, kind: str) -> None:
    said = exports.export(run_folder=run, folder=out, form="gguf", kind=kind)
    assert said.endswith(f"; for Ollama: ollama create NAME -f {out}/Modelfile")
    file = f"model-{kind}.gguf"
    assert {path.name for path in out.iterdir()} == {file, "Modelfile", "README.md"}
    expected = logits(rounded(policy(run), kind))
    assert torch.allclose(logits(from_gguf(out, file)), expected, atol=1e-4)
    assert 1e-4 < (expected - logits(policy(run))).abs().max() < 0.5
    weights = GGUFReader(out / file).tensors
    assert {w.tensor_type.name for w in weights} == {"F32", kind.upper()}

    before = exports.shared_of(run).tokens.tokenizer
    after = AutoTokenizer.from_pretrained(out, gguf_file=file)
    for turns in exports.CONVERSATIONS:
        ids = [one.apply_chat_template(turns, return_dict=False) for one in (before, after)]
        assert ids[0] == ids[1] and len(ids[0]) > 40
    assert after.eos_token == "<|im_end|>" and after.pad_token == "<|endoftext|>"
    assert "library_name: gguf" in (out / "README.md").read_text()


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
        MistralConfig(**SHAPE, sliding_window=None, head_dim=16),
        Qwen2Config(**SHAPE),
        Qwen3Config(**SHAPE, head_dim=128, tie_word_embeddings=True),
    ],
    ids=lambda config: config.model_type,
)
def test_every_kind_of_model_that_is_converted(config: Any, tmp_path: Path) -> None:
    tiny(config, tmp_path)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = settle(AutoTokenizer.from_pretrained(tmp_path), 272)
    to_gguf.write(lm, tokens, tmp_path / "m.gguf", kind="f16", name="m")
    if config.model_type == "llama":  # transformers reads no bias of it
        found = {w.name for w in GGUFReader(tmp_path / "m.gguf").tensors}
        assert {"blk.1.attn_q.bias", "blk.1.ffn_down.bias"} <= found
        return
    read = logits(from_gguf(tmp_path, "m.gguf"))
    assert torch.allclose(read, logits(rounded(lm, "f16")), atol=1e-4)


def test_scaled_rotary_embeddings_are_what_llama_cpp_divides_by(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    lm = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE, rope_parameters=rope))
    tokens = settle(byte_tokenizer(), 272)
    to_gguf.write(lm, tokens, tmp_path / "m.gguf", kind="f16", name="m")
    [factors] = [
        w for w in GGUFReader(tmp_path / "m.gguf").tensors if w.name == "rope_freqs.weight"
    ]
    plain = 1e4 ** -(torch.arange(0, 8, 2) / 8)
    assert torch.allclose(plain / torch.tensor(factors.data), lm.model.rotary_emb.inv_freq)
    assert factors.data[0] == 1 and factors.data[-1] == 8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "gemma2"}, "the kind 'gemma2' (it does: llama, mistral, qwen2, qwen3)"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "yarn"}}, "rotary embeddings"),
        ({"model_type": "mistral", "sliding_window": 4096}, "attention in a sliding window"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "the activation 'gelu'"),
    ],
)
def test_a_model_of_another_kind_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as error:
        to_gguf.check(changes)
    assert said in str(error.value) and "convert_hf_to_gguf.py" in str(error.value)


def test_how_a_tokenizer_splits_has_llama_cpp_s_name(tiny_model: Path) -> None:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    found = {}
    for [*_, last], name in to_gguf.SPLITS.items():
        parts = [pre_tokenizers.Split(Regex(last), "isolated")]
        parts += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        if last == "words":
            parts = [digits, words] if name == "smollm" else [words]
        made = byte_tokenizer(pre_tokenizers.Sequence(parts), name == "llama-bpe")
        found[name] = to_gguf.split_of(made)
    assert found == {name: name for name in ("gpt-2", "smollm", "qwen2", "llama-bpe")}
    strange = byte_tokenizer(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), words]))
    for other in (AutoTokenizer.from_pretrained(tiny_model), strange):
        with pytest.raises(UsageError, match="this tokenizer: it is not one of the byte-level BPE"):
            to_gguf.split_of(other)


# ---- what else is refused -----------------------------------------------------------------------


def test_what_cannot_be_exported_is_refused_before_torch_is_loaded(run: Path, out: Path) -> None:
    full = str(run)
    calls = [
        ({"folder": full}, f"{full} is not empty (name a new folder)"),
        ({"stage": "nothing"}, f"{run} has no finished stage nothing (sft, reward, ppo, judge)"),
        ({"stage": "judge", "kind": "f16"}, "--type is how a GGUF stores its weights (add"),
        ({"stage": "reward", "form": "gguf"}, "a GGUF holds a policy, and reward is not one"),
        ({"form": "gguf", "push": "me/x"}, "--push uploads safetensors"),
        ({"form": "adapter", "push": "me/x"}, "nobody else has the folder"),
        ({"push": "me"}, "--push takes user/name, not 'me'"),
        ({"push": "me/x"}, "HF_HUB_OFFLINE is set, so nothing can be pushed (unset it)"),
    ]
    code = "import json, sys\nfrom pathlib import Path\nfrom rlhf_recipes.pipeline import export\n"
    code += "for words in json.loads(sys.argv[1]):\n    try:\n"
    code += "        given = {'folder': sys.argv[3]} | words\n"
    code += "        given['folder'] = Path(given['folder'])\n"
    code += "        export.export(run_folder=Path(sys.argv[2]), **given)\n"
    code += "    except export.UsageError as error:\n        print(error)\n"
    code += "print({'torch', 'transformers', 'gguf'} & set(sys.modules))"
    words = json.dumps([call for call, _ in calls])
    done = subprocess.run(
        [sys.executable, "-c", code, words, full, str(out)], capture_output=True, text=True
    )
    *lines, loaded = done.stdout.splitlines()
    assert loaded == "set()", done.stderr
    for (_, said), line in zip(calls, lines, strict=True):
        assert said in line
    assert not out.exists()


def test_a_template_that_reads_back_otherwise_is_an_error(
    run: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = GGUFWriter.add_token_merges
    monkeypatch.setattr(GGUFWriter, "add_token_merges", lambda self, merges: add(self, merges[:3]))
    with pytest.raises(ModelError, match="read back, writes a chat with other ids"):
        exports.export(run_folder=run, folder=out, form="gguf")


# ---- Ollama -------------------------------------------------------------------------------------

DEFAULTED = TEMPLATE.replace(
    "{% for m in messages %}",
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "{% for m in messages %}",
    1,
)


def test_the_modelfile_of_a_run(run: Path, out: Path) -> None:
    exports.export(run_folder=run, folder=out, form="gguf")
    assert (out / "Modelfile").read_text() == (
        "FROM ./model-f16.gguf\n"
        'TEMPLATE """{{ if not .System }}{{ end }}{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}'
        '{{ else if eq .Role "assistant" }}<|im_end|>\n<|im_start|>assistant\n{{ .Content }}'
        "<|im_end|>\n{{ end }}{{ end }}<|im_end|>\n<|im_start|>assistant\n"
        '"""\n'
        "PARAMETER temperature 1\nPARAMETER top_k 0\nPARAMETER top_p 1\nPARAMETER min_p 0\n"
        'PARAMETER repeat_penalty 1\nPARAMETER stop "<|im_end|>"\n'
    )


@pytest.mark.parametrize("template", [TEMPLATE, DEFAULTED], ids=["plain", "defaulted"])
@pytest.mark.parametrize("system", [None, "", "Answer first."])
def test_the_turns_of_a_template_write_what_it_writes(template: str, system: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokens = settle(tokenizer, 272)
    turns = turns_of(tokens, system)
    for roles in ("u", "su", "uau", "suauau"):
        names = {"s": "system", "u": "user", "a": "assistant"}
        said = [{"role": names[role], "content": f"x{i}\ny"} for i, role in enumerate(roles)]
        first = [] if system is None or roles[0] == "s" else [{"role": "system", "content": system}]
        whole = render(tokens.tokenizer, [*first, *said], add_generation_prompt=True)
        assert turns.write(said) == whole


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"),
        TEMPLATE.replace("<|im_start|>assistant", "{{ messages | length }}"),
        TEMPLATE.replace("<|im_start|>assistant", '<|im_start|>""""'),
        TEMPLATE.replace("<|im_start|>assistant", "<|im_start|>\u200bassistant"),
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE,
    ],
    ids=["changes", "counts", "quotes", "unseen", "refuses"],
)
def test_a_template_that_does_more_is_not_translated(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    text = modelfile(settle(tokenizer, 272), "m.gguf", temperature=0.5, system=None)
    assert 'TEMPLATE "' not in text and text.splitlines()[1].startswith("# The chat template is")
    assert "PARAMETER temperature 0.5\n" in text


# ---- the hub ------------------------------------------------------------------------------------


# As in tests/sources/test_push.py: huggingface_hub 2.4 without Xet.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_pushed_model_is_what_lies_in_the_folder(
    run: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import close_session, constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with FakeHub() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        hub.troubles["/api/repos/create"] = "forbidden"
        with pytest.raises(ModelError, match="me/new was not pushed"):
            exports.export(run_folder=run, folder=out, push="me/new")
        assert not out.exists()  # it is refused before the work
        hub.troubles.clear()
        said = exports.export(run_folder=run, folder=out, push="me/new")
        close_session()
    assert said.splitlines()[1] == f"{hub.url}/me/new holds the same; the model is private there"
    files = hub.content("model", "me/new")
    assert hub.private == {"me/new"} and files.pop(".gitattributes") == b""
    assert files == dict(texts(out)) and "model.safetensors" in files
    assert 'pipeline("text-generation", "me/new")' in files["README.md"].decode()
    assert '"name": "me/new"' in files["README.md"].decode()
