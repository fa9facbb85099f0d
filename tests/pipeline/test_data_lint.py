"""The data lint: each oddity is put in, and found; and what is not there is not said."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes import cli
from rlhf_recipes.findings import Finding
from rlhf_recipes.pipeline import data_lint
from rlhf_recipes.pipeline.plan import Plan, plan_run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages.session import Session
from tests.helpers.counting import toy
from tests.helpers.tiny import RECIPE, TEMPLATE, WORDS

pytestmark = pytest.mark.train

PAIRS = [
    {"prompt": f"{a} {b}", "chosen": WORDS[(i + j) % 8], "rejected": f"{WORDS[8 + i % 8]}"}
    for i, a in enumerate(WORDS)
    for j, b in enumerate(WORDS)
]


def linted(plan: Plan) -> list[Finding]:
    return data_lint.data_lint(plan, Session(plan.recipe, plan.model))


class Lint:
    def __init__(self, model: Path, folder: Path) -> None:
        self.model, self.folder = model, folder

    def __call__(self, rows: list[dict[str, Any]], *words: str) -> list[Finding]:
        data, file = self.folder / "rows.jsonl", self.folder / "tiny.toml"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        file.write_text(RECIPE.format(model=self.model, data=data))
        return linted(plan_run(load_recipe(file, set=words), self.folder / "runs"))

    def about(self, about: str, rows: list[dict[str, Any]], *words: str) -> list[tuple[str, str]]:
        return [(line.level, line.text) for line in self(rows, *words) if line.about == about]


@pytest.fixture
def look(tiny_model: Path, tmp_path: Path) -> Lint:
    return Lint(tiny_model, tmp_path)


def test_rows_that_are_as_they_should_be(look: Lint) -> None:
    found = look(PAIRS)
    assert {line.level for line in found} == {"note"}
    assert [line.about for line in found] == ["rows", "tokens", "length", *["example"] * 3]
    sides = {side: int(n) for n, side in zip(*[iter(found[0].text.split()[2:8])] * 2, strict=True)}
    assert sum(sides.values()) == 256
    assert found[1].text.startswith("prompt 7 · 7 · 7; chosen 2 · 2 · 2; rejected 2 · 2 · 2")
    assert found[-1].text.endswith("<|im_end|>") and "<|im_start|>" in found[-1].text


def test_what_the_test_prompts_can_prove_is_said(look: Lint) -> None:
    def proof(*words: str) -> tuple[str, str, str]:
        look(PAIRS, *words)
        made = plan_run(load_recipe(look.folder / "tiny.toml", set=words), look.folder / "runs")
        (one,) = data_lint.provable(made, Session(made.recipe, made.model))
        held = len(Session(made.recipe, made.model).data(made.recipe.dataset).test)
        assert one.about == "proof"
        return one.level, one.text, one.change.replace(f"={held} ", "=ALL ")

    few = proof("evaluation.prompts=9")
    assert few[:2] == ("doubt", "9 test prompts: a win rate is right to ±33 points")
    assert few[2].startswith("--set evaluation.prompts=ALL for ±")
    level, text, change = proof("evaluation.prompts=500", "dataset.test_fraction=0.1")
    assert level == "doubt" and text.endswith(" points")
    assert change.startswith("--set dataset.test_fraction=0.25 for ±")
    level, _, change = proof("evaluation.prompts=500", "dataset.test_fraction=0.7")
    assert (level, change) == ("note", "")


def test_what_is_dropped_is_said_by_reason(look: Lint) -> None:
    rows = [*PAIRS[:40], *[{**row, "rejected": row["chosen"]} for row in PAIRS[40:60]]]
    rows += [{**row, "prompt": "red " * 20} for row in PAIRS[60:63]]
    text = "20 × both answers are the same; 3 × prompt over 16 tokens"
    assert look.about("dropped", rows) == [("doubt", text)]
    assert look.about("dropped", [*PAIRS, rows[-1]]) == [("note", "1 × prompt over 16 tokens")]
    ((level, text),) = look.about("dropped", PAIRS, "dataset.weight=0.5")
    assert level == "note" and text.endswith(" × beyond the dataset's weight")  # as was asked for


def test_a_column_that_no_row_has(look: Lint) -> None:
    rows = [{**row, "gold": 7} for row in PAIRS]
    listed = 'ppo.rewards=[{ rule = "number", column = "gold" }]'
    assert {line.level for line in look(rows, listed)} == {"note"}
    wrong = look.about("rows", rows, listed.replace("gold", "golden"))
    what = 'no row has the column "golden" (did you mean "gold"?), which a rule names; there are '
    held = "chosen, gold, prompt, rejected"
    assert wrong[1:] == [("fault", f"{s}: {what}{held}") for s in ("ppo", "evaluation")]


def test_answers_that_ppo_has_no_room_for(look: Lint) -> None:
    rows = [{**row, "chosen": "red " * (6 if i % 4 == 0 else 2)} for i, row in enumerate(PAIRS)]
    found = look(rows)
    (line,) = [line for line in found if line.about == "too long"]
    assert (line.level, line.text) == (
        "doubt",
        "25.0% of the chosen answers are longer than ppo.response_length, 6",
    )
    assert line.change == "--set ppo.response_length=7, or a lower max_answer_tokens"
    assert look.about("too long", rows, "ppo.response_length=7") == []


def test_room_for_answers_a_little_longer_than_the_longest(look: Lint) -> None:
    rows = [{**row, "chosen": "red red red red"} for row in PAIRS]  # and the end of the turn
    (line,) = [line for line in look(rows, "ppo.response_length=5") if line.about == "room"]
    assert (line.level, line.text) == (
        "note",
        "the longest chosen answer has 5 tokens, ppo.response_length is 5: an answer that is a "
        "little longer is cut off, and cannot learn to end",
    )
    assert line.change == "--set ppo.response_length=6"
    assert look.about("room", rows, "ppo.response_length=6") == []


def test_pairs_that_stand_twice_and_that_contradict(look: Lint) -> None:
    turned = {**PAIRS[0], "chosen": PAIRS[0]["rejected"], "rejected": PAIRS[0]["chosen"]}
    assert look.about("pairs", [*PAIRS, PAIRS[3], PAIRS[3], turned]) == [
        ("note", "2 of 259 pairs are copies of others"),
        ("note", "1 of 259 pairs say the opposite of another"),
    ]
    (line,) = look.about("pairs", PAIRS * 2)
    assert line == ("doubt", "256 of 512 pairs are copies of others")


def test_answers_that_are_chosen_by_their_length(look: Lint) -> None:
    texts = [("red", "cat cat") if i % 10 == 0 else ("red red", "cat") for i in range(len(PAIRS))]
    rows = [{**p, "chosen": c, "rejected": r} for p, (c, r) in zip(PAIRS, texts, strict=True)]
    assert look.about("length", rows) == [
        ("doubt", "the chosen answer is the longer one in 90% of pairs (ties ½)")
    ]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    ((level, text),) = look.about("length", turned)
    assert (level, text[-21:]) == ("doubt", "10% of pairs (ties ½)")
    one = [PAIRS[0] | {"chosen": "red red"}, *PAIRS[1:]]
    ((level, text),) = look.about("length", one)
    assert level == "note" and " 50% of pairs" in text


def test_prompts_that_are_nearly_on_two_sides(look: Lint) -> None:
    """A word more is another prompt by digest, on another side for some."""
    longer = [" ".join(WORDS[i : i + 5] + WORDS[: max(0, i - 11)]) for i in range(16)]
    rows = [{**PAIRS[i], "prompt": words} for i, words in enumerate(longer)]
    rows += [
        {**PAIRS[i], "prompt": f"{words} {words.split()[0]}"} for i, words in enumerate(longer)
    ]
    lines = [line for line in look(rows, "dataset.test_fraction=0.5") if line.about == "splits"]
    assert not any("assistant" in line.change for line in lines)  # people's words, no template's
    sides = [line.text for line in lines]
    assert sides and all(text.endswith("are nearly a training prompt") for text in sides)


def test_a_stage_s_own_rows_and_what_is_not_here(look: Lint, tmp_path: Path) -> None:
    demos = tmp_path / "demos.jsonl"
    demos.write_text(
        "".join(json.dumps({"prompt": p["prompt"], "completion": "red"}) + "\n" for p in PAIRS)
    )
    found = look(PAIRS, f"sft.dataset.path={demos}")
    assert [line.about for line in found[-2:]] == ["sft.rows", "sft.tokens"]
    for word, what in (
        ("model.name=owner/model", "owner/model"),
        ("dataset.path=owner/a", "owner/a"),
    ):
        recipe = load_recipe(tmp_path / "tiny.toml", set=[word])
        plan = plan_run(load_recipe(tmp_path / "tiny.toml"), tmp_path / "runs")
        object.__setattr__(plan, "recipe", recipe)
        (line,) = linted(plan)
        assert line.text == f"not looked at: {what} is not on this machine"
        assert line.change.startswith("rlhf-recipes fetch ")


def test_rows_that_cannot_be_used_are_a_line_of_the_plan(
    look: Lint, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (line,) = look([{"title": "red \x1b[2J"}] * 3)
    assert line.level == "fault" and "3 of 3 rows are unusable" in line.text
    assert "row 1 has title: 'red \\x1b[2J'" in line.text
    assert line.change.startswith("the shapes that are understood")
    monkeypatch.setattr(sys, "argv", ["rlhf-recipes", "plan", str(tmp_path / "tiny.toml")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    told = capsys.readouterr()
    assert "✗ rows       " in told.out and "sft         runs  new" in told.out


def test_stages_that_find_no_rows(look: Lint) -> None:
    """Rows that are recognised, and are not what a stage learns from."""
    prompts = [{"prompt": row["prompt"], "better": "red"} for row in PAIRS]
    assert look.about("rows", prompts)[1:] == [("fault", "none for sft, reward")]
    answers = [{"prompt": row["prompt"], "completion": "red", "label": True} for row in PAIRS]
    assert look.about("rows", answers)[1:] == [("fault", "none for reward")]
    found = look.about("rows", PAIRS, "dataset.test_fraction=0")
    assert found[1:] == [("fault", "none for evaluation")]


def test_without_a_tokenizer_it_says_so(tmp_path: Path) -> None:
    (line,) = linted(plan_run(load_recipe(toy(tmp_path)), tmp_path / "runs"))
    assert (line.level, line.text) == ("fault", f"{tmp_path / 'model'} has no tokenizer")
    assert line.change.startswith("copy tokenizer.json and tokenizer_config.json there")


def test_how_rows_were_read_is_said(look: Lint) -> None:
    rows = [{"question": row.pop("prompt"), "source": "web", **row} for row in map(dict, PAIRS)]
    assert look.about("read", rows) == [
        ("note", "columns: prompt from question"),
        ("note", "columns that are not used: source"),
    ]


def test_prompts_whose_answers_nobody_named(look: Lint) -> None:
    rows = [{"prompt": r["prompt"], "good_one": "red cat", "bad_one": "blue"} for r in PAIRS]
    fault = look(rows)[-1]
    assert (fault.level, fault.text) == ("fault", "none for sft, reward")
    named = 'chosen = "good_one", prompt = "prompt", rejected = "bad_one"'
    assert fault.change.startswith(f"--set 'dataset.columns={{{named}}}'")


def test_marks_of_another_template(look: Lint) -> None:
    rows = [{**row, "prompt": f"[INST] {row['prompt']} [/INST]"} for row in PAIRS]
    assert look.about("markup", rows) == [
        ("doubt", "256 of 256 prompts hold a template's marks"),
    ]


def test_what_a_template_writes_by_itself(look: Lint, tmp_path: Path) -> None:
    model = shutil.copytree(look.model, tmp_path / "other")
    config = json.loads((model / "tokenizer_config.json").read_text())
    template = TEMPLATE.replace("assistant\n", "assistant {{ strftime_now('%d') }} <think>\n")
    (model / "chat_template.jinja").write_text(template)
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    other = Lint(model, tmp_path)
    assert other.about("template", PAIRS) == [
        ("note", "the template writes the day's date; here it is always 26 Jul 2024"),
        ("doubt", "the template begins <think>, and 256 of 256 answers never end it"),
    ]
