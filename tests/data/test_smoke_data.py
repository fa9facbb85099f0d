"""The shipped data is what its README says: no cue but the text itself."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import AutoTokenizer

pytestmark = pytest.mark.train

FOLDER = Path(__file__).parents[2] / "recipes" / "smoke"


def read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


def test_length_does_not_tell_the_pairs_apart() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")
    for measure in (len, lambda text: len(tokenizer.encode(text))):
        differences = [measure(r["rejected"]) - measure(r["chosen"]) for r in read("pairs.jsonl")]
        shorter_wins = sum((d > 0) + 0.5 * (d == 0) for d in differences) / len(differences)
        assert 0.45 < shorter_wins < 0.55
    longest = max(len(tokenizer.encode(r[k])) for r in read("pairs.jsonl") for k in r)
    assert longest == 15  # with its end of turn it fits response_length


def test_no_opening_word_marks_a_side() -> None:
    pairs = read("pairs.jsonl")
    openings = {
        side: Counter(r[side].split()[0].strip(",") for r in pairs)
        for side in ("chosen", "rejected")
    }
    assert len(pairs) == 1200
    for counts in openings.values():
        assert counts.most_common(1)[0][1] <= 0.08 * len(pairs)
    for word in set(openings["chosen"]) | set(openings["rejected"]):
        assert abs(openings["chosen"][word] - openings["rejected"][word]) <= 12


def test_no_prompt_stands_twice() -> None:
    prompts = [r["prompt"] for name in ("pairs", "demonstrations") for r in read(f"{name}.jsonl")]
    assert len(prompts) == len(set(prompts)) == 2400


def test_the_model_is_small_and_its_licence_is_beside_it() -> None:
    size = sum(f.stat().st_size for f in (FOLDER / "model").iterdir())
    assert size < 4e6
    assert "Princeton University" in (FOLDER / "LICENSE-WORDNET").read_text()
