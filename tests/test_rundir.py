from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_recipes import rundir
from rlhf_recipes.errors import BusyError, UsageError

HOLD = """
import sys, time
from pathlib import Path
from rlhf_recipes import rundir
with rundir.lock(Path(sys.argv[1]), "run x"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_json_is_strict_and_whole(tmp_path: Path) -> None:
    import numpy

    file = tmp_path / "new" / "x.json"
    rundir.write_json(file, {"a": math.nan, "b": [1, numpy.float32(0.5)], "c": "\udcff é"})
    assert file.read_text() == (
        '{\n  "format": 1,\n  "a": null,\n  "b": [\n    1,\n    0.5\n  ],\n  "c": "\\udcff é"\n}\n'
    )
    assert os.listdir(file.parent) == ["x.json"]


@pytest.mark.parametrize("text", ["", '{"format": 1', "[1]", '{"format": 2}', "{}"])
def test_json_that_is_not_ours_reads_as_missing(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    assert rundir.read_json(tmp_path / "x.json") is None
    assert rundir.read_json(tmp_path / "missing.json") is None


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.json"
    rundir.write_json(file, {"a": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        rundir.write_json(file, {"a": 2})
    assert json.loads(file.read_text()) == {"format": 1, "a": 1}


def test_the_record_is_synced_after_what_it_speaks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "weights").write_text("w")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    assert rundir.read_record(tmp_path) is None
    rundir.write_record(tmp_path, {"key": "k"})
    assert rundir.read_record(tmp_path) == {"format": 1, "key": "k"}
    names = [Path(path).name for path in synced]
    assert names[:2] == ["output", "weights"]
    assert names[-2].startswith(".stage.json.")
    assert names[-1] == tmp_path.name


def test_a_cleared_stage_is_as_new(tmp_path: Path) -> None:
    (tmp_path / "output" / "deep").mkdir(parents=True)
    (tmp_path / "stage.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("{}")
    outside = tmp_path.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_text("")
    (tmp_path / "link").symlink_to(outside)
    with rundir.lock(tmp_path, "stage"):
        rundir.clear_stage(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "output", "work"]
    assert list((tmp_path / "output").iterdir()) == []
    assert (outside / "kept").exists()


def test_checkpoints_stay_with_what_led_to_them_unless_fresh(tmp_path: Path) -> None:
    for name in ("work/checkpoint-000002.pt", "metrics.jsonl", "output/half"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with rundir.lock(tmp_path, "stage"):
        rundir.clear_stage(tmp_path)
        assert (tmp_path / "work/checkpoint-000002.pt").exists()
        assert (tmp_path / "metrics.jsonl").exists()
        assert not (tmp_path / "output/half").exists()
        (tmp_path / "work/checkpoint-000002.pt").rename(tmp_path / "work/partial")
        rundir.clear_stage(tmp_path)  # a first one half written is none
        assert not (tmp_path / "metrics.jsonl").exists()
        (tmp_path / "work/checkpoint-000002.pt").write_text("")
        rundir.clear_stage(tmp_path, fresh=True)
    assert not list((tmp_path / "work").iterdir())
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_lock_says_who_holds_it_and_dies_with_its_process(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(BusyError) as caught, rundir.lock(tmp_path, "run x"):
            pass
        assert caught.value.exit_code == 75
        assert str(caught.value).startswith(f"run x is held by process {other.pid} on ")
        assert str(caught.value).endswith("nothing needs to be cleared by hand)")
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    with rundir.lock(tmp_path, "run x"):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_runs_are_found_by_name_and_by_folder(tmp_path: Path) -> None:
    for name in ("smoke", "chat-1a2b3c"):
        rundir.write_json(tmp_path / name / "manifest.json", {})
    assert rundir.find_run("smoke", tmp_path) == tmp_path / "smoke"
    assert rundir.find_run(str(tmp_path / "smoke"), Path("elsewhere")) == tmp_path / "smoke"
    for word, hint in [
        ("smoek", f"did you mean {tmp_path / 'smoke'}?"),
        ("runs/smok", f"did you mean {tmp_path / 'smoke'}?"),
        ("zzz", "runs there: chat-1a2b3c, smoke"),
    ]:
        with pytest.raises(UsageError) as caught:
            rundir.find_run(word, tmp_path)
        assert str(caught.value) == f"no run {word!r} in {tmp_path} ({hint})"
    with pytest.raises(UsageError, match="none was made there yet"):
        rundir.find_run("smoke", tmp_path / "empty")


def test_where_runs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_RECIPES_RUNS", "")
    assert rundir.runs_folder() == Path("runs")
    monkeypatch.setenv("RLHF_RECIPES_RUNS", "/data/runs")
    assert rundir.runs_folder() == Path("/data/runs")
    assert rundir.runs_folder(Path("mine")) == Path("mine")


def test_provenance() -> None:
    import torch

    assert rundir.versions()["trl"] == "1.12.0"
    assert rundir.versions()["torch"] == torch.__version__  # with its build: +cpu, +cu130
    assert set(rundir.hardware()) == {"system", "cores", "threads", "memory_bytes", "gpus"}
    assert rundir.hardware()["memory_bytes"] > 2**30
