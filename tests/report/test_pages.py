"""The page of a run: what it shows in which order, and that it runs and loads nothing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.report import compare as comparison
from rlhf_recipes.report import run_page
from rlhf_recipes.report.facts import TYPES, Facts
from rlhf_recipes.report.html import STYLE, placeless
from rlhf_recipes.store.files import read_json
from tests.helpers.told import GOOD, KEY, shares, told

pytestmark = pytest.mark.train

ROWS = [
    {
        "prompt": f"question {i}",
        "answers": {"base": f"base {i}", "sft": f"sft {i}", "ppo": f"ppo {i}"},
        "scores": {"base": -1.0, "sft": 0.0, "ppo": i / 10},
        "judged": {"base": 0.0, "sft": 0.25, "ppo": 1.0},
        "tokens": {"base": 48, "sft": 30, "ppo": 33},
        "ended": {"base": False, "sft": True, "ppo": True},
    }
    for i in range(20)
]
EVIDENCE = {
    "format": 1, "pairs": 200, "margins": [n / 20 - 1 for n in range(200)],
    "calibration": [{"pairs": 0, "said": None, "right": None}]
    + [{"pairs": 20 * n, "said": 0.5 + n / 20, "right": 0.5 + n / 25} for n in range(1, 10)],
    "worst": [{"prompt": "asked", "chosen": "good", "rejected": "bad", "margin": -2.5}],
}  # fmt: skip
PPO = [
    {
        "step": n, "score": n / 10 - 2, "KL": n / 5, "length": 30 + n / 4, "loss/value_avg": 2 / n,
        "policy/clipfrac_avg": 0.02, "val/entropy_per_token": 1.2,
        **({"eval/score": n / 10 - 2.1} if n % 6 == 0 else {}),
    }
    for n in range(1, 37)
]  # fmt: skip
LOSS = [{"step": 10 * n, "loss": 4 / n, "accuracy": 1 - 0.4 / n} for n in range(1, 9)]
BEST_OF = {
    "format": 1, "policy": "sft", "against": "ppo", "n": [1, 2, 4, 8, 16],
    "kl": [0, 0.19, 0.64, 1.2, 1.84], "score_gain": [0, 0.6, 1.1, 1.5, 1.9],
    "judge_gain": [0, 0.1, 0.2, 0.3, 0.4],
}  # fmt: skip


def whole(folder: Path, rows: list[dict[str, Any]] = ROWS, **words: Any) -> Path:
    """A run with everything that there is to show."""
    answers = "".join(json.dumps(row) + "\n" for row in rows)
    evidence = {"evidence.json": json.dumps(EVIDENCE)}
    outputs = {
        "reward": evidence, "judge": evidence, "evaluation": {"answers.jsonl": answers},
        "best_of": {"best_of.json": json.dumps(BEST_OF)},
    }  # fmt: skip
    curves = {"sft": LOSS, "reward": LOSS, "judge": LOSS, "ppo": PPO}
    return told(folder, outputs=words.pop("outputs", outputs), curves=curves, **words)


class Page(HTMLParser):
    """A page's tags with their attributes, and all its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data.replace("\u00a0", " "))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(run: Path) -> tuple[str, Page]:
    run_page.write(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


def harmless(html: str) -> Page:
    """The page, once it is known to run nothing, load nothing and lead nowhere."""
    found = Page(html)
    names = {tag for tag, _ in found.tags}
    assert names.isdisjoint("script iframe object embed img link base form video audio".split())
    for tag, attributes in found.tags:
        for key, value in attributes.items():
            assert not key.startswith("on") and key not in ("src", "srcset", "action"), tag
            if key.endswith("href"):
                assert value and value.startswith("#"), value
            if value and tag != "meta":
                assert "url(" not in value.replace("url(#", ""), value
    (policy,) = [
        meta["content"] for meta in found.all("meta") if meta.get("http-equiv", "")
    ]  # fmt: skip
    style = re.search("<style>(.*?)</style>", html, re.DOTALL)[1]
    assert policy == (  # an inline style may stand anywhere; scripts and loads are forbidden
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    )
    assert html.count("<style") == 1 and "url(" not in style and "@import" not in style
    return found


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, Page]:
    """A whole run, and its page."""
    run = whole(tmp_path_factory.mktemp("whole"))
    return run, *page(run)


