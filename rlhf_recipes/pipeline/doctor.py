"""What this machine has and lacks, a line each: what is, and where it is wrong, what to do.

Nothing of a run is needed for it, and each question stands alone: one that fails is a line too.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

from rlhf_recipes.errors import briefly
from rlhf_recipes.findings import Finding, Found
from rlhf_recipes.pipeline import places
from rlhf_recipes.sources.hub import TIMEOUT, bound, says_no
from rlhf_recipes.text import size

LEAST_MEMORY = 4 * 2**30
LEAST_DISK = 10 * 2**30
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"  # in a clone
DRIVER = Path("/proc/driver/nvidia/version")
# The oldest driver of a CUDA's major version on Linux, of NVIDIA's release notes.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}

Answers = Iterator[tuple[str, ...]]  # level, text, and what to do where there is something


def doctor(runs: Path) -> list[Finding]:
    """Every question and its answer, the heavy ones last."""
    questions = {
        "device": device,
        "precision": bfloat16,
        "memory": memory,
        "4 bit": four_bit,
        "versions": versions,
        "hub": hub,
        "disk": partial(disk, runs),
        "runs": partial(where, runs),
    }
    return [line for about, question in questions.items() for line in answered(about, question)]


def short(runs: Path) -> list[Finding]:
    """The three lines that matter before a run: where it computes, its memory, its disk."""
    questions = {"device": device, "memory": memory, "disk": partial(disk, runs)}
    return [next(answered(about, question)) for about, question in questions.items()]


def answered(about: str, question: Callable[[], Answers]) -> Found:
    try:
        for level, *words in question():
            yield Finding(level, about, *words)
    except Exception as error:  # a library that is broken is what is asked about
        change = "install the versions of constraints.txt again"
        yield Finding("fault", about, briefly(error), change)


def _good_unless(wrong: bool, text: str, change: str) -> tuple[str, ...]:
    return ("doubt", text, change) if wrong else ("good", text)


# ---- the questions ------------------------------------------------------------------------------


def device() -> Answers:
    """Where stages compute; a card that torch does not use is said, and why it does not."""
    import torch

    seen, built, version = _driver(), torch.version.cuda, torch.__version__
    if torch.cuda.is_available():
        first, *others = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        more = f"; the other {len(others)} stay idle" if others else ""
        yield "good", f"{first}, torch {version}{more}"
        able = torch.cuda.get_device_capability()
        known = [int(arch[3:]) for arch in torch.cuda.get_arch_list() if arch[3:].isdigit()]
        if known and able[0] * 10 + able[1] < min(known):
            change = "install a torch that was built for it"
            yield "fault", f"this torch has no code for compute {able}", change
        return
    if not seen:
        text = f"no NVIDIA driver: all on {torch.get_num_threads()} threads of the processor"
        yield "note", f"{text}, torch {version}"
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why, change = "CUDA does not start", "is CUDA_VISIBLE_DEVICES right? `nvidia-smi` says more"
    if torch.version.hip or built is None:
        why, change = f"torch {version} was built without CUDA", "install it with CUDA"
    elif hidden is not None and not re.match(r"\d|GPU|MIG", hidden):
        why, change = f"CUDA_VISIBLE_DEVICES={hidden!r} hides it", "unset CUDA_VISIBLE_DEVICES"
    elif int(seen.split(".")[0]) < (least := OLDEST_DRIVER.get(int(built.split(".")[0]), 0)):
        why = f"CUDA {built}, which torch was built for, needs driver {least}"
        change = "update the driver, or install a torch for an older CUDA"
    text = f"a card with driver {seen}, but torch computes on the processor: {why}"
    yield "fault", text, change


def _driver() -> str:
    """The version of NVIDIA's driver; nothing where there is none."""
    with contextlib.suppress(OSError):
        if found := re.search(r"Module.*?\s(\d+\.[\d.]+)", DRIVER.read_text()):
            return found[1]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(ask, capture_output=True, text=True, timeout=10)
        if said.returncode == 0 and re.fullmatch(r"[\d.]+", first := said.stdout.split("\n")[0]):
            return first
    return ""


def bfloat16() -> Answers:
    import torch

    from rlhf_recipes.models.load import compute_dtype

    auto = str(compute_dtype("auto")).removeprefix("torch.")
    if auto == "bfloat16":
        yield "good", 'bfloat16 in hardware: dtype = "auto" uses it'
    else:
        where = "card" if torch.cuda.is_available() else "processor"
        yield "note", f'no bfloat16 in this {where}: dtype = "auto" means {auto}'


