"""A stage as a group of processes: as one process computes it, and nothing is lost in it.

Processes are forked from this one, on gloo; one test starts a real torchrun.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf_recipes import group
from rlhf_recipes.errors import BusyError, StageError, UsageError
from rlhf_recipes.pipeline import launch, runner
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages.order import MICROS, ROWS, share_out
from rlhf_recipes.store import layout, locks
from tests.helpers.groups import forking
from tests.helpers.killing import left
from tests.helpers.tiny import RECIPE

pytestmark = pytest.mark.train

STOCK, LOOPS = ("sft", "reward", "dpo", "kto"), ("ppo", "rloo", "grpo")
FEW = ("sft", "reward", "kto", "ppo", "grpo")  # of every family; the rest is for `make torture`
CLOCKS = ("seconds", "eps")


def told(kinds: tuple[str, ...]) -> list[str]:
    """`--set` words: 6 steps of 16 rows, of 68 rows, reach into the second epoch."""
    sets: dict[str, Any] = {"stages": list(kinds), "ppo.total_episodes": 48, "ppo.keep": "best"}
    sets |= {"evaluation.judge": "independent" if len(kinds) > len(FEW) else False}
    sets |= {"evaluation.best_of": 2} if len(kinds) > len(FEW) else {}
    for kind in STOCK:
        sets |= {f"{kind}.max_steps": 6, f"{kind}.per_device_train_batch_size": 16}
        sets |= {f"{kind}.logging_steps": 1, f"{kind}.save_steps": 2, f"{kind}.learning_rate": 1e-2}
    for kind in ("rloo", "grpo"):
        sets |= {f"{kind}.max_completion_length": 6, f"{kind}.num_iterations": 2}
        sets |= {f"{kind}.max_steps": 6, f"{kind}.policy": "sft"}
    sets = {
        key: v for key, v in sets.items() if "." not in key or key.split(".")[0] in known(kinds)
    }
    return [f"{key}={json.dumps(value)}" for key, value in sets.items() if value is not False]


def known(kinds: tuple[str, ...]) -> set[str]:
    return {*kinds, "evaluation"}


Go = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def no_reports() -> Iterator[None]:
    """Other tests look at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner._Run, "_report", lambda self: [])
        patch.setattr(runner._Run, "_write_model", lambda self: None)
        yield


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("group") / "tiny.toml"
    file.write_text(RECIPE.format(model=tiny_model, data=tiny_pairs))
    return file


