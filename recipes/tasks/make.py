"""Make the rows of sorting.toml and arithmetic.toml from reasoning-gym, with a fixed seed.

pip install reasoning-gym==0.1.25, then: python recipes/tasks/make.py
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import reasoning_gym

Row = dict[str, str]

SEED = 1
ROWS = 1200  # tasks of each kind, no two alike


def find_sorting() -> list[Row]:
    """Three different digits, up or down: "up:6,2,8" and its answer "2,6,8". There are 1,440."""
    tasks = reasoning_gym.create_dataset(
        "number_sorting", seed=SEED, size=20 * ROWS, max_value=9, min_value=0,
        min_numbers=3, max_numbers=3, min_decimals=0, max_decimals=0,
    )  # fmt: skip
    found: dict[str, str] = {}
    for task in tasks:
        question = task["question"].partition("\n")[0]
        way = "up" if "ascending" in question else "down"
        numbers, answer = (re.findall(r"(\d)\.0", text) for text in (question, task["answer"]))
        if len(set(numbers)) == 3:
            found[f"{way}:{','.join(numbers)}"] = ",".join(answer)
    return as_rows(found)


def find_sums() -> list[Row]:
    """Two numbers of two digits: "43 + 14 =" and its answer "57". There are 8,100."""
    tasks = reasoning_gym.create_dataset(
        "chain_sum", seed=SEED, size=20 * ROWS, min_terms=2, max_terms=2, min_digits=2, max_digits=2
    )
    asked = ((task["question"].partition(": ")[2], task["answer"]) for task in tasks)
    return as_rows({question: answer for question, answer in asked if "+" in question})


def as_rows(found: dict[str, str]) -> list[Row]:
    return [{"prompt": prompt, "answer": answer} for prompt, answer in found.items()][:ROWS]


def other_order(answer: str, rng: random.Random) -> str:
    """One of the five wrong orders."""
    shuffled = answer
    while shuffled == answer:
        shuffled = ",".join(rng.sample(answer.split(","), 3))
    return shuffled


def near_miss(answer: str, rng: random.Random) -> str:
    """One or ten more or less: the ones or a carry are wrong."""
    return str(int(answer) + rng.choice([-10, -1, 1, 10]))


def show_both(tasks: list[Row], wrong: Callable[[str, random.Random], str]) -> list[Row]:
    """Each task twice: with the right answer, and with a wrong one by chance."""
    rng = random.Random(SEED)
    return [
        {"prompt": row["prompt"], "completion": text}
        for row in tasks
        for text in (row["answer"], wrong(row["answer"], rng))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    out = parser.parse_args().out
    for name, tasks, wrong in (
        ("sorting", find_sorting(), other_order),
        ("sums", find_sums(), near_miss),
    ):
        files = {name: tasks, f"{name}-demonstrations": show_both(tasks, wrong)}
        for stem, rows in files.items():
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (out / f"{stem}.jsonl").write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
