"""Talk to a run's policies: streamed, with the turns kept; to one of them, or to all at once.

All stand on the one base in memory, as in training. Asked together, each keeps a conversation
of its own and draws under the same seed, so that what differs between answers is the policies'.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import IO

import torch
from rich.console import Console
from rich.text import Text
from transformers.generation.streamers import BaseStreamer

from rlhf_recipes.data.tokens import Messages, Tokens
from rlhf_recipes.errors import UsageError
from rlhf_recipes.models.reward_model import open_reward
from rlhf_recipes.models.sampling import score_ids
from rlhf_recipes.pipeline.export import finished_stage, policies
from rlhf_recipes.pipeline.speakers import Speakers
from rlhf_recipes.recipe.kinds import makes
from rlhf_recipes.screen import Screen
from rlhf_recipes.text import plain

HELP = "an empty line forgets the conversation · Ctrl-C stops an answer · Ctrl-D ends"


def chat(*, run_folder: Path, stage: str | None, everyone: bool, screen: Screen) -> None:
    """Read messages from stdin, write the answers to stdout, until the input ends.

    With `everyone`, the base and every policy answer, and what PPO was scored by scores them.
    Raises UsageError where `stage` is no finished policy of the run.
    """
    with screen.quiet():
        talk = _Talk(run_folder, stage, everyone, screen)
    if person := sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() its arrow keys)
        names = ", ".join(plain(speaker.name) for speaker in talk.speakers)
        print(f"{names} of {run_folder.resolve().name} · {HELP}")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            message = input("> " if person else "")
            with screen.quiet():
                talk.answer(message)
    print(end="\n" if person else "")


class _Speaker(BaseStreamer):
    """A policy, its turns, and its answer, which `generate` puts here token by token."""

    def __init__(self, name: str, tokens: Tokens, out: IO[str]):
        self.name, self.tokens, self.out = name, tokens, out
        self.turns: Messages = []

    def put(self, value: torch.Tensor) -> None:
        if value.dim() > 1:
            return  # the prompt
        self.ids += value.tolist()
        text = self.tokens.decode(self.ids).rstrip("\ufffd")  # half a character
        text = "".join(c if c == "\n" else " " if c.isspace() else plain(c) for c in text)
        print(text[len(self.shown) :], end="", file=self.out, flush=True)
        self.shown = text

    def end(self) -> None: ...


class _Talk:
    def __init__(self, run_folder: Path, stage: str | None, everyone: bool, screen: Screen):
        last, kind, output = finished_stage(run_folder, stage)
        names = policies(run_folder)
        if not makes(kind, "policy"):
            told = ", ".join([*names][1:])
            raise UsageError(f"{last} is no policy to talk to", f"policies: {told}")
        upto = [*names][: [*names].index(last) + 1]
        outputs = {name: names[name] for name in upto} if everyone else {last: output}
        self.all = every = Speakers(run_folder, outputs)
        tokens = every.tokens
        self.speakers = [_Speaker(name, tokens, screen.out) for name in every.roles]
        self.reward = None
        if everyone and every.recipe.explorer:
            with contextlib.suppress(UsageError):  # it is from elsewhere: no scores
                scorer = finished_stage(run_folder, every.recipe.explorer.reward_model)[2]
                self.reward = open_reward(every.session.base, scorer)
        self.asked, self.screen = 0, screen
        self.console = Console(file=screen.out, highlight=False)

    def answer(self, message: str) -> None:
        """Print everyone's answer, or one line that says why there is none."""
        turn = {"role": "user", "content": message}
        if not message.strip():
            for speaker in self.speakers:
                speaker.turns.clear()
        elif why := self.all.refused(message):
            self.screen.line(why)
        else:
            for speaker in self.speakers:
                speaker.turns.append(turn)
            room, prompt = self.all.room, self.all.prompt
            while max(len(prompt(speaker.turns)) for speaker in self.speakers) > room:
                self.screen.line(f"the oldest turn is forgotten: at most {room} tokens are read")
                for speaker in self.speakers:  # by all, so that all know the same questions
                    del speaker.turns[:2]
            self.asked += 1
            for speaker in self.speakers:
                if len(self.speakers) > 1:
                    self.console.print(Text(f"{plain(speaker.name)}: ", "bold"), end="")
                score = self._sample(speaker)
                print(f"  ({score})" if score else "", file=self.screen.out, flush=True)

    def _sample(self, speaker: _Speaker) -> str:
        """The speaker's next turn, under draws that are everyone's; Ctrl-C ends it where it is.

        Returns how the reward model scores it, if one does.
        """
        speaker.ids, speaker.shown, said = [], "", ""
        prompt = self.all.prompt(speaker.turns)
        with contextlib.suppress(KeyboardInterrupt):
            self.all.say(speaker.name, prompt, self.asked, speaker)
            if self.reward is not None:
                score = score_ids(self.reward, [(prompt, speaker.ids)], self.all.tokens.pad_id, 1)
                said = f"score {score.item():+z.2f}"
        answer = self.all.tokens.decode(speaker.ids)
        speaker.turns.append({"role": "assistant", "content": answer})
        return said
