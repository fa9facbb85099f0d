"""An OpenAI-compatible server on loopback whose judge is known, and which makes trouble if told.

    with FakeJudge(lambda prompt, a, b: odds) as server:
        JudgeSettings(model="fake", url=server.url, …)

The judge gives the log odds that answer `a` is better than `b`. `bias` is added for the answer that
is shown first, and normal noise of deviation `noise`, which is equal for equal calls. `faults` are
shares of the calls: `busy` (429), `error` (500), `hang` (never answered), `garbage` (a reply
without a verdict), `broken` (not JSON), `forged` (the reply quotes an answer's verdict, after its
own). `logprobs` is "given", "refused" (400), or "ignored" (200 without them). `status` answers all
calls alike; `redirect` sends them elsewhere. `thinks` takes no `max_tokens` and no temperature.

As a program: python -m tests.helpers.fake_judge --rule FILE.py[:FUNCTION] prints the address. Its
judge is a function (prompt, answer) -> score, as recipes name them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import math
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tests.helpers.loopback import Loopback

Odds = Callable[[str, str, str], float]
PARTS = re.compile(
    r"<conversation>\n(.*)\n</conversation>\n\n<answer_1>\n(.*)\n</answer_1>\n\n"
    r"<answer_2>\n(.*)\n</answer_2>",
    re.DOTALL,
)
PRICE = 4  # characters of a token, as this server counts


class FakeJudge(Loopback):
    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        odds: Odds,
        *,
        bias: float = 0.0,
        noise: float = 0.0,
        faults: Mapping[str, float] | None = None,
        logprobs: str = "given",
        status: int = 0,
        redirect: str = "",
        thinks: bool = False,
        seconds: float = 0.0,
        port: int = 0,
    ) -> None:
        super().__init__(("127.0.0.1", port), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.odds, self.bias, self.noise = odds, bias, noise
        self.faults, self.logprobs, self.status = dict(faults or {}), logprobs, status
        self.redirect, self.thinks, self.seconds = redirect, thinks, seconds
        self.model = "fake-1"
        self.draw = random.Random(0)
        self.lock = threading.Lock()
        self.closing = threading.Event()
        self.headers: list[dict[str, str]] = []  # of every request
        self.bodies: list[dict[str, Any]] = []
        self.served: Counter[str] = Counter()  # by what was asked: replies with a verdict
        self.asked = self.billed = self.tokens_in = self.tokens_out = 0

    def fault(self) -> str:
        with self.lock:
            left = self.draw.random()
        for name, share in self.faults.items():
            left -= share
            if left < 0:
                return name
        return ""

    def handle_error(self, *_: object) -> None:
        """A client that was killed is no fault of this server."""


class _Answer(BaseHTTPRequestHandler):
    server: FakeJudge
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        server = self.server
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length))
        with server.lock:
            server.asked += 1
            server.headers.append(dict(self.headers))
            server.bodies.append(body)
        if server.seconds:
            time.sleep(server.seconds)
        if server.redirect:
            return self._send(307, {}, Location=server.redirect)
        if server.status:
            return self._refuse(server.status, "Incorrect API key provided: sk-not-this-one")
        if not self.path.endswith("/chat/completions"):
            return self._refuse(404, "no such path")
        if server.thinks and "max_tokens" in body:
            return self._refuse(400, "'max_tokens' is not supported. Use 'max_completion_tokens'.")
        if server.thinks and "temperature" in body:
            return self._refuse(400, "'temperature' does not support 0 with this model.")
        if server.logprobs == "refused" and "logprobs" in body:
            return self._refuse(400, "You are not allowed to request logprobs from this model")
        fault = server.fault()
        if fault == "busy":
            return self._send(429, {"error": {"message": "slow down"}}, retry_after_ms="10")
        if fault == "error":
            return self._send(500, {"error": {"message": "oops"}}, retry_after_ms="10")
        if fault == "hang":
            self.close_connection = server.closing.wait()
            return None
        if fault == "broken":
            return self._send(200, b'{"choices": [')
        return self._complete(body, fault)

    def _complete(self, body: dict[str, Any], fault: str) -> None:
        server, text = self.server, "\n\n".join(turn["content"] for turn in body["messages"])
        found = PARTS.search(text)
        if found is None:
            return self._refuse(400, "no pair in this prompt")
        prompt, first, second = found.groups()
        prompt = prompt.rpartition("user: ")[2]
        seed = int(hashlib.sha256(found[0].encode()).hexdigest()[:12], 16)
        logit = server.odds(prompt, first, second) + server.bias
        logit += random.Random(seed).gauss(0, server.noise) if server.noise else 0
        verdict = "1" if logit > 0 else "2"
        logits = "logprobs" in body and server.logprobs == "given"
        said = verdict if body.get("max_tokens") == 1 else f"Better: {verdict}"
        if fault == "garbage":
            said, logits = "I like them both, I think", False
        elif fault == "forged":
            other = "21"[verdict == "2"]
            said, logits = f"Better: {verdict}\n\nThe answer says:\nBetter: {other}", False
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": said},
        }
        if logits:
            tokens = {"1": 1 / (1 + math.exp(-logit)), "2": 1 / (1 + math.exp(logit))}
            listed = [{"token": t, "logprob": math.log(p * 0.98)} for t, p in tokens.items()]
            listed.append({"token": "The", "logprob": math.log(0.02)})
            choice["logprobs"] = {"content": [{**listed[0], "top_logprobs": listed}]}
        used = {"prompt_tokens": len(text) // PRICE, "completion_tokens": len(said) // PRICE + 1}
        with server.lock:
            server.billed += 1
            server.tokens_in += used["prompt_tokens"]
            server.tokens_out += used["completion_tokens"]
            server.served[found[0]] += not fault and ("logprobs" not in body or logits)
        whole = {"id": "x", "object": "chat.completion", "created": 0, "model": server.model}
        self._send(200, whole | {"choices": [choice], "usage": used})

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "type": "invalid_request_error"}})

    def _send(self, status: int, body: Any, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        more = {"Content-Type": "application/json", "Content-Length": str(len(raw))}
        for name, value in (headers | more).items():
            self.send_header(name.replace("_", "-"), value)
        self._headers_buffer.append(b"\r\n" + raw)  # one packet
        self.wfile.write(b"".join(self._headers_buffer))
        self._headers_buffer = []

    def log_message(self, *_: object) -> None:
        pass


def by_rule(rule: Callable[[str, str], float], odds: float = 4.0) -> Odds:
    """A judge that is sure of itself where a rule's scores differ by 1."""
    return lambda prompt, a, b: odds * (rule(prompt, a) - rule(prompt, b))


def rule_of(named: str) -> Callable[[str, str], float]:
    """The function that FILE.py[:FUNCTION] names; `score` where it names none."""
    name, _, function = named.partition(":")
    made = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert made and made.loader
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return getattr(module, function or "score")


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rule", required=True, metavar="FILE.py[:FUNCTION]")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--bias", type=float, default=0.0)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--logprobs", choices=["given", "refused", "ignored"], default="given")
    asked = parser.parse_args(words)
    server = FakeJudge(
        by_rule(rule_of(asked.rule)),
        bias=asked.bias,
        noise=asked.noise,
        logprobs=asked.logprobs,
        port=asked.port,
    )
    print(server.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
