"""Answers by a vLLM server: what it is asked, whose they are, and what becomes of its faults."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_recipes import signals
from rlhf_recipes.errors import StageError, UsageError
from rlhf_recipes.models import vllm
from rlhf_recipes.models.base import Base
from rlhf_recipes.models.role import Role, logprobs
from rlhf_recipes.models.sampler import Sampler, apart
from rlhf_recipes.models.sampling import join
from rlhf_recipes.models.vllm import Vllm
from tests.helpers.fake_vllm import Serve, serve
from tests.helpers.roles import make_base, trained

__all__ = ["serve"]  # a fixture
pytestmark = pytest.mark.train

PROMPTS = [[7 + i] * (2 + i % 3) for i in range(6)]
WORDS: dict[str, Any] = {"length": 5, "temperature": 0.7, "eos": 2, "pad": 0, "batch": 4, "seed": 3}


@pytest.fixture
def base(tiny_model: Path) -> Base:
    return make_base(tiny_model)


@pytest.fixture
def policy(base: Base) -> Role:
    return trained(base, "policy")


def engine(base: Base, policy: Role, folder: Path, told: list[str] | None = None) -> Vllm:
    return Vllm(folder, (told if told is not None else []).append, partial(base.save, policy))


def read(policy: Role, answers: list[list[int]]) -> torch.Tensor:
    rows = join(PROMPTS, answers, 0, torch.device("cpu"))
    with policy.active(), torch.no_grad():
        return logprobs(policy, rows.ids, rows.mask, rows.answer, WORDS["temperature"])[0]


def test_answers_are_those_of_the_adapter_as_it_is_now(
    serve: Serve, base: Base, policy: Role, tmp_path: Path
) -> None:
    server, asked = serve(), engine(base, policy, tmp_path)
    for step in range(2):
        picked: list[list[float]] = []
        answers = asked.sample(PROMPTS, picked=picked, **WORDS)
        assert apart(picked, read(policy, answers)) < 1e-5
        assert asked.sample(PROMPTS, picked=[], **WORDS) == answers  # nothing moved: no new one
        assert len(server.loaded) == step + 1 and server.names == server.loaded[-1:]
        with torch.no_grad():
            for weight in policy.trainable():
                weight += 0.2 * torch.randn(
                    weight.shape, generator=torch.Generator().manual_seed(5)
                )
        assert apart(picked, read(policy, answers)) > 0.01  # else the above would show nothing
    asked.close()
    assert server.names == []


def test_a_row_s_draws_hang_on_its_place_alone(
    serve: Serve, base: Base, policy: Role, tmp_path: Path
) -> None:
    server, asked = serve(), engine(base, policy, tmp_path)
    whole = asked.sample([*PROMPTS, PROMPTS[0]], picked=[], **WORDS)
    assert asked.sample(PROMPTS[:2], picked=[], **WORDS) == whole[:2]
    assert whole[6] != whole[0]  # the same prompt in another place
    body = next(one for one in server.bodies if one["prompt"] == PROMPTS[1])
    assert {body[key] for key in ("top_p", "repetition_penalty")} == {1.0}
    assert not any(body[key] for key in ("top_k", "min_p", "presence_penalty", "logprobs"))
    assert body["temperature"] == 0.7 and body["max_tokens"] == 5
    assert body["ignore_eos"] and body["stop_token_ids"] == [2] and body["return_token_ids"]
    assert all(len(ids) == 5 or ids[-1] == 2 for ids in whole)


def test_a_server_that_loads_or_was_restarted_is_asked_again(
    serve: Serve, base: Base, policy: Role, tmp_path: Path
) -> None:
    serve()
    answers = engine(base, policy, tmp_path / "a").sample(PROMPTS, picked=[], **WORDS)
    told: list[str] = []
    server = serve(loading=len(PROMPTS), forgets=True)
    asked, picked = engine(base, policy, tmp_path / "b", told), list[list[float]]()
    assert asked.sample(PROMPTS, picked=picked, **WORDS) == answers
    assert len(picked) == len(answers) and len(server.loaded) == 2
    assert told[0] == f"vLLM at {server.url}: 503: Service Unavailable; asked again in 0 s"
    assert "does not exist" in told[1] and len(told) == 2


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"loading": 99}, "503: Service Unavailable (see that the server runs; the same command"),
        ({"refuses": True}, "LoRA rank 4 is greater than max_lora_rank 2. (it reads that folder"),
        ({"static": True}, "takes no adapters while it runs (start it with: vllm serve)"),
        ({"no ids": True}, "sent no token ids"),
        ({"no logprobs": True}, "sent no log-probability for some tokens"),
        ({"other prompt": True}, "sent the ids of another prompt"),
        ({"other model": True}, "answered as "),
        ({"other end": True}, "ended an answer by 9"),
        ({"garbage": True}, "sent what is not a completion: ValueError"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_faults_end_in_one_line(
    serve: Serve, base: Base, policy: Role, tmp_path: Path, faults: dict[str, Any], said: str
) -> None:
    server = serve(**faults)
    with pytest.raises(StageError) as error:
        engine(base, policy, tmp_path).sample(PROMPTS, picked=[], **WORDS)
    assert said in str(error.value) and server.url in str(error.value)
    assert "\n" not in str(error.value)


def test_no_server_and_one_that_takes_too_few_tokens(
    serve: Serve, base: Base, policy: Role, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as server:
        asked = engine(base, policy, tmp_path)
        with pytest.raises(StageError, match="takes 128 tokens, not 4 prompt and 126 answer"):
            asked.sample(PROMPTS, picked=[], **WORDS | {"length": 126})
    monkeypatch.setattr(signals, "requested", lambda: True)  # Ctrl-C: nothing is waited for
    with pytest.raises(StageError, match="Connection refused"):
        asked.sample(PROMPTS, picked=[], **WORDS)
    with pytest.raises(StageError, match=f"no vLLM at {server.url}: Connection.*start it with: "):
        engine(base, policy, tmp_path)
    for wrong in ("127.0.0.1:8000", "http://me:secret@127.0.0.1", "http://127.0.0.1:8000/v1"):
        monkeypatch.setenv("RLHF_RECIPES_VLLM", wrong)
        with pytest.raises(UsageError, match="RLHF_RECIPES_VLLM is not a server's address"):
            engine(base, policy, tmp_path)


def test_where_nobody_reads_the_answers_some_are_read(
    serve: Serve, base: Base, policy: Role, tmp_path: Path
) -> None:
    """An evaluation has no trainer that compares log-probabilities."""
    serve()
    asked = Sampler(policy, engine=engine(base, policy, tmp_path / "a"))
    assert asked.told.startswith("by vLLM at http://127.0.0.1:")
    assert len(asked.sample(PROMPTS, **WORDS)) == len(PROMPTS)
    serve(shift=0.02)
    with pytest.raises(StageError, match=r"is 0.02 from the trainer's on average, over 0.01"):
        Sampler(policy, engine=engine(base, policy, tmp_path / "b")).sample(PROMPTS, **WORDS)


def test_the_command_that_starts_a_server() -> None:
    assert vllm.command(Path("/m y"), "bfloat16", 20) == (
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve '/m y' --host 127.0.0.1 --dtype bfloat16"
        " --enable-lora --max-lora-rank 32 --logprobs-mode processed_logprobs"
    )
