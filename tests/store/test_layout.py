from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from rlhf_recipes.errors import BusyError, UsageError
from rlhf_recipes.store import files, layout, locks, provenance

HOLD = """
import sys, time
from pathlib import Path
from rlhf_recipes.store import locks
with locks.lock(Path(sys.argv[1]), "run x"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_json_is_strict_and_whole(tmp_path: Path) -> None:
    import numpy

    file = tmp_path / "new" / "x.json"
    files.write_json(file, {"a": math.nan, "b": [1, numpy.float32(0.5)], "c": "\udcff é"})
    assert file.read_text() == (
        '{\n  "format": 1,\n  "a": null,\n  "b": [\n    1,\n    0.5\n  ],\n  "c": "\\udcff é"\n}\n'
    )
    assert os.listdir(file.parent) == ["x.json"]
    assert files.aside(file) != files.aside(file)  # two machines may have processes of one number


@pytest.mark.parametrize("text", ["", '{"format": 1', "[1]", '{"format": 2}', "{}"])
def test_json_that_is_not_ours_reads_as_missing(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert files.read_json(tmp_path / "x.json") is None
    assert files.read_json(tmp_path / "missing.json") is None


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.json"
    files.write_json(file, {"a": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"format": 1, "a": 1}


def test_a_write_that_is_cut_off_leaves_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        files.write_json(tmp_path / "x.json", {"a": 1})
    assert list(tmp_path.iterdir()) == []


def test_json_that_cannot_be_read_is_not_taken_as_missing(tmp_path: Path) -> None:
    """Else an error of the disk would have a whole stage computed again."""
    (tmp_path / "x.json").mkdir()
    with pytest.raises(IsADirectoryError):
        files.read_json(tmp_path / "x.json")


def test_the_record_is_synced_after_what_it_speaks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "weights").write_text("w")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    assert layout.read_record(tmp_path) is None
    layout.write_record(tmp_path, {"key": "k"})
    assert layout.read_record(tmp_path) == {"format": 1, "key": "k"}
    names = [Path(path).name for path in synced]
    assert names[:2] == ["output", "weights"]
    assert names[-2].startswith(".stage.json.")
    assert names[-1] == tmp_path.name


def test_a_complete_stage_keeps_no_heartbeat(tmp_path: Path) -> None:
    for name in ("progress.json", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    layout.tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_cleared_stage_is_as_new(tmp_path: Path) -> None:
    (tmp_path / "output" / "deep").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text("{}")
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    (tmp_path / "link").symlink_to(outside)
    layout.clear_stage(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "work"]
    assert list((tmp_path / "output").iterdir()) == []
    assert (outside / "kept").exists()


def test_checkpoints_stay_with_what_led_to_them_unless_begun_before(tmp_path: Path) -> None:
    def made() -> None:
        names = ("work/checkpoint-000002/weights", "metrics.jsonl", "tensorboard/1", "output/half")
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("")

    def kept(**words: str) -> list[bool]:
        layout.clear_stage(tmp_path, **words)
        names = ("work/checkpoint-000002", "metrics.jsonl", "output/half")
        assert (tmp_path / "tensorboard/1").exists() == (tmp_path / "metrics.jsonl").exists()
        return [(tmp_path / name).exists() for name in names]

    made()
    assert kept() == [True, True, False]
    (tmp_path / "work/checkpoint-000002").rename(tmp_path / "work/partial")
    assert kept() == [False, False, False]  # a first one half written is none
    made()
    assert kept(begun="today") == [False, False, False]
    made()
    assert kept(begun="today") == [True, True, False]
    assert kept() == [True, True, False]
    assert kept(begun="tomorrow") == [False, False, False]


def test_a_folder_is_swapped_for_another_also_through_a_link(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "stages" / "sft-1"
    folder.parent.mkdir()
    folder.symlink_to(elsewhere)
    for number, left in enumerate([[], [".sft-1.old"], ["sft-1"]]):
        fresh = layout.beside(folder, "fresh")
        assert fresh.parent == tmp_path
        for name in left:
            (tmp_path / name.replace("sft-1", "elsewhere")).mkdir(exist_ok=True)
        layout.clear_stage(fresh)
        layout.settle(folder)  # not whole: it stays where it is
        assert fresh.exists()
        (fresh / "output" / "weights").write_text(str(number))
        layout.write_record(fresh, {"key": str(number)})
        layout.settle(folder)
        assert layout.read_record(folder)["key"] == str(number)
        assert (folder / "output" / "weights").read_text() == str(number)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "stages"]
    assert folder.is_symlink()
    (elsewhere / "work" / "checkpoint-000002").mkdir()
    layout.tidy(folder)
    assert not (elsewhere / "work").exists()


def lock_of(folder: Path) -> str:
    return folder.with_name(f".{folder.name}.lock").read_text()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process that holds `tmp_path`, until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_lock_says_who_holds_it_and_dies_with_its_process(
    tmp_path: Path, other: subprocess.Popen
) -> None:
    with pytest.raises(BusyError) as caught, locks.lock(tmp_path, "run x"):
        pass
    assert caught.value.exit_code == 75
    assert str(caught.value).startswith(f"run x is held by process {other.pid} on ")
    assert str(caught.value).endswith(" (--wait waits for it; nothing needs to be cleared by hand)")
    other.send_signal(signal.SIGKILL)
    other.wait()
    with locks.lock(tmp_path, "run x"):
        assert lock_of(tmp_path).startswith(f"process {os.getpid()} on ")
    assert list(tmp_path.iterdir()) == []  # it lies beside what it locks


def test_who_waits_says_for_whom_and_holds_the_lock_then(
    tmp_path: Path, other: subprocess.Popen
) -> None:
    said = []

    def waiting(line: str) -> None:
        said.append(line)
        other.kill()

    with locks.lock(tmp_path, "run x", waiting):
        assert lock_of(tmp_path).startswith(f"process {os.getpid()} on ")
        with pytest.raises(BusyError), locks.lock(tmp_path, "run x"):
            pass
    assert len(said) == 1 and said[0].startswith(f"run x is held by process {other.pid} on ")
    assert said[0].endswith(": waiting for it")


def test_who_only_looks_is_in_nobodys_way(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    with locks.lock(folder, "run x"):
        assert locks.held(folder)
    with locks.lock_file(folder).open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.02, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with locks.lock(folder, "run x"):
            pass
    assert not locks.held(folder)


def test_waiting_is_ended_by_a_signal(tmp_path: Path, other: subprocess.Popen) -> None:
    def waiting(line: str) -> None:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt), locks.lock(tmp_path, "run x", waiting):
        pass


def test_a_lock_that_was_removed_while_one_waited_is_none(
    tmp_path: Path, other: subprocess.Popen
) -> None:
    def waiting(line: str) -> None:
        tmp_path.with_name(f".{tmp_path.name}.lock").unlink()
        other.kill()

    with locks.lock(tmp_path, "run x", waiting):
        with pytest.raises(BusyError), locks.lock(tmp_path, "run x"):
            pass


def test_runs_are_found_by_name_and_by_folder(tmp_path: Path) -> None:
    for name in ("smoke", "chat-1a2b3c"):
        files.write_json(tmp_path / name / "manifest.json", {})
    assert layout.find_run("smoke", tmp_path) == tmp_path / "smoke"
    assert layout.find_run(str(tmp_path / "smoke"), Path("elsewhere")) == tmp_path / "smoke"
    for word, hint in [
        ("smoek", f"did you mean {tmp_path / 'smoke'}?"),
        ("runs/smok", f"did you mean {tmp_path / 'smoke'}?"),
        ("zzz", "runs there: chat-1a2b3c, smoke"),
    ]:
        with pytest.raises(UsageError) as caught:
            layout.find_run(word, tmp_path)
        assert str(caught.value) == f"no run {word!r} in {tmp_path} ({hint})"
    with pytest.raises(UsageError, match="none was made there yet"):
        layout.find_run("smoke", tmp_path / "empty")


def test_where_runs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_RECIPES_RUNS", "")
    assert layout.runs_folder() == Path("runs")
    monkeypatch.setenv("RLHF_RECIPES_RUNS", "/data/runs")
    assert layout.runs_folder() == Path("/data/runs")
    assert layout.runs_folder(Path("mine")) == Path("mine")


@pytest.mark.train
def test_provenance() -> None:
    import torch

    assert provenance.versions()["trl"] == version("trl")
    assert provenance.versions()["torch"] == torch.__version__  # with its build: +cpu, +cu130
    assert set(provenance.hardware()) == {"system", "cores", "threads", "memory_bytes", "gpus"}
    assert provenance.hardware()["memory_bytes"] > 2**30
