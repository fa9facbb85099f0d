"""Whether a folder is fit to keep runs in: what its file system is called, and what it does.

A run relies on two things: a lock that one process holds keeps others out, and a rename replaces a
file or folder at once. Both are tried here between two processes of this machine. Whether a lock
reaches other machines cannot be tried from one: mount options say that it does not, where it is so.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from rlhf_recipes.errors import RlhfRecipesError
from rlhf_recipes.store import locks
from rlhf_recipes.store.files import write_text

NETWORK = "nfs nfs4 cifs smb3 smbfs lustre beegfs gpfs ceph glusterfs afs 9p virtiofs".split()
# Object stores shown as files: https://github.com/awslabs/mountpoint-s3/blob/main/doc/SEMANTICS.md
STORES = "mountpoint-s3 s3fs goofys gcsfuse blobfuse blobfuse2 rclone ossfs geesefs".split()
# Options with which a lock stays on its own machine: nfs(5), mount.cifs(8), Lustre's manual.
ALONE = {"nolock", "local_lock=all", "local_lock=flock", "nobrl", "localflock", "noflock"}
PATIENCE = 60.0  # seconds
ELSEWHERE = "--runs DIR keeps runs elsewhere"
# Two looks at a lock; between them the other process lets go of it, and replaces the file.
CHILD = """
import fcntl, sys
def got():
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "kept out"
    return "got it"
lock, file = open(sys.argv[1], "a+"), open(sys.argv[2])
print(got(), flush=True)
sys.stdin.readline()
print(got(), file.read(), open(sys.argv[2]).read(), sep="\\n")
"""
WANTED = {  # by the line of what it prints
    "kept out": "a lock does not keep another process out",
    "got it": "a lock holds on after it was let go of",
    "old": "a file that is open changes when another takes its name",
    "new": "a rename does not replace a file at once",
}


def existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def mount_of(folder: Path) -> tuple[str, set[str]]:
    """The type of a folder's file system, and the options it is mounted with."""
    folder, best = folder.resolve(), ("", "unknown", "")
    for disk in psutil.disk_partitions(all=True):
        inside = Path(disk.mountpoint) in (folder, *folder.parents)
        if inside and len(disk.mountpoint) >= len(best[0]):  # the last of several at one place
            best = (disk.mountpoint, disk.fstype, disk.opts)
    return best[1], {*best[2].split(",")}


def fit(runs: Path) -> tuple[str, ...]:
    """What `doctor` says of where runs are kept: a level, a text, and what to do."""
    there = existing(runs)
    kind, options = mount_of(there)
    if kind.removeprefix("fuse.") in STORES:
        text = (
            f"{there} is on {kind}, an object store: no lock reaches others, no rename is at once"
        )
        return "fault", text, f"keep runs on a disk; {ELSEWHERE}"
    if wrong := tried(there):
        return "fault", f"{there} is on {kind}: {wrong}", ELSEWHERE
    works = f"{kind}: between two processes here, a lock keeps out and a rename replaces at once"
    if alone := sorted(ALONE & options):
        text = f"{there} is on {kind}, mounted with {', '.join(alone)}: no lock reaches others"
        return "fault", text, "start runs on one machine alone, or mount it without"
    # A program that shows files (FUSE) may keep locks to itself: with bindfs and rclone, a lock on
    # the mount kept nobody out of the folder below it.
    if kind in NETWORK or (kind.startswith("fuse") and kind != "fuseblk"):
        text = f"{works}; between machines this was not tried"
        how = "while a run is under way here, `rlhf-recipes runs` on another machine has to say so;"
        return "doubt", text, f"{how} label on one machine alone"
    return "good", works


def tried(folder: Path) -> str:
    """What does not work in a folder; nothing where all does."""
    with tempfile.TemporaryDirectory(prefix=".tried-", dir=folder) as name:
        held, file = Path(name, "held"), Path(name, "file")
        file.write_text("old")
        command = [sys.executable, "-I", "-S", "-c", CHILD, locks.lock_file(held), file]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        try:
            with contextlib.ExitStack() as ends:
                with locks.lock(held, "a lock"):
                    child = ends.enter_context(subprocess.Popen(command, text=True, **pipes))
                    ends.callback(child.kill)
                    first = child.stdout.readline().strip()
                    write_text(file, "new")
                rest, failed = child.communicate("\n", timeout=PATIENCE)
        except (
            OSError,
            NotImplementedError,
            subprocess.SubprocessError,
            RlhfRecipesError,
        ) as error:
            return f"a lock or a rename fails: {error}"
    if child.returncode:
        return f"a lock or a rename fails: {failed.strip().rpartition(chr(10))[2]}"
    said = zip(WANTED.items(), [first, *rest.split("\n")], strict=False)
    return "; ".join(wrong for (wanted, wrong), line in said if line != wanted)
