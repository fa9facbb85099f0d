"""Two policies of a run asked the same, side by side; a vote is a judgement in the store.

Names are told after the vote. It has the question of training: `rlhf-recipes feedback` writes it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlhf_recipes.feedback.asks import Asks
from rlhf_recipes.feedback.guard import fields
from rlhf_recipes.feedback.items import item
from rlhf_recipes.feedback.page import WORDS
from rlhf_recipes.feedback.store import Store
from rlhf_recipes.pipeline.export import policies
from rlhf_recipes.store import history
from rlhf_recipes.ui.house import House
from rlhf_recipes.ui.talk import Talk, Talks

QUEUE = "chat"
PERSON = "you"  # as on the labelling page
LONGEST = 8000  # characters of a question


class Chat:
    """The pages of the chat."""

    def __init__(self, house: House) -> None:
        self.house, self.talks = house, Talks()

    def routes(self) -> list[Route]:
        return [
            Route("/chat/{name}", self._form),
            Route("/chat/{name}", self._say, methods=["POST"]),
            Route("/chat/{name}/{talk}", self._show),
            Route("/chat/{name}/{talk}/now", self._now),
            Route("/chat/{name}/{talk}", self._vote, methods=["POST"]),
        ]

    # ---- asking

    def _form(self, request: Request) -> Response:
        folder, manifest = self.house.run(request.path_params["name"])
        return self._page(request, folder, manifest)

    async def _say(self, request: Request) -> Response:
        given = await fields(request)
        return await run_in_threadpool(self._said, request, given)

    def _said(self, request: Request, given: dict[str, str]) -> Response:
        folder, manifest = self.house.run(request.path_params["name"])
        names, question = [given.get("left", ""), given.get("right", "")], given.get("question", "")
        question = question.replace("\r\n", "\n").strip()
        before = self.talks.known.get(given.get("after", ""))
        wrong = ""
        if not {*names} <= {*_policies(folder)} or len({*names}) < 2:
            wrong = "Choose two policies that differ."
        elif not 0 < len(question) <= LONGEST:
            wrong = f"A question has 1 to {LONGEST:,} characters."
        if wrong:
            return self._page(request, folder, manifest, 400, wrong=wrong, question=question)
        turns = [{"role": "user", "content": question}]
        if before and before.chosen is not None and before.run == folder:
            turns = [*before.turns, {"role": "assistant", "content": before.chosen}, *turns]
        if (talk := self.talks.say(folder, names, turns)) is None:
            wrong = "One answer at a time: the models are still at the last question."
            return self._page(request, folder, manifest, 409, wrong=wrong, question=question)
        return self.house.to(f"chat/{folder.name}/{talk.id}")

    # ---- what they say

    def _talk(self, request: Request) -> Talk:
        talk = self.talks.known.get(request.path_params["talk"])
        if talk is None or talk.run.name != request.path_params["name"]:
            raise HTTPException(404)
        return talk

    def _show(self, request: Request) -> Response:
        talk = self._talk(request)
        return self._page(request, *self.house.run(talk.run.name), talk=talk, wrong=talk.wrong)

    def _now(self, request: Request) -> Response:
        talk = self._talk(request)
        if not talk.doing:
            return JSONResponse({"reload": True})
        return JSONResponse({"parts": self.house.blocks("chat.html", ["said"], talk=talk)})

    async def _vote(self, request: Request) -> Response:
        given = await fields(request)
        return await run_in_threadpool(self._voted, request, given.get("verdict", ""))

    def _voted(self, request: Request, verdict: str) -> Response:
        talk = self._talk(request)
        if talk.doing or talk.wrong or talk.alike:
            raise HTTPException(409, "There is nothing to vote on yet.")
        store = Store(self.house.runs)
        asks = Asks(store, QUEUE)
        if not talk.ask:
            made = {"run": talk.run.name, "stage": [*talk.names]}
            one = item(talk.turns, talk.texts, made)
            store.put([one], QUEUE)
            talk.ask = asks.put(PERSON, one, one.answers[0] != talk.texts[0], talk.done_at)
        try:
            asks.judge(talk.ask, PERSON, verdict)
        except ValueError as error:
            raise HTTPException(400, f"Not saved: {error}.") from None
        talk.verdict = verdict
        return self.house.to(f"chat/{talk.run.name}/{talk.id}")

    def _page(
        self,
        request: Request,
        folder: Path,
        manifest: dict[str, Any],
        code: int = 200,
        talk: Talk | None = None,
        **words: Any,
    ) -> Response:
        names = _policies(folder)
        taken = sorted(talk.names, key=names.index) if talk else names[-2:]
        busy = history.state(folder, manifest) == "running"
        given = {"run": folder.name, "names": names, "taken": taken, "talk": talk, "busy": busy}
        return self.house.page("chat.html", request, code=code, **given, words=WORDS, **words)


def _policies(folder: Path) -> list[str]:
    """The base, and the policies whose weights are there."""
    return [name for name, out in policies(folder).items() if out is None or out.is_dir()]
