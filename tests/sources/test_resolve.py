from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from rlhf_recipes.errors import DataError, ModelError
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.tables import DatasetTable
from rlhf_recipes.sources import resolve as sources
from tests.helpers.counting import RECIPE, toy

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_MODEL = RECIPE.replace('"./model"', '"owner/model"')


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
        hashlib, "file_digest", lambda f, _: read.append(f.name) or hashlib.sha256(f.read())
    )
    file = tmp_path / "big.jsonl"
    file.write_bytes(b"large enough")
    (tmp_path / "runs").mkdir()
    first = sources.content_digest(file, tmp_path / "runs")
    assert sources.content_digest(file, tmp_path / "runs") == first
    assert len(read) == 1

    os.utime(file, ns=(1, 1))  # touched: read again, and found the same
    assert sources.content_digest(file, tmp_path / "runs") == first
    assert len(read) == 2
    (tmp_path / "runs" / ".stages" / "digests.json").write_text("{damaged")
    assert sources.content_digest(file, tmp_path / "runs") == first
    assert len(read) == 3

    file.write_bytes(b"large again!")  # as large, and as old: what a copy that keeps times leaves
    os.utime(file, ns=(1, 1))
    assert sources.content_digest(file, tmp_path / "runs") != first


@pytest.mark.parametrize(
    ("words", "counted"),
    [
        ({}, "a.jsonl b.jsonl deep/a.jsonl"),
        ({"data_files": "a.jsonl"}, "a.jsonl"),
        ({"data_files": ["./a.jsonl", "deep/a.jsonl"]}, "a.jsonl deep/a.jsonl"),
        ({"data_files": {"train": "a.jsonl", "test": ["b.jsonl"]}}, "a.jsonl b.jsonl"),
        ({"data_files": "a.jsonl", "data_dir": "deep"}, "deep/a.jsonl"),
        ({"data_files": {"train": "a.*", "x": "b.jsonl"}}, "a.jsonl b.jsonl deep/a.jsonl"),
    ],
)
def test_the_files_that_a_dataset_of_a_folder_is_of(
    tmp_path: Path, words: dict, counted: str
) -> None:
    names = {"a.jsonl", "b.jsonl", "deep/a.jsonl", "rule.py", "NOTES.md", ".hidden", "README.md"}
    (tmp_path / "deep").mkdir()
    for name in names:
        (tmp_path / name).write_text("---\nconfigs: none\n---\n")
    table = DatasetTable(".", base=tmp_path, **words)
    before = sources.identify_dataset(table, tmp_path / "runs")
    for name in names:
        (tmp_path / name).write_text("---\nconfigs: some\n---\n")
        changed = sources.identify_dataset(table, tmp_path / "runs")
        assert (changed != before) == (name in [*counted.split(), "README.md"]), name
        before = changed
    (tmp_path / "README.md").write_text("no front matter")
    before = sources.identify_dataset(table, tmp_path / "runs")
    (tmp_path / "README.md").write_text("edited")
    assert sources.identify_dataset(table, tmp_path / "runs") == before


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def cached_model(cache: Path) -> Path:
    """A commit of owner/model, as `from_pretrained` leaves it: no list of its files."""
    folder = cache / "models--owner--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "snapshots" / COMMIT / "config.json").write_text("{}")
    (folder / "snapshots" / COMMIT / "model.safetensors").write_bytes(b"weights")
    return folder / "snapshots" / COMMIT


def test_a_cached_commit_wins_without_asking_the_hub(cache: Path, tmp_path: Path) -> None:
    cached_model(cache)
    recipe = load_recipe(toy(tmp_path, text=HUB_MODEL))
    identity = {"repo": "owner/model", "revision": COMMIT}
    assert sources.identify_base(recipe, tmp_path) == identity
    assert sources.identify_model("owner/model", recipe, tmp_path) == identity
    pinned = HUB_MODEL.replace('"owner/model"', f'"owner/other"\nrevision = "{COMMIT}"')
    found = sources.identify_base(load_recipe(toy(tmp_path, text=pinned)), tmp_path)
    assert found == {"repo": "owner/other", "revision": COMMIT}


def test_what_is_nowhere_is_one_line(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        sources.identify_base(load_recipe(toy(tmp_path, text=HUB_MODEL)), tmp_path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(
        "the model owner/model is neither on this machine nor to be had from the hub (Offline"
    )
    assert text.endswith(
        "HF_HUB_OFFLINE is set: unset it, or `rlhf-recipes fetch` where there is a network, "
        "or name a local folder (./…) as the model)"
    )

    recipe = load_recipe(toy(tmp_path, text=RECIPE.replace("./pairs.jsonl", "owner/pairs")))
    with pytest.raises(DataError, match="the dataset owner/pairs is neither on this machine"):
        sources.identify_dataset(recipe.dataset, tmp_path)


def test_a_hub_model_is_loaded_from_its_snapshot(cache: Path, tmp_path: Path) -> None:
    recipe = load_recipe(toy(tmp_path, text=HUB_MODEL))
    snapshot = cached_model(cache)
    identity = {"repo": "owner/model", "revision": COMMIT}
    assert sources.base_folder(recipe, identity) == snapshot
    assert sources.model_folder("owner/model", recipe) == snapshot
    assert sources.model_folder("./model", recipe) == tmp_path / "model"

    shards = dict.fromkeys("ab", "model.safetensors") | {"c": "model-2.safetensors"}
    index = snapshot / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(ModelError):  # one shard of two, and the network is off
        sources.base_folder(recipe, identity)
    index.unlink()
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        sources.base_folder(recipe, identity)


def test_of_a_dataset_with_a_folder_that_folder_is_wanted() -> None:
    wanted = {folder: sources.dataset_repo(DatasetTable("a/b", data_dir=folder)).wanted
              for folder in (None, "x", "./x/", "x/y", ".")}  # fmt: skip
    assert wanted[None] == ("*",)
    assert wanted["x"] == wanted["./x/"] == ("x/*", "README.md")
    assert (wanted["x/y"], wanted["."]) == (("x/y/*", "README.md"), ("*", "README.md"))