def test_the_page_of_a_whole_run(shown: tuple[Path, str, Page]) -> None:
    _, html, found = shown
    harmless(html)
    order = [a["id"] for a in found.all("section")]
    assert order == "verdict answers price ppo reward sft cost data recipe next".split()
    text = " ".join(found.text)
    for words in (
        "It looks better, but that is not proven.", "PPO beat SFT on 71 % of 128 prompts (63–79)",
        "PPO gained 85 % of what the best of 16 answers does, at 3.4 times the KL",
        "gain +1.90 by the reward model", "cut off after 48 tokens",
        "PPO's answers are preferred to SFT's on 71 % of the prompts",
        "The score rose from −1.80 to +1.50",
        "It moved 7.0 nats an answer away from its start, at the end",
        "It is surer than it should be: off by 3 % on average",
        "40", "In the middle pair the better answer leads by",
        "On rows it did not see, the loss fell from 4.72 to 3.67",
        "1 min 01 s", "500 MB", "3: too long", "…/told.toml", "…/pairs.jsonl", "trl 1.12.0",
    ):  # fmt: skip
        assert words in text, words
    assert "What is not here" not in text and "/home" not in html
    assert len(html.encode()) < 300_000


def test_dpo_has_words_plots_and_a_judge_of_its_own(tmp_path: Path) -> None:
    steps = [
        {"step": n, "loss": 0.7 - n / 50, "margin": n / 10, "accuracy": 0.6 + n / 50}
        for n in range(1, 9)
    ]
    judged = [{k: v for k, v in row.items() if k != "scores"} for row in ROWS]
    rows = [
        {k: {"dpo": v["ppo"], **v} if isinstance(v, dict) else v for k, v in row.items()}
        for row in judged
    ]
    none = {key: None for key in GOOD if key.startswith(("ppo.", "reward.", "best_of."))}
    none |= shares("dpo.judge_win_rate", 0.7, 0.08) | {"dpo.length": 30.0, "dpo.kl": 3.0}
    run = told(
        tmp_path,
        none,
        kinds=["sft", "dpo", "judge", "evaluation"],
        recipe={"dpo": {"kind": "dpo", "learning_rate": 1e-4, "policy": "sft"}},
        curves={"sft": LOSS, "judge": LOSS, "dpo": steps},
        outputs={
            "judge": {"evidence.json": json.dumps(EVIDENCE)},
            "evaluation": {"answers.jsonl": "".join(json.dumps(row) + "\n" for row in rows)},
        },
    )
    _, found = page(run)
    sections = [a["id"] for a in found.all("section")]
    assert sections == "verdict answers price compared reward sft cost data recipe next".split()
    text = " ".join(" ".join(found.text).split())
    for words in (
        "How DPO went", "The margin of its training rows rose from +0.10 to +0.80",
        "whose better answer it prefers: the share rose from 62 % to 76 %",
        "Did the judge learn what people prefer?", "judge 1.00",
    ):  # fmt: skip
        assert words in text, words
    assert "Did the reward model" not in text and "· judge" not in text
    imitated = text.partition("Did it learn from the examples?")[2].partition("Time and")[0]
    assert "On rows it did not see, the loss fell from 4.72 to 3.67" in imitated
    assert "training loss" not in imitated


def test_a_mark_has_its_own_colour_in_every_box() -> None:
    levels = "fault success good doubt note".split()
    assert all(f"\nli.{level} .mark " in STYLE for level in levels)
    assert not re.search(r"^\.\w+ \.mark", STYLE, re.MULTILINE)


