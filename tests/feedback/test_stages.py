"""`sample` and `label` in a run: from prompts alone, through people or a rule, to a policy."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.cli import app
from rlhf_recipes.errors import PeopleNeeded, RecipeError
from rlhf_recipes.feedback import curve
from rlhf_recipes.feedback.items import ANSWERS, ROWS, Item, read_items
from rlhf_recipes.feedback.store import Store
from rlhf_recipes.pipeline.plan import plan_run
from rlhf_recipes.pipeline.runner import RunOutcome, run
from rlhf_recipes.recipe.load import load_recipe
from tests.helpers.people import say
from tests.helpers.tiny import WORDS
from tests.ui.conftest import Site

pytestmark = pytest.mark.train

TABLES = """
[sample]
prompts = 60

[label]
minimum = 20
minimum_test = 5
"""
STAGES = 'stages=["sft", "sample", "label", "reward", "ppo"]'
FAST = ["reward.minimum_accuracy=0", "reward.max_steps=20", 'reward.pairs=["label"]']
COLOURS = WORDS[:8]


def colours(text: str) -> int:
    """People like colours."""
    return sum(word in COLOURS for word in text.split())


def verdict(one: Item) -> str:
    first, second = map(colours, one.answers)
    return "tie" if first == second else "first" if first > second else "second"


def people(runs: Path, items: Iterable[Item], person: str = "ada") -> None:
    store = Store(runs)
    for one in items:
        say(store, one, person, verdict(one))


def items_of(outcome: Any) -> list[Item]:
    return list(read_items(outcome.folder / "output" / ANSWERS))


@pytest.fixture(autouse=True)
def quick(undrawn: None) -> None: ...


@pytest.fixture
def recipe(tiny_recipe: Path, tiny_pairs: Path) -> Any:
    tiny_recipe.write_text(tiny_recipe.read_text() + TABLES)
    return lambda *words: load_recipe(tiny_recipe, set=[STAGES, *FAST, *words])


def words_of(recipe: Any) -> list[str]:
    return [word for said in recipe.overrides for word in ("--set", said)]


def go(recipe: Any, runs: Path, **options: Any) -> RunOutcome:
    return run(recipe, runs=runs, name="mine", model=False, **options)


def commands_know_that_it_waits(runs: Path, typed: str, capsys: Any) -> None:
    """Of a run that waits for people: its report, and what else a person may ask."""

    def call(*words: Any) -> str:
        capsys.readouterr()
        app([*map(str, words), "--runs", str(runs)], standalone_mode=False)
        return capsys.readouterr().out

    page = unescape((runs / "mine" / "report.html").read_text())
    assert "People have to judge first" in page and "<code>rlhf-recipes label" in page
    assert "Something is wrong" not in page and "ended early" not in page
    shown = " ".join(call("report", "mine").split())
    assert shown.startswith("? The run waits, 2 of 6 stages are done: stage label: people have")
    assert typed.partition(" --set")[0] in shown
    assert " waiting " in call("runs")
    site = Site(runs)
    said = site.get("/label").text
    assert "The run waits for people" in said
    [place] = re.findall(r'action="(/[^"]+)"', said)
    opened = site.client.post(place, data={"open": "1"}).headers["location"]
    assert site.client.get(site.client.get(opened).headers["location"]).status_code == 200
    shutil.copytree(runs / "mine", runs / "copy")
    assert "recipe: the same" in call("compare", "mine", "copy")
    shutil.rmtree(runs / "copy")
    call("doctor")
    exported = runs.parent / "exported"
    call("export", "mine", exported)
    assert (exported / "model.safetensors").is_file()


def test_a_run_waits_for_people_and_goes_on_from_what_they_said(
    recipe: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
):
    monkeypatch.setattr(curve, "LEAST", 10)
    monkeypatch.setattr(curve, "LEAST_TEST", 2)
    runs = tmp_path / "runs"
    with pytest.raises(PeopleNeeded, match=r"0 of \d+ are judged, 25 more are needed") as stopped:
        go(recipe(), runs)
    assert stopped.value.exit_code == 4
    typed = shlex.join(["rlhf-recipes", "label", str(recipe().path), *words_of(recipe())])
    assert stopped.value.hint == f"{typed} --name mine --runs {runs}"
    manifest = json.loads((runs / "mine" / "manifest.json").read_text())
    assert manifest["outcome"] == "waiting" and manifest["error"]["stage"] == "label"
    commands_know_that_it_waits(runs, typed, capsys)
    assert "Traceback" not in (runs / "mine" / "log.txt").read_text()
    _, sample, label, *_ = plan_run(recipe(), runs, name="mine").stages
    items = items_of(sample)
    assert sample.done and not label.done
    assert {one.side for one in items} == {"train", "validation", "test"}
    assert len({one.id for one in items}) == len(items)

    people(runs, items)
    steady = 4 - (verdict(items[0]) != "tie")  # "both bad" is a tie
    for place, one in enumerate(items[:4]):
        say(Store(runs), one, "ada", verdict(one) if place else "both_bad", again=True)
    done = {one.stage.name: one for one in go(recipe(), runs).stages}
    assert [name for name, one in done.items() if one.did == "cached"] == ["sft", "sample"]
    entries = json.loads((runs / "mine" / "manifest.json").read_text())["stages"]
    assert [one["name"] for one in entries if one["reason"] == "cached"] == ["sft", "sample"]
    rows = [
        json.loads(line)
        for line in (done["label"].stage.folder / "output" / ROWS).read_text().splitlines()
    ]
    told = {one.id: verdict(one) for one in items}
    assert len(rows) == sum(said != "tie" for said in told.values()) > 10
    assert all(colours(row["chosen"]) > colours(row["rejected"]) for row in rows)
    # The reward model learned from these rows alone, and is tested on those of the test side.
    tests = sum(one.side == "test" and told[one.id] != "tie" for one in items)
    assert done["reward"].record["metrics"]["test_pairs"] == tests > 0

    told_of = done["label"].record["metrics"]
    assert (told_of["self_agreement"], told_of["asked_again"]) == (steady / 4, 4)
    assert told_of["self_agreement_low"] < steady / 4 < told_of["self_agreement_high"]
    held = json.loads((done["reward"].stage.folder / "output" / curve.FILE).read_text())
    assert [held["test_pairs"], held["points"][-1]["pairs"]] == [
        tests,
        done["reward"].record["metrics"]["pairs"],
    ]

    # Nothing was said since: nothing runs. One judgement more: all that learns from it runs.
    again = go(recipe(), runs)
    assert {one.did for one in again.stages} == {"cached"}
    say(Store(runs), items[0], "bob", verdict(items[0]))
    reasons = {one.name: one.reason for one in plan_run(recipe(), runs, name="mine").stages}
    assert reasons["sample"] == "cached" and "judgements.digest changed" in reasons["label"]
    assert "input label changed" in reasons["reward"]

    # A fork that samples the same answers has their judgements at once.
    forked = plan_run(recipe("ppo.kl_coef=0.3"), runs, name="fork")
    assert forked.stages[1].done


def test_judgements_that_come_before_the_label_stage_is_planned_count(recipe: Any, tmp_path: Path):
    """The items of another run, which this one samples again under other names."""
    runs = tmp_path / "runs"
    with pytest.raises(PeopleNeeded):
        go(recipe(), runs)
    people(runs, items_of(plan_run(recipe(), runs, name="mine").stages[1]))
    fresh = go(recipe(), runs, fresh=True, until="label")
    assert [one.did for one in fresh.stages] == ["ran", "ran", "ran"]
    assert fresh.results["label.judged"] == fresh.results["sample.items"]


def test_a_rule_judges_without_people(recipe: Any, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setenv("RLHF_RECIPES_ALLOW_CODE", "1")
    judge = tmp_path / "judge.py"
    judge.write_text(
        f"COLOURS = {COLOURS}\n\n\ndef score(prompt, answer):\n"
        "    return sum(word in COLOURS for word in answer.split())\n"
    )
    made = recipe("label.by=rule", f"label.rule=python:{judge}:score", "sample.answers=3")
    done = {one.stage.name: one for one in go(made, tmp_path / "runs", until="label").stages}
    items = {one.id: verdict(one) for one in items_of(done["sample"].stage)}
    metrics = done["label"].record["metrics"]
    assert metrics["judged"] == len(items)
    assert metrics["ties"] == sum(said == "tie" for said in items.values())
    judge.write_text(judge.read_text() + "# another judge\n")
    reasons = [one.reason for one in plan_run(made, tmp_path / "runs", name="mine").stages]
    assert reasons[1] == "cached" and "rule" in reasons[2]


def test_a_model_judges_and_people_measure_it(recipe: Any, tmp_path: Path):
    from tests.helpers.fake_judge import FakeJudge, by_rule

    runs = tmp_path / "runs"
    with FakeJudge(by_rule(lambda prompt, answer: colours(answer)), bias=0.3) as server:
        words = ["label.by=model", "label.model=fake", f"label.url={server.url}"]
        made = recipe(*words, "label.people=10")
        with pytest.raises(PeopleNeeded, match="0 of 10 are judged, 10 more are needed"):
            go(made, runs)
        assert server.asked == 0
        items = items_of(plan_run(made, runs, name="mine").stages[1])
        people(runs, [one for one in items if one.side == "test"])
        people(runs, [one for one in items if one.side != "test"][:10])
        results = go(made, runs, until="label").results
        asked = server.asked
        again = go(recipe(*words, "label.people=10", "label.concurrency=2"), runs, until="label")
        assert [one.did for one in again.stages] == ["cached"] * 3
        # A fork with another ceiling of length asks anew only about answers that are not the same.
        go(recipe(*words, "label.tie=0.2"), runs, until="label")
        assert server.asked == asked == 2 * len(items)
    told = {one.id: verdict(one) for one in items}
    assert results["label.judged"] == len(items) and results["label.judge_model"] == "fake"
    assert results["label.ties"] == sum(said == "tie" for said in told.values())
    assert results["label.agreement"] == 1.0


def test_single_answers_are_labels_for_kto(recipe: Any, tmp_path: Path):
    runs, stages = tmp_path / "runs", 'stages=["sft", "sample", "label", "kto"]'
    words = [stages, "sample.answers=1", 'kto.pairs=["label"]', "kto.max_steps=2"]
    made = recipe(*words)
    with pytest.raises(PeopleNeeded):
        go(made, runs)
    items = items_of(plan_run(made, runs, name="mine").stages[1])
    for one in items:
        say(Store(runs), one, "ada", "good" if colours(one.answers[0]) > 1 else "bad")
    results = go(made, runs, until="kto").results
    assert results["label.labels"] == len(items)
    assert 0 < results["kto.good"] < results["kto.good"] + results["kto.bad"] <= len(items)


def test_items_hold_the_columns_of_the_rules_that_judge_them_alone(recipe: Any, tmp_path: Path):
    """What other stages' rewards read is in no key of the answers."""
    rows = tmp_path / "rows.jsonl"
    texts = [{"prompt": f"{a} {b}", "length": 3, "best": a} for a in COLOURS for b in COLOURS]
    rows.write_text("".join(json.dumps(row) + "\n" for row in texts))
    rewards = "ppo.rewards=[{rule='number', column='length'}]"
    rule = "label.rule={rule='contains', column='best'}"
    words = [f"dataset.path={rows}", "sft.dataset.path=" + str(recipe().dataset.file), rewards]
    made = recipe('stages=["sft", "sample", "label", "ppo"]', "label.by=rule", rule, *words)
    made = load_recipe(made.path, set=[word for word in made.overrides if "reward" not in word[:7]])
    outcome = go(made, tmp_path / "runs", until="sample")
    assert all(one.row.keys() == {"best"} for one in items_of(outcome.stages[-1].stage))


