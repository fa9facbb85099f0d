"""Whether runs can be compared, and what of their recipes and results is worth a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.report import compare as comparison
from tests.helpers.runs import call
from tests.helpers.told import GOOD, shares, told

DPO: dict[str, Any] = {key: None for key in GOOD if key.startswith(("ppo.", "reward."))}
DPO |= shares("dpo.judge_win_rate", 0.61, 0.08) | {"dpo.kl": 2.5, "dpo.length": 30.0}
JUDGE = {"kind": "judge", "name": "judge", "version": 7, "lora": {}, "model": {}, "dataset": {}}


def measured(run: Path, **changes: Any) -> Path:
    """The run, with payloads of its evaluation and judge in its manifest."""
    manifest = json.loads((run / "manifest.json").read_text())
    for entry in manifest["stages"]:
        if entry["name"] == "evaluation":
            inputs = {"judge": str(changes.get("judge", 1)) * 64}
            dataset = {"content": str(changes.get("rows", 1)) * 64}
            entry["payload"] = {"inputs": inputs, "settings": {}, "dataset": dataset}
        if entry["name"] == "judge":
            settings = {"learning_rate": changes.get("rate", 1e-3)}
            entry["payload"] = JUDGE | {"settings": settings, "inputs": {}}
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_what_makes_win_rates_another_measure_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = {"temperature": 1.0, "response_length": 20}
    one = measured(told(tmp_path / "a", recipe={"evaluation": asked}))
    same = measured(told(tmp_path / "b", recipe={"evaluation": asked, "ppo": {"kl_coef": 0.3}}))
    cooler = {"evaluation": asked | {"temperature": 0.7}}
    about = {"recipe": cooler, "manifest": {"seed": 7}}
    other = measured(told(tmp_path / "c", **about), judge=2, rows=2, rate=1e-4)
    assert comparison.rulers([one, same]) == []
    assert comparison.rulers([one, measured(told(tmp_path / "older"))]) == []
    assert comparison.rulers([one, same, other]) == [
        "another judge (learning_rate 0.001 → 0.0001)",
        "another temperature (1.0 → 0.7)",
        "another set of test prompts",
        "another seed (42 → 7)",
    ]
    page = tmp_path / "page.html"
    out, _ = call(monkeypatch, capfd, "compare", str(one), str(other), "--page", str(page))
    assert out[:2] == [
        "not comparable: another judge (learning_rate 0.001 → 0.0001), another temperature "
        "(1.0 → 0.7), another set of test prompts, another seed (42 → 7)",
        f"  → rlhf-recipes compare {one} {other} --head-to-head",
    ]
    assert "Not comparable: another judge (learning_rate" in page.read_text()


def test_the_page_names_no_place_on_this_machine(tmp_path: Path) -> None:
    runs = []
    for name, judge in (("a", "independent"), ("b", ["independent", "python:/home/me/o.py:score"])):
        runs.append(told(tmp_path / name, recipe={"evaluation": {"judge": judge}}))
    comparison.write(runs, page := tmp_path / "page.html")
    text = page.read_text()
    assert "o.py:score" in text and "/home" not in text and str(tmp_path) not in text


def test_of_a_stage_that_one_run_lacks_only_what_its_recipe_says_is_shown(tmp_path: Path) -> None:
    one = told(tmp_path / "a")
    dpo = {"dpo": {"kind": "dpo", "learning_rate": 1e-4, "beta": 0.1, "policy": "sft"}}
    kinds = ["sft", "dpo", "judge", "evaluation"]
    other = told(tmp_path / "b", DPO, kinds=kinds, recipe=dpo | {"evaluation": {"prompts": 96}})
    for run, table in ((one, "[ppo]\nkl_coef = 0.15\n"), (other, "[dpo]\nbeta = 0.1\n")):
        (run / "recipe.toml").write_text(f'stages = ["sft"]\n{table}')
    parts = comparison.compare([one, other])
    assert parts["recipe"].keys() >= {"stages", "evaluation.prompts", "ppo.kl_coef", "dpo.beta"}
    assert not {"ppo.learning_rate", "dpo.learning_rate", "reward.learning_rate"} & {
        *parts["recipe"]
    }
    assert not any(key.startswith(("ppo.", "dpo.", "reward.")) for key in parts["results"])
    table = parts["policies"]
    assert table["policy"] == ["ppo, against sft", "dpo, against sft"]
    assert table["preferred by the judge"] == ["71\u00a0% (63–79)", "61\u00a0% (53–69)"]
    assert table["KL, nats an answer"] == ["6.20", "2.50"]
