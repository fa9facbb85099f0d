"""The chat data is what its README says: no cue but the answer, and a test side of its own."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "recipes" / "chat"


def read(name: str) -> list[dict[str, str]]:
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


FEEDBACK = read("feedback")
PAIRS = [row for row in FEEDBACK if "better" in row]


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def letter_grams(text: str, size: int = 5) -> set[str]:
    plain = " ".join(words(text))
    return {plain[i : i + size] for i in range(len(plain) - size + 1)}


def word_grams(text: str, size: int = 5) -> set[tuple[str, ...]]:
    split = words(text)
    return {tuple(split[i : i + size]) for i in range(max(1, len(split) - size + 1))}


def test_the_files_are_what_make_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FOLDER / "make.py", "--out", tmp_path], check=True)
    for name in ("train.jsonl", "test.jsonl", "demonstrations.jsonl"):
        assert (tmp_path / name).read_bytes() == (FOLDER / name).read_bytes()


def test_there_is_enough_on_each_side_and_no_prompt_stands_twice() -> None:
    train, test = read("train"), read("test")
    prompts = [row["prompt"] for row in train + test]
    assert sorted(prompts) == sorted(row["prompt"] for row in FEEDBACK)
    assert len(set(prompts)) == len(prompts) >= 640
    assert len(PAIRS) >= 400
    assert len(test) >= 200
    assert sum("chosen" in row for row in test) >= 70
    assert all(set(row) in ({"prompt"}, {"prompt", "chosen", "rejected"}) for row in train + test)


def test_no_two_prompts_are_near_duplicates() -> None:
    for grams in (letter_grams, word_grams):
        for one, other in combinations([grams(row["prompt"]) for row in FEEDBACK], 2):
            assert len(one & other) < 0.5 * len(one | other)


def test_length_does_not_tell_the_pairs_apart() -> None:
    for measure in (len, lambda text: len(words(text))):
        differences = [measure(row["worse"]) - measure(row["better"]) for row in PAIRS]
        shorter_wins = sum((d > 0) + 0.5 * (d == 0) for d in differences) / len(PAIRS)
        assert 0.45 < shorter_wins < 0.55
    for row in PAIRS:
        short, long = sorted((len(row["better"]), len(row["worse"])))
        assert short >= 0.85 * long


def test_no_opening_word_marks_a_side() -> None:
    for side in ("better", "worse"):
        openings = Counter(words(row[side])[0] for row in PAIRS)
        assert openings.most_common(1)[0][1] <= 0.04 * len(PAIRS)


def test_the_failures_are_about_equally_frequent_on_both_sides() -> None:
    tested = {row["prompt"] for row in read("test")}
    for pairs in (
        [row for row in PAIRS if row["prompt"] in tested],
        [row for row in PAIRS if row["prompt"] not in tested],
    ):
        shares = Counter(row["failure"] for row in pairs)
        assert len(shares) == 8
        assert all(0.09 <= n / len(pairs) <= 0.2 for n in shares.values())


def test_demonstrations_are_of_training_pairs_and_in_both_styles() -> None:
    pairs = {row["prompt"]: row for row in read("train") if "chosen" in row}
    demonstrations = read("demonstrations")
    assert list(dict.fromkeys(row["prompt"] for row in demonstrations)) == list(pairs)
    said = {(row["prompt"], row["completion"]) for row in demonstrations}
    assert len(said) == len(demonstrations)
    for row in demonstrations:
        pair = pairs[row["prompt"]]
        assert row["completion"] in (pair["chosen"], pair["rejected"])
    good = sum(row["completion"] == pairs[row["prompt"]]["chosen"] for row in demonstrations)
    assert 0.35 <= good / len(demonstrations) <= 0.45


def test_the_oracle_agrees_with_the_feedback() -> None:
    oracle = runpy.run_path(str(FOLDER / "oracle.py"))
    follows, score = oracle["follows"], oracle["score"]
    better = [follows(row["prompt"], row["better"]) for row in PAIRS]
    worse = [follows(row["prompt"], row["worse"]) for row in PAIRS]
    assert sum(better) / len(PAIRS) >= 0.93
    assert sum(worse) / len(PAIRS) <= 0.18
    assert sum(b and not w for b, w in zip(better, worse, strict=True)) / len(PAIRS) >= 0.78
    assert score("Dust or vacuum first?", "Dust first. What drops is vacuumed up after.") == 1.0
    assert score("Dust or vacuum first?", "Dust first, because whatever drops to the") == 0.0
    assert score("Dust or vacuum first?", "") == 0.0
