"""A folder on its way to the hub: what arrives there, and every way in which it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_recipes.errors import ModelError, UsageError
from rlhf_recipes.sources import push
from tests.helpers.fake_hub import TOKEN, FakeHub
from tests.helpers.hubs import trouble

# huggingface_hub 2.4 hands a file to httpx by the old word `data`, where it uploads without Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

CARD = "---\nlicense: apache-2.0\n---\n# A model\n"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to push; nothing but plain HTTP is spoken to the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "README.md").write_text(CARD)
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    return folder


def test_a_new_model_is_private_and_holds_the_folder(fake: FakeHub, model: Path) -> None:
    push.open_repo("me/new")
    assert fake.content("model", "me/new") == {".gitattributes": b""}
    push.open_repo("me/new")  # a push that failed may be tried again
    assert push.push("me/new", model) == f"{fake.url}/me/new"
    assert fake.private == {"me/new"}
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    assert fake.content("model", "me/new") == {".gitattributes": b"", **files}
    with pytest.raises(UsageError, match="me/new on the hub has files already, such as README.md"):
        push.open_repo("me/new")


def test_an_empty_public_repository_is_refused(fake: FakeHub, model: Path) -> None:
    push.open_repo("me/new")
    fake.private.clear()
    with pytest.raises(UsageError, match="me/new is public on the hub, .*make it private there"):
        push.open_repo("me/new")


@pytest.mark.parametrize("name", ["mine", "a/b/c", "./mine", "me/", "me/a b"])
def test_a_name_is_a_user_and_a_name(fake: FakeHub, model: Path, name: str) -> None:
    with pytest.raises(UsageError, match="--push takes user/name, not"):
        push.open_repo(name)
    assert fake.asked == []


def test_nothing_is_asked_without_a_token_or_a_network(
    fake: FakeHub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "nowhere")
    with pytest.raises(UsageError, match=r"there is no token to push with \(set HF_TOKEN, or run"):
        push.open_repo("me/new")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE is set, so nothing can be pushed"):
        push.open_repo("me/new")
    assert fake.asked == []


@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        ("unauthorized", "set HF_TOKEN to a token that is valid"),
        ("forbidden", "set HF_TOKEN to a token that may write there"),
        ("absent", "check the name of the user"),
        ("conflict", "another change came first, or the name is taken"),
        ("busy", "wait some minutes"),
        ("refused", "check the network"),
    ],
)
@pytest.mark.parametrize("at", ["/api/repos/create", "PUT /lfs/", "/commit/"])
def test_what_the_hub_refuses_is_one_line(
    fake: FakeHub, model: Path, kind: str, advice: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    opens = at == "/api/repos/create"
    if not opens:
        push.open_repo("me/new")
    trouble(fake, kind, at)
    with pytest.raises(ModelError) as error:
        push.open_repo("me/new") if opens else push.push("me/new", model)
    said = str(error.value)
    assert said.startswith("me/new was not pushed (") and advice in said
    assert "\n" not in said and TOKEN not in said
    assert (f"{model} is whole: `hf upload me/new {model}`" in said) != opens
