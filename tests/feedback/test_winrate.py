"""A human win rate: what is asked, what comes of it, and where the report shows it."""

import json
from pathlib import Path

import pytest

from rlhf_recipes.errors import UsageError
from rlhf_recipes.feedback.items import Item
from rlhf_recipes.feedback.store import Store
from rlhf_recipes.feedback.winrate import (
    QUESTION_EVALUATION,
    evaluation_items,
    people_lines,
    queue,
    write,
)
from rlhf_recipes.report import run_page
from rlhf_recipes.report.facts import Facts
from rlhf_recipes.report.people import table
from rlhf_recipes.report.verdict import verdict
from rlhf_recipes.stats import wilson
from rlhf_recipes.store.files import read_json
from tests.helpers.people import say
from tests.helpers.runs import call
from tests.helpers.told import KEY, told

TALK = [{"role": "system", "content": "Brief."}, {"role": "user", "content": "question 3"}]


def row(n: int) -> dict:
    """The judge likes PPO's answers to the first ten prompts, the reward model all; PPO's are
    longer. The last ten prompts have equal answers."""
    ppo = f"ppo {n}" if n < 20 else "same"
    return {
        "prompt": f"question {n}",
        **({"turns": TALK} if n == 3 else {}),
        "answers": {"base": "base", "sft": f"sft {n}" if n < 20 else "same", "ppo": ppo},
        "scores": {"base": -1, "sft": 0, "ppo": 1},
        "judged": {"base": 0, "sft": 0, "ppo": 1 if n < 10 else -1},
        "reward.words": {"base": 0, "sft": 1, "ppo": 1},
        "tokens": {"base": 5, "sft": 30, "ppo": 33},
        "ended": {"base": True, "sft": True, "ppo": True},
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = "".join(json.dumps(row(n)) + "\n" for n in range(30))
    return told(tmp_path, outputs={"evaluation": {"answers.jsonl": rows}})


def of(one: Item, policy: str) -> str:
    """The verdict that a policy's answer is the better one."""
    return "first" if one.answers[0].startswith(policy) else "second"


def number(one: Item) -> int:
    return int(one.answers[0].split()[1])


def judge(run: Path, pairs: list[Item], **words: object) -> Store:
    """Ada prefers PPO's answers to the first 12 prompts, then says tie, both bad, and SFT's."""
    store = Store(run.parent)
    store.put(pairs)
    for one in pairs:
        n = number(one)
        said = of(one, "ppo") if n < 12 else of(one, "sft")
        said = {12: "tie", 13: "both_bad", 19: "skip"}.get(n, said)
        say(store, one, "ada", said, question=QUESTION_EVALUATION, **words)
    return store


def test_the_pairs_are_those_that_differ_and_more_begin_with_the_same(run: Path):
    every = evaluation_items(run, 100)
    assert len(every) == 20 and evaluation_items(run, 7) == every[:7]
    assert sorted(map(number, every)) == list(range(20)) != [*map(number, every)]
    for one in every:
        n = number(one)
        assert {*one.answers} == {f"sft {n}", f"ppo {n}"} and one.side == "test"
        assert one.made["stage"][one.answers.index(f"ppo {n}")] == "ppo"
        talk = TALK if n == 3 else [{"role": "user", "content": f"question {n}"}]
        assert one.prompt == talk
    assert queue(run) == f"evaluation-{KEY[:12]}"
    with pytest.raises(UsageError, match="no answers of a policy and its start"):
        evaluation_items(told(run.parent / "other"))


def test_people_s_win_rate_and_who_agrees_with_them(run: Path):
    every = evaluation_items(run, 20)
    judge(run, every)
    before = (run / "results.json").read_bytes()
    write(run)
    assert (run / "results.json").read_bytes() == before
    facts, held = Facts(run), read_json(run / "people.json")
    rate = (12 + 0.5 * 2) / 19  # 12 of PPO, a tie, both bad, 5 of SFT, and one skipped
    low, high = wilson(rate, 19)
    assert {key: facts.number(f"ppo.people_{key}") for key in (
        "win_rate", "win_rate_low", "win_rate_high", "pairs"
    )} == {
        "win_rate": rate, "win_rate_low": low, "win_rate_high": high, "pairs": 19
    }  # fmt: skip
    assert held["both_bad"] == 1
    agreeing = {by: one["value"] for by, one in held["agreement"].items()}
    assert agreeing == {  # of 17 pairs in which Ada prefers one
        "scores": 12 / 17, "judged": 15 / 17, "reward.words": 0.5, "tokens": 12 / 17
    }  # fmt: skip
    [one] = [one for one in verdict(facts) if "People prefer" in one.text]
    assert (one.level, one.about) == ("doubt", "ppo")
    assert one.text == (
        "People prefer PPO to SFT in 68 % of 19 pairs (46–85), blind; in 1 of them both answers "
        "are bad: this may be chance."
    )
    run_page.write(run)
    page = (run / "report.html").read_text(encoding="utf-8")
    for called, share in {
        "the reward model": "71 % of 17 pairs (47–87)",
        "the judge": "88 % of 17 pairs (66–97)",
        "words, a part of the reward": "50 % of 17 pairs (29–71)",
        "the longer answer": "71 % of 17 pairs (47–87)",
    }.items():
        assert f'<th scope="row">{called}</th><td>{share}</td>' in page
    people = page.partition("preferred by people")[2].partition("</tr>")[0]
    assert people.endswith("</th><td>—</td><td>—</td><td>68\u00a0% (46–85)</td>")
    lines = people_lines(run, Store(run.parent))
    assert lines[0] == ("win rate", one.text)
    assert ("the judge", "88 % of 17 pairs (66–97)") in lines and (
        "ada",
        "19 judged, 10 s each",
    ) in lines


@pytest.mark.parametrize(("who", "level"), [("ppo", "success"), ("sft", "fault")])
def test_a_clear_preference(run: Path, who: str, level: str):
    store = Store(run.parent)
    for one in evaluation_items(run, 10):
        for person in ("ada", "bob"):
            say(store, one, person, of(one, who), question=QUESTION_EVALUATION)
        say(store, one, "ada", of(one, who), question=QUESTION_EVALUATION, again=True)
        say(store, one, "cy", of(one, "sft"))  # another question: of training
    write(run)
    facts = Facts(run)
    [one] = [one for one in verdict(facts) if "People prefer" in one.text]
    assert one.level == level and facts.number("ppo.people_pairs") == 10
    rows = dict(people_lines(run, store))
    assert rows["people with each other"] == rows["people with themselves"]
    assert rows["people with themselves"] == "100 % of 10 pairs (72–100)"
    assert rows["judged"] == "10 items, by 2 people"


def test_another_evaluation_s_judgements_do_not_count(run: Path):
    judge(run, evaluation_items(run, 20))
    write(run)
    held = read_json(run / "people.json") | {"evaluation": "f" * 64}
    (run / "people.json").write_text(json.dumps(held))
    assert Facts(run).number("ppo.people_win_rate") is None
    damaged = {"scores": {"value": "x"}, "judged": 3}
    text = json.dumps({"format": 1, "evaluation": KEY, "agreement": damaged})
    (run / "people.json").write_text(text)
    assert table(Facts(run)) == []
    (run.parent / "feedback.db").unlink()
    write(run)
    assert not (run / "people.json").exists() and not (run.parent / "feedback.db").exists()


def test_report_counts_what_people_said_since(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    words = ("report", str(run), "--runs", str(run.parent))
    out, _ = call(monkeypatch, capfd, *words)
    assert "People prefer" not in "".join(out)
    judge(run, evaluation_items(run, 20))
    out, _ = call(monkeypatch, capfd, *words)
    assert "? People prefer PPO to SFT in 68 % of 19 pairs" in "\n".join(out)
    (run.parent / "feedback.db").write_text("a note " * 99)
    out, err = call(monkeypatch, capfd, *words)
    assert "cannot be read" in err[0] and "People prefer" in "\n".join(out)
