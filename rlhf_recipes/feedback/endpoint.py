"""A judge behind an OpenAI-compatible server.

What leaves this machine goes to one address alone: redirects are off, proxies and the environment's
addresses, organisations and headers are not read, and a host that a recipe names has to be agreed
to by a person unless it is this machine.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_recipes import signals
from rlhf_recipes.data.turns import Messages
from rlhf_recipes.errors import StageError, UsageError, briefly
from rlhf_recipes.feedback.calls import Ask
from rlhf_recipes.feedback.prompt import in_one_turn
from rlhf_recipes.feedback.reading import Reply, from_completion
from rlhf_recipes.text import cut, plain

ALLOW = "RLHF_RECIPES_ALLOW_HOSTS"  # hosts, by commas; set by a person, never by a recipe
KEY = "RLHF_RECIPES_JUDGE_KEY"
OPENAI = "api.openai.com"
URL = re.compile(r"(https?)://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(:\d{1,5})?((?:/[\w.~%-]*)*)")
HEADERS = ("host", "accept", "content-type", "content-length", "user-agent")
RETRIES = 5  # of one call: 408, 409, 429, 5xx and no connection, as the client has it
SLOWEST = 180.0  # seconds of back-off in one call, at most
PAUSES = (0.0, 30.0, 120.0)  # seconds before each pass over what failed
STOPS = {401: "refused the key", 402: "wants to be paid", 403: "refused access", 404: "has no such"}
LENGTHS = {"logits": 1, "text": 32, "reasons": 1024}  # tokens of a reply, at most
THOUGHT = 4096  # the same, of a model that thinks before it writes
TRIES, LOW = 8, 0.5  # after so many calls: the share whose first token is no name, to ask for text

Keep = Callable[[list[tuple[Ask, Reply]]], Any]


@dataclass(frozen=True)
class Place:
    """An address that may be asked, and the key for it."""

    url: str
    host: str
    key: str

    @property
    def local(self) -> bool:
        return is_local(self.host)


def is_local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def place(url: str, *, typed: bool) -> Place:
    """Raise UsageError where `url` may not be asked.

    `typed` says that a person has typed it. A recipe's address is this machine's, or of a host that
    the environment allows: a recipe cannot give itself that consent.
    """
    found = URL.fullmatch(url)
    if not found:
        raise UsageError(f"{url!r} is not an address of a server", "as http://127.0.0.1:8000/v1")
    host = found[2].lower()
    allowed = {name.strip().lower() for name in os.environ.get(ALLOW, "").split(",")}
    if not (typed or is_local(host) or host in allowed):
        what = f"the recipe has the pairs to be judged sent to {host}"
        raise UsageError(what, f"{ALLOW}={host} before the same command allows it")
    key = os.environ.get(KEY) or ""
    if not key and host == OPENAI and found[1] == "https":
        key = os.environ.get("OPENAI_API_KEY") or ""
    return Place(url, host, key)


class Purse:
    """A ceiling: what was spent and what calls under way may cost never pass the budget.

    In dollars where there is a price a million tokens, else in calls.
    """

    def __init__(self, budget: float | None, price: tuple[float, float] | None, spent: float):
        self.budget, self.price, self.spent = budget, price, spent
        self.held: list[float] = []  # what each call under way may cost; a sum would leave a rest

    def cost(self, tokens_in: int, tokens_out: int) -> float:
        if self.price is None:
            return 1.0
        return (tokens_in * self.price[0] + tokens_out * self.price[1]) / 1e6

    def fits(self, cost: float) -> bool:
        return self.budget is None or self.spent + sum(self.held) + cost <= self.budget + 1e-12


class Endpoint:
    """Asks a server, many calls at a time, until all is asked, or nothing more may be spent."""

    def __init__(
        self,
        where: Place,
        model: str,
        write: Callable[[Ask, str, Sequence[str]], Messages],
        *,
        mode: str,
        temperature: float,
        purse: Purse,
        concurrency: int,
        timeout: float,
        tell: Callable[[str], Any],
        pauses: Sequence[float] = PAUSES,
    ) -> None:
        self.where, self.model, self.write, self.mode = where, model, write, mode
        self.purse, self.concurrency, self.timeout = purse, concurrency, timeout
        self.tell, self.pauses = tell, pauses
        self.words: dict[str, Any] = {"temperature": temperature}
        self.limit = "max_tokens"
        self.one_turn = False
        # Replies with log-probabilities, those whose first token is no name, and those without any.
        self.given = self.low = self.without = 0
        self.broke = False  # a call did not fit into the budget
        self.probed = False
        self.finished: list[tuple[Ask, Reply]] = []  # and not yet kept

    def ask(self, asks: Sequence[Ask], keep: Keep) -> None:
        """Ask all of it. `keep` takes the finished calls, the failed ones too, in another thread.

        Failed calls go to the end. After a Ctrl-C no call is sent, and those under way are kept.
        Raises StageError where no call can be answered.
        """
        with signals.deferred():
            try:
                asyncio.run(self._ask(asks, keep))
            finally:
                if self.finished:  # of calls that another's failure cut off
                    keep(self.finished)
                    self.finished = []

    def close(self) -> None: ...

    async def _ask(self, asks: Sequence[Ask], keep: Keep) -> None:
        async with _client(self.where, self.timeout, self.concurrency) as self.client:
            self.settled, self.disk = asyncio.Condition(), asyncio.Lock()
            waits = False
            for number, pause in enumerate(self.pauses):
                queue, failed = deque(asks), list[tuple[Ask, Reply]]()
                if not queue:
                    return
                await self._pause(pause if waits else 0.0, len(queue))
                if not self.probed:  # alone, so that what holds for all calls is told by one
                    await self._work(deque([queue.popleft()]), failed, keep)
                    self.probed = True
                    if failed and not failed[0][1].answered:
                        hint = "see that it runs and is not busy; the same command goes on"
                        raise StageError(f"{self.where.url}: {failed[0][1].error}", hint)
                try:
                    async with asyncio.TaskGroup() as group:
                        for _ in range(min(self.concurrency, len(queue))):
                            group.create_task(self._work(queue, failed, keep))
                except BaseExceptionGroup as several:
                    raise several.exceptions[0] from None
                if self.broke or signals.requested():
                    return
                # What was read and holds no verdict is asked once more; what got no answer, longer.
                asks = [ask for ask, reply in failed if not (reply.answered and number)]
                waits = not all(reply.answered for _, reply in failed)

    async def _pause(self, seconds: float, calls: int) -> None:
        if seconds:
            self.tell(f"{calls} calls got no answer; they are sent again in {seconds:.0f} s")
        for _ in range(round(seconds * 10)):  # so that Ctrl-C is heard
            if not signals.requested():
                await asyncio.sleep(0.1)

    async def _work(self, queue: deque[Ask], failed: list[tuple[Ask, Reply]], keep: Keep) -> None:
        while queue and not self.broke and not signals.requested():
            ask, reply = queue.popleft(), None
            for _ in range(3):  # for text where log-probabilities said nothing
                mode = self.mode if reply is None or reply.mass is None else "text"
                reply = await self._call(ask, mode)
                if reply is None:
                    return
                self.given += reply.mass is not None
                await self._kept(ask, reply, keep)
                if reply.error is None or mode != "logits" or not self._without(reply):
                    break
            if reply is not None and reply.error is not None:
                failed.append((ask, reply))

    async def _kept(self, ask: Ask, reply: Reply, keep: Keep) -> None:
        """Calls that end during a commit go into the next one: a disk can be the slower part."""
        self.finished.append((ask, reply))
        if self.disk.locked() and len(self.finished) < self.concurrency:
            return
        async with self.disk:
            while self.finished:
                some, self.finished = self.finished, []
                await asyncio.to_thread(keep, some)

    def _without(self, reply: Reply) -> bool:
        """Whether a call for log-probabilities is to be asked again for text."""
        if reply.error == "no log-probabilities":
            self.without += 1
            if self.without > 1 and not self.given:
                self._to_text("the server gives no log-probabilities")
            return not self.given
        if reply.mass is None:
            return False
        self.low += 1
        if self.given >= TRIES and self.low > LOW * self.given:
            self._to_text("most replies begin with another token than 1 or 2")
        return True

    def _to_text(self, why: str) -> None:
        if self.mode == "logits":
            self.mode = "text"
            self.tell(
                f"{why}: the text of replies is read, which keeps a pair if both orders agree"
            )

    async def _call(self, ask: Ask, mode: str) -> Reply | None:
        """One call, changed until the server takes it; None where it does not fit the budget."""
        for _ in range(6):
            turns = self.write(ask, mode, ())
            turns = in_one_turn(turns) if self.one_turn else turns
            length = THOUGHT if self.limit != "max_tokens" and mode != "logits" else LENGTHS[mode]
            # A token is a byte at least, and a chat template adds some.
            worst = sum(len(turn["content"].encode()) + 16 for turn in turns) + 64
            cost = self.purse.cost(worst, length)
            async with self.settled:
                while not self.purse.fits(cost):
                    if not self.purse.held:
                        self.broke = True
                        self.settled.notify_all()
                    if self.broke:
                        return None
                    await self.settled.wait()
                self.purse.held.append(cost)
            reply, spent = Reply(error="interrupted"), cost
            try:
                reply, again, spent = await self._send(turns, mode, length, cost)
            finally:
                async with self.settled:
                    self.purse.held.remove(cost)
                    self.purse.spent += spent
                    self.settled.notify_all()
            if not again:
                return reply
            mode = self.mode if mode == "logits" else mode
        return reply

    async def _send(
        self, turns: Messages, mode: str, length: int, worst: float
    ) -> tuple[Reply, bool, float]:
        """The reply, whether to send it again in another form, and what it cost."""
        import openai

        words = {**self.words, self.limit: length}
        if mode == "logits":
            words |= {"logprobs": True, "top_logprobs": 20}
        began = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout * (RETRIES + 1) + SLOWEST):
                body = {"model": self.model, "messages": turns, **words}
                # Not `chat.completions.create`, whose types took most of a call's time.
                text = await self.client.post("/chat/completions", body=body, cast_to=str)
            reply = from_completion(_parsed(text), mode)
        except openai.APIStatusError as error:
            if self._changed(error, mode, words):
                return Reply(), True, 0.0
            busy = error.status_code in (408, 409, 429) or error.status_code >= 500
            reply = Reply(error=self._refusal(error), answered=not busy)
            worst = 0.0  # a server bills no refusal
        except (openai.APITimeoutError, TimeoutError):
            reply = Reply(error="no answer in time")  # and the server may bill it
        except openai.APIConnectionError as error:
            reply, worst = Reply(error=f"no connection: {briefly(error.__cause__ or error)}"), 0.0
        reply = reply.but(seconds=time.monotonic() - began)
        if self.purse.price is None:
            return reply, False, 1.0
        if reply.tokens_in is None or reply.tokens_out is None:
            return reply, False, worst
        return reply, False, self.purse.cost(reply.tokens_in, reply.tokens_out)

    def _changed(self, error: Any, mode: str, words: dict[str, Any]) -> bool:
        """Whether the call can be sent without what the server refuses in it."""
        said = _said(error).casefold()
        if error.status_code not in (400, 422):
            return False
        if "logprob" in said and mode == "logits":
            self._to_text("the server refuses log-probabilities")
        elif self.limit in said and self.limit == "max_tokens" and "max_completion" in said:
            self.limit = "max_completion_tokens"  # OpenAI's models that think
        elif "temperature" in said and "temperature" in words:
            self.words.pop("temperature", None)
        elif "system" in said and "role" in said and not self.one_turn:
            self.one_turn = True
        else:
            return False
        return True

    def _refusal(self, error: Any) -> str:
        """What to keep of a refusal. Raises StageError for one that holds for every call."""
        status, said = error.status_code, cut(plain(_said(error)), 200)
        if 300 <= status < 400:
            to = cut(plain(error.response.headers.get("location", "elsewhere")), 100)
            hint = "redirects are not followed: name the address itself, if you trust it"
            raise StageError(f"{self.where.host} sends calls on to {to}", hint)
        if status in STOPS or "insufficient_quota" in said:
            what = STOPS.get(status, STOPS[402])
            what += f" model {self.model} at {self.where.url}" if status == 404 else ""
            raise StageError(f"{self.where.host} {what}: {status}, {said}", f"the key is {KEY}")
        return f"{status}: {said}"


def _said(error: Any) -> str:
    """What a server says of an error, in its own words."""
    return str(error.body if error.body is not None else error.message)


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _client(where: Place, timeout: float, connections: int) -> Any:
    """Sends HEADERS and the key alone, to this host, by no proxy."""
    try:
        import openai
    except ImportError:
        hint = "pip install 'rlhf-recipes[judge]'"
        raise UsageError("a judge behind a server needs the package openai", hint) from None

    async def bare(request: Any) -> None:
        # The client reads OPENAI_CUSTOM_HEADERS, OPENAI_ORG_ID and the like from the environment.
        for name in [name for name in request.headers if name.lower() not in HEADERS]:
            del request.headers[name]
        if where.key:
            request.headers["authorization"] = f"Bearer {where.key}"

    http = openai.DefaultAsyncHttpxClient(
        follow_redirects=False, trust_env=False, timeout=timeout, event_hooks={"request": [bare]}
    )
    return openai.AsyncOpenAI(
        base_url=where.url,
        api_key=where.key or "none",
        max_retries=RETRIES,
        timeout=timeout,
        http_client=http,
    )
