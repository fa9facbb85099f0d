"""What a card does: right or not, how fast, how much memory. One command, ten minutes at most.

    python -m benchmarks.gpu --out DIR          on a card (make gpu)
    python -m benchmarks.gpu --out DIR --quick  every item on a CPU with the smoke model

Each item is a process of its own with a limit of its own, and its row is appended to
DIR/gpu.jsonl as soon as it ends: a death or a timeout loses one row. Correctness comes first, so a
run that is cut off still says whether anything works. DIR/gpu.json and a table are written at the
end; the exit code is 1 where a row of correctness failed.

Models larger than the smoke model have random weights: made on the card from the shapes of
Qwen2.5-0.5B, Qwen2.5-1.5B and Llama-3.1-8B. No answer of theirs ends early, so every answer has its
full length.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from rlhf_recipes.store.provenance import hardware, versions

ROOT = Path(__file__).parents[1]
# Name, seconds at most, and whether it is about correctness; the most important first.
ITEMS = (
    ("device", 60, True),
    ("chain", 150, True),
    ("bytes", 150, True),
    ("smoke3", 150, True),
    ("sampling", 150, False),
    ("ppo_small", 120, False),
    ("ppo_large", 150, False),
    ("learning", 60, False),
    ("memory_8b", 260, False),
)
QUICK_SECONDS = 420  # of an item on a CPU that others use, too


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu"))
    parser.add_argument("--quick", action="store_true", help="on a CPU, with the smoke model")
    parser.add_argument("--only", default="", help="names of items, with commas")
    parser.add_argument("--limit", type=float, default=570, help="seconds in all")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    wanted = args.only.split(",") if args.only else [name for name, *_ in ITEMS]
    began, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        for name, most, right in ITEMS:
            left = args.limit - (time.monotonic() - began)
            if name not in wanted or (left < 15 and not args.quick):
                continue
            limit = QUICK_SECONDS if args.quick else min(most, left)
            row = {"item": name, "correctness": right, **_item(name, Path(work), limit, args.quick)}
            rows.append(row)
            with (args.out / "gpu.jsonl").open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            print(_line(row), flush=True)
    about = {"date": date.today().isoformat(), "quick": args.quick, "versions": versions()}
    found = {**about, "hardware": hardware(), "rows": rows}
    (args.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(any(row["correctness"] and row["status"] != "ok" for row in rows))


def _item(name: str, work: Path, limit: float, quick: bool) -> dict[str, Any]:
    """One item in a process of its own; what it printed last is its row."""
    command = [sys.executable, "-m", "benchmarks.gpu_items", name, str(work), str(int(quick))]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=out, stderr=errors, start_new_session=True
        )
        try:
            code: int | None = child.wait(limit)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, 9)
            child.wait()
            code = None
        out.seek(0), errors.seek(0)
        lines, said = out.read().strip().split("\n"), errors.read()
    seconds = round(time.monotonic() - began, 1)
    try:
        found = json.loads(lines[-1])
    except ValueError:
        found = {}
    status = "timeout" if code is None else found.pop("status", "ok" if code == 0 else "failed")
    row = {"status": status if code in (0, None) else "failed", "seconds": seconds, **found}
    return row if row["status"] == "ok" else row | {"stderr": said[-1500:]}


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "RLHF_RECIPES_ALLOW_CODE": "1",
        **more,
    }


def _line(row: dict[str, Any]) -> str:
    about = ("item", "correctness", "status", "seconds", "stderr")
    said = "; ".join(f"{key} {_short(value)}" for key, value in row.items() if key not in about)
    return f"| {row['item']} | {row['status']} | {row['seconds']} s | {said} |"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


if __name__ == "__main__":
    main()
