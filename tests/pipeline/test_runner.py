from __future__ import annotations

import errno
import json
import os
import re
import stat
import sys
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes import screen
from rlhf_recipes.errors import BusyError, DataError, MachineError, StageError, UsageError
from rlhf_recipes.pipeline import runner
from rlhf_recipes.pipeline.plan import plan_run
from rlhf_recipes.pipeline.runner import RunOutcome, run
from rlhf_recipes.recipe.load import fork_recipe, load_recipe, smaller_layout
from rlhf_recipes.store import files, layout, locks, provenance
from tests.helpers import counting
from tests.helpers.counting import Counting, toy

pytestmark = pytest.mark.train

STAGES = ["sft", "reward", "ppo", "evaluation"]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Counting:
    return Counting(monkeypatch)


def go(recipe: Path, *changes: str, **options: Any) -> RunOutcome:
    return run(load_recipe(recipe, set=changes), runs=recipe.parent / "runs", **options)


def headings(capfd: pytest.CaptureFixture[str]) -> list[str]:
    """The stages' headings, as of stages that take no time."""
    lines = re.sub(r"\(\d+ s when", "(0 s when", capfd.readouterr().err).splitlines()
    return [line for line in lines if line.startswith("Stage ")]


def test_a_run_computes_each_stage_once(
    tmp_path: Path, count: Counting, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = toy(tmp_path)
    outcome = go(recipe)
    assert count.ran == STAGES
    assert [done.did for done in outcome.stages] == ["ran"] * 4
    assert capfd.readouterr().err.splitlines()[:4] == [
        f"Toy · {tmp_path}/runs/toy",
        "Stage 1 of 4 · sft — new",
        "  1/2                loss 0.5  score 1.25",
        "    Where is Paris? → In France.   score 1.5",
    ]
    again = go(recipe)
    assert count.ran == STAGES
    assert count.exported == ["ppo"]
    assert [done.did for done in again.stages] == ["cached"] * 4
    assert again.results == outcome.results
    assert headings(capfd) == [
        f"Stage {n} of 4 · {name} — cached (0 s when it ran)" for n, name in enumerate(STAGES, 1)
    ]


def test_a_vllm_server_that_is_not_there_is_missed_before_the_first_stage(
    tmp_path: Path, count: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_RECIPES_VLLM", "http://127.0.0.1:9")
    with pytest.raises(StageError) as error:
        go(toy(tmp_path), "model.sampler=vllm")
    assert "no vLLM at http://127.0.0.1:9: ConnectionRefusedError" in str(error.value)
    assert f"vllm serve {tmp_path}/model --host 127.0.0.1 --dtype" in str(error.value)
    assert count.ran == []
    go(toy(tmp_path), "model.sampler=vllm", until="reward")
    assert count.ran == ["sft", "reward"]


def test_the_run_s_folder(tmp_path: Path, count: Counting) -> None:
    recipe = toy(tmp_path)
    outcome = go(recipe)
    folder = tmp_path / "runs" / "toy"
    assert (outcome.run_folder, outcome.model) == (folder, folder / "model")
    assert sorted(path.name for path in folder.iterdir()) == [
        "log.txt", "manifest.json", "model", "recipe.toml", "report.html", "resolved.toml",
        "results.json",
    ]  # fmt: skip
    assert (folder / "recipe.toml").read_text() == recipe.read_text()
    assert load_recipe(folder / "resolved.toml").model.folder == tmp_path / "model"
    assert json.loads((folder / "results.json").read_text()) == {
        "format": 1,
        "sft.loss": 0.25, "sft.steps": 2, "reward.loss": 0.25, "reward.steps": 2,
        "ppo.loss": 0.25, "ppo.steps": 2, "ppo.win_rate": 0.75, "evaluation.prompts": 8,
    }  # fmt: skip
    assert (folder / "model" / "model.safetensors").read_text() == "ppo 3"

    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["outcome"]) == (1, "finished")
    assert manifest["recipe"] == str(recipe)
    assert [(s["name"], s["outcome"]) for s in manifest["stages"]] == [(n, "ran") for n in STAGES]
    assert manifest["versions"]["trl"] == version("trl")
    assert len(manifest["model"]["content"]) == len(manifest["dataset"]["content"]) == 64
    for entry in manifest["stages"]:
        record = json.loads((tmp_path / "runs" / entry["folder"] / "stage.json").read_text())
        assert (record["format"], record["key"]) == (1, entry["key"])
        assert record["payload"]["kind"] == entry["kind"]
    assert record["metrics"] == {"ppo.win_rate": 0.75, "prompts": 8}
    ppo = layout.read_record(tmp_path / "runs" / manifest["stages"][2]["folder"])
    assert ppo["layout"]["per_device_train_batch_size"] == 8


def test_a_fork_that_changes_ppo_redoes_ppo_and_evaluation_alone(
    tmp_path: Path, count: Counting, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = toy(tmp_path)
    go(recipe)
    fork = fork_recipe(recipe, tmp_path / "mine.toml", set=["ppo.total_episodes=128"])
    capfd.readouterr()
    outcome = go(fork)
    assert count.ran[4:] == ["ppo", "evaluation"]
    assert headings(capfd) == [
        "Stage 1 of 4 · sft — cached (0 s when it ran)",
        "Stage 2 of 4 · reward — cached (0 s when it ran)",
        "Stage 3 of 4 · ppo — total_episodes 64 → 128",
        "Stage 4 of 4 · evaluation — input ppo changed",
    ]
    assert outcome.results["sft.loss"] == 0.25  # a cached stage's numbers count, too
    assert count.exported == ["ppo", "ppo"]
    go(recipe)
    assert len(count.ran) == 6


def test_until_stops_after_a_stage_and_the_next_run_goes_on(
    tmp_path: Path, count: Counting
) -> None:
    recipe = toy(tmp_path)
    first = go(recipe, until="reward")
    assert count.ran == ["sft", "reward"]
    assert set(first.results) == {"sft.loss", "sft.steps", "reward.loss", "reward.steps"}
    assert (first.model / "model.safetensors").read_text() == "sft 1"
    second = go(recipe)
    assert count.ran == STAGES
    assert (second.model / "model.safetensors").read_text() == "ppo 3"
    with pytest.raises(UsageError) as caught:
        go(recipe, until="rewrd")
    assert str(caught.value) == "the recipe has no stage 'rewrd' (did you mean reward?)"


def weights(recipe: Path) -> dict[str, str]:
    """What each stage's output holds, by its kind."""
    folders = (recipe.parent / "runs" / ".stages").glob("[!.]*/output/weights")
    return {file.parts[-3].partition("-")[0]: file.read_text() for file in folders}


def test_fresh_computes_all_again(tmp_path: Path, count: Counting) -> None:
    recipe = toy(tmp_path)
    go(recipe)
    outcome = go(recipe, fresh=True)
    assert count.ran == STAGES * 2
    assert (outcome.model / "model.safetensors").read_text() == "ppo 7"
    go(recipe, fresh=True)
    assert count.ran == STAGES * 3
    for record in (tmp_path / "runs" / ".stages").glob("[!.]*/stage.json"):  # by a clock ahead
        record.write_text(record.read_text().replace('"started": "20', '"started": "30'))
    go(recipe, fresh=True)
    assert count.ran == STAGES * 4
    left = [path.name for path in (tmp_path / "runs" / ".stages").iterdir()]
    assert not [name for name in left if name.endswith((".fresh", ".old"))]


@pytest.mark.parametrize("again", [False, True])
def test_a_pass_of_fresh_that_fails_keeps_what_was_whole_and_goes_on(
    tmp_path: Path, count: Counting, again: bool
) -> None:
    recipe = toy(tmp_path)
    go(recipe)
    count.fault["reward"] = counting.fail
    with pytest.raises(StageError):
        go(recipe, fresh=True)
    assert count.ran == [*STAGES, "sft", "reward"]
    made = {"sft": "sft 5", "reward": "reward 2", "ppo": "ppo 3", "evaluation": "evaluation 4"}
    assert weights(recipe) == made
    go(recipe, name="other")  # another run finds all of it done
    assert len(count.ran) == 6
    count.fault.clear()
    outcome = go(recipe, fresh=again)
    if again:
        assert count.ran[6:] == ["reward", "ppo", "evaluation"]
        assert [done.did for done in outcome.stages] == ["cached", "ran", "ran", "ran"]
    else:
        assert weights(recipe) == made
    count.ran.clear()
    go(recipe, fresh=True)  # that pass is over: this is another
    assert count.ran == STAGES


def test_what_another_pass_of_fresh_saved_is_not_gone_on_with(
    tmp_path: Path, count: Counting
) -> None:
    recipe, seen = toy(tmp_path), []

    def fail(context: Any) -> None:
        seen.append(sorted(path.name for path in (context.folder / "work").glob("checkpoint*")))
        (context.folder / "work" / f"checkpoint-{len(seen):06d}").mkdir()
        raise ValueError

    go(recipe)
    count.fault["sft"] = fail
    for _ in range(2):
        with pytest.raises(StageError):
            go(recipe, fresh=True)
    go(recipe)
    with pytest.raises(StageError):
        go(recipe, fresh=True)
    assert seen == [[], ["checkpoint-000001"], []]


def test_two_keys_that_begin_alike_are_two_stages(
    tmp_path: Path, count: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "stage_folder", lambda runs, kind, key: runs / ".stages" / kind)
    recipe = toy(tmp_path)
    go(recipe, until="sft")
    go(recipe, "sft.learning_rate=2e-3", until="sft")
    assert count.ran == ["sft", "sft"]
    count.fault["sft"] = counting.fail
    with pytest.raises(StageError):
        go(recipe, until="sft")
    assert weights(recipe) == {"sft": "sft 2"}  # the other's is whole


def test_a_stage_that_fails_leaves_no_record_and_starts_afresh(
    tmp_path: Path, count: Counting, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = toy(tmp_path)
    count.fault["reward"] = counting.fail
    with pytest.raises(StageError) as caught:
        go(recipe)
    log = tmp_path / "runs" / "toy" / "log.txt"
    assert str(caught.value) == (f"stage reward failed: ValueError: the loss is NaN (log: {log})")
    assert "Traceback" in log.read_text()
    assert "and more of the same" in log.read_text()
    assert "Traceback" not in capfd.readouterr().err
    manifest = files.read_json(tmp_path / "runs" / "toy" / "manifest.json")
    assert manifest["outcome"] == "failed"
    assert [s["outcome"] for s in manifest["stages"]] == ["ran", "not run", "not run", "not run"]
    folder = tmp_path / "runs" / manifest["stages"][1]["folder"]
    assert layout.read_record(folder) is None
    assert (folder / "output" / "weights").exists()

    seen = []
    count.fault["reward"] = lambda context: seen.extend(os.listdir(context.folder))
    count.ran.clear()
    go(recipe)
    assert count.ran[0] == "reward"
    assert sorted(seen) == ["output", "work"]
    assert headings(capfd)[1] == "Stage 2 of 4 · reward — was not finished"
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_stage_s_own_error_keeps_its_kind(tmp_path: Path, count: Counting) -> None:
    count.fault["sft"] = counting.refuse
    with pytest.raises(DataError) as caught:
        go(toy(tmp_path))
    assert str(caught.value) == (
        "stage sft: no rows on the train side (lower test_fraction; "
        f"log: {tmp_path}/runs/toy/log.txt)"
    )


RAISED = {
    "full": OSError(errno.ENOSPC, "No space left on device", "/d/weights"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded", "/d/weights"),
    "in Rust": RuntimeError("I/O error: No space left on device (os error 28)"),
    "in C++": RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    "read-only": OSError(errno.EROFS, "Read-only file system", "/d/weights"),
    "memory": MemoryError(),
    "on a CPU": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate"
    " memory: you tried to allocate 40000000000000 bytes."),
    "on a GPU": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
}  # fmt: skip
FREE = "free some space there, and the same command goes on"
LESS = (
    "the same command with --set ppo.per_device_train_batch_size=4 --set "
    "ppo.gradient_accumulation_steps=2 --set ppo.gradient_checkpointing=true --set "
    "ppo.local_rollout_forward_batch_size=32 --name toy needs less, and goes on from the last "
    "checkpoint"
)
SAID = {
    "full": f"No space left on device: '/d/weights' ({FREE}",
    "quota": f"Disk quota exceeded: '/d/weights' ({FREE}",
    "in Rust": f"No space left on device ({FREE}",
    "in C++": f"a file could not be written whole: the disk may be full ({FREE}",
    "read-only": "Read-only file system: '/d/weights' (see who may read and write it; --runs DIR "
    "keeps runs elsewhere",
    **dict.fromkeys(["memory", "on a CPU", "on a GPU"], f"out of memory ({LESS}"),
}


@pytest.mark.parametrize("what", RAISED)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_the_machine_lacks_is_one_line_that_says_what_to_do(
    tmp_path: Path, count: Counting, what: str, wrapped: bool
) -> None:
    def lack(_: Any) -> None:
        try:
            raise RAISED[what]
        except Exception as error:
            if wrapped:
                raise StageError("the checkpoint could not be written") from error
            raise

    recipe = toy(tmp_path)
    go(recipe, until="reward")
    count.fault["ppo"] = lack
    with pytest.raises(MachineError) as caught:
        go(recipe, "ppo.gradient_checkpointing=false", name="toy")
    assert caught.value.exit_code == 1
    log = tmp_path / "runs" / "toy" / "log.txt"
    assert str(caught.value) == f"stage ppo: {SAID[what]}; log: {log})"
    assert "Traceback" in log.read_text()


def test_what_can_be_made_smaller_is_what_is_there(tmp_path: Path) -> None:
    def advice(stage: str, *changes: str) -> str:
        return smaller_layout(load_recipe(toy(tmp_path), set=changes), stage, "my run")

    nine = ["sft.per_device_train_batch_size=9", "sft.gradient_accumulation_steps=2"]
    assert "size=3 --set sft.gradient_accumulation_steps=6 " in advice("sft", *nine)
    assert " --name 'my run' needs less" in advice("sft", *nine)
    least = ["sft.per_device_train_batch_size=1", "sft.gradient_checkpointing=true"]
    nothing = "end what else holds memory, and the same command goes on"
    assert advice("sft", *least) == advice("evaluation") == nothing


def test_what_fails_first_is_told(
    tmp_path: Path, count: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail(_: Any) -> None:
        monkeypatch.setattr(files, "write_json", full)
        raise ValueError("the loss is NaN")

    count.fault["sft"] = fail
    with pytest.raises(StageError, match="the loss is NaN"):
        go(toy(tmp_path))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the log
def test_a_log_that_cannot_be_written_is_one_line_on_the_screen(
    tmp_path: Path,
    count: Counting,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where a library's noise is what does not go into it; the screen is given back."""
    recipe = toy(tmp_path)
    with monkeypatch.context() as patch:
        full = lambda *_: os.open("/dev/full", os.O_RDWR)  # noqa: E731
        patch.setattr(screen, "no_link", full)
        with pytest.raises(MachineError, match="^No space left on device"):
            go(recipe)

    def fill(_: Any) -> None:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        sys.stdout.write("noise")
        raise ValueError("the loss is NaN")

    count.fault["sft"] = fill
    with pytest.raises(StageError, match="the loss is NaN"):
        go(recipe)
    print("to the person")
    assert capfd.readouterr().out == "to the person\n"


def test_the_lock_is_asked_for_before_anything_slow(
    tmp_path: Path, count: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that of a stage before anything is brought from a hub."""
    recipe, slow = toy(tmp_path), []
    monkeypatch.setattr(runner, "plan_run", lambda *_, **__: slow.append("plan"))
    with locks.lock(tmp_path / "runs" / "toy", "run toy"):
        with pytest.raises(BusyError):
            go(recipe)
    monkeypatch.undo()
    count = Counting(monkeypatch)
    monkeypatch.setattr(runner, "bring", lambda *_: slow.append("bring"))
    sft = plan_run(load_recipe(recipe), tmp_path / "runs").stages[0]
    with locks.lock(sft.folder, "stage sft"):
        with pytest.raises(BusyError):
            go(recipe)
    assert slow == count.ran == []
    go(recipe)
    go(recipe)
    assert slow == ["bring"]


def test_a_stage_that_another_run_computes_is_busy(tmp_path: Path, count: Counting) -> None:
    recipe = toy(tmp_path)
    caught: list[BusyError] = []

    def meanwhile(_: Any) -> None:
        with pytest.raises(BusyError) as error:
            go(recipe, name="other")
        caught.append(error.value)
        with pytest.raises(BusyError, match="run toy is held by"):
            go(recipe)

    count.fault["sft"] = meanwhile
    go(recipe)
    assert str(caught[0]).startswith(f"stage sft is held by process {os.getpid()} on ")
    assert count.ran == STAGES


def test_a_stage_that_another_run_finished_meanwhile_is_taken(
    tmp_path: Path, count: Counting
) -> None:
    recipe = toy(tmp_path)
    reward = plan_run(load_recipe(recipe), tmp_path / "runs").stages[1]

    def other(_: Any) -> None:  # while this run is at SFT, another one does the reward stage
        (reward.folder / "output").mkdir(parents=True)
        (reward.folder / "output" / "weights").write_text("theirs")
        record = {"key": reward.key, "metrics": {"loss": 9}, "seconds": 7, "summary": "theirs"}
        layout.write_record(reward.folder, record | {"versions": provenance.versions()})

    count.fault["sft"] = other
    outcome = go(recipe)
    assert count.ran == ["sft", "ppo", "evaluation"]
    assert outcome.results["reward.loss"] == 9


def test_other_versions_are_said(
    tmp_path: Path, count: Counting, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    recipe = toy(tmp_path)
    go(recipe, until="sft")
    capfd.readouterr()
    now = provenance.versions() | {"torch": "9.9"}
    before = provenance.versions()["torch"]
    monkeypatch.setattr(provenance, "versions", lambda: now)
    go(recipe, until="sft")
    assert count.ran == ["sft"]
    line = capfd.readouterr().err.splitlines()[2]
    assert line == f'  computed with other versions: torch "{before}" → "9.9"'


def test_nothing_is_writable_by_others_and_any_thread_may_run(
    tmp_path: Path, count: Counting
) -> None:
    recipe = toy(tmp_path)
    before = os.umask(0)
    try:
        worker = threading.Thread(target=go, args=[recipe])
        worker.start()
        worker.join()
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    made = [tmp_path / "runs", *(tmp_path / "runs").rglob("*")]
    assert len(made) > 30
    assert [p for p in made if stat.S_IMODE(p.stat().st_mode) & 0o022] == []


def test_a_moved_runs_folder_stays_whole(tmp_path: Path, count: Counting) -> None:
    recipe = toy(tmp_path)
    go(recipe)
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    run(load_recipe(recipe), runs=tmp_path / "elsewhere")
    assert count.ran == STAGES


@pytest.mark.parametrize(
    ("busy", "given", "policy"),
    [(90.0, None, "PASSIVE"), (3.0, None, None), (90.0, "ACTIVE", "ACTIVE")],
)
def test_threads_sleep_as_they_wait_where_others_are_busy(
    monkeypatch: pytest.MonkeyPatch, busy: float, given: str | None, policy: str | None
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(runner.psutil, "cpu_percent", lambda interval: busy)
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.delenv("OMP_WAIT_POLICY")
    if given:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    runner._share_cores()
    assert os.environ.get("OMP_WAIT_POLICY") == policy


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_one_of_a_launcher_s_processes_is_refused_at_once(
    tmp_path: Path, count: Counting, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """accelerate would wait for the other processes for ever."""
    monkeypatch.setenv(name, "2")
    with pytest.raises(UsageError, match=f"{name} is 2: a run is one process.*torchrun") as caught:
        go(toy(tmp_path))
    assert caught.value.exit_code == 2 and count.ran == [] and not (tmp_path / "runs").exists()
    monkeypatch.setenv(name, "1")
    assert len(go(toy(tmp_path)).stages) == 4