@pytest.fixture(scope="module")
def pair(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of the few kinds, computed by two processes."""
    runs = tmp_path_factory.mktemp("two")
    with forking() as two:
        runner.run(load_recipe(recipe, set=told(FEW)), runs=runs, name="x", launch=two)
    return runs


def stages_of(runs: Path) -> dict[str, Path]:
    manifest = json.loads((runs / "x" / "manifest.json").read_text())
    return {stage["name"]: runs / stage["folder"] for stage in manifest["stages"]}


def compared(one: Path, two: Path) -> dict[str, dict[str, float]]:
    """By stage: how far apart the numbers of its first step, of all steps, and its weights are."""
    found: dict[str, dict[str, float]] = {}
    for name, folder in stages_of(one).items():
        other, mine = stages_of(two)[name], found.setdefault(name, {})
        both = [lines(folder), lines(other)]
        assert len(both[0]) == len(both[1])
        steps = [apart(a, b) for a, b in zip(*both, strict=True)]
        if steps:
            mine |= {"first": steps[0], "steps": max(steps)}
        for file in sorted((folder / "output").rglob("*.safetensors")):
            pairs = zip(
                load_file(file).values(),
                load_file(other / file.relative_to(folder)).values(),
                strict=True,
            )
            far = max((a - b).abs().max().item() for a, b in pairs)
            mine["weights"] = max(mine.get("weights", 0.0), far)
        records = [layout.read_record(one)["metrics"] for one in (folder, other)]
        mine["results"] = apart(*records)
        answers = [one / "output" / "answers.jsonl" for one in (folder, other)]
        if answers[0].exists():
            texts = [
                [json.loads(line)["answers"] for line in f.read_text().splitlines()]
                for f in answers
            ]
            mine["answers apart"] = sum(a != b for a, b in zip(*texts, strict=True))
    return found


def lines(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def apart(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a.keys() == b.keys()
    numbers = [key for key in a if isinstance(a[key], float) and key not in CLOCKS]
    return max((abs(a[key] - b[key]) / max(1.0, abs(a[key])) for key in numbers), default=0.0)


def equal(found: dict[str, dict[str, float]]) -> None:
    """GRPO divides by a group's deviation: where a group's scores are alike, rounding is large."""
    for name, far in found.items():
        assert far.get("first", 0.0) <= 1e-5, (name, far)
        assert far.get("steps", 0.0) <= (1e-2 if name == "grpo" else 1e-5), (name, far)
        assert far.get("weights", 0.0) <= 1e-4, (name, far)
        assert far["results"] <= 1e-4, (name, far)
        assert not far.get("answers apart"), (name, far)


def test_two_processes_compute_what_one_does(
    recipe: Path, pair: Path, tmp_path: Path, record_property: Callable
) -> None:
    """The same rows, prompts and draws in every step; the numbers but for rounding."""
    runner.run(load_recipe(recipe, set=told(FEW)), runs=tmp_path, name="x")
    found = compared(tmp_path, pair)
    record_property("apart", json.dumps(found))
    equal(found)
    assert [
        layout.read_record(one)["layout"].get("processes") for one in stages_of(pair).values()
    ] == [2] * len(stages_of(pair))
    # What two computed is cached for one.
    again = runner.run(load_recipe(recipe, set=told(FEW)), runs=pair, name="x")
    assert {done.did for done in again.stages} == {"cached"}


@pytest.mark.torture
def test_so_does_every_kind(recipe: Path, tmp_path: Path, record_property: Callable) -> None:
    words = told((*STOCK, *LOOPS))
    runner.run(load_recipe(recipe, set=words), runs=tmp_path / "one", name="x")
    with forking() as two:
        runner.run(load_recipe(recipe, set=words), runs=tmp_path / "two", name="x", launch=two)
    found = compared(tmp_path / "one", tmp_path / "two")
    record_property("cases", f"{len(found)} of {len(found)}")
    equal(found)


def at_step(rank: int, step: int, act: Callable[[], None]) -> Callable[[int], None]:
    """A fault: `act` in one process, as its stage tells of so many steps."""

    def fault(mine: int) -> None:
        from rlhf_recipes.pipeline.worker import Silent
        from rlhf_recipes.screen import StageProgress

        kind = Silent if rank else StageProgress
        update = kind.update

        def updating(self: Any, done: int, *rest: Any, **words: Any) -> None:
            update(self, done, *rest, **words)
            if done == step:
                act()

        if mine == rank:
            kind.update = updating

    return fault


def test_a_process_that_is_killed_is_named_and_nothing_is_lost(
    recipe: Path, pair: Path, tmp_path: Path
) -> None:
    asked = load_recipe(recipe, set=told(FEW))
    died = at_step(1, 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with forking(fault=died) as two, pytest.raises(StageError) as caught:
        runner.run(asked, runs=tmp_path, name="x", launch=two, until="sft")
    assert "stage sft: process 1 of 2 died without a word" in str(caught.value)
    [folder] = (tmp_path / ".stages").glob("sft-*")
    assert not locks.held(folder)  # nor is a process left, for each has the lock
    assert (
        sorted(path.name for path in (folder / "work").glob("checkpoint-*"))[-1]
        == "checkpoint-000004"
    )
    with forking() as two:
        runner.run(asked, runs=tmp_path, name="x", launch=two, until="sft")
    assert left(tmp_path, "sft") == left(pair, "sft")


def test_a_checkpoint_of_two_processes_goes_on_in_one(
    recipe: Path, pair: Path, tmp_path: Path
) -> None:
    asked = load_recipe(recipe, set=told(FEW))
    died = at_step(0, 5, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with forking(fault=died) as two, pytest.raises(StageError, match="process 0 of 2 died"):
        runner.run(asked, runs=tmp_path, name="x", launch=two, until="sft")
    runner.run(asked, runs=tmp_path, name="x", until="sft")
    assert "goes on from its checkpoint after step 4" in (tmp_path / "x" / "log.txt").read_text()
    both = [
        stages_of(runs)["sft"] / "output/adapter_model.safetensors" for runs in (tmp_path, pair)
    ]
    one, two_ = map(load_file, both)
    assert max((one[key] - two_[key]).abs().max().item() for key in one) < 1e-4


def test_gradients_that_are_not_added_are_found_at_the_next_checkpoint(
    recipe: Path, tmp_path: Path
) -> None:
    """As where a trainer leaves out the wrapper that adds them: each process learns alone."""

    def apart(rank: int) -> None:
        group.add_gradients = lambda weights, part=1.0: None

    asked = load_recipe(recipe, set=told(FEW))
    with forking(fault=apart) as two, pytest.raises(StageError) as caught:
        runner.run(asked, runs=tmp_path, name="x", launch=two, until="sft")
    assert "process 1 has other weights than process 0 after step 2" in str(caught.value)


def test_a_batch_that_cannot_be_shared_out_is_refused_before_a_model_is_read(
    recipe: Path, tmp_path: Path
) -> None:
    words = [*told(FEW), "sft.per_device_train_batch_size=3"]
    broken = load_recipe(recipe, set=words)
    with forking() as two, pytest.raises(StageError) as caught:
        runner.run(broken, runs=tmp_path, name="x", launch=two, until="sft")
    assert "sft: a batch of 3 × 1 rows cannot be shared out among 2 processes" in str(caught.value)
    assert "rows:" not in (tmp_path / "x" / "log.txt").read_text()  # nor were rows


def test_vllm_is_refused_in_a_group(recipe: Path) -> None:
    asked = load_recipe(recipe, set=[*told(FEW), "model.sampler=vllm"])
    assert share_out(asked, "ppo", 1) == share_out(asked, "evaluation", 1) == {}
    assert share_out(asked, "reward", 2)
    for stage in ("ppo", "evaluation"):
        with pytest.raises(StageError, match=f"{stage}: a group of 2 processes samples by itself"):
            share_out(asked, stage, 2)


@pytest.mark.parametrize(
    ("stage", "words", "count", "found"),
    [
        ("sft", [], 2, {ROWS: 8}),
        ("sft", ["sft.gradient_accumulation_steps=4"], 2, {MICROS: 2}),
        (
            "sft",
            ["sft.per_device_train_batch_size=3", "sft.gradient_accumulation_steps=2"],
            6,
            {ROWS: 1, MICROS: 1},
        ),
        ("kto", ["kto.gradient_accumulation_steps=2"], 2, {ROWS: 8}),
        ("kto", ["kto.per_device_train_batch_size=2"], 2, "a micro-batch of 2 rows"),
        ("reward", [], 3, "a batch of 16 × 1 rows"),
        ("ppo", [], 2, {ROWS: 4}),
        ("ppo", ["ppo.per_device_train_batch_size=1"], 2, "a mini-batch of 1 answers"),
        ("sft", ['sft.train_sampling_strategy="batch_rebalance"'], 2, "batch_rebalance"),
    ],
)
def test_a_batch_is_the_group_s(
    recipe: Path,
    stage: str,
    words: list[str],
    count: int,
    found: Any,
) -> None:
    asked = load_recipe(recipe, set=[*told(FEW), *words])
    if isinstance(found, dict):
        assert share_out(asked, stage, count) == found
        return
    with pytest.raises(
        StageError, match=f"{stage}: {found} cannot be shared out among {count} processes"
    ):
        share_out(asked, stage, count)


def test_the_lock_of_a_stage_is_held_until_its_last_process_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the runner was killed; here its processes live on, as they do off Linux."""
    monkeypatch.setattr(launch, "end_with_parent", lambda: None)
    stage, there = tmp_path / "stage", tmp_path / "pid"
    if not (runner_ := os.fork()):
        with locks.lock(stage, "stage sft") as lock:
            left_ = launch.start([sys.executable, "-c", "import time; time.sleep(60)"], lock, None)
            there.write_text(str(left_.pid))
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(runner_, 0)
    try:
        with pytest.raises(BusyError, match="stage sft is held"), locks.lock(stage, "stage sft"):
            pass
    finally:
        os.kill(int(there.read_text()), signal.SIGKILL)
    with locks.lock(stage, "stage sft", lambda text: None):  # waits for a moment
        pass


def test_a_launcher_that_is_not_there_or_wants_shards_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with locks.lock(tmp_path / "stage", "stage sft") as lock:
        with pytest.raises(
            StageError, match="the launcher 'torchrum' does not start: No such file"
        ):
            launch.start(["torchrum"], lock, None)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(
        StageError, match="the launcher asks for DeepSpeed: stages run with a whole"
    ):
        group.join()


TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_PORT": "1",
    "HOME": "/",
}


