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

from rlhf_recipes.data.tokens import Messages, Tokens, encode
from rlhf_recipes.errors import UsageError
from rlhf_recipes.models.reward_model import open_reward
from rlhf_recipes.models.role import Role
from rlhf_recipes.models.sampling import sampling, score_ids
from rlhf_recipes.pipeline.export import finished_stage, shared_of
from rlhf_recipes.recipe.kinds import makes
from rlhf_recipes.recipe.tables import BASE
from rlhf_recipes.screen import Screen
from rlhf_recipes.store.digests import derive_seed
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
        names = ", ".join(speaker.name for speaker in talk.speakers)
        print(f"{names} of {run_folder.resolve().name} · {HELP}")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            message = input("> " if person else "")
            with screen.quiet():
                talk.answer(message)
    print(end="\n" if person else "")


class _Speaker(BaseStreamer):
    """A policy, its turns, and its answer, which `generate` puts here token by token."""

    def __init__(self, name: str, role: Role, tokens: Tokens, out: IO[str]):
        self.name, self.role, self.tokens, self.out = plain(name), role, tokens, out
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
        session = shared_of(run_folder)
        recipe = session.recipe
        names = [name for name in recipe.stages if recipe.kind(name).makes == "policy"]
        last, kind, output = finished_stage(run_folder, stage)
        if not makes(kind, "policy"):
            raise UsageError(f"{last} is no policy to talk to", f"policies: {', '.join(names)}")
        outputs = {last: output}
        if everyone:
            names = names[: names.index(last) + 1]
            outputs = {BASE: None} | {name: finished_stage(run_folder, name)[2] for name in names}

        self.tokens = tokens = session.tokens
        roles = {n: session.base.open(f"policy-{n}", out, seed=0) for n, out in outputs.items()}
        self.speakers = [_Speaker(name, role, tokens, screen.out) for name, role in roles.items()]
        self.reward = None
        if everyone and recipe.explorer:
            with contextlib.suppress(UsageError):  # it is from elsewhere: no scores
                scorer = finished_stage(run_folder, recipe.explorer.reward_model)[2]
                self.reward = open_reward(session.base, scorer)

        config = self.speakers[0].role.lm.config.get_text_config()
        context = getattr(config, "max_position_embeddings", sys.maxsize)
        length = min(recipe.dataset.max_answer_tokens, context // 2)
        self.room = context - length  # for a conversation, in tokens
        temperature = recipe.asked_with("temperature")
        self.settings = sampling(length, temperature, eos=tokens.eos_id, pad=tokens.pad_id)
        system = recipe.dataset.system
        self.start = [] if system is None else [{"role": "system", "content": system}]
        self.seed, self.asked, self.screen = recipe.seed, 0, screen
        self.console = Console(file=screen.out, highlight=False)

    def answer(self, message: str) -> None:
        """Print everyone's answer, or one line that says why there is none."""
        turn, limit = {"role": "user", "content": message}, f"at most {self.room} tokens are read"
        if not message.strip():
            for speaker in self.speakers:
                speaker.turns.clear()
        elif self.tokens.has_specials(message):
            self.screen.line("not sent: it contains a special token of the model")
        elif len(self._prompt([turn])) > self.room:
            self.screen.line(f"not sent: {limit}")
        else:
            for speaker in self.speakers:
                speaker.turns.append(turn)
            while max(len(self._prompt(s.turns)) for s in self.speakers) > self.room:
                self.screen.line(f"the oldest turn is forgotten: {limit}")
                for speaker in self.speakers:  # by all, so that all know the same questions
                    del speaker.turns[:2]
            self.asked += 1
            for speaker in self.speakers:
                if len(self.speakers) > 1:
                    self.console.print(Text(f"{speaker.name}: ", "bold"), end="")
                score = self._sample(speaker)
                print(f"  ({score})" if score else "", file=self.screen.out, flush=True)

    def _sample(self, speaker: _Speaker) -> str:
        """The speaker's next turn, under draws that are everyone's; Ctrl-C ends it where it is.

        Returns how the reward model scores it, if one does.
        """
        speaker.ids, speaker.shown, said = [], "", ""
        prompt = self._prompt(speaker.turns)
        ids = torch.tensor([prompt], device=speaker.role.lm.device)
        torch.manual_seed(derive_seed(self.seed, "chat", self.asked))
        with contextlib.suppress(KeyboardInterrupt):
            with speaker.role.active():
                speaker.role.lm.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=self.settings,
                    streamer=speaker,
                )
            if self.reward is not None:
                score = score_ids(self.reward, [(prompt, speaker.ids)], self.tokens.pad_id, 1)
                said = f"score {score.item():+z.2f}"
        speaker.turns.append({"role": "assistant", "content": self.tokens.decode(speaker.ids)})
        return said

    def _prompt(self, turns: Messages) -> list[int]:
        return encode(self.tokens, [*self.start, *turns])[0]
