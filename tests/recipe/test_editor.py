"""An editor completes a recipe from `rlhf-recipes schema`: Tombi is asked as an editor asks it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes import cli
from tools.make_docs import field_tables

pytestmark = pytest.mark.train  # the schema's texts are upstream's

SCHEMA = Path(__file__).parents[2] / "docs" / "recipe.schema.json"
HERE = "|"  # the cursor


class Server:
    """A language server on a process's pipes: a JSON message each way, after its length."""

    def __init__(self, root: Path) -> None:
        words = [Path(sys.executable).with_name("tombi"), "lsp", "--offline"]
        quiet = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(words, cwd=root, **quiet)
        self._count = 0
        self.root = root.as_uri()
        self.ask("initialize", capabilities={}, processId=None, rootUri=self.root)
        self._send(method="initialized", params={})

    def ask(self, method: str, **params: Any) -> Any:
        self._count += 1
        self._send(id=self._count, method=method, params=params)
        while True:
            said = self._read()
            if "method" in said and "id" in said:  # of the editor, that this one is not
                self._send(id=said["id"], result=None)
            elif said.get("id") == self._count:
                return said["result"]

    def completions(self, text: str) -> dict[str, str]:
        """What is offered where the cursor stands, with what is said of it."""
        before, _, after = text.partition(HERE)
        name = f"{self.root}/{self._count}.toml"
        document = {"uri": name, "languageId": "toml", "version": 1, "text": before + after}
        self._send(method="textDocument/didOpen", params={"textDocument": document})
        place = {"line": before.count("\n"), "character": len(before.rpartition("\n")[2])}
        found, until = None, time.monotonic() + 20
        while not found and time.monotonic() < until:  # it reads the schema meanwhile
            found = self.ask("textDocument/completion", textDocument={"uri": name}, position=place)
        return {item["label"]: json.dumps(item.get("documentation")) for item in found or []}

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _send(self, **message: Any) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self._process.stdin.flush()

    def _read(self) -> Any:
        length = 0
        while line := self._process.stdout.readline().strip():
            if line.lower().startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        return json.loads(self._process.stdout.read(length))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("editor")
    with (root / "recipe.schema.json").open("w") as file, contextlib.redirect_stdout(file):
        cli.app(["schema"], standalone_mode=False)
    assert (root / "recipe.schema.json").read_text() == SCHEMA.read_text()
    made = Server(root)
    yield made
    made.end()


@pytest.mark.parametrize(
    ("text", "offered"),
    [
        ("[ppo]\nkl|", {"kl_coef", "kl_estimator"}),
        ("[ppo.guard]\n|", {"max_kl", "min_entropy", "min_length", "max_score_drop"}),
        ("[model]\nquantization = |", {'"none"', '"8bit"', '"4bit"'}),
        ("[warmup]\nkind = |", {'"sft"', '"reward"', '"ppo"', '"dpo"'}),
        ("[lora]\ntarget|", {"target_modules"}),
        ("[|", {"model", "lora", "dataset", "sft", "reward", "ppo", "dpo", "evaluation"}),
    ],
)
def test_what_is_offered(server: Server, text: str, offered: set[str]) -> None:
    found = server.completions(f"#:schema ./recipe.schema.json\n{text}\n")
    assert offered <= found.keys()


def test_a_stage_s_keys_are_offered_with_what_they_mean(server: Server) -> None:
    """All that the trainer heeds, and nothing that the program or another key owns."""
    found = server.completions("#:schema ./recipe.schema.json\n[ppo]\n|\n")
    passed = {key for key, one in field_tables()["ppo"].items() if one.standing == "passed"}
    assert passed <= found.keys() and len(passed) > 30
    assert "nat of KL" in found["kl_coef"] and "0.05" in found["kl_coef"]
    assert not {"bf16", "output_dir", "push_to_hub", "trust_remote_code"} & found.keys()
