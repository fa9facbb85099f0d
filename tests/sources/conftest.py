"""A fake hub for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_recipes.sources import hub
from tests.helpers.counting import toy
from tests.helpers.fake_hub import FakeHub


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with the toy's model and data, for this process alone."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(hub, "TIMEOUT", 0.5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own-cache"))
    with FakeHub() as fake:
        url = fake.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", fake.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        toy(tmp_path)
        fake.publish("model", "owner/model", tmp_path / "model")
        (tmp_path / "data").mkdir()
        (tmp_path / "pairs.jsonl").rename(tmp_path / "data" / "pairs.jsonl")
        fake.publish("dataset", "owner/pairs", tmp_path / "data")
        yield fake
        close_session()
