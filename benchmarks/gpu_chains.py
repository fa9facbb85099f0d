"""The items of `benchmarks.gpu` that run the smoke chain: by precision, again, and by seed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import ROOT, environment

Row = dict[str, Any]
CPU_SMOKE = {"reward.accuracy": [0.961, 0.971, 0.956], "ppo.win_rate": [0.912, 0.912, 0.891]}

SHORT = [
    "sft.max_steps=8",
    "reward.max_steps=10",
    "ppo.total_episodes=256",
    "ppo.guard.max_kl=1e9",
    "ppo.minimum_accuracy=0",
    "ppo.logging_steps=1",
    "evaluation.prompts=16",
]
# On a CPU, where no number counts: as little as goes through every stage, and can be resumed.
QUICK = [
    *SHORT,
    "dataset.max_rows=160",
    "sft.dataset.max_rows=160",
    "sft.max_steps=2",
    "reward.max_steps=2",
    "ppo.total_episodes=24",
    "ppo.per_device_train_batch_size=4",
    "ppo.eval_steps=1.0",  # before the first update, and after the last
    "evaluation.prompts=4",
]
PRECISIONS = {
    "float32": ["model.dtype=float32"],
    "bfloat16": ["model.dtype=bfloat16"],
    "float16": ["model.dtype=float16"],
    "8bit": ["model.dtype=bfloat16", "model.quantization=8bit"],
    "4bit": ["model.dtype=bfloat16", "model.quantization=4bit"],
}


def _start(runs: Path, words: list[str], name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rlhf_recipes", "run", "smoke", "--no-rehearsal"]
    command += ["--runs", str(runs), "--name", name, *(f"--set={word}" for word in words)]
    runs.mkdir(parents=True, exist_ok=True)
    with (runs / f"{name}.out").open("a") as out:
        env = environment(OMP_NUM_THREADS="1" if "dataset.max_rows=160" in words else "2")
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out, text=True)


def _ended(child: subprocess.Popen[str], runs: Path, name: str) -> Row:
    code = child.wait()
    if code == 0:
        return {"ok": True}
    log = (runs / f"{name}.out").read_text(errors="replace")[-600:]
    return {"ok": False, "exit": code, "said": log}


def _numbers(runs: Path, name: str) -> Row:
    file = runs / name / "results.json"
    return json.loads(file.read_text()) if file.exists() else {}


def _curve(runs: Path, kind: str) -> list[Row]:
    files = sorted((runs / ".stages").glob(f"{kind}-*/metrics.jsonl"))
    return [json.loads(line) for line in files[-1].read_text().splitlines()] if files else []


def chain(work: Path, quick: bool) -> Row:
    """Every stage in every precision, side by side: which run, and PPO's first update."""
    wanted = ["bfloat16"] if quick else [*PRECISIONS]  # float32 is what the other chains run in
    short = QUICK if quick else SHORT
    runs = {name: work / f"chain-{name}" for name in wanted}
    started = {n: _start(runs[n], short + PRECISIONS[n], n) for n in wanted}
    found = {n: _ended(child, runs[n], n) for n, child in started.items()}
    for name, row in found.items():
        if curve := _curve(runs[name], "ppo"):
            keys = ("objective/kl", "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio")
            row["first"] = {key: curve[0][key] for key in keys if key in curve[0]}
        row["sft_loss"] = _numbers(runs[name], name).get("sft.validation_loss")
    good = all(row["ok"] for name, row in found.items())
    return {"status": "ok" if good else "failed", **found}


def same_bytes(work: Path, quick: bool) -> Row:
    """The same chain twice, and once killed during PPO and gone on: the same policy's bytes?"""
    row: Row = {"status": "ok"}
    dtypes = ("float32",) if quick else ("float32", "bfloat16")
    short = [word for word in (QUICK if quick else SHORT) if not word.startswith("evaluation")]
    short += ["ppo.save_steps=1", "evaluation=false"]
    words = {dtype: [*short, f"model.dtype={dtype}"] for dtype in dtypes}
    runs = {d: {n: work / f"bytes-{d}-{n}" for n in ("once", "again", "killed")} for d in dtypes}
    children, killed = {}, {}
    for name in ("killed",) if quick else ("killed", "once", "again"):
        for dtype in dtypes:
            children[dtype, name] = _start(runs[dtype][name], words[dtype], name)
    for dtype in dtypes:
        one = children[dtype, "killed"], runs[dtype]["killed"]
        killed[dtype] = _kill_at(*one, "checkpoint-000002")
        children[dtype, "killed"] = _start(runs[dtype]["killed"], words[dtype], "killed")
    for name in ("once", "again") if quick else ():  # one at a time: a CPU has few cores
        for dtype in dtypes:
            children[dtype, name] = _start(runs[dtype][name], words[dtype], name)
            children[dtype, name].wait()
    for dtype in dtypes:
        ended = [_ended(children[dtype, name], runs[dtype][name], name) for name in runs[dtype]]
        if not killed[dtype] or not all(one["ok"] for one in ended):
            row |= {"status": "failed", dtype: ended, "killed": killed}
            continue
        once = runs[dtype]["once"]
        row[dtype] = {
            "run_to_run": _compared(once, runs[dtype]["again"]),
            "resumed": _compared(once, runs[dtype]["killed"]),
        }
        print(json.dumps(row), flush=True)
    return row


def _kill_at(child: subprocess.Popen[str], runs: Path, checkpoint: str) -> bool:
    """Whether the child was killed as soon as it had that checkpoint, and not over before."""
    while child.poll() is None:
        if any((runs / ".stages").glob(f"ppo-*/work/{checkpoint}")):
            child.send_signal(signal.SIGKILL)
            child.wait()
            return True
        time.sleep(0.005)
    return False


def _compared(one: Path, other: Path) -> Row:
    """Whether two runs' policies are the same, by stage, and how far PPO's are apart at most."""
    from safetensors.torch import load_file

    row: Row = {}
    for kind in ("sft", "reward", "ppo"):
        place = f"{kind}-*/output/adapter_model.safetensors"
        files = [next((runs / ".stages").glob(place)) for runs in (one, other)]
        row[kind] = files[0].read_bytes() == files[1].read_bytes()
        a, b = (load_file(file) for file in files)
        row[f"{kind}_apart"] = max(float((a[key] - b[key]).abs().max()) for key in a)
    return row


def smoke3(work: Path, quick: bool) -> Row:
    """The smoke recipe in full, by three seeds: does it learn on a card as it does on a CPU?"""
    seeds = (42,) if quick else (42, 1, 2)
    few = QUICK if quick else []
    runs = {seed: work / f"smoke-{seed}" for seed in seeds}
    began = time.monotonic()
    started = {seed: _start(runs[seed], [*few, f"seed={seed}"], "smoke") for seed in seeds}
    ended = [_ended(child, runs[seed], "smoke") for seed, child in started.items()]
    row: Row = {"wall": round(time.monotonic() - began, 1), "cpu": CPU_SMOKE}
    for key in ("reward.accuracy", "ppo.win_rate", "ppo.judge_win_rate", "ppo.kl", "ppo.ended"):
        row[key] = [_numbers(runs[seed], "smoke").get(key) for seed in seeds]
    good = all(one["ok"] for one in ended)
    return {"status": "ok" if good else "failed", **row, **({} if good else {"ended": ended})}
