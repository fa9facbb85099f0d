"""The disk layout: runs, stage folders, records, locks, provenance.

A stage folder is complete where its `stage.json` stands: it is written last, to a temporary name,
synced, then renamed. Nothing on disk says "running"; a lock is a kernel lock that dies with its
process, so nobody ever clears one by hand.

    <runs>/<name>/                    one run: recipe, manifest, results, log, model/
    <runs>/.stages/<kind>-<key12>/    one stage, shared by all runs: stage.json, work/, output/, …

Beside each lies its lock, `.<name>.lock`, and while it is replaced what is to take its place and
what had it: `.<name>.fresh`, `.<name>.old`.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from rlhf_recipes.errors import BusyError, UsageError

FORMAT = 1  # of every JSON file here
RECORD = "stage.json"
MANIFEST = "manifest.json"
REPORT = "report.html"
FRESH = ".fresh"  # in a run's folder: when its pass of `--fresh` began that is not finished
CHECKPOINTS = "checkpoint-*"  # in a stage's work/
BEGUN = "begun"  # there, too: when the pass of `--fresh` began that the stage is computed in
LIBRARIES = "rlhf-recipes trl transformers torch peft accelerate datasets bitsandbytes".split()


def runs_folder(given: Path | None = None) -> Path:
    """`--runs`, else RLHF_RECIPES_RUNS, else ./runs."""
    return given or Path(os.environ.get("RLHF_RECIPES_RUNS") or "runs")


def stage_folder(runs: Path, kind: str, key: str) -> Path:
    return runs / ".stages" / f"{kind}-{key[:12]}"


def entry_folder(runs: Path, entry: dict[str, Any]) -> Path:
    """The folder of a stage in a manifest: one of the stages here, whatever the manifest says."""
    return runs / ".stages" / re.sub(r"[^\w-]", "_", Path(str(entry["folder"])).name)


def find_run(word: str, runs: Path) -> Path:
    """The run that a person means: its folder, or its name. Raises UsageError with the nearest."""
    for folder in (Path(word), runs / word):
        if (folder / MANIFEST).is_file():
            return folder
    known = sorted(manifest.parent.name for manifest in runs.glob(f"*/{MANIFEST}"))
    near = difflib.get_close_matches(Path(word).name, known, n=1, cutoff=0.5)
    hint = f"runs there: {', '.join(known)}" if known else "none was made there yet"
    if near:
        hint = f"did you mean {runs / near[0]}?"
    raise UsageError(f"no run {word!r} in {runs}", hint)


# ---- JSON ---------------------------------------------------------------------------------------


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinity become null, scalars of torch and NumPy plain numbers."""
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    number = value.item() if hasattr(value, "item") else value
    return None if isinstance(number, float) and not math.isfinite(number) else number


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_text(path, to_json({"format": FORMAT, **value}, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all, also when the power fails: temporary name, sync, rename, sync."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file of ours; None where it is missing, damaged or of another format."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and value.get("format") == FORMAT else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- stage folders ------------------------------------------------------------------------------


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a complete stage; None where the stage is not complete."""
    return read_json(folder / RECORD)


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Complete the stage. What it made is synced first: the record must not outlive it."""
    sync_all(folder)
    write_json(folder / RECORD, record)


def clear_stage(folder: Path, *, begun: str = "") -> None:
    """Make the stage folder ready to run in; only for who holds its lock, and where no record is.

    A stage's checkpoints stay, and the numbers and samples that led to them; of those that were
    made when nothing was to be taken as done, only those of the pass that `begun` names.
    """
    work, folder = folder / "work", folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    _sync(folder.parent)
    goes_on = any(work.glob(CHECKPOINTS)) and begun in ("", _read(work / BEGUN))
    for path in folder.iterdir():
        if not (goes_on and path.name in ("work", "metrics.jsonl", "samples.jsonl", "tensorboard")):
            remove(path)
    work.mkdir(exist_ok=True)
    (folder / "output").mkdir()
    if begun:
        write_text(work / BEGUN, begun)


def tidy(folder: Path) -> None:
    """Let go of what a complete folder has no use for: its checkpoints, and what it replaced."""
    for path in (folder / "work", beside(folder, "old")):
        with contextlib.suppress(OSError):
            remove(path)


def beside(folder: Path, what: str) -> Path:
    """Where a run's or a stage's `what` lies: beside the folder itself, wherever a link is."""
    folder = folder.resolve()
    return folder.with_name(f".{folder.name}.{what}")


def swap(new: Path, folder: Path) -> None:
    """`new`, on the same disk, takes the place of `folder`."""
    old, folder = beside(folder, "old"), folder.resolve()
    remove(old)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    _sync(folder.parent)
    with contextlib.suppress(OSError):  # another process may be at it; `tidy` comes again
        remove(old)


def settle(folder: Path) -> None:
    """End a swap that was cut off; only for who holds the stage's lock."""
    if read_record(beside(folder, "fresh")) is not None:
        swap(beside(folder, "fresh"), folder)


def remove(path: Path) -> None:
    """A file, a folder with all that is in it, or a link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_all(folder: Path) -> None:
    """What was written below `folder` outlives a power failure from here on."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            _sync(path)


def begun(run_folder: Path) -> str:
    """When the pass of `--fresh` began that is under way; now, where none is."""
    if _read(run_folder / FRESH) is None:
        write_text(run_folder / FRESH, now())
    return (run_folder / FRESH).read_text(encoding="utf-8")


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


# ---- locks --------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(folder: Path, what: str, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold `folder` for this process alone, by a file beside it.

    Where another process holds it: raises BusyError, which names that process; or tells `waiting`
    the same, and waits.
    """
    file = lock_file(folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(file, "a+", encoding="utf-8", opener=no_link) as stream:
            if not _got(stream):
                stream.seek(0)
                held = f"{what} is held by {stream.read().strip() or 'another process'}"
                if waiting is None:
                    raise BusyError(
                        held, "--wait waits for it; nothing needs to be cleared by hand"
                    )
                waiting(f"{held}: waiting for it")
                fcntl.flock(stream, fcntl.LOCK_EX)
            if not _is_still(file, stream):
                continue  # who had it removed the file, and a third may hold a new one
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {platform.node()} since {now()}\n")
            stream.flush()
            yield
            return


def no_link(file: str, flags: int) -> int:
    """An opener: what a link in a stranger's runs folder leads to is not ours to write to."""
    return os.open(file, flags | os.O_NOFOLLOW, 0o666)


def _got(stream: IO[str]) -> bool:
    """Whether the lock is ours now. Asked twice: who only looks (`held`) has it for an instant."""
    for pause in (0.05, 0.0):
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(pause)
    return False


def held(folder: Path) -> bool:
    """Whether a live process holds `folder`; nothing is made or written to find out."""
    with contextlib.suppress(FileNotFoundError), lock_file(folder).open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def lock_file(folder: Path) -> Path:
    return beside(folder, "lock")


def _is_still(file: Path, stream: IO[str]) -> bool:
    """Whether an open file is still the one of that name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(file.stat(), os.fstat(stream.fileno()))
    return False


# ---- provenance ---------------------------------------------------------------------------------


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@functools.cache
def versions() -> dict[str, str]:
    """Of Python and of the libraries that a result depends on, read without importing them."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    # A wheel from PyPI says which CUDA it was built for in here alone.
    with contextlib.suppress(importlib.metadata.PackageNotFoundError, OSError):
        file = importlib.metadata.distribution("torch").locate_file("torch/version.py")
        if build := re.search(r"^__version__ = '(.+)'", Path(file).read_text(), re.MULTILINE):
            found["torch"] = build[1]
    return found


def hardware() -> dict[str, Any]:
    """This machine, without torch: a run that finds everything cached never loads it."""
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    models = [re.search(r"^Model:[ \t]*(.*\S)", gpu.read_text(), re.MULTILINE) for gpu in gpus]
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS"),  # None: as many as torch finds right
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": [model[1] if model else "unknown" for model in models],
    }
