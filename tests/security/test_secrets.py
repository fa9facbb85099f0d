"""Secrets, consent and permissions: what no file, log or traceback may hold, and who must agree."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import py_compile
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_recipes import cli, cli_options
from rlhf_recipes import screen as progress
from rlhf_recipes.errors import ModelError, RecipeError, StageError, UsageError
from rlhf_recipes.findings import Finding
from rlhf_recipes.pipeline import doctor
from rlhf_recipes.pipeline.runner import run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.recipe.rewards import term
from rlhf_recipes.recipe.tables import MirrorTable
from rlhf_recipes.sources import fetch, mirror, trust
from rlhf_recipes.stages.rewards.rule import Said, load_rule
from rlhf_recipes.text import masked
from tests.helpers.commands import environment
from tests.helpers.counting import RECIPE, Counting, toy

pytestmark = pytest.mark.train

TOKENS = {
    "hugging face": "hf_" + "Ab1" * 11,
    "openai": "sk-proj-" + "Ab1_" * 8,
    "github": "ghp_" + "Ab1" * 12,
    "a url's": "s3cretpassword",
    "amazon": "AKIA" + "ABCD" * 4,
    "the environment's": "d0d0d0d0d0d0d0d0d0d0",
}
WRITTEN = {name: token for name, token in TOKENS.items() if name != "a url's"}
WRITTEN["a url's"] = f"https://me:{TOKENS['a url' + chr(39) + 's']}@example.com/x"


@pytest.fixture(autouse=True)
def of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", TOKENS["the environment's"])
    monkeypatch.setenv("HF_TOKEN", TOKENS["hugging face"])


@pytest.mark.parametrize("name", WRITTEN)
def test_a_recipe_that_holds_a_secret_is_refused_and_not_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    secret, token = WRITTEN[name], TOKENS[name]
    monkeypatch.chdir(tmp_path)
    file = toy(tmp_path)
    texts = [f"# {secret}\n{RECIPE}", RECIPE.replace('"Toy"', f'"{secret}"')]
    texts += [RECIPE.replace("[sft]", f'[sft]\nhub_token = "{secret}"'), f"{RECIPE}\n{secret}"]
    calls = [["run", "toy.toml", "--set", f"{key}={secret}"] for key in ("title", "sft.hub_token")]
    calls += [["check", "toy.toml", "--json", "--set", f"title={secret}"]]
    calls += [["fork", "toy.toml", "new.toml", "--set", f"title={secret}"]]
    for place, text in enumerate(texts):
        (tmp_path / f"toy{place}.toml").write_text(text)
        calls += [["run", f"toy{place}.toml"], ["--debug", "check", f"toy{place}.toml", "--json"]]
    for words in calls:
        monkeypatch.setattr(sys, "argv", ["rlhf-recipes", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        told = "".join(capfd.readouterr())
        assert ended.value.code == 2
        assert token not in told, words
        assert "holds a password or a token: take it out" in told or "not TOML" in told, words
    assert not (tmp_path / "runs").exists() and not (tmp_path / "new.toml").exists()
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, set=[f"title={secret}"])
    assert token not in repr(caught.value.problems)


def test_secrets_are_in_no_file_of_a_run_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A library prints, logs, warns and raises with all of them; and they are in the command."""
    said = " ".join(WRITTEN.values())
    file, counting = toy(tmp_path), Counting(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["rlhf-recipes", "run", str(file), said])

    def fault(context: object) -> None:
        print(said)
        os.write(2, said.encode())
        logging.getLogger("transformers").warning(said)
        context.progress.note(said)
        try:
            raise OSError(said)
        except OSError as error:
            raise ValueError(said) from error

    counting.fault["reward"] = fault
    with pytest.raises(StageError) as caught:
        run(load_recipe(file), runs=tmp_path / "runs")
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"log.txt", "manifest.json", "report.html"} <= {path.name for path in files}
    told = {path.name: path.read_text() for path in files}
    told |= {"error": str(caught.value), "screen": "".join(capfd.readouterr())}
    for place, text in told.items():
        for name, token in TOKENS.items():
            assert token not in text, (place, name)
    assert "ValueError" in told["log.txt"] and "Traceback" in told["log.txt"]
    assert told["log.txt"].count("***") > 20


