"""Make the chat recipe's training, test and demonstration files from feedback.jsonl.

Who goes where depends on digests of the prompts alone: the same feedback gives the same files.
"""

import argparse
import hashlib
import json
from collections import defaultdict
from pathlib import Path

Row = dict[str, str]

HERE = Path(__file__).parent
TEST_PAIRS = 1 / 6  # of each failure's pairs, so that the test measures all seven alike
TEST_PROMPTS = 136  # of the prompts alone; the others are for PPO to practise on
BETTER = 2 / 3  # of the pairs also demonstrate the better answer; all demonstrate the worse one


def by_digest(rows: list[Row], purpose: str) -> list[Row]:
    """The rows in an order that is another for each purpose, and by chance for all of them."""
    return sorted(rows, key=lambda r: hashlib.sha256(f"{purpose} {r['prompt']}".encode()).digest())


def find_test(feedback: list[Row]) -> set[str]:
    """The prompts of the test side: a share of each failure's pairs, and of the prompts alone."""
    kinds: defaultdict[str, list[Row]] = defaultdict(list)
    for row in feedback:
        kinds[row.get("failure", "")].append(row)
    test = by_digest(kinds.pop(""), "test")[:TEST_PROMPTS]
    for rows in kinds.values():
        test += by_digest(rows, "test")[: round(TEST_PAIRS * len(rows))]
    return {row["prompt"] for row in test}


def as_pair(row: Row) -> Row:
    """The row in the shape that the project reads: a pair, or a prompt alone."""
    if "better" not in row:
        return {"prompt": row["prompt"]}
    return {"prompt": row["prompt"], "chosen": row["better"], "rejected": row["worse"]}


def make_demonstrations(pairs: list[Row]) -> list[Row]:
    """Answers of both kinds, 40 % good: SFT learns to answer in both ways, PPO has to choose."""
    good = {row["prompt"] for row in by_digest(pairs, "style")[: round(BETTER * len(pairs))]}
    return [
        {"prompt": row["prompt"], "completion": row[side]}
        for row in pairs
        for side in (["better", "worse"] if row["prompt"] in good else ["worse"])
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="the folder for the three files")
    out = parser.parse_args().out
    lines = (HERE / "feedback.jsonl").read_text(encoding="utf-8").splitlines()
    feedback = [json.loads(line) for line in lines]
    tested = find_test(feedback)
    train = [row for row in feedback if row["prompt"] not in tested]
    files = {
        "train": [as_pair(row) for row in train],
        "test": [as_pair(row) for row in feedback if row["prompt"] in tested],
        "demonstrations": make_demonstrations([row for row in train if "better" in row]),
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