def test_two_policies_are_set_against_each_other(recipe: Any, tmp_path: Path):
    stages = 'stages=["warmup", "sft", "sample", "label"]'
    words = [stages, "warmup.kind=sft", "warmup.max_steps=1", "sample.against=warmup"]
    made = load_recipe(recipe().path, set=[words[0], *words[1:]])
    outcome = go(made, tmp_path / "runs", until="sample")
    for one in items_of(outcome.stages[-1].stage):
        assert {*one.made["stage"]} == {"warmup", "sft"}


def test_a_judged_row_of_a_test_splits_prompt_is_a_test_row(recipe: Any, tiny_pairs: Path):
    from rlhf_recipes.stages.session import Session

    rows = tiny_pairs.read_text().splitlines(keepends=True)
    folder = recipe().path.parent / "split"
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(rows[12:]))
    (folder / "test.jsonl").write_text("".join(rows[:12]))
    made = load_recipe(
        recipe().path,
        set=[STAGES, f"dataset.path={folder}", "dataset.test_split=test"],
        unset=["dataset.test_fraction"],
    )
    session = Session(made, {})
    judged = folder.parent / ROWS
    tested = [json.loads(rows[at]) for at in (0, 20)]
    judged.write_text("".join(json.dumps(row | {"chosen": "gold"}) + "\n" for row in tested))
    whole, session.judged = session.data_of("reward"), {"reward": [judged]}
    both = session.data_of("reward")
    assert len(both.test) == len(whole.test) + 1
    learned = [len(data.train) + len(data.validation) for data in (both, whole)]
    assert learned[0] == learned[1] + 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (['stages=["sft", "label"]'], "label has nothing to judge"),
        (["label.by=rule"], 'needs rule = { rule = "…" }'),
        (["label.rule={ rule = 'ended' }"], 'is for by = "rule", not "people"'),
        (["label.by=rule", "label.rule=colours"], 'must be a table with a rule, or "python:'),
        (["label.by=rule", "label.rule={ rule = 'word', at_most = 3 }"], "words"),
        (['reward.pairs=["labels"]'], 'did you mean "label"?'),
        (["label.guideline=gone.md"], "no such file"),
        (["label.answers=sft"], "is of kind sft, not sample"),
        (["sample.against=ppo"], "does not come before"),
        (
            ["sample.choose=unsure"],
            '"unsure" needs a reward model, and no stage before it makes one',
        ),
        (["sample.choose=unsure", "sample.answers=1"], "answers must be at least 2"),
        (
            ['stages=["sft", "dpo"]', "evaluation.judge=independent", 'reward.pairs=["sft"]'],
            'reward.pairs: "sft" is neither "dataset" nor a label stage',
        ),
    ],
)
def test_what_is_wrong_with_a_label_stage_is_said(recipe: Any, words: list[str], said: str):
    with pytest.raises(RecipeError) as wrong:
        recipe(*words)
    assert said in str(wrong.value)


def test_no_judgement_before_is_needed_where_a_side_has_few_items(recipe: Any):
    from rlhf_recipes.feedback.items import item
    from rlhf_recipes.feedback.store import Judged
    from rlhf_recipes.stages.label import lacking

    prompt = [{"role": "user", "content": "red"}]
    items = [item(prompt, ["a", str(n)], {"side": side}) for n, side in enumerate(["test"] * 3)]
    items += [item(prompt, ["b", str(n)]) for n in range(40)]
    said = [Judged(one.id, "ada", "first", False) for one in items]
    least = {"minimum": 30, "minimum_test": 20}
    assert lacking(items, [], 1, least) == 33
    assert lacking(items, said[:3], 1, least) == 30
    assert lacking(items, said, 2, least) == 20 + 3
    skips = [replace(one, verdict="skip") for one in said]
    assert lacking(items, skips[:13], 1, least) == 30  # all 3 test items, 10 of 40 others
    assert lacking(items, skips, 1, least) == 0
    twice = said + [replace(one, person="bob") for one in said]
    assert lacking(items, twice, 2, least) == 0