def test_a_traceback_that_is_asked_for_holds_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError(" ".join(WRITTEN.values()))

    monkeypatch.setattr("rlhf_recipes.recipe.load.load_recipe", fail)
    monkeypatch.setattr(sys, "argv", ["rlhf-recipes", "run", str(toy(tmp_path)), "--debug"])
    with pytest.raises(SystemExit):
        cli.main()
    told = "".join(capfd.readouterr())
    assert "Traceback" in told and not [name for name, t in TOKENS.items() if t in told]


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_the_doctor_tells_no_password_of_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], form: list
) -> None:
    line = Finding("doubt", "hub", f"{WRITTEN['a url' + chr(39) + 's']} does not answer")
    monkeypatch.setattr(doctor, "doctor", lambda runs: [line])
    monkeypatch.setattr(sys, "argv", ["rlhf-recipes", "doctor", *form])
    with pytest.raises(SystemExit):
        cli.main()
    assert "https://***@example.com/x does not answer" in capfd.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        *(
            "hf_ubs",
            "sk-learn",
            "https://example.com:80/a@b",
            "git@example.com:a/b.git",
            "task-force",
        ),
        *("0" * 40, "Qwen/Qwen2.5-0.5B", "me@example.com", "https://me@example.com/"),
    ],
)
def test_what_is_no_secret_is_left(text: str) -> None:
    assert masked(text) == text


def test_words_of_the_environment_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "main")
    monkeypatch.setenv("OTHER_TOKEN", "/home/me/a-token-file")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "a long word of no secret")
    text = "main /home/me/a-token-file a long word of no secret"
    assert masked(text) == text
    assert masked(TOKENS["the environment's"]) == "***"


