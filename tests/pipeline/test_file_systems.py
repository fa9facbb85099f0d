"""What `doctor` says of the folder of runs: its locks and renames, and its file system."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_recipes.pipeline import doctor, places


def mounted(monkeypatch: pytest.MonkeyPatch, folder: Path, kind: str, options: str = "rw") -> None:
    disks = [("/", "ext4", "rw"), (str(folder), "tmpfs", "rw"), (str(folder), kind, options)]
    found = [SimpleNamespace(mountpoint=m, fstype=f, opts=o) for m, f, o in disks]
    monkeypatch.setattr(places.psutil, "disk_partitions", lambda all: found)


def test_a_lock_and_a_rename_are_tried_between_two_processes(tmp_path: Path) -> None:
    assert places.tried(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []
    level, text = places.fit(tmp_path / "not" / "yet")
    assert level == "good" and text.endswith("a lock keeps out and a rename replaces at once")
    assert [line.level for line in doctor.answered("", lambda: doctor.where(tmp_path / "x"))]


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ("LOCK_EX | fcntl.LOCK_NB", "LOCK_UN", "a lock does not keep another process out"),
        ('return "got it"', 'return "kept out"', "a lock holds on after it was let go of"),
        ("file.read(), open", "open(sys.argv[2]).read(), open", "a file that is open changes"),
        ("open(sys.argv[2]).read(), sep", "file.read(), sep", "a rename does not replace a file"),
        (
            "fcntl.flock(lock",
            "raise OSError(37, 'No locks available')\n        (lock",
            "No locks av",
        ),
    ],
)
def test_a_folder_where_they_do_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, was: str, now: str, said: str
) -> None:
    """The other process sees what it would see there."""
    assert was in places.CHILD
    monkeypatch.setattr(places, "CHILD", places.CHILD.replace(was, now))
    assert said in places.tried(tmp_path)
    level, text, change = places.fit(tmp_path)
    assert level == "fault" and said in text and change == places.ELSEWHERE


def test_a_lock_that_fails_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(places.locks, "lock", fail)
    assert places.tried(tmp_path).endswith("fails: [Errno 38] Function not implemented")


@pytest.mark.parametrize(
    ("kind", "options", "level", "said"),
    [
        ("nfs4", "rw,vers=4.2,local_lock=none", "doubt", "between machines this was not tried"),
        ("nfs", "rw,local_lock=flock", "fault", "mounted with local_lock=flock: no lock reaches"),
        ("nfs", "rw,nolock,local_lock=all", "fault", "mounted with local_lock=all, nolock"),
        ("lustre", "rw,localflock", "fault", "mounted with localflock"),
        ("cifs", "rw,nobrl", "fault", "mounted with nobrl"),
        ("fuse", "rw", "doubt", "between machines this was not tried"),
        ("fuseblk", "rw", "good", "fuseblk: between two processes here"),
        ("fuse.sshfs", "rw", "doubt", "between machines this was not tried"),
        ("fuse.s3fs", "rw", "fault", "an object store: no lock reaches others"),
        ("fuse.mountpoint-s3", "rw", "fault", "an object store"),
        ("xfs", "rw", "good", "xfs: between two processes here"),
    ],
)
def test_what_a_file_system_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: str, level: str, said: str
) -> None:
    mounted(monkeypatch, tmp_path, kind, options)
    monkeypatch.setattr(places, "tried", lambda folder: "")
    found = places.fit(tmp_path / "runs")
    assert (found[0], said in found[1]) == (level, True), found
    mounted(monkeypatch, tmp_path / "elsewhere", kind, options)
    assert places.mount_of(tmp_path)[0] == "ext4"


def test_the_other_process_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        places, "CHILD", "print('kept out', flush=True); import time; time.sleep(60)"
    )
    monkeypatch.setattr(places, "PATIENCE", 0.1)
    left: list[subprocess.Popen[str]] = []
    real = subprocess.Popen
    monkeypatch.setattr(
        places.subprocess, "Popen", lambda *a, **w: left.append(real(*a, **w)) or left[-1]
    )
    assert "timed out" in places.tried(tmp_path)
    assert left[0].poll() is not None
