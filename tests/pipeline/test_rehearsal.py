"""The rehearsal: what would break breaks first, on the longest rows, and it changes nothing."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_recipes.errors import Interrupted, MachineError, ModelError, PeopleNeeded
from rlhf_recipes.feedback.items import ANSWERS, read_items
from rlhf_recipes.feedback.store import Store
from rlhf_recipes.pipeline import fit, rehearsal, runner
from rlhf_recipes.pipeline.plan import plan_run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages import contract, reward
from rlhf_recipes.stages.ppo import trainer as ppo
from rlhf_recipes.stages.session import Session
from rlhf_recipes.store.files import read_json
from tests.helpers.people import say

pytestmark = pytest.mark.train

WHOLE = (
    'stages=["sft", "reward", "dpo", "ppo"]',
    *(f"{stage}.max_steps=2" for stage in ("sft", "reward", "dpo")),
    "ppo.total_episodes=16",
    "lora.lora_dropout=0.2",
    'ppo.keep="best"',
    'evaluation.judge="independent"',
    "evaluation.best_of=4",
)
ALL = ["sft", "reward", "dpo", "ppo", "judge", "evaluation", "best_of"]
HEADING = "Rehearsal · a step of each stage, on its longest rows"


@pytest.fixture(autouse=True)
def quick(stages_alone: None) -> None: ...


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the run is short."""
    monkeypatch.setattr(rehearsal, "SHORT", 0.0)
    monkeypatch.setattr(rehearsal, "SHARE", 1e9)
    monkeypatch.setattr(fit, "refuse", lambda *_: None)


def go(file: Path, *changes: str, **words: Any) -> runner.RunOutcome:
    return runner.run(load_recipe(file, set=changes), runs=file.parent / "runs", **words)


def left(runs: Path) -> list[str]:
    """What lies in the runs folder that is neither a run nor its stages, nor a lock."""
    found = [path.name for path in (*runs.iterdir(), *(runs / ".stages").glob("*"))]
    return [name for name in found if name.startswith(".") and not name.endswith("lock")]


def test_it_changes_nothing_in_what_the_stages_make(
    tiny_recipe: Path, always: None, capfd: pytest.CaptureFixture[str]
) -> None:
    made = []
    for rehearse in (True, False):
        runs = tiny_recipe.parent / f"runs-{rehearse}"
        recipe = load_recipe(tiny_recipe, set=WHOLE)
        outcome = runner.run(recipe, runs=runs, name="tiny", rehearse=rehearse)
        files = [path for path in (runs / ".stages").rglob("output/**/*") if path.is_file()]
        found = {path.relative_to(runs): path.read_bytes() for path in files}
        digests = {path: hashlib.sha256(content).hexdigest() for path, content in found.items()}
        made.append((digests, outcome.results))
        assert left(runs) == [".stages"]
    assert len(made[0][0]) > 20
    assert made[0] == made[1]
    shown = capfd.readouterr().err.splitlines()
    assert shown.count(HEADING) == 1
    place = shown.index(HEADING)
    assert place == 4  # after three lines of the doctor
    told = shown[place + 1 : place + 9]
    assert [line.split()[0] for line in told[:-1]] == ALL
    assert all("about" in line for line in told)
    assert "s a step" in told[0]


