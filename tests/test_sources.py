from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from rlhf_recipes import sources
from rlhf_recipes.errors import DataError, ModelError
from rlhf_recipes.recipe import load_recipe
from tests.counting import RECIPE, toy

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_content_is_names_and_bytes_wherever_they_lie(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "a.safetensors").write_bytes(b"weights")
    before = sources.content_digest(folder, tmp_path)

    (folder / "README.md").write_text("edited")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("hidden")
    moved = folder.rename(tmp_path / "elsewhere")
    assert sources.content_digest(moved, tmp_path) == before

    (moved / "sub" / "a.safetensors").write_bytes(b"WEIGHTS")
    changed = sources.content_digest(moved, tmp_path)
    (moved / "sub" / "a.safetensors").rename(moved / "sub" / "b.safetensors")
    assert len({before, changed, sources.content_digest(moved, tmp_path)}) == 3


def test_a_file_is_its_suffix_and_bytes(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.json"):
        (tmp_path / name).write_text("{}")
    first, second, third = (
        sources.content_digest(tmp_path / name, tmp_path)
        for name in ("a.jsonl", "b.jsonl", "c.json")
    )
    assert first == second != third  # the suffix says how it is read


def test_large_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "REMEMBERED_BYTES", 4)
    read = []
    monkeypatch.setattr(
        sources.hashlib, "file_digest", lambda f, _: read.append(f.name) or hashlib.sha256(f.read())
    )
    file = tmp_path / "big.jsonl"
    file.write_bytes(b"large enough")
    first = sources.content_digest(file, tmp_path / "runs")
    assert sources.content_digest(file, tmp_path / "runs") == first
    assert len(read) == 1

    os.utime(file, ns=(1, 1))  # touched: read again, and found the same
    assert sources.content_digest(file, tmp_path / "runs") == first
    assert len(read) == 2
    (tmp_path / "runs" / ".stages" / "digests.json").write_text("{damaged")
    assert sources.content_digest(file, tmp_path / "runs") == first
    assert len(read) == 3


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_cached_commit_wins_without_asking_the_hub(hub: Path, tmp_path: Path) -> None:
    refs = hub / "models--owner--model" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(COMMIT)
    identity = {"repo": "owner/model", "revision": COMMIT}
    assert sources.identify_hub_model("owner/model", None) == identity
    assert sources.identify_hub_model("owner/other", COMMIT)["revision"] == COMMIT


def test_what_is_nowhere_is_one_line(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        sources.identify_hub_model("owner/model", None)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(
        "the model owner/model is neither on this machine nor to be had from the hub (Offline"
    )
    assert text.endswith(
        "check the name and the network, or name a local folder (./…) as the model)"
    )

    recipe = load_recipe(toy(tmp_path, text=RECIPE.replace("./pairs.jsonl", "owner/pairs")))
    with pytest.raises(DataError, match="the dataset owner/pairs is neither on this machine"):
        sources.identify_dataset(recipe.dataset, tmp_path)


def test_a_hub_model_is_loaded_from_its_snapshot(hub: Path, tmp_path: Path) -> None:
    recipe = load_recipe(toy(tmp_path, text=RECIPE.replace('"./model"', '"owner/model"')))
    snapshot = hub / "models--owner--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(ModelError):  # only half of it is here, and the network is off
        sources.model_folder(recipe)
    (snapshot / "model.safetensors").write_bytes(b"weights")
    assert sources.model_folder(recipe) == snapshot
    assert sources.local_path("./model", recipe) == tmp_path / "model"
