"""A server on loopback that speaks vLLM's protocol, as version 0.27.1 answers.

    def test(serve: Serve) -> None:
        server = serve(loading=2)

It holds the model, reads adapters from their folders by PEFT, and draws from the whole
distribution. `faults` make trouble: "loading" (503, so often), "refuses" (no adapter is taken),
"static" (no route for adapters), "stale" (each adapter is the first one), "forgets" (once: all
adapters are gone), "no ids", "no logprobs", "other prompt", "other model", "other end" (answers end
by another token), "garbage", and "shift" (log-probabilities are that much too high).
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from rlhf_recipes.models import vllm
from rlhf_recipes.models.load import load_causal_lm
from tests.helpers.loopback import Loopback

Serve = Callable[..., "FakeVllm"]


@pytest.fixture
def serve(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts a server with these faults, at the address that the environment names."""
    started: list[FakeVllm] = []

    def start(**faults: Any) -> FakeVllm:
        started.append(FakeVllm(tiny_model, **faults))
        started[-1].__enter__()
        monkeypatch.setenv(vllm.ADDRESS, started[-1].url)
        monkeypatch.setattr(vllm, "PAUSES", (0.0, 0.0))
        return started[-1]

    yield start
    for server in started:
        server.__exit__()


class FakeVllm(Loopback):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, model: Path, **faults: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.lm: Any = load_causal_lm(model, dtype=torch.float32)
        self.base, self.faults = str(model), faults
        self.peft: PeftModel | None = None
        self.names: list[str] = []  # the adapters that it has
        self.loaded: list[str] = []  # every one that it was given
        self.bodies: list[dict[str, Any]] = []
        self.lock, self.closing = threading.Lock(), threading.Event()

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is no fault of this server."""

    def load(self, name: str, folder: str) -> None:
        if self.peft is None:
            self.peft = PeftModel.from_pretrained(self.lm, folder, adapter_name=name)
        else:
            self.peft.load_adapter(folder, name)
        self.peft.eval()
        self.names.append(name)
        self.loaded.append(name)

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> tuple[list[int], list[float]]:
        model = self.peft or self.lm
        generator = torch.Generator().manual_seed(body["seed"])
        if body["model"] != self.base:
            self.peft.set_adapter(self.loaded[0] if "stale" in self.faults else body["model"])
        ids, said = list(body["prompt"]), list[float]()
        bare = self.peft.disable_adapter if self.peft and body["model"] == self.base else _nothing
        while len(said) < body["max_tokens"]:
            with bare():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            chances = torch.log_softmax(logits / body["temperature"], -1)
            drawn = int(torch.multinomial(chances.exp(), 1, generator=generator))
            ids.append(drawn)
            said.append(float(chances[drawn]) + self.faults.get("shift", 0.0))
            if drawn in body["stop_token_ids"]:
                break
        return ids[len(body["prompt"]) :], said


class _nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


class _Answer(BaseHTTPRequestHandler):
    server: FakeVllm
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        card = {"id": self.server.base, "root": self.server.base, "max_model_len": 128}
        found = [card | {"parent": None}]
        found += [{"id": name, "parent": self.server.base} for name in self.server.names]
        self._send(200, {"object": "list", "data": found})

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            answer = {
                "/v1/load_lora_adapter": self._load,
                "/v1/unload_lora_adapter": self._unload,
                "/v1/completions": self._complete,
            }[self.path]
            answer(body)

    def _load(self, body: dict[str, Any]) -> None:
        if "static" in self.server.faults:
            return self._send(404, {"detail": "Not Found"})
        if "refuses" in self.server.faults:
            return self._refuse(500, "LoRA rank 4 is greater than max_lora_rank 2.")
        self.server.load(body["lora_name"], body["lora_path"])
        self._send(200, f"Success: LoRA adapter '{body['lora_name']}' added successfully.")

    def _unload(self, body: dict[str, Any]) -> None:
        self.server.names.remove(body["lora_name"])
        self._send(200, f"Success: LoRA adapter '{body['lora_name']}' removed successfully.")

    def _complete(self, body: dict[str, Any]) -> None:
        server, faults = self.server, self.server.faults
        if faults.get("loading", 0) > 0:
            faults["loading"] -= 1
            return self._refuse(503, "Service Unavailable")
        if faults.pop("forgets", False):
            server.names.clear()
        if body["model"] not in (server.base, *server.names):
            return self._refuse(404, f"The model `{body['model']}` does not exist.")
        if "garbage" in faults:
            return self._send(200, {"choices": []})
        server.bodies.append(body)
        ids, numbers = server.complete(body)
        if "other end" in faults:
            ids, numbers = ids[:1], numbers[:1]
        choice: dict[str, Any] = {
            "index": 0,
            "text": "",
            "finish_reason": "stop" if ids[-1] in body["stop_token_ids"] else "length",
            "stop_reason": 9 if "other end" in faults else None,
            "token_ids": None if "no ids" in faults else ids,
            "prompt_token_ids": [1] if "other prompt" in faults else body["prompt"],
            "logprobs": None if "no logprobs" in faults else {"token_logprobs": numbers},
        }
        named = server.base if "other model" in faults else body["model"]
        self._send(200, {"object": "text_completion", "model": named, "choices": [choice]})

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "code": status}})

    def _send(self, status: int, body: Any) -> None:
        raw = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass
