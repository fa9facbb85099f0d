"""Answers from a vLLM server that serves the same base model.

The policy's adapter goes to the server as a folder, under a new name each time its weights have
moved. It is never merged: a merge and its undoing change a 16-bit base (TRL-facts 77). Prompts and
answers are token ids both ways. Facts about the protocol are those of vLLM 0.27.1.

A person names the server in the environment, never a recipe. Calls go to that address alone:
without proxies, without redirects.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any

from rlhf_recipes import signals
from rlhf_recipes.errors import StageError, UsageError, briefly
from rlhf_recipes.models.base import ADAPTER
from rlhf_recipes.store.digests import derive_seed, file_digest
from rlhf_recipes.text import cut, plain

ADDRESS, KEY = "RLHF_RECIPES_VLLM", "RLHF_RECIPES_VLLM_KEY"
HERE = "http://127.0.0.1:8000"  # vLLM's own default
AT_ONCE = 256  # calls; the server queues what is over its own limit
TIMEOUT = 600.0  # seconds that a call may take, its time in the server's queue included
PAUSES = (1.0, 4.0, 15.0, 40.0, 60.0)  # seconds before each new try: a server that loads takes some
BUSY = {408, 429, 500, 502, 503, 504}
AGAIN = "see that the server runs; the same command goes on from the last checkpoint"
URL = re.compile(r"(https?)://([A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?/?")
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that a server can be started for


class Busy(Exception):
    """No answer, and perhaps one soon."""


class Vllm:
    """Samples from the base of a server, under the adapter in `folder`, or under none.

    With `save`, the adapter is written anew to a folder inside `folder` before each sampling. The
    server reads it there: both see the same disk. `start` is the command for such a server.
    """

    def __init__(
        self,
        folder: Path | None,
        tell: Callable[[str], object] = lambda text: None,
        save: Callable[[Path], object] | None = None,
        start: str = "vllm serve",
    ):
        self.url = (os.environ.get(ADDRESS) or HERE).rstrip("/")
        if not (found := URL.fullmatch(self.url)):
            raise UsageError(f"{ADDRESS} is not a server's address", f"as in {HERE}")
        self.secure, self.host, self.port = found[1] == "https", found[2], found[3]
        self.folder, self.tell, self.save, self.start = folder, tell, save, start
        self.name = self.digest = ""  # of the adapter that the server has; none yet
        self.open: set[HTTPConnection] = set()
        self.base, self.longest = self._base()

    @property
    def told(self) -> str:
        return f"by vLLM at {self.url}"

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        length: int,
        temperature: float,
        eos: int,
        seed: int,
        picked: list[list[float]],
        **_: Any,
    ) -> list[list[int]]:
        """As `sampling.sample`. A row's draws depend on `seed` and its place, but for rounding.

        A failed call is sent again, after a pause and at most len(PAUSES) times. Then StageError.
        """
        if self.longest and max(map(len, prompts)) + length > self.longest:
            what = f"{max(map(len, prompts))} prompt and {length} answer tokens"
            hint = "restart it with a larger --max-model-len"
            raise StageError(f"vLLM at {self.url} takes {self.longest} tokens, not {what}", hint)
        self._write()
        found: dict[int, tuple[list[int], list[float]]] = {}
        words = _words(length, temperature, eos)

        def row(place: int) -> str:
            seeded = words | {"seed": derive_seed(seed, "row", place)}
            try:
                found[place] = self._answer(model, list(prompts[place]), seeded)
            except Busy as why:
                return str(why)
            return ""

        for pause in (*PAUSES, None):
            rows = [place for place in range(len(prompts)) if place not in found]
            try:
                model = self._load()
                why = self._each(row, rows)
            except Busy as error:
                why = str(error)
            if not why:
                break
            if pause is None or signals.requested():
                raise StageError(f"vLLM at {self.url}: {why}", AGAIN)
            self.tell(f"vLLM at {self.url}: {why}; asked again in {pause:.0f} s")
            time.sleep(pause)
        picked.extend(found[place][1] for place in range(len(prompts)))
        return [found[place][0] for place in range(len(prompts))]

    def close(self) -> None:
        """Have the server forget the adapter."""
        if self.name:
            with suppress(Busy, StageError):
                self._ask("/v1/unload_lora_adapter", {"lora_name": self.name})
        self.name = self.digest = ""

    # ---- the adapter

    def _write(self) -> None:
        """The adapter as it is now, if it has moved, in a folder that the server has not read."""
        if self.save is None or self.folder is None:
            return
        new = self.folder / "new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        self.save(new)
        digest = file_digest(new / ADAPTER)
        if digest != self.digest:
            self.close()
            self.digest = digest
            kept = self.folder / "adapter"
            shutil.rmtree(kept, ignore_errors=True)
            new.rename(kept)

    def _load(self) -> str:
        """What to ask for: the adapter, which the server reads unless it has it, or the base."""
        if self.folder is None or self.name:
            return self.name or self.base
        # A name that was in use may bring its prefix cache (vLLM #42125).
        name = f"rlhf-recipes-{uuid.uuid4().hex[:12]}"
        folder = self.folder if self.save is None else self.folder / "adapter"
        body = {"lora_name": name, "lora_path": str(folder.resolve())}
        status, said = self._call("POST", "/v1/load_lora_adapter", body)
        if status == 404 and name not in said:  # there is no such route
            what = f"vLLM at {self.url} takes no adapters while it runs"
            raise StageError(what, f"start it with: {self.start}")
        if status == 503:
            raise Busy(f"503: {_message(said)}")
        if status != 200:
            what = f"refused the adapter in {body['lora_path']}: {_message(said)}"
            hint = f"it reads that folder itself; start it with: {self.start}"
            raise StageError(f"vLLM at {self.url} {what}", hint)
        self.name = name
        return name

    # ---- calls

    def _each(self, row: Callable[[int], str], rows: Sequence[int]) -> str:
        """Why a row has no answer, if one has none."""
        pool = ThreadPoolExecutor(min(AT_ONCE, len(rows)))
        try:
            return next((why for why in [*pool.map(row, rows)] if why), "")
        finally:  # also where Ctrl-C or a refusal ends it: no call is waited for
            pool.shutdown(wait=False, cancel_futures=True)
            for connection in [*self.open]:
                with suppress(OSError, AttributeError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    def _answer(
        self, model: str, prompt: list[int], words: dict[str, Any]
    ) -> tuple[list[int], list[float]]:
        """The ids of an answer, and the log-probability of each."""
        text = self._ask("/v1/completions", {"model": model, "prompt": prompt, **words})
        [eos] = words["stop_token_ids"]
        try:
            said = json.loads(text)
            [choice] = said["choices"]
            ids, seen = choice["token_ids"], choice.get("prompt_token_ids")
            numbers = (choice["logprobs"] or {}).get("token_logprobs")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._wrong(f"sent what is not a completion: {briefly(error)}") from None
        if not ids or (seen is not None and seen != prompt):
            what = "the ids of another prompt" if ids else "no token ids"
            raise self._wrong(f"sent {what}")
        if said.get("model") != model:
            raise self._wrong(f"answered as {said.get('model')!r}, and {model!r} was asked")
        if not numbers or len(numbers) != len(ids) or None in numbers:
            raise self._wrong("sent no log-probability for some tokens")
        if len(ids) > words["max_tokens"] or eos in ids[:-1]:
            raise self._wrong("went on after the end of an answer")
        if len(ids) < words["max_tokens"] and ids[-1] != eos:
            raise self._wrong(f"ended an answer by {choice.get('stop_reason')!r}")
        return ids, numbers

    def _wrong(self, what: str) -> StageError:
        return StageError(f"vLLM at {self.url} {what}", "vLLM 0.27.1 is known to work")

    def _ask(self, path: str, body: dict[str, Any]) -> str:
        """The text of a reply. Raises Busy, and StageError where to ask again would not help."""
        status, text = self._call("POST", path, body)
        if status == 200:
            return text
        said = f"{status}: {_message(text)}"
        if status == 404 and body.get("model") not in (None, self.base):
            self.name = ""  # the server was started again, and has no adapters
            raise Busy(said)
        if status in BUSY:
            raise Busy(said)
        raise StageError(f"vLLM at {self.url}: {said}", AGAIN)

    def _base(self) -> tuple[str, int]:
        """What the server calls its base model, and the most tokens that it takes."""
        hint = f"start it with: {self.start}; {ADDRESS} says where it is"
        try:
            status, text = self._call("GET", "/v1/models")
            found = [one for one in json.loads(text)["data"] if not one.get("parent")]
            return found[0]["id"], int(found[0].get("max_model_len") or 0)
        except Busy as error:
            raise StageError(f"no vLLM at {self.url}: {error}", hint) from None
        except (ValueError, LookupError, TypeError, AttributeError):
            said = f"{status}: {_message(text)}"
            raise StageError(f"what answers at {self.url} is not vLLM: {said}", hint) from None

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, str]:
        """Status and text of a reply. Raises Busy where none came."""
        kind = HTTPSConnection if self.secure else HTTPConnection
        connection = kind(self.host, self.port and int(self.port), timeout=TIMEOUT)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        self.open.add(connection)
        try:
            connection.request(method, path, json.dumps(body) if body else None, headers)
            reply = connection.getresponse()
            return reply.status, reply.read().decode("utf-8", "replace")
        except TimeoutError:
            what = f"vLLM at {self.url} gave no answer within {TIMEOUT:.0f} s"
            raise StageError(what, AGAIN) from None
        except (OSError, HTTPException) as error:
            raise Busy(briefly(error)) from None
        finally:
            self.open.discard(connection)
            connection.close()


def command(model: Path, dtype: str, rank: int) -> str:
    """What starts a server for such a base and such adapters."""
    most = next((one for one in RANKS if one >= rank), rank)
    words = f"--host 127.0.0.1 --dtype {dtype} --enable-lora --max-lora-rank {most}"
    words += " --logprobs-mode processed_logprobs"  # at the temperature that was asked for
    return f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve {shlex.quote(str(model))} {words}"


def _words(length: int, temperature: float, eos: int) -> dict[str, Any]:
    """Draw from the whole distribution at `temperature`, until `eos` alone.

    Each setting is said, since a server fills in what is left out from the model's own
    generation_config.json. Any other token that would end an answer there is ignored.
    """
    return {
        "max_tokens": length,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "ignore_eos": True,
        "stop_token_ids": [eos],
        "logprobs": 0,  # of the chosen token alone
        "return_token_ids": True,
        "skip_special_tokens": False,
    }


def _message(text: str) -> str:
    """What a server says of an error, in its own words."""
    with suppress(ValueError, LookupError, TypeError):
        text = json.loads(text)["error"]["message"]
    return cut(plain(str(text).strip()), 200)
