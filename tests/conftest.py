"""A tiny model with a chat template, and rows to train it on. The network is off."""

from __future__ import annotations

import gc
import importlib
import json
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers.canary import Canary
from tests.helpers.tiny import RECIPE, WORDS, save_llama, word_tokenizer

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=tempfile.mkdtemp(prefix="rlhf-recipes-tests-"),
    HF_HUB_DISABLE_TELEMETRY="1",
    TRL_EXPERIMENTAL_SILENCE="1",
    RLHF_RECIPES_ALLOW_CODE="1",  # of the judges that tests write
    RLHF_RECIPES_RUNS="",
    COLUMNS="200",
    OMP_NUM_THREADS="1",  # these models are too small to share out; it also fixes every sum's order
)
# A job in a script's background ignores Ctrl-C, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
gc.disable()  # while a thousand modules are imported, which all stay

# What a run imports when it comes to it.
LATE = ["matplotlib.backends.backend_svg", "rlhf_recipes.report.run_page"]
LATE += [f"rlhf_recipes.pipeline.{name}" for name in ("export", "fit", "rehearsal")]
LATE += [f"rlhf_recipes.stages.{name}" for name in ("evaluate", "ppo.stage", "reward", "sft")]


def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection of garbage need look at it again.

    A run collects a dozen times. Later no model may be frozen, or none would go.
    """
    if "torch" in sys.modules:
        for name in LATE:
            importlib.import_module(name)
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder: a random two-layer Llama, float32, and a word tokenizer with a ChatML template."""
    words = {"vocab_size": 32, "max_position_embeddings": 128}
    words |= {"tie_word_embeddings": True, "eos_token_id": 2}
    return save_llama(tmp_path_factory.mktemp("tiny-model"), word_tokenizer(), **words)


@pytest.fixture(scope="session")
def tiny_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 pairs: to two words, people prefer three colours to three animals, in any order."""
    import random

    draw = random.Random(0)
    rows = []
    for first in WORDS:
        for second in WORDS[:6]:
            row = {"prompt": f"{first} {second}"}
            row["chosen"] = " ".join(draw.sample(WORDS[:8], draw.choice([2, 3])))
            row["rejected"] = " ".join(draw.sample(WORDS[8:], draw.choice([2, 3])))
            rows.append(row)
    file = tmp_path_factory.mktemp("tiny-data") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def tiny_recipe(tiny_model: Path, tiny_pairs: Path, tmp_path: Path) -> Path:
    """A recipe file for the whole chain on the tiny model: seconds."""
    file = tmp_path / "tiny.toml"
    file.write_text(RECIPE.format(model=tiny_model, data=tiny_pairs))
    return file


@pytest.fixture(scope="session")
def trained(
    tiny_model: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """SFT and the reward model of the tiny recipe, trained once, only to be read.

    `recipe` is its file; `outputs` and `metrics` are by stage.
    """
    from rlhf_recipes.recipe.load import load_recipe
    from tests.helpers.chains import Chain

    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.toml").write_text(RECIPE.format(model=tiny_model, data=tiny_pairs))
    chain = Chain(load_recipe(folder / "tiny.toml"), folder)
    metrics = {"sft": chain.run("sft", {}).metrics}
    metrics["reward"] = chain.run("reward", {"policy": "sft"}).metrics
    chain.session.release()
    return SimpleNamespace(recipe=chain.recipe.path, outputs=chain.outputs, metrics=metrics)


@pytest.fixture
def stages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run here writes no report and merges no model, which take as long as two stages."""
    from rlhf_recipes.pipeline import runner

    monkeypatch.setattr(runner._Run, "_report", lambda _: [])
    monkeypatch.setattr(runner._Run, "_write_model", lambda _: None)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report's plots are made, but not rendered, which takes four fifths of its time."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda _, out, **__: out.write("<svg></svg>"))


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Canary]:
    """Must stay away all the test long; that its payloads would work is tried first."""
    canary = Canary(tmp_path / "canary")
    for payload in (lambda: pickle.loads(canary.pickled), lambda: exec(canary.code)):
        payload()
        canary.file.rmdir()
    yield canary
    assert not canary.touched


def _unit(config: pytest.Config) -> bool:
    return config.option.markexpr == "unit"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """A run of the unit tests does not import the modules whose tests train."""
    if _unit(config) and collection_path.suffix == ".py":
        if "pytestmark = pytest.mark.train" in collection_path.read_text(encoding="utf-8"):
            return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What neither trains nor takes minutes is a unit test."""
    for item in items:
        if not any(item.get_closest_marker(name) for name in ("train", "torture")):
            item.add_marker("unit")


@pytest.fixture(autouse=True)
def no_torch(request: pytest.FixtureRequest) -> Iterator[None]:
    """A unit test loads no torch; looked at where unit tests run alone."""
    yield
    if _unit(request.config) and "torch" in sys.modules:
        pytest.exit(f"{request.node.nodeid} loaded torch: mark it with pytest.mark.train", 1)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The cases that `make torture` tried, and those that passed: what tests record as "cases"."""
    if terminalreporter.config.option.markexpr != "torture":
        return
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in report.user_properties:
                if name == "cases" and report.when == "call":
                    terminalreporter.write_line(f"{value:>14}  {report.nodeid}")