def memory() -> Answers:
    """What is free now, of each card and of the machine."""
    import psutil
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for card in range(count):
        free, whole = torch.cuda.mem_get_info(card)
        whose = f"card {card}'s" if count > 1 else "the card's"
        text = f"{size(free)} of {whose} {size(whole)} free"
        text += f": {torch.cuda.get_device_name(card)}" if count > 1 else ""
        change = "end what else uses the card: `nvidia-smi` lists it"
        yield _good_unless(free < 0.8 * whole, text, change)
    held = psutil.virtual_memory()
    text = f"{size(held.available)} of {size(held.total)} free"
    change = "end what else runs, or take a smaller model"
    yield _good_unless(held.available < LEAST_MEMORY, text, change)


def four_bit() -> Answers:
    """One real step: a 4-bit layer with gradients to what comes before it, on this device."""
    import bitsandbytes
    import torch

    from rlhf_recipes.models.load import device as here

    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
    whole = layer.weight.data.clone().float()
    layer.support_avx512bf16_for_cpu = False  # as models.py has it: that path has no gradient
    layer = layer.to(here())
    x = torch.randn(4, 64, device=here(), requires_grad=True)
    y = layer(x)
    y.square().mean().backward()
    exact = x.detach().cpu() @ whole.T
    error = ((y.detach().cpu().float() - exact).norm() / exact.norm()).item()
    if x.grad is None or not 0 < x.grad.norm() < float("inf") or not error < 0.3:
        change = 'install the bitsandbytes of constraints.txt; until then, quantization = "none"'
        yield "fault", f"a step comes out wrong (off by {error:.0%})", change
    else:
        text = f"a step on {here().type} with bitsandbytes {bitsandbytes.__version__} comes out "
        yield "good", f"{text}right (off by {error:.0%}, as 4 bit is)"


def versions() -> Answers:
    """What is installed against the versions that the tests ran with."""
    rows = []
    with contextlib.suppress(OSError):
        rows = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    wanted = [row.strip().split("==") for row in rows if "==" in row and row[0] != "#"]
    other, seen = [], 0
    for name, version in wanted:
        with contextlib.suppress(metadata.PackageNotFoundError):
            there, seen = metadata.version(name), seen + 1
            if there.partition("+")[0] != version:
                other.append(f"{name} {there}, tested with {version}")
    if not wanted:
        yield "note", "no constraints.txt beside this installation to compare with"
    elif other:
        more = f"; {len(other) - 4} more" if len(other) > 4 else ""
        change = f"`pip install -c {CONSTRAINTS.name} -e .`, in the clone, for the tested ones"
        yield "doubt", "; ".join(other[:4]) + more, change
    else:
        yield "good", f"as in constraints.txt, {seen} of them"


def hub() -> Answers:
    """Whether the hub answers, in `TIMEOUT`, and whether it knows the token, if there is one."""
    from huggingface_hub import HfApi, constants, get_session, get_token

    where = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        yield "note", "HF_HUB_OFFLINE is set: what is cached is used, the rest is not to be had"
        return
    trouble = "does not answer"
    change = "see the network and the proxy; what is cached, local folders and mirrors work"
    bound()
    try:
        answer = get_session().get(f"{where}/api/models?limit=1", timeout=TIMEOUT)
        if answer.is_server_error:
            answer.raise_for_status()
        if get_token() is None:
            yield "good", f"{where} answers; no token, which public repositories do not need"
            return
        HfApi().whoami()
        yield "good", f"{where} answers, and knows the token"
    except Exception as error:
        if says_no(error):
            trouble, change = "refuses the token", "set HF_TOKEN to one that is valid, or unset it"
        yield "doubt", f"{where} {trouble} ({type(error).__name__})", change


def disk(runs: Path) -> Answers:
    """Room and right to write where runs are kept; and whether others may write there."""
    there, elsewhere = places.existing(runs), places.ELSEWHERE
    free = shutil.disk_usage(there).free
    room = f"{size(free)} free for {runs}"
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:  # a file, another's folder, a disk that is read-only or full
        yield "fault", f"{there} cannot be written to ({error.strerror})", elsewhere
        return
    change = f"`rlhf-recipes clean` removes what no run needs; {elsewhere}"
    yield _good_unless(free < LEAST_DISK, room, change)
    if runs.is_dir() and runs.stat().st_mode & 0o002:
        yield "doubt", f"anyone on this machine may change what is in {runs}", f"chmod o-w {runs}"


def where(runs: Path) -> Answers:
    """Whether locks and renames work there, of which a run makes use."""
    there = places.existing(runs)
    if there.is_dir() and os.access(there, os.W_OK):  # else "disk" says so
        yield places.fit(runs)
