"""The chat's models: loaded when first asked, by one thread that gives one answer at a time.

Two policies of a run are in memory, on its one base. Which of them answers on which side is drawn.
"""

from __future__ import annotations

import queue
import random
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_recipes.errors import briefly
from rlhf_recipes.pipeline.export import policies
from rlhf_recipes.screen import quietly
from rlhf_recipes.text import masked

if TYPE_CHECKING:
    from rlhf_recipes.data.turns import Messages
    from rlhf_recipes.pipeline.speakers import Speakers

KEPT = 50  # talks, the last


@dataclass
class Talk:
    """A question to two policies, and what they say; `names` and `texts` are left and right."""

    run: Path
    names: tuple[str, str]
    turns: Messages  # what was said before, and the question
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    texts: list[str] = field(default_factory=lambda: ["", ""])
    doing: str = "Loading the model"  # "" where it has ended
    wrong: str = ""
    done_at: float = 0.0
    ask: str = ""  # of the store, once there is a verdict
    verdict: str = ""

    @property
    def alike(self) -> bool:
        return not self.doing and self.texts[0] == self.texts[1]

    @property
    def chosen(self) -> str | None:
        """The answer that a conversation can go on from."""
        sides = {"left": self.texts[0], "right": self.texts[1]}
        return self.texts[0] if self.alike else sides.get(self.verdict)


class Talks:
    """All talks of a server. `say` puts a question; another thread answers it."""

    def __init__(self) -> None:
        self.known: dict[str, Talk] = {}
        self._waiting: queue.SimpleQueue[Talk] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Speakers | None] = (None, None)
        self._asked = 0

    def say(self, run: Path, names: Sequence[str], turns: Messages) -> Talk | None:
        """None while another question is answered."""
        with self._lock:
            if any(talk.doing for talk in self.known.values()):
                return None
            left, right = random.sample([*names], 2)
            talk = Talk(run, (left, right), turns)
            self.known = dict([*self.known.items(), (talk.id, talk)][-KEPT:])
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
        self._waiting.put(talk)
        return talk

    def _work(self) -> None:
        while True:
            talk = self._waiting.get()
            try:
                with quietly():
                    self._answer(talk)
            except Exception as error:
                talk.wrong = masked(getattr(error, "message", "") or briefly(error))
            talk.done_at, talk.doing = time.time(), ""

    def _answer(self, talk: Talk) -> None:
        from rlhf_recipes.pipeline.speakers import Writer

        speakers = self._speakers(talk)
        prompt = speakers.prompt(talk.turns)
        talk.wrong = speakers.refused(talk.turns[-1]["content"])
        if not talk.wrong and len(prompt) > speakers.room:
            talk.wrong = f"not sent: at most {speakers.room} tokens of a conversation are read"
        if talk.wrong:
            return
        self._asked += 1
        for side, name in enumerate(talk.names):
            talk.doing = "Answering"
            speakers.say(name, prompt, self._asked, Writer(talk.texts, side, speakers.tokens))

    def _speakers(self, talk: Talk) -> Speakers:
        from rlhf_recipes.pipeline.speakers import Speakers

        outputs = policies(talk.run)
        taken = {name: outputs[name] for name in sorted(talk.names)}
        made = [out.parent.stat().st_mtime_ns for out in taken.values() if out]
        about = (talk.run, taken, made)
        if self._loaded[0] != about:
            self._loaded = (None, None)  # one base in memory, not two
            self._loaded = (about, Speakers(talk.run, taken))
        speakers = self._loaded[1]
        assert speakers is not None
        return speakers
