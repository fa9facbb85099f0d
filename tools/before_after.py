"""Six test prompts of a run, as Markdown: what was answered before PPO and after it, unedited.

    python tools/before_after.py runs/chat

The rule: the prompts are ordered by how much PPO's answer gained over SFT's, in the reward model's
units, and the middle one of each sixth is taken. So the first is among the worst, the last among
the best.
"""

import json
import sys
from pathlib import Path

SHOWN = 6


def main(run: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    [evaluation] = [stage for stage in manifest["stages"] if stage["kind"] == "evaluation"]
    folder = run.parent / evaluation["folder"] / "output"
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted((json.loads(line) for line in lines), key=gain)
    print("| asked | SFT | PPO | gain |\n|---|---|---|---|")
    for sixth in range(SHOWN):
        row = rows[round((sixth + 0.5) / SHOWN * len(rows))]
        texts = (row["prompt"], row["answers"]["sft"], row["answers"]["ppo"])
        cells = " | ".join(" ".join(text.split()).replace("|", "\\|") for text in texts)
        print(f"| {cells} | {gain(row):+.2f} |")


def gain(row: dict) -> float:
    return row["scores"]["ppo"] - row["scores"]["sft"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
