"""What a result was made with: the time, the versions of libraries, the machine."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

LIBRARIES = "rlhf-recipes trl transformers torch peft accelerate datasets bitsandbytes".split()


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
        if build := re.search(r"^__version__ = '(.+)'", Path(str(file)).read_text(), re.MULTILINE):
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
