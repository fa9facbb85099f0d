"""The top of a report: the result in words that a stranger understands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.report.facts import Facts
from rlhf_recipes.report.headline import Headline, headline, meanings, times
from rlhf_recipes.report.verdict import verdict
from tests.helpers.told import KEY, shares, told, write

RULE = {"evaluation": {"judge": {"rule": "words", "at_most": 40}}}


def top(run: Path) -> Headline:
    facts = Facts(run)
    return headline(facts, verdict(facts))


def test_a_share_in_words() -> None:
    said = {0.9: "9 times in 10", 0.89: "9 times in 10", 0.55: "55 times in 100", 0.5: "5 times"}
    said |= {0.99: "99 times in 100", 1.0: "every time", 0.0: "not once", 0.01: "1 time in 100"}
    assert all(times(share).startswith(words) for share, words in said.items())


def test_a_success_says_what_it_did_who_judged_and_the_price(tmp_path: Path) -> None:
    assert top(told(tmp_path, recipe=RULE)) == Headline(
        "It worked.",
        "On 128 prompts it had never seen, the new model's answer was preferred 7 times in 10.",
        "Judged by the rule `words`, which was written down before the training. PPO's answers "
        "were preferred to SFT's in 71 % (63–79) of 128 prompts. 50 % would mean no difference.",
        "The price: PPO moved 6.2 nats away from SFT. Under 0.5 it has hardly moved; over 50 its "
        "scores mean little. Its answers have 33 tokens, SFT's 30. The run took 6 min 06 s.",
    )


def test_a_judge_on_the_same_base_alone_proves_nothing(tmp_path: Path) -> None:
    found = top(told(tmp_path))
    assert found.says == "It looks better, but that is not proven."
    assert "Judged by a second reward model on the same base, which may err as the" in found.judged


def test_people_judge_before_a_model_does(tmp_path: Path) -> None:
    run = told(tmp_path)
    results = shares("ppo.people_win_rate", 0.8, 0.1) | {"ppo.people_pairs": 50}
    people = {"format": 1, "evaluation": KEY, "policy": "ppo", "start": "sft", "results": results}
    write(run / "people.json", people)
    found = top(run)
    assert (found.says, found.result[:11]) == ("It worked.", "On 50 pairs")
    assert found.judged.startswith("Judged by people who did not know whose answer is whose. ")


@pytest.mark.parametrize(
    ("changes", "about", "says", "result"),
    [
        (shares("ppo.judge_win_rate", 0.3, 0.08), {}, "Something is wrong.", "only 3 times in 10."),
        (
            {"ppo.kl": 80.0}, {}, "Something is wrong.",
            "That does not count while something is wrong.",
        ),
        (
            shares("ppo.judge_win_rate", 0.56, 0.2), {}, "It cannot be told yet.",
            "56 times in 100. That may be chance.",
        ),
        ({"ppo.kl": 0.1}, {}, "It cannot be told yet.", "It hardly differs from SFT."),
        ({}, {"outcome": "waiting", "error": {"message": "m"}}, "People have to judge first.", ""),
        ({}, {"outcome": "failed", "error": {"message": "m"}}, "The run ended early.", ""),
        ({}, {"outcome": "unfinished"}, "The run is not finished.", ""),
        ({}, {"outcome": "interrupted"}, "The run is not finished.", ""),
    ],
)  # fmt: skip
def test_what_did_not_work_says_so_first(
    tmp_path: Path, changes: dict[str, Any], about: dict[str, Any], says: str, result: str
) -> None:
    found = top(told(tmp_path, changes, recipe=RULE, manifest=about))
    assert found.says == says
    assert found.result.endswith(result) and bool(found.result) == bool(result)


def test_a_run_without_an_evaluation_has_no_result(tmp_path: Path) -> None:
    none = {key: None for key in ("ppo.win_rate", "ppo.judge_win_rate", "ppo.kl", "ppo.length")}
    found = top(told(tmp_path, none, kinds=["sft"]))
    said = ("The run is done.", "No judge has compared its answers.", "")
    assert (found.says, found.result, found.judged) == said


def test_each_word_of_the_trade_has_its_meaning_there_and_is_in_the_glossary() -> None:
    found = meanings("PPO beat SFT at 6.2 nats; unitedly, a judge ranks test pairs.")
    assert [*found] == ["SFT", "PPO", "judge", "test pairs", "nats"]
    glossary = (Path(__file__).parents[2] / "docs/glossary.md").read_text().lower()
    for word, meaning in meanings("").items() | found.items():
        assert len(meaning.split(". ")[0].split()) <= 25
        assert re.search(rf"\b{word.lower().rstrip('es')}", glossary), word