def test_every_plot_says_what_it_means_and_what_is_to_be_seen(
    shown: tuple[Path, str, Page],
) -> None:
    _, html, found = shown
    plots = [svg for svg in found.all("svg") if svg.get("role") == "img"]
    assert len(plots) == html.count("<figcaption>") == 3 + 6 + 2 * 4 + 1
    assert all(len(svg["aria-label"] or "") > 20 for svg in plots)
    assert all(svg.get("aria-hidden") for svg in found.all("svg") if svg.get("role") != "img")
    assert not re.search(r"[:\"]#[0-9a-f]{6}", " ".join(re.findall("<svg.*?</svg>", html, re.S)))
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px; font-family", html)]
    assert len(sizes) > 100 and min(sizes) >= 12  # in units of the SVG, which a page never shrinks
    assert {(svg["viewbox"] or "").split()[2] for svg in plots} == {"290"}
    units = "units of the reward|nats an answer|nats a token|tokens|units squared|of the tokens"
    assert all(f">{unit}</text>" in html for unit in units.split("|"))
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_same_run_gives_the_same_bytes(shown: tuple[Path, str, Page]) -> None:
    run, html, _ = shown
    assert page(run)[0] == html


HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style><script>x</script>",
    "]]></svg><script>y</script>", "{{ 7 * 7 }}{% raw %}", "javascript:alert(1)", "$\\frac{1}{0}$",
    "&lt;b&gt;", "<!--", "\x1b[31mred\x1b[0m",
]  # fmt: skip


def test_hostile_text_comes_out_as_text(tmp_path: Path, shown: tuple[Path, str, Page]) -> None:
    text = " ".join(HOSTILE)
    row = {"prompt": text, "answers": {"base": text, "sft": text, "ppo": text}}
    row |= {"scores": {"sft": 0.0, "ppo": 1.0}, "judged": {"ppo": text}, "tokens": {"ppo": text}}
    worst = [{"prompt": text, "chosen": text, "rejected": text, "margin": text}]
    evidence = {"evidence.json": json.dumps(EVIDENCE | {"worst": worst})}
    answers = {"answers.jsonl": json.dumps(row) + "\n"}
    manifest = {
        "title": text, "recipe": f"/home/{text}/r.toml", "overrides": [text], "mirror": text,
        "versions": {text: text}, "hardware": {text: [text]}, "model": {"repo": text},
        "error": {"stage": text, "message": text, "hint": text}, "outcome": "failed",
    }  # fmt: skip
    run = whole(tmp_path, outputs={"reward": evidence, "evaluation": answers}, manifest=manifest)
    (run / "recipe.toml").write_text(text)
    judge = {"judge": f"python:/x/{text}.py:score"}
    resolved = (run / "resolved.toml").read_text().replace('judge = "independent"', "")
    (run / "resolved.toml").write_text(
        resolved.replace("[evaluation]", f"[evaluation]\njudge = {json.dumps(judge['judge'])}")
    )
    data = run.parent / ".stages" / "sft-0123456789ab" / "data.json"
    data.write_text(json.dumps(read_json(data) | {"dropped": {text: 3}}))
    html, found = page(run)
    harmless(html)
    clean = re.sub("[\x00-\x1f]", "", text)
    assert sum(clean in one for one in found.text) >= 12
    assert {tag for tag, _ in found.tags} <= {tag for tag, _ in shown[2].tags} | {"code", "ul"}