def test_a_launcher_around_the_whole_command_is_used_for_each_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch, "end_with_parent", lambda: None)
    assert launch.around({"HOME": "/"}) is None and launch.around({"WORLD_SIZE": "2"}) is None
    assert launch.around({**TORCHRUN, "RANK": "1"}) == ""
    first = dict(TORCHRUN)
    command = launch.around(first)
    assert command and command.endswith("-m torch.distributed.run --standalone --nproc-per-node 2")
    assert first == {"HOME": "/"}
    with pytest.raises(UsageError, match="4 processes on several machines"):
        launch.around({**TORCHRUN, "WORLD_SIZE": "4"})


@pytest.mark.torture
def test_torchrun_around_the_whole_command_computes_the_same(
    recipe: Path, pair: Path, tmp_path: Path
) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "rlhf_recipes", "run", str(recipe), "--runs", str(tmp_path), "--name", "x"]
    words += ["--until", "sft", *(part for one in told(FEW) for part in ("--set", one))]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Stage 1 of") == 1 and "  2 processes" in done.stderr
    assert left(tmp_path, "sft") == left(pair, "sft")


@pytest.mark.torture
def test_nothing_is_lost_in_any_kind_of_stage(
    recipe: Path, tmp_path: Path, record_property: Callable
) -> None:
    """A process, the launcher or the runner killed, Ctrl-C, SIGTERM, a full disk.

    At one point each. The helper's command takes more of them.
    """
    file = recipe.with_name("killed.toml")
    words = [*told((*STOCK, *LOOPS)), "lora.lora_dropout=0.2"]
    file.write_text(load_recipe(recipe, set=words).text)
    command = [sys.executable, "-m", "tests.helpers.group_kills", file, tmp_path / "killed", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [one for one in cases if one["wrong"]]
    record_property("cases", f"{len(cases) - len(wrong)} of {len(cases)}")
    assert wrong == []
