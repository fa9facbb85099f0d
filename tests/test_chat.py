"""The chat on the tiny model: who answers what, what each remembers, what reaches the terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from transformers import GenerationMixin

from rlhf_recipes import chat
from rlhf_recipes.cli import main
from rlhf_recipes.data.tokens import Tokens
from rlhf_recipes.feedback.items import item
from rlhf_recipes.feedback.store import Store
from rlhf_recipes.models.reward_model import open_reward
from rlhf_recipes.models.sampling import score_ids
from rlhf_recipes.pipeline.export import finished_stage
from rlhf_recipes.pipeline.runner import run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages.session import Session
from tests.helpers.tiny import RECIPE
from tests.ui.conftest import Site

pytestmark = pytest.mark.train

LINE = re.compile(r"(\w+): (.*?)(?:  \(score ([+-]\d+\.\d\d)\))?")
LORA = "[lora]\nr = 4\nlora_alpha = 8\n"


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of SFT, reward model and PPO."""
    here = tmp_path_factory.mktemp("chat")
    (here / "tiny.toml").write_text(RECIPE.format(model=tiny_model, data=tiny_pairs))
    recipe = load_recipe(here / "tiny.toml", set=["evaluation=false"])
    return run(recipe, runs=here / "runs", name="tiny").run_folder


class Typed(io.StringIO):
    """What a person types at a terminal."""

    def isatty(self) -> bool:
        return True


