"""The command itself, in a process of its own where a signal or an exit code is the point."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_recipes.cli import main
from rlhf_recipes.recipe.load import shipped_recipes
from tests.helpers.commands import command, environment
from tests.helpers.counting import RECIPE, Counting, fail, toy

pytestmark = pytest.mark.train

COMMANDS = (
    "init run plan check fork fetch recipes schema sweep runs compare report doctor clean chat"
    " export label sample feedback judge ui"
).split()


def hanging(cwd: Path) -> subprocess.Popen[str]:
    """`rlhf-recipes run toy.toml`, at its stage PPO."""
    running = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.counting", "run", "toy.toml"],
        cwd=cwd,
        env=environment("hang:ppo"),
        stderr=subprocess.PIPE,
        text=True,
        # A job in a script's background ignores SIGINT, and its children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not (cwd / "hanging").exists():
        assert running.poll() is None
        time.sleep(0.02)
    return running


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with toy.toml in it, to be in."""
    toy(tmp_path)
    (tmp_path / "model" / "tokenizer.json").write_text('{"added_tokens": []}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit code of `rlhf-recipes WORDS` in this process."""
    monkeypatch.setattr(sys, "argv", ["rlhf-recipes", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_a_run_ends_in_a_table_and_what_to_type_next(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Counting(monkeypatch)
    assert call(monkeypatch, "run", "toy.toml") == 0
    out, err = capsys.readouterr()
    table, verdict, rest = out.strip("\n").split("\n\n")
    rows = [line.split(maxsplit=4) for line in table.splitlines()]
    assert rows[0] == ["stage", "time", "result"]
    for row, name in zip(rows[1:], ("sft", "reward", "ppo", "evaluation"), strict=True):
        assert row[2].isdecimal()
        assert [*row[:2], *row[3:]] == [name, "ran", "s", "loss 0.50 → 0.25"]
    assert verdict.splitlines() == [
        "? PPO wins against SFT on 75 % of 8 prompts (41–93) by the reward model: too few prompts "
        "to tell.",
        "  → Raise `evaluation.prompts` (8 now): 200 prompts tell 60 % from chance in four cases "
        "of five, 780 tell 55 %.",
    ]
    assert rest.splitlines() == [
        "results  runs/toy/results.json",
        "report   runs/toy/report.html",
        "model    runs/toy/model",
        "next     rlhf-recipes chat runs/toy",
        "         rlhf-recipes fork toy.toml my-recipe.toml",
    ]
    assert err.splitlines()[0] == "Toy · runs/toy"

    assert call(monkeypatch, "run", "toy.toml") == 0
    out, err = capsys.readouterr()
    assert out.count("cached") == 4
    assert len(err.splitlines()) == 5


def test_strict_ends_with_a_code_of_its_own_where_the_verdict_has_a_fault(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlhf_recipes.findings import Finding
    from rlhf_recipes.report import run_page

    Counting(monkeypatch)
    assert call(monkeypatch, "run", "toy", "--strict") == 0  # a doubt is not a fault
    fault = Finding("fault", "sft", "SFT made the model worse.")
    monkeypatch.setattr(run_page, "verdict", lambda facts: [fault])
    assert call(monkeypatch, "run", "toy") == 0
    assert call(monkeypatch, "run", "toy", "--strict") == 5
    assert "✗ SFT made the model worse." in capsys.readouterr().out


def test_a_failed_stage_is_one_line_and_a_traceback_only_with_debug(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Counting(monkeypatch).fault["reward"] = fail
    assert call(monkeypatch, "run", "toy.toml") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-3:] == [
        "Stage 2 of 4 · reward — new",
        "  report: runs/toy/report.html",
        "stage reward failed: ValueError: the loss is NaN (log: runs/toy/log.txt)",
    ]
    assert call(monkeypatch, "run", "toy.toml", "--debug") == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and "in fail" in shown and "and more of the same" in shown


def test_noise_of_every_origin_stays_in_the_log(here: Path) -> None:
    done = command("run", "toy.toml", "--until", "sft", cwd=here, fault="noise:sft")
    assert done.returncode == 0
    said = done.stdout + done.stderr
    assert "library" not in said and "echoed" not in said
    log = (here / "runs" / "toy" / "log.txt").read_text()
    for words in (
        "printed by a library",
        "complained by a library",
        "echoed from C",
        "UserWarning: warned by a library",
        "logged by a library",
        "INFO rlhf_recipes.stages: logged by us",
        "Stage 1 of 4",
    ):
        assert words in log


def test_after_a_kill_the_same_command_goes_on(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No lock to clear by hand; what was finished is kept, the stage that was killed runs anew."""
    running = hanging(here)
    running.kill()
    running.communicate(timeout=60)
    assert running.returncode == -signal.SIGKILL
    Counting(monkeypatch)
    assert call(monkeypatch, "run", "toy.toml") == 0
    said = capsys.readouterr().err
    assert said.count("— cached (") == 2
    assert "ppo — was not finished" in said


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: int,
    code: int,
) -> None:
    Counting(monkeypatch)
    running = hanging(here)
    assert call(monkeypatch, "run", "toy.toml") == 75
    busy = capsys.readouterr().err
    assert busy.startswith(f"run toy is held by process {running.pid} on ")
    assert len(busy.splitlines()) == 1

    running.send_signal(signum)
    stderr = running.communicate(timeout=60)[1]
    assert running.returncode == code
    assert stderr.splitlines()[-1] == (
        "run toy was interrupted (the same command goes on from what is finished and saved)"
    )
    assert json.loads((here / "runs/toy/manifest.json").read_text())["outcome"] == "interrupted"
    assert call(monkeypatch, "run", "toy.toml") == 0
    after = capsys.readouterr().err.splitlines()
    said = [line.rpartition(" — ")[2] for line in after if "Stage" in line]
    cached = "cached "
    assert [re.sub(r"\(.*", "", why) for why in said] == [cached, cached, "was not finished", "new"]


def test_a_call_that_is_wrong_is_two_plain_lines(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, lines in [
        (["run", "--nam", "x"], ["No such option: --nam", "for help: rlhf-recipes run --help"]),
        (["run"], ["Missing argument 'RECIPE'.", "for help: rlhf-recipes run --help"]),
        (["rum"], ["No such command 'rum'. Did you mean 'run'?", "for help: rlhf-recipes --help"]),
        (
            ["run", "toy.toml", "--until", "sf"],
            ["the recipe has no stage 'sf' (did you mean sft?)"],
        ),
        (["chat", "toi"], ["no run 'toi' in runs (none was made there yet)"]),
        (
            ["export", "toy", "x", "--form", "z"],
            ["no form 'z' (--form is merged, adapter or gguf)"],
        ),
        (["export", "toy", "x", "--type", "q4"], ["no type 'q4' (--type is f16 or q8_0)"]),
    ]:
        assert call(monkeypatch, *words) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert [line.partition(" (Possible")[0] for line in err.splitlines()] == lines


def test_a_terminal_gets_colours_a_hanging_indent_and_the_cure_on_its_own_line(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert call(monkeypatch, "run", "none") == 2
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "\x1b[31m✗\x1b[0m no recipe none"
    assert rest[0].startswith("  \x1b[36m→\x1b[0m shipped: ")
    assert all(line.startswith("    ") and len(line) <= 60 for line in rest[1:])
    monkeypatch.setenv("NO_COLOR", "1")
    assert call(monkeypatch, "run", "none") == 2
    assert capsys.readouterr().err.startswith("✗ no recipe none\n  → shipped: ")


def test_a_terminal_is_told_of_a_step_before_it_takes_long(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Counting(monkeypatch)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")
    for words, step in (
        (["check", "toy"], "Looking at the rows and the model of toy.toml …\n"),
        (["run", "toy"], "  Loading PyTorch …\n"),
    ):
        assert call(monkeypatch, *words) == 0
        assert step in capsys.readouterr().err


def test_output_in_ascii(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert call(monkeypatch, "check", "toy.toml") == 0
    out.seek(0)
    assert "toy.toml: ok (4 stages: sft -> reward -> ppo -> evaluation)" in out.read()


def test_nothing_in_an_error_can_move_the_cursor(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = here / "runs" / "a\x1b[2J\x07\u202eb"
    evil.mkdir(parents=True)
    (evil / "manifest.json").write_text("{}")
    assert call(monkeypatch, "report", "toi") == 2
    assert capsys.readouterr().err == "no run 'toi' in runs (runs there: a[2Jb)\n"


def test_check_prints_findings_and_is_done(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "bad.toml").write_text(RECIPE.replace("learning_rate = 1e-5", "learning_rat = 1e-5"))
    assert call(monkeypatch, "check", "toy.toml") == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("toy.toml: ok (4 stages: sft → reward → ppo → evaluation)\n", "")

    assert call(monkeypatch, "check", "bad.toml", "toy.toml", "none.toml") == 2
    out, err = capsys.readouterr()
    bad, good, none = out.splitlines()
    assert bad.startswith("bad.toml:15: reward.learning_rat: ")
    assert good.startswith("toy.toml: ok")
    assert none.startswith("no recipe none.toml")
    assert err == ""

    assert call(monkeypatch, "check", "bad.toml", "toy.toml", "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == 1
    first, second = found["recipes"]
    assert first["file"] == "bad.toml"
    [problem, *_] = first["problems"]
    assert (problem["line"], problem["key"]) == (15, "reward.learning_rat")
    assert second == {"file": "toy.toml", "problems": [], "notes": []}


def test_check_says_which_stages_find_no_rows(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for columns, said in (
        ({"prompt": "a", "completion": "b"}, "no rows for reward (sft needs answers; "),
        ({"prompt": "a", "good_one": "it is"}, "no rows for sft, reward (--set 'dataset.columns="),
    ):
        (here / "pairs.jsonl").write_text(json.dumps(columns))
        assert call(monkeypatch, "check", "toy.toml") == 1
        out = capsys.readouterr().out
        assert out.startswith(f"toy.toml: rows: ./pairs.jsonl has {said}"), out
    many = "".join(json.dumps(columns) + "\n" for _ in range(300))  # more than `check` looks at
    (here / "pairs.jsonl").write_text(many)
    assert call(monkeypatch, "check", "toy.toml") == 1
    assert "no rows for sft, reward (--set 'dataset.columns=" in capsys.readouterr().out
    (here / "model" / "tokenizer.json").unlink()
    assert call(monkeypatch, "check", "toy.toml", "--json") == 1
    [found] = json.loads(capsys.readouterr().out)["recipes"]
    assert found["rows"] and found["model"].startswith(f"{here}/model has no tokenizer (copy ")


def test_check_resolved_is_a_recipe_of_its_own(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "check", "toy.toml", "--resolved", "--set", "seed=5") == 0
    (here / "resolved.toml").write_text(capsys.readouterr().out)
    assert call(monkeypatch, "check", "resolved.toml", "--resolved") == 0
    assert capsys.readouterr().out == (here / "resolved.toml").read_text()
    assert "seed = 5\n" in (here / "resolved.toml").read_text()


def test_recipes_and_fork(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "recipes", "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["format"] == 1
    assert [entry["file"] for entry in listed["recipes"]] == [str(p) for p in shipped_recipes()]
    assert call(monkeypatch, "recipes") == 0
    assert "smoke           Smoke: " in capsys.readouterr().out

    assert call(monkeypatch, "fork", "toy.toml", "mine.toml", "--set", "seed=5") == 0
    assert capsys.readouterr().out == "mine.toml written; run it with: rlhf-recipes run mine.toml\n"
    assert "seed = 5" in (here / "mine.toml").read_text()


def test_init_writes_a_recipe_and_says_what_to_type_next(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"what is {n};good {n};bad {n}\n" for n in range(9)]
    (here / "own.csv").write_text("question;good_answer;bad_answer\n" + "".join(lines))
    assert call(monkeypatch, "init", "own.csv", "--model", "org/m", "--method", "dpo") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == [
        "own.csv: 9 of 9 rows can be used, as pairs",
        "  own.csv has semicolons between its columns",
        "  columns: question is the prompt, good_answer is the chosen, bad_answer is the rejected",
    ]
    assert out[3].startswith("? the model org/m is neither on this machine nor to be had")
    assert out[4:] == [
        "own.toml written: sft → dpo → judge → evaluation",
        "next     rlhf-recipes fetch own",
        "         rlhf-recipes run own",
        "         rlhf-recipes report own --open",
    ]
    assert call(monkeypatch, "check", "own") == 0


def test_init_at_a_terminal_asks_three_questions(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "own.csv").write_text("question,good_answer,bad_answer\nwhy,so,no\nwho,he,it\n")
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    asked: list[str] = []

    def answer(question: str, default: object) -> object:
        asked.append(question)
        return {"Which model": "org/m", "Which method": "kto"}.get(
            question[:12].strip(" ,"), default
        )

    monkeypatch.setattr("typer.prompt", answer)
    monkeypatch.setattr("typer.confirm", answer)
    assert call(monkeypatch, "init", "own.csv") == 0
    assert asked == [
        "Which model, on the hub or in a folder?",
        "Are these columns right?",
        "Which method: ppo, sft, dpo, kto, rloo, grpo?",
    ]
    recipe = (here / "own.toml").read_text()
    assert 'name = "org/m"' in recipe and 'stages = ["sft", "kto"]' in recipe


def test_chat_and_export_get_a_run_s_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Counting(monkeypatch)
    import types

    got: list[dict] = []
    talk, export = (
        types.ModuleType("rlhf_recipes.chat"),
        sys.modules["rlhf_recipes.pipeline.export"],
    )
    talk.chat = lambda **given: got.append(given)
    export.export = lambda **given: got.append(given) or "written"
    monkeypatch.setitem(sys.modules, "rlhf_recipes.chat", talk)
    assert call(monkeypatch, "run", "toy.toml", "--runs", "kept", "--name", "one") == 0
    capsys.readouterr()
    assert call(monkeypatch, "chat", "one", "--runs", "kept", "--all") == 0
    assert call(monkeypatch, "export", "kept/one", "out", "--form=adapter", "--stage=sft") == 0
    assert capsys.readouterr().out == "written\n"
    assert got[0].pop("screen")
    assert got[0] == {"run_folder": Path("kept/one"), "stage": None, "everyone": True}
    assert got[1] == {
        "run_folder": Path("kept/one"), "folder": Path("out"), "stage": "sft", "form": "adapter",
        "kind": None, "push": None,
    }  # fmt: skip


def test_help_names_every_command_and_version_is_the_package_s(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ([], ["--help"], ["-h"]):
        assert call(monkeypatch, *words) == 0
        out = capsys.readouterr().out
        listed = out.partition("Commands:\n")[2].splitlines()
        assert [line.split()[0] for line in listed if line.strip()] == COMMANDS
    for name in COMMANDS:
        assert call(monkeypatch, name, "--help") == 0
        assert capsys.readouterr().out.startswith(f"Usage: rlhf-recipes {name} ")
    monkeypatch.setattr("importlib.metadata.version", lambda _: "1.2.3")
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == "rlhf-recipes 1.2.3\n"