def test_what_learns_from_judgements_is_rehearsed_once_they_are_there(
    tiny_recipe: Path, always: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """What comes before them is rehearsed at the start, and not again."""

    def rehearsed() -> list[list[str]]:
        first, *others = capfd.readouterr().err.split(HEADING)
        told = [[line.split()[0] for line in part.splitlines()[1:]] for part in others]
        return [names[: names.index("in")] for names in told]

    words = ['stages=["sft", "sample", "label", "reward"]', "sft.max_steps=2", "sample.prompts=40"]
    words += ["reward.max_steps=2", 'reward.pairs=["label"]', "reward.minimum_accuracy=0"]
    with pytest.raises(PeopleNeeded):
        go(tiny_recipe, *words)
    assert rehearsed() == [["sft", "sample"]]
    runs = tiny_recipe.parent / "runs"
    [file] = (runs / ".stages").glob(f"sample-*/output/{ANSWERS}")
    for one in read_items(file):
        say(Store(runs), one, "ada", "first")
    go(tiny_recipe, *words)
    assert rehearsed() == [["reward", "evaluation"]]

    # A rule judges within the run: what comes after it is rehearsed there.
    rule = ["label.by=rule", 'label.rule={rule="words", at_most=3}', "sft.max_steps=1"]
    go(tiny_recipe, *words[:1], *words[2:], *rule)
    assert rehearsed() == [["sft", "sample"], ["reward", "evaluation"]]


def test_what_would_break_at_the_end_breaks_before_anything_is_trained(
    tiny_recipe: Path, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error's kind and exit code; the stage's name; nothing left of it, and nothing made."""

    def lack(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    need = Counter(weights=10**6, activations=2 * 10**9)
    monkeypatch.setattr(fit, "refuse", lambda ahead, *_: ahead.needs.update(ppo=need))
    monkeypatch.setattr(ppo.PPOTrainer, "optimize", lack)
    with pytest.raises(MachineError) as caught:
        go(tiny_recipe)
    told = str(caught.value)
    known = "the rehearsal of stage ppo: out of memory, most of it for activations (2 GB by rule) ("
    assert told.startswith(f"{known}the same command with --set")
    assert "--set ppo.per_device_train_batch_size=4" in told
    runs = tiny_recipe.parent / "runs"
    manifest = read_json(runs / "tiny" / "manifest.json")
    assert manifest["error"]["stage"] == "ppo"
    assert {stage["outcome"] for stage in manifest["stages"]} == {"not run"}
    assert left(runs) == [".stages"]
    assert not list((runs / ".stages").glob("*/work/*"))


def test_a_sequence_longer_than_the_model_s_positions_is_refused(
    tiny_recipe: Path, tiny_model: Path
) -> None:
    """A short run too: PPO's answers, where all rows fit."""
    there = json.loads((tiny_model / "config.json").read_text())["max_position_embeddings"]
    with pytest.raises(ModelError, match=f"stage ppo: its longest .* the model {there} positions"):
        go(tiny_recipe, f"ppo.response_length={there}")


def test_what_is_drawn_afterwards_is_as_without_it_also_where_it_is_stopped(
    tiny_recipe: Path, always: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        torch.rand(3), random.random(), np.random.rand()
        raise KeyboardInterrupt

    monkeypatch.setattr(reward, "measure", stop)

    def drawn() -> list[Any]:
        return [torch.rand(3).tolist(), random.random(), np.random.rand()]

    def seed() -> None:
        torch.manual_seed(3), random.seed(3), np.random.seed(3)

    seed()
    expected = drawn()
    seed()
    with pytest.raises(Interrupted):
        go(tiny_recipe, until="reward")
    assert drawn() == expected
    assert left(tiny_recipe.parent / "runs") == [".stages"]


def test_it_is_left_out_where_the_run_is_short_or_on_request_or_goes_on(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[list[str]] = []

    def tell(ahead: rehearsal.Ahead) -> Any:
        tried.append([stage.name for stage in ahead.stages])
        return iter(())

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rehearsal, "rehearse", tell)
    monkeypatch.setattr(contract, "module_of", lambda kind: SimpleNamespace(run=stop))

    def begin(*changes: str, **words: Any) -> list[list[str]]:
        tried.clear()
        with pytest.raises(Interrupted):
            go(tiny_recipe, *changes, **words)
        return list(tried)

    assert begin() == []  # short: by the rule
    monkeypatch.setattr(rehearsal, "SHORT", 0.0)
    monkeypatch.setattr(fit, "refuse", lambda *_: None)
    assert begin() == []  # a rehearsal would do half of its steps
    long = ["sft.max_steps=900", "reward.max_steps=900", "ppo.total_episodes=9000"]
    [names] = begin(*long, name="tiny")
    assert names == ["sft", "reward", "ppo", "evaluation"]
    assert begin(*long, name="tiny", until="reward") == [["sft", "reward"]]
    assert begin(*long, name="tiny", rehearse=False) == []
    plan = plan_run(load_recipe(tiny_recipe, set=long), tiny_recipe.parent / "runs", name="tiny")
    (plan.stages[0].folder / "work" / "checkpoint-000001").mkdir(parents=True)
    assert begin(*long, name="tiny") == []


def test_the_same_layout_is_rehearsed_once(
    tiny_recipe: Path,
    always: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Rates and names change no memory; rows, sizes, the model, libraries and the machine do."""
    measured: list[str] = []

    def step(ahead: Any, stage: Any, *_: Any) -> rehearsal.Rehearsed:
        measured.append(stage.name)
        return rehearsal.Rehearsed(stage.name, {"process_bytes": 10**9}, 1.5, 4, 6.0)

    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rehearsal, "_stage", step)
    monkeypatch.setattr(contract, "module_of", lambda kind: SimpleNamespace(run=stop))

    def again(*changes: str) -> int:
        measured.clear()
        with pytest.raises(Interrupted):
            go(tiny_recipe, *changes)
        return len(measured) // 4

    assert again() == 1
    capfd.readouterr()
    assert again() == 0
    shown = capfd.readouterr().err
    assert "Rehearsal · not repeated: the same layout was rehearsed on this machine" in shown
    assert "sft         1 GB, 1.5 s a step, about 6 s" in shown and "in all about 24 s" in shown
    assert again("ppo.kl_coef=0.3", "sft.learning_rate=1e-3") == 0
    assert again("ppo.kl_coef=0.0") == 1  # 0 may leave a computation out
    assert again("ppo.per_device_train_batch_size=4", "ppo.gradient_accumulation_steps=4") == 1
    assert again("sft.max_steps=5") == 1
    assert again("dataset.max_answer_tokens=7") == 1
    assert again("lora.r=5") == 1
    assert again() == 0
    for file in (tiny_recipe.parent / "runs" / ".stages" / "rehearsed").iterdir():
        file.write_text(file.read_text()[:-9])
    assert again() == 1
    monkeypatch.setattr(rehearsal.provenance, "versions", lambda: {"torch": "9"})
    assert again() == 1 and again() == 0
    monkeypatch.setattr(rehearsal.models, "machine", lambda: {"card": "another"})
    assert again() == 1


def test_each_stage_is_cut_to_two_steps_of_its_longest_rows(tiny_recipe: Path) -> None:
    long = ["sft.max_steps=-1", "sft.gradient_accumulation_steps=4", "ppo.total_episodes=9000"]
    recipe = load_recipe(tiny_recipe, set=long)
    plan = plan_run(recipe, tiny_recipe.parent / "runs")
    session = Session(recipe, plan.model)
    data = session.data(recipe.dataset)
    sft, rewards, policy, evaluation = plan.stages

    trial = rehearsal.trial_of(recipe, sft)
    less = trial.recipe
    options = less.table("sft").given
    assert (options["max_steps"], options["gradient_accumulation_steps"]) == (2, 2)
    rows = rehearsal.longest(data, sft, trial).train
    learned = data.learned("answers")
    most = max(len(e.prompt_ids) + len(e.chosen_ids) for e in learned)
    assert len(rows) == 2 * 2 * 8
    assert {len(e.prompt_ids) + len(e.chosen_ids) for e in rows[1::2]} == {most}
    assert len(set(map(id, rows))) == 16
    assert rehearsal.work_of(recipe, sft, data).steps == -(-len(learned) // 32) * 3

    kept = rehearsal.longest(data, rewards, rehearsal.trial_of(recipe, rewards))
    assert set(map(id, kept.train)) <= set(map(id, data.reward_train))
    assert kept.validation and kept.test

    less = rehearsal.trial_of(recipe, policy).recipe
    options = less.table("ppo").options
    assert options["total_episodes"] == 8 * 2  # an update, whole: it is sampled at once
    assert options["num_ppo_epochs"] == recipe.table("ppo").options["num_ppo_epochs"]
    assert less.table("ppo").extras["minimum_accuracy"] == 0
    assert rehearsal.work_of(recipe, policy, data).steps == 9000 // 16 + 1
    assert rehearsal.trial_of(recipe, evaluation).recipe.evaluation.prompts == 12


SIZES = ["per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches"]
SIZES += ["num_ppo_epochs", "local_rollout_forward_batch_size"]


@pytest.mark.parametrize(
    ("sizes", "some", "fewer", "updates"),
    [
        ((2, 128, 4, 1, 16), 32, 2, 1),  # no more than 64, which are sampled at a time
        ((8, 8, 2, 2, 64), 8, 2, 1),  # all that is sampled
        ((32, 8, 2, 2, 16), 4, 2, 1),  # two backwards a step: the second meets gradients
        ((8, 1, 2, 1, 64), 1, 2, 1),  # mini-batches smaller than a micro-batch stay so
        ((4, 1, 1, 1, 64), 1, 1, 2),  # one step an update: two updates
        ((4, 1, 1, 4, 64), 1, 1, 1),
        ((1, 64, 1, 1, 8), 64, 1, 2),
    ],
)
def test_an_update_of_ppo_is_cut_to_what_takes_its_memory(
    sizes: tuple[int, ...], some: int, fewer: int, updates: int
) -> None:
    options = dict(zip(SIZES, sizes, strict=True), whiten_rewards=False)
    cut = ppo.one_update(SimpleNamespace(options=options))
    assert (cut["gradient_accumulation_steps"], cut["num_mini_batches"]) == (some, fewer)
    assert cut["total_episodes"] == sizes[0] * some * updates