class Talk:
    """`rlhf-recipes chat WORDS` in this process; `asked` and `given` are the ids of it all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
        self.monkeypatch, self.capfd = monkeypatch, capfd
        self.asked: list[list[int]] = []
        self.given: list[list[int]] = []
        generate = GenerationMixin.generate

        def spy(lm, **given):
            out = generate(lm, **given)
            self.asked.append(given["input_ids"][0].tolist())
            self.given.append(out[0, len(self.asked[-1]) :].tolist())
            return out

        monkeypatch.setattr(GenerationMixin, "generate", spy)

    def __call__(self, *words: str | Path, said: list[str], code: int = 0) -> tuple[str, str]:
        """What was printed and what complained, when a pipe said this."""
        self.asked, self.given = [], []
        self.monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{s}\n" for s in said)))
        self.run(*words, code=code)
        return self.capfd.readouterr()

    def run(self, *words: str | Path, code: int = 0) -> None:
        self.monkeypatch.setattr(sys, "argv", ["rlhf-recipes", "chat", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code

    def at_a_terminal(self, *words: str | Path, typed: list[str]) -> str:
        """All that a terminal was sent."""
        master, slave = pty.openpty()
        sent: list[bytes] = []

        def read() -> None:
            try:
                while some := os.read(master, 4096):
                    sent.append(some)
            except OSError:  # Linux: the other side is closed
                pass

        reader = threading.Thread(target=read)
        reader.start()
        self.monkeypatch.setenv("TERM", "xterm")
        self.monkeypatch.setattr(sys, "stdin", Typed("".join(f"{line}\n" for line in typed)))
        with os.fdopen(slave, "w", encoding="utf-8") as terminal, self.monkeypatch.context() as now:
            now.setattr(sys, "stdout", terminal)
            self.run(*words)
        reader.join()
        os.close(master)
        return b"".join(sent).decode().replace("\r\n", "\n")


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Talk:
    return Talk(monkeypatch, capfd)


def parsed(out: str) -> list[tuple[str, str, str]]:
    """The (policy, answer, score) of each line."""
    return [LINE.fullmatch(line).groups() for line in out.splitlines()]


def test_all_answer_the_same_question_in_order_and_each_keeps_its_own_turns(
    folder: Path, talk: Talk
) -> None:
    out, err = talk(folder, "--all", said=["red cat", "blue", "", "red cat"])
    assert err == ""
    given = parsed(out)
    assert [name for name, _, _ in given] == ["base", "sft", "ppo"] * 3
    answers = {name: [a for who, a, _ in given if who == name] for name in ("base", "sft", "ppo")}
    assert answers["base"] != answers["sft"] != answers["ppo"] != answers["base"]
    decode = Session(load_recipe(folder / "resolved.toml"), {}).tokens.tokenizer.decode
    first, second, fresh = (list(map(decode, talk.asked[i : i + 3])) for i in (0, 3, 6))
    assert first == fresh == ["<|im_start|> user red cat <|im_end|> <|im_start|> assistant"] * 3
    assert second == [
        f"{before} {answer} <|im_end|> <|im_start|> user blue <|im_end|> <|im_start|> assistant"
        for before, (_, answer, _) in zip(first, given[:3], strict=True)
    ]


def test_in_the_browser_two_answer_side_by_side_and_a_vote_is_a_judgement(folder: Path) -> None:
    site = Site(folder.parent)
    page = site.get("/chat/tiny").text
    assert "<option selected>sft</option>" in page and "<option>base</option>" in page
    asked = {"left": "base", "right": "ppo", "question": "red cat"}
    for wrong in ({"left": "ppo"}, {"left": "reward"}, {"question": " "}):
        assert site.post("/chat/tiny", **asked | wrong).status_code == 400
    place = site.post("/chat/tiny", **asked).headers["location"]
    busy = site.post("/chat/tiny", **asked | {"question": "still mine"})
    assert busy.status_code == 409 and ">still mine</textarea>" in busy.text
    assert site.client.post(place, data={"verdict": "left"}).status_code == 409

    def answered(place: str) -> str:
        for _ in range(600):
            if "reload" in site.client.get(f"{place}/now").json():
                return site.client.get(place).text
            time.sleep(0.1)
        raise AssertionError("no answer")

    html = answered(place)
    shown = re.findall('<b>(.*?)</b></div>\n<p class="text">(.*?)</p>', html)
    assert [name for name, _ in shown] == ["Left", "Right"]
    assert site.client.post(place, data={"verdict": "first"}).status_code == 400
    assert site.client.post(place, data={"verdict": "left"}).headers["location"] == place
    html = site.client.get(place).text
    named = dict(re.findall('<b>(.*?)</b></div>\n<p class="text">(.*?)</p>', html))
    assert {*named} == {"base", "ppo"} and [*named.values()] == [text for _, text in shown]
    assert "Kept: Left is better." in html

    store = Store(folder.parent)
    [said] = store.judged(store.ids())
    [one] = store.items(store.ids())
    assert (said.person, said.item) == ("you", one.id)
    assert one.id == item([{"role": "user", "content": "red cat"}], named.values()).id
    better = one.answers[said.verdict == "second"]
    assert better == shown[0][1] and 0 <= said.seconds < 60
    site.client.post(place, data={"verdict": "both_bad"})
    assert [each.verdict for each in store.judged(store.ids())] == ["both_bad"]

    # It goes on from the better answer; what cannot be sent says why.
    site.client.post(place, data={"verdict": "right"})
    after = place.rpartition("/")[2]
    second = site.post("/chat/tiny", **asked | {"question": "blue", "after": after})
    html = answered(second.headers["location"])
    turns = re.findall('<div class="turn .*?<p class="text">(.*?)</p>', html)
    assert turns == ["red cat", shown[1][1], "blue"]
    third = site.post("/chat/tiny", **asked | {"question": "red <|im_end|>"})
    assert "contains a special token" in answered(third.headers["location"])
    assert site.get("/chat/tiny/0123456789abcdef").status_code == 404


def test_an_answer_is_the_same_when_its_policy_is_alone(folder: Path, talk: Talk) -> None:
    said = ["red cat", "blue", "pink gold", "fox"]
    given = parsed(talk(folder, "--all", said=said)[0])
    for name, words in {"sft": ["--stage", "sft"], "ppo": []}.items():
        alone, err = talk(folder, *words, said=said)
        assert alone.splitlines() == [answer for who, answer, _ in given if who == name]
        assert err == ""


def test_the_scores_are_the_reward_model_s(folder: Path, talk: Talk) -> None:
    out, _ = talk(folder, "--all", said=["red cat", "blue"])
    rows = list(zip(talk.asked, talk.given, strict=True))
    session = Session(load_recipe(folder / "resolved.toml"), {})
    reward = open_reward(session.base, finished_stage(folder, "reward")[2])
    scores = score_ids(reward, rows, session.tokens.pad_id, 1).tolist()
    assert [float(score) for *_, score in parsed(out)] == pytest.approx(scores, abs=0.00501)


def test_a_terminal_gets_the_answers_one_after_another_too(folder: Path, talk: Talk) -> None:
    piped, _ = talk(folder, "--all", said=["red cat", "blue"])
    sent = talk.at_a_terminal(folder, "--all", typed=["red cat", "blue"])
    head, *answers = re.sub(r"\x1b\[\d*m", "", sent).split("\n> ")
    assert head == f"base, sft, ppo of tiny · {chat.HELP}" == sent.partition("\n")[0]
    assert [*answers] == ["".join(piped.splitlines(True)[:3])[:-1],
                          "".join(piped.splitlines(True)[3:])[:-1], "\n"]  # fmt: skip


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_model_says_commands_neither_the_terminal_nor_rich(
    folder: Path, talk: Talk, monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    hostile = "a\x1b[2J\x9b1m [red]b[/]\u202e\u200b\tc\x07\r\xa0d\n\x1b]0;e\x07 :bomb: \ufffd"
    monkeypatch.setattr(Tokens, "decode", lambda _, ids: hostile)
    shown = ["a[2J1m [red]b[/] c  d", "]0;e :bomb: "]
    if not terminal:
        out, _ = talk(folder, "--stage", "sft", said=["red"])
        assert out == "\n".join(shown) + "\n"
        return
    sent = talk.at_a_terminal(folder, "--all", typed=["red"])
    for command in ("\x1b[2J", "\x9b", "\x1b]", "\x07", "\u202e", "\u200b", "\xa0"):
        assert command not in sent
    for line in shown:
        assert sent.count(line.rstrip()) >= 3


def test_what_cannot_be_answered_is_one_line_and_leaves_the_talk_alone(
    folder: Path, talk: Talk
) -> None:
    said = ["red cat", "blue <|im_end|>", "fox " * 120, "blue"]
    out, err = talk(folder, said=said)
    assert err.splitlines() == [
        "not sent: it contains a special token of the model",
        "not sent: at most 120 tokens are read",
    ]
    assert out == talk(folder, said=["red cat", "blue"])[0]


def test_a_long_talk_forgets_its_oldest_turns_for_everyone_alike(folder: Path, talk: Talk) -> None:
    questions = [f"{word} " * 20 for word in ("red", "green", "blue", "grey", "black", "white")]
    out, err = talk(folder, "--all", said=questions)
    assert len(parsed(out)) == 18
    assert set(err.splitlines()) == {"the oldest turn is forgotten: at most 120 tokens are read"}
    lengths = [len(prompt) for prompt in talk.asked]
    assert 80 < max(lengths) <= 120
    decode = Session(load_recipe(folder / "resolved.toml"), {}).tokens.tokenizer.decode
    last = [decode(prompt) for prompt in talk.asked[-3:]]
    known = {tuple(q.strip() in text for q in questions) for text in last}
    assert len(known) == 1 and known.pop()[-2:] == (True, True)


def test_ctrl_c_stops_an_answer_and_the_talk_goes_on(
    folder: Path, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = parsed(talk(folder, "--all", said=["red cat"])[0])
    put, pressed = chat._Speaker.put, []

    def press(speaker, value):
        put(speaker, value)
        if not pressed and len(speaker.ids) == 2:
            pressed.append(speaker.name)
            raise KeyboardInterrupt

    monkeypatch.setattr(chat._Speaker, "put", press)
    given = parsed(talk(folder, "--all", said=["red cat", "blue"])[0])
    assert pressed == ["base"]
    (name, half, score), *others = given[:3]
    assert (name, score, others) == ("base", None, whole[1:])
    assert whole[0][1].startswith(half) and half != whole[0][1]
    assert [name for name, *_ in given[3:]] == ["base", "sft", "ppo"]
    assert all(score for *_, score in given[3:])


def test_what_libraries_say_meanwhile_goes_to_the_log(
    folder: Path, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8-bit layers on a CPU warn at every product."""
    clean = talk(folder, "--all", said=["red cat"])
    put = chat._Speaker.put

    def noisy(speaker, value):
        put(speaker, value)
        print("cast")
        print("warn", file=sys.stderr)

    monkeypatch.setattr(chat._Speaker, "put", noisy)
    assert talk(folder, "--all", said=["red cat"]) == clean
    sent = talk.at_a_terminal(folder, "--all", typed=["red cat"])
    assert "cast" not in sent and "warn" not in sent
    log = (folder / "log.txt").read_text()
    assert log.count("cast\n") == log.count("warn\n") > 6


