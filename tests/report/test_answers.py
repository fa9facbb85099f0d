"""The answers of a report: which won and by whom, in which words they differ, all to unfold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_recipes.report import answers
from rlhf_recipes.report.facts import Facts
from tests.helpers.told import told
from tests.report.test_pages import Page, page


def run_of(folder: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    return told(folder, outputs={"evaluation": {"answers.jsonl": text}})


def row(number: int = 0, **words: Any) -> dict[str, Any]:
    said = {"base": "b", "sft": "a red old fox", "ppo": "a red young fox"}
    scores = {"sft": 0.0, "ppo": number / 100}
    return {"prompt": f"question {number}", "answers": said, "scores": scores, **words}


def test_the_words_that_differ_are_marked_where_the_answers_are_alike() -> None:
    assert answers.differing("a red old  fox", "a red young\nfox <b>") == (
        "a red <del>old</del>  fox",
        "a red <ins>young</ins>\nfox <ins>&lt;b&gt;</ins>",
    )
    assert answers.differing("a red fox", "quite another thing") == (
        "a red fox",
        "quite another thing",
    )
    assert answers.differing("", "new") == ("", "new")


def test_who_prefers_which_answer(tmp_path: Path) -> None:
    facts = Facts(run_of(tmp_path, [row()]))
    for more, said in {
        (1.0, 0.5, 0.0): "PPO's is preferred by the judge and the second judge. "
        "The reward model has no difference.",
        (-1.0, None, 2.0): "PPO's is preferred by the reward model. SFT's is preferred by the "
        "judge.",
        (None, None, None): "",
    }.items():
        keys = ("judged", "judged2", "scores")
        one = row(**{k: {"sft": 0.0, "ppo": v} for k, v in zip(keys, more, strict=True)})
        assert answers.preferred(facts, one, "ppo", "sft") == said
    same = row(answers={"sft": "x", "ppo": "x"})
    assert answers.preferred(facts, same, "ppo", "sft") == "Both answers are the same."


def test_all_prompts_are_there_to_unfold(tmp_path: Path) -> None:
    html, found = page(run_of(tmp_path, [row(number) for number in range(20)]))
    assert "All 20 test prompts" in " ".join(found.text)
    inside = html.partition('<div class="every">')[2].partition("</section>")[0]
    asked = [text for text in Page(inside).text if text.startswith("question")]
    assert asked == [f"question {number}" for number in reversed(range(20))]
    assert inside.count("<ins>young</ins>") == inside.count("<del>old</del>") == 20


def test_answers_that_nothing_scored_are_drawn_by_lot(tmp_path: Path) -> None:
    rows = [{**row(number), "scores": {}} for number in range(20)]
    facts = Facts(run_of(tmp_path, rows))
    shown = answers.cases(facts, "ppo", "sft")
    assert [one["label"] for one in shown] == ["drawn by lot"] * 8


def test_a_thousand_prompts_of_500_words_still_open_and_the_page_says_what_is_left_out(
    tmp_path: Path,
) -> None:
    long = "word " * 500
    said = {"base": long, "sft": long + "a", "ppo": long + "b"}
    rows = [row(number, prompt=f"{number} {long}", answers=said) for number in range(1000)]
    html, found = page(run_of(tmp_path, rows))
    text = " ".join(" ".join(found.text).split())
    assert len(html.encode()) < 1_600_000
    shown = html.count('<details class="one"')
    assert 300 < shown < 1000
    assert f"{shown} of the 1,000 test prompts, drawn by lot" in text
    assert "cut after 500 characters" in text and "answers.jsonl" in text
