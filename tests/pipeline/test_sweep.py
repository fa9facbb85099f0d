"""A sweep: which runs, what they are called, what they share, how they end, what is shown."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from rlhf_recipes.errors import Interrupted, RecipeError, UsageError
from rlhf_recipes.pipeline import sweep
from rlhf_recipes.pipeline.sweep import Trial, go, trials, values
from rlhf_recipes.recipe.load import Recipe
from tests.helpers.commands import environment
from tests.helpers.counting import Counting, toy
from tests.helpers.runs import call
from tests.helpers.told import told
from tests.report.test_compare import measured

COUNTING = (sys.executable, "-m", "tests.helpers.counting")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    toy(tmp_path)
    (tmp_path / "model" / "tokenizer.json").write_text('{"added_tokens": []}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(made: list[Trial]) -> list[str]:
    return [one.name for one in made]


# ---- which runs


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ("1,2, 3", ["1", "2", "3"]),
        ("0.05", ["0.05"]),
        ('["sft", "dpo"],["sft"]', ['["sft", "dpo"]', '["sft"]']),
        ('{prompt="a", chosen="b"}', ['{prompt="a", chosen="b"}']),
        ('"one, and two"', ['"one, and two"']),
        ("don't,can't", ["don't", "can't"]),
        ("a/b,c/d", ["a/b", "c/d"]),
        ("1,,2", ["1", "", "2"]),
    ],
)
def test_commas_separate_values_but_not_within_a_list(raw: str, found: list[str]) -> None:
    assert values(raw) == found


def test_every_combination_is_a_run_named_after_its_settings(here: Path) -> None:
    made = trials("toy", ["seed=1,2", "ppo.kl_coef=0.05,0.1"])
    assert names(made) == [
        "toy-ppo.kl_coef=0.05-seed=1",
        "toy-ppo.kl_coef=0.05-seed=2",
        "toy-ppo.kl_coef=0.1-seed=1",
        "toy-ppo.kl_coef=0.1-seed=2",
    ]
    assert [(one.setting, one.seed) for one in made[1:3]] == [
        ("ppo.kl_coef=0.05", "2"),
        ("ppo.kl_coef=0.1", "1"),
    ]
    assert [one.recipe.tables["ppo"].options["kl_coef"] for one in made] == [0.05, 0.05, 0.1, 0.1]
    # What is the same in all is in the name's beginning: another value is another run.
    one, other = (trials("toy", ["seed=1,2", f"sft.max_steps={n}"]) for n in (5, 6))
    assert one[0].name != other[0].name and one[0].name.startswith("toy-")
    assert names(trials("toy", ["seed=1,2", "sft.max_steps=5"], name="mine"))[0] == "mine-seed=1"
    one, other = names(trials("toy", ["title=a/b,a b"]))
    assert one != other and one.startswith("toy-title=a_b-") and other.startswith("toy-title=a_b-")


def test_what_is_wrong_in_any_run_is_said_before_one_starts(here: Path) -> None:
    with pytest.raises(RecipeError) as found:
        trials("toy", ["seed=1,x", "ppo.kl_coef=0.1,much", "sft.lr=1"])
    said = str(found.value)
    assert [said.count(word) for word in ("seed=x", "kl_coef=much", "sft.lr")] == [1, 1, 2]
    for words, problem in {
        ("seed=1",): "needs a key with several values",
        ("seed=1,2", "seed=3"): "seed is set twice (once, as in --set seed=A,B)",
        (
            "seed=1,2,1",
        ): "toy-seed=1 and toy-seed=1 would be one run (a value is there twice: leave one out)",
        ("ppo.kl_coef=0.1,1e-1",): "toy-ppo.kl_coef=0.1 and toy-ppo.kl_coef=1e-1 would be one run",
        ("seed=1,",): "an empty value",
        ("seed=" + ",".join(map(str, range(501))),): "501 runs are too many",
    }.items():
        with pytest.raises(UsageError, match=re.escape(problem)):
            trials("toy", [*words])
    (here / "pairs.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(Exception, match=r"toy-seed=1: .*no rows for sft"):
        trials("toy", ["seed=1,2"])


def test_dry_prints_what_starts_the_runs_anywhere(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["--set", "seed=1,2", "--set", 'sft.dataset={path="./pairs.jsonl"}', "--dry"]
    out, _ = call(monkeypatch, capfd, "sweep", "toy", *words)
    assert out == [
        f"rlhf-recipes run toy --set seed={seed} --set 'sft.dataset={{path=\"./pairs.jsonl\"}}' "
        f"--name toy-1d24da-seed={seed} --wait"
        for seed in (1, 2)
    ]
    assert not (here / "runs").exists()


# ---- running them


def fake(here: Path, text: str) -> tuple[str, ...]:
    """A program in place of `rlhf-recipes`; $8 is the run's name."""
    (here / "fake.sh").write_text(text)
    return ("sh", str(here / "fake.sh"))