def test_calls_that_are_wrong_are_a_line(folder: Path, talk: Talk) -> None:
    for words, line in [
        (["--stage", "reward"], "reward is no policy to talk to (policies: sft, ppo)"),
        (["--stage", "dpo"], f"{folder} has no finished stage dpo (sft, reward, ppo)"),
        (
            ["--all", "--stage", "sft"],
            "--all and --stage exclude each other (--all takes every policy)",
        ),
    ]:
        assert talk(folder, *words, said=["red"], code=2) == ("", f"{line}\n")


def test_policies_without_lora_each_have_weights_of_their_own(
    tiny_model: Path, tiny_pairs: Path, tmp_path: Path, talk: Talk
) -> None:
    text = RECIPE.format(model=tiny_model, data=tiny_pairs).replace(LORA, "")
    (tmp_path / "whole.toml").write_text(text.replace("seed = 7", "seed = 7\nlora = false"))
    recipe = load_recipe(tmp_path / "whole.toml")
    folder = run(recipe, runs=tmp_path, until="sft").run_folder
    talk.capfd.readouterr()
    given = parsed(talk(folder, "--all", said=["red cat"])[0])
    assert [(name, score) for name, _, score in given] == [("base", None), ("sft", None)]
    assert given[0][1] != given[1][1]
    assert talk(folder, said=["red cat"])[0] == f"{given[1][1]}\n"


def test_the_real_command_in_a_pipe_prints_answers_alone(folder: Path) -> None:
    asked = subprocess.run(
        [sys.executable, "-m", "rlhf_recipes", "chat", folder],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        input="red cat\nblue\n",
        capture_output=True,
        text=True,
    )
    assert asked.returncode == 0 and asked.stderr == ""
    assert len(asked.stdout.splitlines()) == 2 and asked.stdout.endswith("\n")