def test_the_log_keeps_what_others_wrote(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    with progress.Screen(log) as screen:
        screen._log.write(f"é {TOKENS['hugging face']} \udcff\n")
    assert log.read_text().splitlines()[0] == "before"
    assert log.read_text().splitlines()[-1] == "é *** \\udcff"


# ---- code, and who agreed to it -----------------------------------------------------------------


def judged(folder: Path, code: str) -> Path:
    (folder / "rule.py").write_text(code)
    return toy(folder, text=RECIPE + 'judge = "python:./rule.py:score"\n')


@pytest.mark.parametrize("said", [None, "", "0", "yes"])
def test_a_judge_from_a_stranger_needs_a_person(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, canary, said: str | None
) -> None:
    recipe = load_recipe(judged(tmp_path, canary.code))
    counting = Counting(monkeypatch)
    monkeypatch.delenv(trust.ALLOW)
    if said is not None:
        monkeypatch.setenv(trust.ALLOW, said)
    line = (
        r"the recipe has .*/rule\.py run on this machine \(read it first; RLHF_RECIPES_ALLOW_CODE=1"
    )
    with pytest.raises(UsageError, match=line):
        run(recipe, runs=tmp_path / "runs")
    assert counting.ran == []
    with pytest.raises(UsageError, match=line):
        load_rule(term("python:./rule.py:score"), tmp_path)


def test_the_shipped_judge_needs_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(trust.ALLOW)
    recipes = Path(cli.__file__).parents[1] / "recipes"
    assert load_rule(term("python:./chat/oracle.py:score"), recipes)
    for place in (tmp_path / "recipes", Path(f"{recipes}-evil")):  # of a like name, or a like start
        with pytest.raises(UsageError):
            trust.check_judge(term("python:./oracle.py:score"), place)
    (tmp_path / "link.py").symlink_to(recipes / "chat" / "oracle.py")
    trust.check_judge(term("python:./link.py:score"), tmp_path)  # what it leads to is what is run


def test_a_judge_is_run_as_it_is_written(tmp_path: Path, canary) -> None:
    """Not as a compiled file beside it says, whatever times and sizes that one claims."""
    file = tmp_path / "rule.py"
    file.write_text("def score(prompt, answer):\n    return 2\n")
    (tmp_path / "evil.py").write_text(canary.code)
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    to = importlib.util.cache_from_source(str(file))
    py_compile.compile(str(tmp_path / "evil.py"), to, invalidation_mode=mode)
    assert (
        load_rule(term("python:./rule.py:score"), tmp_path)(Said("red", {}, "blue", [], True)) == 2
    )
    assert len(list(Path(to).parent.iterdir())) == 1


def test_to_plan_and_to_check_run_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, canary
) -> None:
    monkeypatch.delenv(trust.ALLOW)
    monkeypatch.chdir(tmp_path)
    judged(tmp_path, canary.code)
    for words in (["check", "toy.toml"], ["plan", "toy.toml"], ["fork", "toy.toml", "x.toml"]):
        monkeypatch.setattr(sys, "argv", ["rlhf-recipes", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == (0 if words[0] == "fork" else 1)  # the model has no tokenizer
    assert fetch.bring  # `run` asks there, before its first stage


def test_the_folder_where_it_is_started_gives_no_code(tmp_path: Path, canary) -> None:
    """A stranger's folder with modules of the names that are imported."""
    for name in ("trl", "torch", "tomlkit", "yaml", "rich", "sitecustomize", "usercustomize"):
        (tmp_path / f"{name}.py").write_text(canary.code)
    toy(tmp_path)
    (tmp_path / "model" / "tokenizer.json").write_text('{"added_tokens": []}')
    code = "import sys; sys.argv = ['rlhf-recipes', 'check', 'toy.toml', '--resolved']\n"
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "rlhf-recipes"
    script.write_text(f"{code}from rlhf_recipes.cli import main\nmain()\n")
    for start in ([str(script)], ["-m", "rlhf_recipes", "check", "toy.toml", "--resolved"]):
        done = subprocess.run(
            [sys.executable, *start],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_pip_is_not_the_one_of_that_folder(tmp_path: Path, monkeypatch, canary) -> None:
    (tmp_path / "pip.py").write_text(canary.code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ModelError, match="the model's mirror, is not to be had"):
        mirror._download(MirrorTable("none-such==1", "a.gguf", "0" * 64), tmp_path)


# ---- others on this machine ---------------------------------------------------------------------


def test_nothing_is_writable_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    toy(tmp_path)
    Counting(monkeypatch)
    before = {path for path in tmp_path.rglob("*")}
    calls = [["run", "toy.toml"], ["fork", "toy.toml", "new/new.toml"], ["report", "toy"]]
    calls += [["run", "toy.toml", "--set", "seed=2", "--name", "two"]]
    calls += [["compare", "toy", "two", "--page", "page.html"]]
    umask = os.umask(0)
    try:
        for words in calls:
            os.umask(0)
            monkeypatch.setattr(sys, "argv", ["rlhf-recipes", *words])
            with pytest.raises(SystemExit) as ended:
                cli.main()
            assert ended.value.code == 0, capfd.readouterr()
    finally:
        os.umask(umask)
    made = [path for path in tmp_path.rglob("*") if path not in before]
    assert len(made) > 20
    assert [path for path in made if path.stat().st_mode & 0o022] == []


def test_problems_say_no_more_than_a_line_each(tmp_path: Path) -> None:
    file = toy(tmp_path, text=RECIPE.replace('"Toy"', '"Toy"\n"a\\nb\\u001b[2J" = 1'))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    assert cli_options.printable(json.dumps(str(caught.value))).count("\x1b") == 0
