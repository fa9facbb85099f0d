"""What this machine has and lacks, a line each: what is, and where it is wrong, what to do.

Nothing of a run is needed for it, and each question stands alone: one that fails is a line too.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from rlhf_recipes.errors import masked
from rlhf_recipes.hub import TIMEOUT

MARKS = {"good": "✓", "note": "·", "doubt": "?", "fault": "✗"}
LEAST_MEMORY = 4 * 2**30
LEAST_DISK = 10 * 2**30
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"  # in a clone
DRIVER = Path("/proc/driver/nvidia/version")
# The oldest driver of a CUDA's major version on Linux, of NVIDIA's release notes.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


@dataclass(frozen=True)
class Line:
    level: str  # of MARKS
    about: str
    text: str
    change: str = ""  # what to do

    def __str__(self) -> str:
        after = f"\n  → {self.change}" if self.change else ""
        return masked(f"{MARKS[self.level]} {self.about:<10} {self.text}{after}")


def doctor(runs: Path) -> list[Line]:
    """Every question and its answer, the heavy ones last."""
    asked = (device, bfloat16, memory, four_bit, versions, hub, lambda: disk(runs))
    return [line for question in asked for line in _answered(question)]


def short(runs: Path) -> list[Line]:
    """The three lines that matter before a run: where it computes, its memory, its disk."""
    return (
        [*_answered(device)][:1] + [*_answered(memory)][:1] + [*_answered(lambda: disk(runs))][:1]
    )


def _answered(question: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    try:
        yield from question()
    except Exception as error:  # a library that is broken is what is asked about
        about = getattr(question, "__name__", "disk").strip("<>").replace("_", " ")
        reason = (str(error).strip() or "fails").partition("\n")[0]
        what = f"{type(error).__name__}: {reason[:160]}"
        yield Line("fault", about, what, "install the versions of constraints.txt again")


# ---- the questions ------------------------------------------------------------------------------


def device() -> Iterator[Line]:
    """Where stages compute; a card that torch does not use is said, and why it does not."""
    import torch

    seen, built = _driver(), torch.version.cuda
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        more = f"; the other {len(cards) - 1} stay idle" if len(cards) > 1 else ""
        yield Line("good", "device", f"{cards[0]}, torch {torch.__version__}{more}")
        able = torch.cuda.get_device_capability()
        known = [int(arch[3:]) for arch in torch.cuda.get_arch_list() if arch[3:].isdigit()]
        if known and able[0] * 10 + able[1] < min(known):
            change = "install a torch that was built for it"
            yield Line("fault", "device", f"this torch has no code for compute {able}", change)
    elif not seen:
        text = f"no NVIDIA driver: all on {torch.get_num_threads()} threads of the processor"
        yield Line("note", "device", f"{text}, torch {torch.__version__}")
    else:
        text = f"a card with driver {seen}, but torch computes on the processor: "
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if torch.version.hip or built is None:
            why, change = (
                f"torch {torch.__version__} was built without CUDA",
                "install it with CUDA",
            )
        elif hidden is not None and not re.match(r"\d|GPU|MIG", hidden):
            why, change = f"CUDA_VISIBLE_DEVICES={hidden!r} hides it", "unset CUDA_VISIBLE_DEVICES"
        elif int(seen.split(".")[0]) < (least := OLDEST_DRIVER.get(int(built.split(".")[0]), 0)):
            why = f"CUDA {built}, which torch was built for, needs driver {least}"
            change = "update the driver, or install a torch for an older CUDA"
        else:
            why, change = "CUDA does not start", "`nvidia-smi` says more; try after a restart"
        yield Line("fault", "device", text + why, change)


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


def bfloat16() -> Iterator[Line]:
    import torch

    from rlhf_recipes.models import compute_dtype

    auto = str(compute_dtype("auto")).removeprefix("torch.")
    if auto == "bfloat16":
        yield Line("good", "precision", 'bfloat16 in hardware: dtype = "auto" uses it')
    else:
        where = "card" if torch.cuda.is_available() else "processor"
        text = f'no bfloat16 in this {where}: dtype = "auto" means {auto}'
        yield Line("note", "precision", text)


def memory() -> Iterator[Line]:
    """What is free now, of the card and of the machine."""
    import torch

    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        used = free < 0.8 * whole
        change = "end what else uses the card: `nvidia-smi` lists it" if used else ""
        text = f"{_gb(free)} of the card's {_gb(whole)} free"
        yield Line("doubt" if used else "good", "memory", text, change)
    import psutil

    held = psutil.virtual_memory()
    few = held.available < LEAST_MEMORY
    text = f"{_gb(held.available)} of {_gb(held.total)} free"
    change = "end what else runs, or take a smaller model" if few else ""
    yield Line("doubt" if few else "good", "memory", text, change)


def four_bit() -> Iterator[Line]:
    """One real step: a 4-bit layer with gradients to what comes before it, on this device."""
    import bitsandbytes
    import torch

    from rlhf_recipes.models import device as here

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
        yield Line("fault", "4 bit", f"a step comes out wrong (off by {error:.0%})", change)
    else:
        text = (
            f"a step on {here().type} with bitsandbytes {bitsandbytes.__version__} comes out right"
        )
        yield Line("good", "4 bit", f"{text} (off by {error:.0%}, as 4 bit is)")


def versions() -> Iterator[Line]:
    """What is installed against the versions that the tests ran with."""
    wanted = {}
    with contextlib.suppress(OSError):
        for row in CONSTRAINTS.read_text(encoding="utf-8").splitlines():
            name, _, version = row.partition("==")
            wanted[name] = version.strip() if not row.startswith("#") else ""
    wanted = {name: version for name, version in wanted.items() if version}
    other = []
    for name, version in wanted.items():
        with contextlib.suppress(metadata.PackageNotFoundError):
            if (there := metadata.version(name)).partition("+")[0] != version:
                other.append(f"{name} {there}, tested with {version}")
    if not wanted:
        yield Line(
            "note", "versions", "no constraints.txt beside this installation to compare with"
        )
    elif other:
        shown = "; ".join(other[:4]) + (f"; {len(other) - 4} more" if len(other) > 4 else "")
        yield Line(
            "doubt", "versions", shown, f"pip install -c {CONSTRAINTS.name} for the tested ones"
        )
    else:
        yield Line("good", "versions", f"as in constraints.txt, {len(wanted)} of them")


def hub() -> Iterator[Line]:
    """Whether the hub answers, in `TIMEOUT`, and whether it knows the token, if there is one."""
    from huggingface_hub import HfApi, constants, get_session, get_token

    where = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        text = "HF_HUB_OFFLINE is set: what is cached is used, the rest is not to be had"
        yield Line("note", "hub", text)
        return
    try:
        get_session().get(f"{where}/api/models?limit=1", timeout=TIMEOUT)
    except Exception as error:
        change = "see the network and the proxy; what is cached, local folders and mirrors work"
        yield Line("doubt", "hub", f"{where} does not answer ({type(error).__name__})", change)
        return
    if get_token() is None:
        yield Line(
            "good", "hub", f"{where} answers; no token, which public repositories do not need"
        )
        return
    try:
        HfApi().whoami()
    except Exception as error:
        change = "set HF_TOKEN to one that is valid, or unset it"
        yield Line("doubt", "hub", f"{where} refuses the token ({type(error).__name__})", change)
    else:
        yield Line("good", "hub", f"{where} answers, and knows the token")


def disk(runs: Path) -> Iterator[Line]:
    """Room and right to write where runs are kept; and whether others may write there."""
    there = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        change = "--runs DIR keeps runs elsewhere"
        yield Line("fault", "disk", f"{there} is not yours to write to", change)
    elif free < LEAST_DISK:
        change = "`rlhf-recipes clean` removes what no run needs; --runs DIR keeps runs elsewhere"
        yield Line("doubt", "disk", f"{_gb(free)} free for {runs}", change)
    else:
        yield Line("good", "disk", f"{_gb(free)} free for {runs}")
    if runs.is_dir() and runs.stat().st_mode & 0o002:
        change = f"chmod o-w {runs}"
        yield Line("doubt", "disk", f"anyone on this machine may change what is in {runs}", change)


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