@pytest.mark.usefixtures("undrawn")
def test_what_hides_in_a_text_is_left_out_and_its_lines_stay(tmp_path: Path) -> None:
    text = "one\n two\u202elast\x00\x07\u2066 \ud800 ‍👨‍👩‍👧"
    rows = [{"prompt": text, "answers": {"sft": "a", "ppo": "b"}, "scores": {}}]
    answers = {"answers.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}
    html, found = page(told(tmp_path, outputs={"evaluation": answers}))
    assert "one\n twolast  ‍👨‍👩‍👧" in found.text
    assert not re.search("[\x00\x07\u202e\u2066]", html)


def test_a_page_stays_small_whatever_a_run_holds(tmp_path: Path) -> None:
    long = "word " * 200_000
    rows = [
        {"prompt": long, "answers": {"base": long, "sft": long, "ppo": long}, "scores": {}}
        for _ in range(20)
    ]
    run = whole(tmp_path, rows)
    (run / "recipe.toml").write_text("# " + long)
    steps = "".join(json.dumps(PPO[0] | {"step": n}) + "\n" for n in range(1, 20_000))
    (run.parent / ".stages" / "ppo-0123456789ab" / "metrics.jsonl").write_text(steps)
    html, found = page(run)
    assert len(html.encode()) < 500_000
    assert "(998,500 characters more)" in " ".join(found.text)


@pytest.mark.usefixtures("undrawn")
def test_cases_are_the_best_the_worst_the_middle_and_some_by_lot(
    tmp_path: Path, shown: tuple[Path, str, Page]
) -> None:
    top = shown[1].partition('<div class="every">')[0]
    asked = [text for text in Page(top).text if text.startswith("question")]
    assert asked[:6] == [f"question {i}" for i in (19, 18, 0, 1, 9, 10)]
    assert len(asked) == len(set(asked)) == 8
    for few in (1, 3):
        answers = "".join(json.dumps(row) + "\n" for row in ROWS[:few])
        outputs = {"evaluation": {"answers.jsonl": answers}}
        html, _ = page(told(tmp_path / str(few), outputs=outputs))
        top = Page(html.partition('<div class="every">')[0])
        assert sorted(text for text in top.text if text.startswith("question")) == [
            f"question {i}" for i in range(few)
        ]


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_failed_shows_what_there_is(tmp_path: Path) -> None:
    error = {"stage": "ppo", "message": "stage ppo: out of memory", "hint": "smaller batches"}
    run = told(
        tmp_path,
        kinds=["sft", "reward", "ppo", "evaluation"],
        not_run=("ppo", "evaluation"),
        manifest={"outcome": "failed", "error": error},
        curves={"sft": LOSS, "reward": LOSS, "ppo": PPO[:9]},
    )
    (run / "results.json").write_text('{"format": 1, "sft.validation_loss": 3.5}')
    html, found = page(run)
    harmless(html)
    text = " ".join(found.text)
    assert "The run ended early. " in text and "smaller batches" in text
    assert "The run ended early, 2 of 4 stages are done: stage ppo: out of memory." in text
    assert "The score rose from −1.90 to −1.10" in text  # as far as it came
    assert "No policy was evaluated: there are no answers to show." in text


def test_what_a_waiting_run_asks_to_type_can_be_typed(tmp_path: Path) -> None:
    command = "rlhf-recipes label /home/me/my own.toml --runs /home/me/runs"
    error = {"message": "people have to judge first in /home/me/runs", "hint": command}
    run = told(tmp_path, not_run=("ppo",), manifest={"outcome": "waiting", "error": error})
    html, _ = page(run)
    assert f"<code>{command}</code>" in html and "judge first in …/runs" in html


@pytest.mark.usefixtures("undrawn")
def test_files_that_are_missing_or_damaged_are_said_and_nothing_more(tmp_path: Path) -> None:
    run = whole(tmp_path)
    for file in run.parent.rglob("*.json*"):
        if file.name not in ("manifest.json", "stage.json"):
            file.write_text("[")
    html, found = page(run)
    harmless(html)
    assert "No margins, calibration or worst pairs of reward" in "".join(found.text)
    for stage in (run.parent / ".stages").iterdir():
        (stage / "stage.json").unlink()
    assert "were removed" in " ".join(page(run)[1].text)
    (run / "manifest.json").write_text('{"format": 1}')
    harmless(page(run)[0])


@pytest.mark.usefixtures("undrawn")
def test_a_value_of_another_type_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    run = whole(tmp_path)
    damaged = {
        "manifest.json": ["overrides", "error", "versions", "hardware", "stages"],
        "data.json": ["dropped"],
        "evidence.json": ["margins", "calibration", "worst"],
        "curve.json": ["points"],
        "people.json": ["results", "agreement"],
    }
    people = {"format": 1, "evaluation": KEY, "results": {}, "agreement": {}}
    (run / "people.json").write_text(json.dumps(people))
    assert sorted(TYPES) == sorted(sum(damaged.values(), []))
    kept = {}
    for name, keys in damaged.items():
        for file in run.parent.rglob(name):
            kept[file] = file.read_text()
            some = keys[: -1 if name == "manifest.json" else None]  # without its stages
            file.write_text(json.dumps({**json.loads(kept[file]), **dict.fromkeys(some, 1)}))
            assert Facts(run).stages
        harmless(page(run)[0])
        for file in run.parent.rglob(name):
            file.write_text(kept[file])
    manifest = run / "manifest.json"
    manifest.write_text(json.dumps(json.loads(kept[manifest]) | {"stages": 1}))
    assert not Facts(run).stages
    harmless(page(run)[0])


@pytest.mark.usefixtures("undrawn")
def test_an_older_run_s_page_says_what_it_has_not(tmp_path: Path) -> None:
    ends = [f"ppo.{by}win_rate_{end}" for by in ("", "judge_") for end in ("low", "high")]
    run = told(tmp_path, dict.fromkeys(ends), kinds=["sft", "reward", "ppo", "evaluation"])
    text = "".join(page(run)[1].text)
    assert "rlhf-recipes run RECIPE --set evaluation.best_of=16 --name told" in text
    assert "71 % of 128 prompts (63–78)" in text  # Wilson's


@pytest.mark.usefixtures("undrawn")
def test_the_card_goes_with_the_model_and_names_no_place_on_this_machine(tmp_path: Path) -> None:
    run = told(tmp_path, manifest={"title": "A [title](x) | <b>"})
    run_page.write(run)
    assert not (run / "model").exists()
    (run / "model").mkdir()
    (run / "model" / "source.json").write_text('{"format": 1, "stage": "ppo"}')
    run_page.write(run, again=False)
    card = (run / "model" / "README.md").read_text()
    assert card.startswith(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n"
        'tags: ["trl", "rlhf-recipes", "sft", "ppo"]\nbase_model: "a/model"\n'
        'base_model_relation: finetune\nmodel-index: [{"name": "told-ppo", "results": ['
    )
    assert "# A \\[title\\](x) \\| &lt;b&gt;\n" in card.replace("&lt\\;", "&lt;")
    assert "- PPO beat SFT on 71 % of 128 prompts (63–79) by a second" in card
    assert "| preferred by the judge | — |" in card and "Data: pairs.jsonl. Seed 42." in card
    assert "/home/me" not in card
    local = {"model": {"name": "/home/me/mine"}, "dataset": {"path": "~/rows"}}
    resolved = (told(tmp_path / "local", recipe=local) / "resolved.toml").read_text()
    (run / "resolved.toml").write_text(resolved)
    run_page.write(run)
    card = (run / "model" / "README.md").read_text()
    assert "\nmine, trained by sft → reward → ppo;" in card and "Data: rows. Seed" in card
    assert "base_model" not in card and "/home/me" not in card


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('path = "/home/a b/pairs.jsonl"', 'path = "…/pairs.jsonl"'),
        ("python:/home/me/judge.py:score", "python:…/judge.py:score"),
        ("No such file: ~me/x/y.txt (see ~/z.log)", "No such file: …/y.txt (see …/z.log)"),
        ("https://a.b/c/d ./data/x ../y/z and/or 1/2/3", None),
        ('name = "HuggingFaceTB/SmolLM2"', None),
    ],
)
def test_a_path_is_shown_by_its_last_part(text: str, shown: str | None) -> None:
    assert placeless(text) == (shown or text)


# ---- runs side by side --------------------------------------------------------------------------


def test_the_page_of_several_runs(tmp_path: Path) -> None:
    one = whole(tmp_path / "a")
    other = whole(tmp_path / "b", recipe={"ppo": {"kl_coef": 0.3}})
    results = json.loads((other / "results.json").read_text())
    changes = shares("ppo.judge_win_rate", 0.55, 0.09) | {"ppo.win_rate_like_length": 0.6}
    (other / "results.json").write_text(json.dumps(results | changes))
    comparison.write([one, other], tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    text = " ".join(harmless(html).text)
    assert "told: It looks better, but that is not proven." in " ".join(text.split())
    assert "ppo.kl_coef" in text and "0.15" in text and "0.3" in text
    assert "71 % (63 to 79)" in text and "55 % (46 to 64)" in text
    assert "ppo.win_rate_like_length 88 % 60 %" in " ".join(text.split())
    assert "ppo.judge_win_rate_low" not in text and "sft.validation_loss" not in text
