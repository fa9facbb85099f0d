"""Each trouble of the hub is one line that says what to do; what is cached works without it."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from rlhf_recipes.errors import DataError, ModelError
from rlhf_recipes.sources import fetch
from rlhf_recipes.sources import resolve as sources
from tests.helpers.fake_hub import FakeHub
from tests.helpers.hubs import HUB, fetched, recipe_of, trouble, weights

pytestmark = pytest.mark.train

LOCAL = r", or name a local folder \(\./…\) as the (model|dataset)\)$"
NETWORK = "check the network: the same command goes on where it broke off"
ADVICE = {
    "missing": "check the name; if it is private, set HF_TOKEN to a token that may read it",
    "gated": r"ask for access at https://huggingface\.co/(datasets/)?owner/\w+, and set HF_TOKEN",
    "moved": "that revision is not there, or not any more: name another as `revision`",
    "absent": "check the name and the revision",
    "unauthorized": "check the name; if it is private, set HF_TOKEN|set HF_TOKEN to a token that",
    "forbidden": "set HF_TOKEN to a token that may read it",
    "busy": "it has had too many requests: wait some minutes, or set HF_TOKEN",
    "error": "it has trouble of its own: try again later",
    "hang": NETWORK,
    "refused": NETWORK,
}
FILES = {"model.safetensors": ModelError, "pairs.jsonl": DataError}


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    wait = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: wait(min(seconds, 0.01)))


def bring(recipe, folder: Path) -> None:
    fetch.bring(recipe, sources.identify_base(recipe, folder))


def line(error: pytest.ExceptionInfo, advice: str) -> None:
    assert "\n" not in str(error.value)
    assert re.search(rf"from the hub \(.*\) \(({advice}).*{LOCAL}", str(error.value)), error.value


@pytest.mark.parametrize("kind", ADVICE)
def test_when_it_is_asked(fake: FakeHub, tmp_path: Path, kind: str) -> None:
    recipe = recipe_of(tmp_path)
    trouble(fake, kind, "owner/")
    for error, call in ((ModelError, bring), (ModelError, lambda *_: fetched(recipe))):
        with pytest.raises(error) as caught:
            call(recipe, tmp_path)
        line(caught, ADVICE[kind])
    with pytest.raises(DataError) as caught:
        sources.identify_dataset(recipe.dataset, tmp_path)
    line(caught, ADVICE[kind])


@pytest.mark.parametrize("what", FILES)
@pytest.mark.parametrize("kind", ["gated", "forbidden", "busy", "hang", "stall", "cut", "short"])
def test_when_a_file_is_brought(fake: FakeHub, tmp_path: Path, kind: str, what: str) -> None:
    """A download that stalls half-way ends as well; and all goes on once the trouble is over."""
    (tmp_path / "data" / "pairs.jsonl").write_text('{"prompt": "a"}\n' * 9)
    fake.publish("dataset", "owner/pairs", tmp_path / "data")
    recipe, since = recipe_of(tmp_path), time.monotonic()
    fake.troubles[f"resolve/{fake.refs['datasets/owner/pairs']['main']}/{what}"] = kind
    fake.troubles[f"resolve/{fake.refs['models/owner/model']['main']}/{what}"] = kind
    with pytest.raises(FILES[what]) as caught:
        bring(recipe, tmp_path)
    advice = ADVICE.get(kind, NETWORK)
    line(caught, f"{advice}|{NETWORK}|check the name")
    assert time.monotonic() - since < 60
    fake.troubles.clear()
    bring(recipe, tmp_path)
    assert weights(recipe, tmp_path) == b"weights"


def test_when_the_files_are_listed(fake: FakeHub, tmp_path: Path) -> None:
    recipe, since = recipe_of(tmp_path), time.monotonic()
    fake.troubles["/tree/"] = "hang"
    with pytest.raises(ModelError) as caught:
        bring(recipe, tmp_path)
    line(caught, NETWORK)
    assert time.monotonic() - since < 60


def test_offline_what_is_cached_works_and_the_rest_is_a_line(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    recipe = recipe_of(tmp_path)
    fetched(recipe)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fake.asked.clear()
    bring(recipe, tmp_path)
    assert weights(recipe, tmp_path) == b"weights"
    other = recipe_of(tmp_path, HUB.replace("owner/model", "owner/other"))
    with pytest.raises(ModelError) as caught:
        bring(other, tmp_path)
    line(caught, "HF_HUB_OFFLINE is set: unset it, or `rlhf-recipes fetch` where there is a")
    assert fake.asked == []


def test_a_pinned_commit_that_is_gone(fake: FakeHub, tmp_path: Path) -> None:
    pinned = HUB.replace('"owner/model"', f'"owner/model"\nrevision = "{"0" * 40}"')
    with pytest.raises(ModelError) as caught:
        bring(recipe_of(tmp_path, pinned), tmp_path)
    line(caught, ADVICE["moved"])


def test_a_branch_that_moves_between_plan_and_run(fake: FakeHub, tmp_path: Path) -> None:
    """What was planned is what is brought, though it is main no more."""
    recipe = recipe_of(tmp_path)
    identity = sources.identify_base(recipe, tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"moved on")
    fake.publish("model", "owner/model", tmp_path / "model")
    fetch.bring(recipe, identity)
    assert weights(recipe, tmp_path) == b"weights"


# ---- a hub that is hostile ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../../../evil.json", "a/../../../../evil.json", "/evil.json"])
def test_a_file_of_a_name_that_climbs_is_not_written(
    fake: FakeHub, tmp_path: Path, name: str, canary
) -> None:
    recipe = recipe_of(tmp_path)
    for files in fake.files.values():
        files[name] = canary.code.encode()
    before = {path for path in tmp_path.rglob("evil*")}
    with pytest.raises((ModelError, DataError)) as caught:
        bring(recipe, tmp_path)
    assert "\n" not in str(caught.value)
    assert {path for path in tmp_path.rglob("evil*")} == before
    assert not Path("/evil.json").exists()


def test_an_index_that_is_none_is_a_line(fake: FakeHub, tmp_path: Path) -> None:
    for index in ("[]", '{"weight_map": []}', "{", json.dumps({"weight_map": {"a": "../b.bin"}})):
        (tmp_path / "model" / "model.safetensors.index.json").write_text(index)
        fake.publish("model", "owner/model", tmp_path / "model")
        with pytest.raises(ModelError) as caught:
            fetched(recipe_of(tmp_path))
        assert "\n" not in str(caught.value)