def todo(count: int) -> list[tuple[Trial, list[str]]]:
    made = [Trial(f"r{n}", "", str(n), (), Recipe.__new__(Recipe)) for n in range(count)]
    return [(one, [one.name]) for one in made]


def test_one_that_fails_stops_no_other(here: Path) -> None:
    program = fake(here, 'echo "stage x failed: $1"; case $1 in r1) exit 3;; r2) kill -9 $$;; esac')
    said: list[str] = []
    ended = go(todo(4), 2, said.append, program)
    assert {name: (end.code, end.line) for name, end in ended.items()} == {
        "r0": (0, "stage x failed: r0"),
        "r1": (3, "stage x failed: r1"),
        "r2": (-9, "killed by signal 9"),
        "r3": (0, "stage x failed: r3"),
    }
    assert {one.partition(" failed after")[0] for one in said} >= {"✗ r1:", "✗ r2:"}
    assert [one for one in said if one.startswith("▸")][-1] == "▸ 4 of 4  r3"


def test_so_many_at_once_each_with_a_card_of_its_own(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = fake(here, 'echo "$1 $CUDA_VISIBLE_DEVICES" >> cards; sleep 0.2')
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a, GPU-b")
    go(todo(4), 2, lambda line: None, program)
    lines = sorted((here / "cards").read_text().splitlines())
    assert [line.split()[0] for line in lines] == ["r0", "r1", "r2", "r3"]
    assert sorted(line.split()[1] for line in lines) == ["GPU-a", "GPU-a", "GPU-b", "GPU-b"]
    assert sweep.card_of(0, 1) == {}  # one at a time has them all
    monkeypatch.setenv("RLHF_RECIPES_LAUNCH", "torchrun")  # a run's processes share the cards
    assert sweep.card_of(1, 2) == {}
    monkeypatch.delenv("RLHF_RECIPES_LAUNCH")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert sweep.card_of(1, 2) == {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(sweep, "hardware", lambda: {"gpus": ["A", "A", "A"]})
    assert [sweep.card_of(n, 4)["CUDA_VISIBLE_DEVICES"] for n in range(4)] == ["0", "1", "2", "0"]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_reaches_each_run_once(here: Path, signum: int, code: int) -> None:
    """And the sweep ends when the last of them has; what waits does not begin."""
    text = 'trap "echo $1 >> heard" INT TERM; echo >> up; '
    text += "while ! [ -s heard ]; do sleep 0.02; done; sleep 0.1; exit 9"
    said: list[str] = []

    def tell() -> None:
        while not (here / "up").exists() or len((here / "up").read_text()) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signum)

    threading.Thread(target=tell).start()
    with pytest.raises(Interrupted) as error:
        go(todo(3), 2, said.append, fake(here, text))
    assert error.value.exit_code == code
    assert sorted((here / "heard").read_text().split()) == ["r0", "r1"]
    assert said[-1] == "stopping 2 runs after their step; once more stops at once"
    assert "0 of 3 runs ended" in str(error.value)


# ---- whole sweeps, of stages that only count


def test_runs_at_once_share_their_stages(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweep.go, "__defaults__", (COUNTING,))
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    words = ["sweep", "toy", "--set", "ppo.kl_coef=0.05,0.1", "--jobs", "2"]
    out, err = call(monkeypatch, capfd, *words)
    assert err[0] == "2 of 2 runs to do, 2 at once: 8 stages, 6 to compute"
    assert sum(line.startswith("✓") for line in err) == 2
    assert len([*(here / "runs" / ".stages").glob("*/stage.json")]) == 6
    shared = r"6 stages took .+; without sharing, 8 would have taken"
    assert any(re.search(shared, line) for line in out)


def test_means_over_seeds_and_the_same_command_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from rlhf_recipes.pipeline.runner import run

    wins = {"0.05": {"1": 0.7, "2": 0.8, "3": 0.9}, "0.1": {"1": 0.6, "2": 0.7, "3": 0.9}}
    sets = ["--set", "seed=1,2,3", "--set", "ppo.kl_coef=0.05,0.1"]
    counting = Counting(monkeypatch)
    made = trials("toy", sets[1::2])
    for one in made:
        run(one.recipe, runs=here / "runs", name=one.name)
        file = here / "runs" / one.name / "results.json"
        result = json.loads(file.read_text()) | {"ppo.kl": 2.0 + int(one.seed)}
        result["ppo.win_rate"] = wins[one.setting.partition("=")[2]][one.seed]
        file.write_text(json.dumps(result))
    assert len(counting.ran) == 18  # of 24: SFT and reward once a seed
    monkeypatch.setattr(sweep, "subprocess", None)  # nothing is started
    out, err = call(monkeypatch, capfd, "sweep", "toy", *sets)
    assert err == []
    head, first, second = (re.split(r"  +", line) for line in out[1:4])
    assert (
        head
        == "setting seeds preferred_by_the_reward_model against_the_first KL".replace(
            "_", " "
        ).split(" ", 2)[:2]
        + head[2:]
    )
    # Student's t of two degrees of freedom is 4.303: ± 4.303 × 0.1 / √3.
    assert first[:4] == ["ppo.kl_coef=0.05", "3 of 3", "80 % (55–100)", "4.00 (1.52 to 6.48)"]
    assert first[4] == "1 ?, 2 ?, 3 ?"
    assert second[2] == "73 % (35–100)"
    assert second[3] == "−6.7 points (−21.0 to 7.7)"  # of runs with the same seed
    page = here / "runs" / "toy-by-seed-ppo.kl_coef.html"
    assert out[-1] == f"page  {page.relative_to(here)}"
    text = page.read_text()
    assert 'href="toy-ppo.kl_coef%3D0.05-seed%3D1/report.html"' in text
    assert "6 of 6 runs are done. 18 stages took" in text
    assert "Not comparable" not in text and "<svg" in text and str(here) not in text

    (here / "runs" / made[-1].name / "manifest.json").unlink()
    out, _ = call(monkeypatch, capfd, "sweep", "toy", *sets, "--jobs", "0", "--json")
    found = json.loads("\n".join(out))
    assert [one["outcome"] for one in found["runs"]] == ["finished"] * 5 + ["not begun"]
    assert found["table"][2][1] == "2 of 3" and found["not_comparable"] == []
    again = [*todo_of(here, sets[1::2])]
    assert again == [made[-1].name]


def todo_of(here: Path, sets: list[str]) -> list[str]:
    made = trials("toy", sets)
    return [one.name for one in made if not sweep.is_done(one.plan(here / "runs"))]


def test_settings_that_move_the_ruler_are_not_compared(here: Path) -> None:
    from rlhf_recipes.report import sweep as report

    one, other = (
        measured(told(here / name), judge=judge, rate=rate)
        for name, judge, rate in (("a", 1, 1e-3), ("b", 2, 1e-4))
    )
    found = report.Sweep([report.Trial("rate=1", "42", one), report.Trial("rate=2", "42", other)])
    assert found.rulers() == ["another judge (learning_rate 0.001 → 0.0001)"]
    (_, row, last) = found.rows()
    assert row[2:4] == ["71 %", ""] and last[3] == "+0.0 points"  # one seed: no interval
    assert row[4:6] == ["6.20", f"42 {found.trials[0].state}"]


def test_the_exit_code_says_if_one_failed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["sweep", "toy", "--set", "seed=1,2"]
    for codes, code in {"r 1": 1, "r 4": 4}.items():
        program = fake(here, f"case $4 in seed=1) exit 0;; *) exit {codes[2:]};; esac")
        monkeypatch.setattr(sweep.go, "__defaults__", (program,))
        out, err = call(monkeypatch, capfd, *words, code=code)
        assert out[-1] == "page  runs/toy-by-seed.html"
        assert any(line.startswith("✗" if code == 1 else "?") for line in err)
