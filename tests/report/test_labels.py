"""What the verdict says of labels: the guideline, more of them, or PPO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.findings import Finding
from rlhf_recipes.report import run_page
from rlhf_recipes.report.facts import Facts
from rlhf_recipes.report.label_rules import label_on, no_person
from tests.helpers.told import shares, told

KINDS = ["sft", "sample", "label", "reward", "ppo"]
RECIPE = {"label": {"by": "people"}}
QUEUE = {"label.items": 300, "label.judged": 220}


def run(
    folder: Path, gain: tuple[float, float, float], results: dict[str, Any], **recipe: Any
) -> Path:
    points = [
        {"pairs": n, "accuracy": 0.7 + n / 1000, "low": 0.6, "high": 0.9} for n in (55, 110, 165)
    ]
    held = dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
    text = json.dumps({"format": 1, "points": points, "test_pairs": 60, **held})
    files = {"reward": {"curve.json": text}}
    about = {"kinds": KINDS, "recipe": {**RECIPE, **recipe}, "outputs": files}
    return told(folder, {**QUEUE, **results}, **about)


def found(*words: Any, **recipe: Any) -> Finding:
    [one] = label_on(Facts(run(*words, **recipe)))
    return one


def steady(value: float, count: int = 40) -> dict[str, Any]:
    return {**shares("label.self_agreement", value, 0.1), "label.asked_again": count}


def test_what_you_and_the_reward_model_agree_in_and_what_the_last_half_gave(tmp_path: Path):
    accuracy = {**shares("reward.accuracy", 0.79, 0.06), "reward.test_pairs": 160}
    one = found(tmp_path, (0.041, 0.005, 0.077), {**steady(0.86), **accuracy})
    assert (one.level, one.about) == ("note", "reward")
    assert one.text == (
        "You agree with yourself in 86 % of 40 asked again (76–96). `reward` agrees with you in "
        "79 % of 160 test pairs (73–85). The last half of its pairs gave +4.1 points (0.5 to 7.7)."
    )
    assert one.change == "Label on: the next 80 pairs are in its queue (`rlhf-recipes label`)."


LOSES = {**shares("ppo.judge_win_rate", 0.4, 0.05)}


@pytest.mark.parametrize(
    ("itself", "accuracy", "gain", "more", "said"),
    [
        (steady(0.7), 0.65, (0.04, 0.01, 0.07), {}, "Make `label.guideline` clearer"),
        (steady(0.9), 0.7, (0.01, -0.02, 0.04), {}, "Label on: the next 80"),
        (steady(0.9), 0.7, (0.01, -0.02, 0.04), {"label.judged": 300}, "Label on: sample more"),
        (steady(0.9), 0.7, (0.0, -0.01, 0.005), {}, "More labels give next to nothing here"),
        (steady(0.9), 0.88, (0.0, -0.02, 0.02), LOSES, "Look at PPO: it loses to its start"),
        (steady(0.9), 0.88, (0.0, -0.02, 0.02), {}, ""),
        (steady(0.5, 8), 0.88, (0.0, -0.02, 0.02), {}, ""),  # so few say nothing
        ({}, 0.88, (0.03, 0.01, 0.05), {}, "Label on"),
    ],
)
def test_what_is_to_be_done_next(
    tmp_path: Path, itself: Any, accuracy: float, gain: Any, more: Any, said: str
):
    results = {**itself, **shares("reward.accuracy", accuracy, 0.04), **more}
    change = found(tmp_path, gain, results).change
    assert change.startswith(said) and bool(change) == bool(said)


def test_a_rule_is_not_you_and_a_run_without_labels_has_no_such_line(tmp_path: Path):
    one = found(tmp_path / "rule", (0.0, -0.02, 0.02), {}, label={"by": "rule"})
    assert one.text.startswith("`reward` agrees with the labels in 90 %")
    assert [*label_on(Facts(told(tmp_path / "none")))] == []


def test_the_report_has_a_plot_of_it(tmp_path: Path):
    folder = run(tmp_path, (-0.002, -0.01, 0.005), {})
    run_page.write(folder)
    page = (folder / "report.html").read_text()
    assert "The last half of the pairs gave −0.2 points (−1.0 to 0.5)" in page
    assert "55 pairs: 76 %; 110 pairs: 81 %; 165 pairs: 86 %" in page


def test_it_says_that_no_person_judged_and_how_far_the_judge_agrees_with_people(tmp_path: Path):
    def line(place: str, **results: Any) -> Finding:
        own = {f"label.{key}": value for key, value in results.items()}
        [one] = no_person(Facts(told(tmp_path / place, own, kinds=KINDS)))
        return one

    alone = line("model", by="model", judge_model="small")
    assert alone.text.startswith("Every pair of `label` was judged by `small`, and by no person")
    assert "`label.people = 60`" in alone.change
    beside = line("both", by="model", judge_model="small", agreement=0.7, agreement_pairs=60)
    assert (
        "As the stage ran, it agreed with people in 70 % of 60 pairs" in beside.text
        and not beside.change
    )
    assert "judged by a rule" in line("rule", by="rule").text
    assert [
        *no_person(Facts(run(tmp_path / "people", (0.0, 0.0, 0.0), {"label.by": "people"})))
    ] == []
