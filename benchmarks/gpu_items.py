"""The items of `benchmarks.gpu`: each prints one JSON object, its row."""

from __future__ import annotations

import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import environment
from benchmarks.gpu_chains import Row, chain, same_bytes, smoke3
from benchmarks.gpu_models import recipe_for


def main() -> None:
    name, work, quick = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "1"
    print(json.dumps(ITEMS[name](work, quick)), flush=True)


# ---- the card -----------------------------------------------------------------------------------


def device(work: Path, quick: bool) -> Row:
    """What there is, and two ceilings: a copy, and a product of square matrices in bfloat16."""
    import torch

    from rlhf_recipes.store.provenance import versions

    row: Row = {"versions": versions(), "torch": torch.__version__}
    if not torch.cuda.is_available():
        return row | {"device": "cpu", "status": "ok" if quick else "no card"}
    card = torch.cuda.get_device_properties(0)
    row |= {"device": card.name, "gb": card.total_memory / 1e9, "cards": torch.cuda.device_count()}
    block = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    row["copy_tb_s"] = 2 * block.numel() / _timed(lambda: block.clone()) / 1e12
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    row["matmul_tflops"] = 2 * 8192**3 / _timed(lambda: square @ square) / 1e12
    return row


def _timed(run: Callable[[], Any], count: int = 5) -> float:
    """Seconds of one; a card's queue is empty before and after."""
    run()
    _sync()
    began = time.perf_counter()
    for _ in range(count):
        run()
    _sync()
    return (time.perf_counter() - began) / count


def _sync() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


# ---- PPO against TRL's --------------------------------------------------------------------------


def ppo_large(work: Path, quick: bool) -> Row:
    """1.5B, prompts of 480 tokens, 64 answers of 64 tokens an update."""
    return _against_trl(work, quick, "1.5b", words=480, length=64)


def ppo_small(work: Path, quick: bool) -> Row:
    """0.5B, prompts of 60 tokens, 64 answers of 256 tokens an update."""
    return _against_trl(work, quick, "0.5b", words=60, length=256)


def _against_trl(work: Path, quick: bool, size: str, **given: Any) -> Row:
    from benchmarks import ppo_vs_trl
    from benchmarks.common import child, module

    place = work / f"against-{size}"
    place.mkdir()
    recipe = recipe_for(work, size, quick, **given)
    child(module("benchmarks.ppo_vs_trl", "--worker", "untrained", recipe, place))
    row: Row = {"status": "ok"}
    for side in ("ours", "trl"):
        try:
            found = ppo_vs_trl.run_side(side, recipe, place, [], use_cpu=quick)
        except SystemExit as error:
            row[side] = {"failed": str(error)[-400:]}
            print(json.dumps(row), flush=True)
            continue
        seconds = statistics.fmean(found["seconds"][-2:]) if found["seconds"] else None
        answers = 8 if quick else 64
        row[side] = {
            "s_an_update": seconds,
            "answers_s": answers / seconds if seconds else None,
            "allocated_gb": found["gpu_peak_bytes"] / 1e9,
            "reserved_gb": found["gpu_reserved_bytes"] / 1e9,
        }
        print(json.dumps(row), flush=True)  # kept where the other side takes too long
    return row


# ---- sampling and learning ----------------------------------------------------------------------


def sampling(work: Path, quick: bool) -> Row:
    """Tokens a second by the adapters, from a merged copy, and with its steps compiled.

    With the share of what bandwidth allows, and with what compiling took.
    """
    import torch

    from rlhf_recipes.models.sampler import STEPS, Sampler
    from rlhf_recipes.recipe.load import load_recipe
    from rlhf_recipes.stages.session import Session

    row: Row = {}
    bandwidth = None
    if torch.cuda.is_available():
        block = torch.empty(2**30, dtype=torch.uint8, device="cuda")
        bandwidth = 2 * block.numel() / _timed(lambda: block.clone())
        del block
    for bits in ("none",) if quick else ("none", "4bit"):
        session = Session(load_recipe(recipe_for(work, "1.5b", quick, bits=bits)), {})
        policy = session.base.open("policy", None, seed=0, trainable=True)
        held = sum(p.numel() * p.element_size() for p in policy.lm.parameters())
        length = 4 if quick else 64
        for count in (4,) if quick else (16, 64, 256):
            prompts = [[7 + i % 50] * 64 for i in range(count)]
            words = dict(length=length, temperature=1.0, eos=-1, pad=0, batch=count, seed=1)
            ways = [(False, 0), (True, 0)]
            if bits == "none" and count in (4, 256):  # a minute of compiling each
                ways.append((True, STEPS))
            for merge, steps in ways:
                told: list[str] = []
                sampler = Sampler(policy, merge, told.append, 64, steps)
                began = time.perf_counter()
                sampler.sample(prompts, **words)
                first = time.perf_counter() - began
                seconds = _timed(partial(sampler.sample, prompts, **words), 1)
                found = {"tokens_s": count * length / seconds, "ms_a_step": 1e3 * seconds / length}
                found |= {"first_s": first, "told": told}
                if bandwidth:
                    found["of_bandwidth"] = held / bandwidth / (seconds / length)
                row[f"{bits} {count} rows, {sampler.told}"] = found
        session.base.close(policy)
        session.release()
    return row


def learning(work: Path, quick: bool) -> Row:
    """A forward and backward of the policy on 16 rows of 1,024 tokens: checkpointed or not."""
    import torch

    from rlhf_recipes.models.role import logprobs
    from rlhf_recipes.recipe.load import load_recipe
    from rlhf_recipes.stages.session import Session

    session = Session(load_recipe(recipe_for(work, "1.5b", quick)), {})
    policy = session.base.open("policy", None, seed=0, trainable=True)
    rows, width = (2, 16) if quick else (16, 1024)
    ids = torch.randint(8, 60, (rows, width), device=policy.lm.device)
    mask, row = torch.ones_like(ids), {}

    def step() -> None:
        with policy.active():
            logprobs(policy, ids, mask, width // 2, 1.0)[0].sum().backward()

    for on in (False, True):
        if on:
            words = {"use_reentrant": False}
            policy.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=words)
            policy.lm.train()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds = _timed(step, 2)
        except torch.cuda.OutOfMemoryError:
            row["checkpointed" if on else "plain"] = "out of memory"
            continue
        most = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
        row["checkpointed" if on else "plain"] = {"ms": 1e3 * seconds, "allocated_gb": most}
    return row


# ---- 8B under 24 GB -----------------------------------------------------------------------------


def memory_8b(work: Path, quick: bool) -> Row:
    """One PPO update of the 8B recipe's shape in 4 bit, then sampling in 16 bit, under 24 GB."""
    import torch

    from benchmarks import ppo_vs_trl
    from rlhf_recipes.recipe.load import load_recipe
    from rlhf_recipes.stages import answers, contract
    from rlhf_recipes.stages.session import Session

    shape = dict(bits="4bit", words=480, length=512, micro=2, steps=8, sampled=16, episodes=16)
    began = time.monotonic()
    file = recipe_for(work, "8b", quick, **shape, checkpointing="true")
    row: Row = {"make_s": time.monotonic() - began}
    if torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 24e9 / whole))
    place, began = work / "memory-8b", time.monotonic()
    place.mkdir()
    ppo_vs_trl.prepare_untrained(str(file), str(place), models=False)
    gc.collect()
    row["load_s"] = time.monotonic() - began
    recipe = load_recipe(file, set=ppo_vs_trl.ALIKE)
    session = Session(recipe, {})

    def measured(name: str, run: Callable[[], Any]) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        began = time.monotonic()
        try:
            run()
            found: Row = {"fits": True}
        except torch.cuda.OutOfMemoryError as error:
            found = {"fits": False, "said": str(error)[:300]}
        found["s"] = time.monotonic() - began
        if torch.cuda.is_available():
            found["allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
            found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        row[name] = found

    folder = place / "side"
    for part in ("work", "output"):
        (folder / part).mkdir(parents=True)
    inputs = {"policy": place / "sft", "reward_model": place / "reward"}
    context = contract.StageContext("ppo", "ppo", recipe, folder, inputs, Silent(), session)
    measured("ppo", lambda: contract.module_of("ppo").run(context))
    examples = session.data(recipe.dataset).train[:32]
    setting = answers.Setting(4 if quick else 64, 0.7, 1)
    policy = folder / "output"
    ask = lambda: list(answers.ask(session, policy, examples, setting, [1]))  # noqa: E731
    measured("evaluation sampling, 16 bit", ask)
    row["rule_gb"] = _by_rule(recipe)
    return row


def _by_rule(recipe: Any) -> Row:
    from collections import namedtuple

    from rlhf_recipes.models.load import load_config
    from rlhf_recipes.pipeline.fit import Room

    Stage = namedtuple("Stage", "name kind inputs")
    room = Room(recipe, load_config(recipe.model.folder), None, 24e9)
    roles = {"reward_model": "reward", "policy": "sft"}
    needs = {name: room.need(Stage(name, name, roles)) for name in ("ppo", "evaluation")}
    return {name: need.total() / 1e9 for name, need in needs.items()}


class Silent:
    def update(self, done: int, total: int, **numbers: float) -> None: ...
    def resume(self, done: int) -> None: ...
    def sample(self, prompt: str, answer: str, **numbers: float) -> None: ...
    def note(self, text: str) -> None: ...


ITEMS: dict[str, Callable[[Path, bool], Row]] = {
    "device": device,
    "chain": chain,
    "bytes": same_bytes,
    "smoke3": smoke3,
    "ppo_large": ppo_large,
    "ppo_small": ppo_small,
    "sampling": sampling,
    "learning": learning,
    "memory_8b": memory_8b,
}

if __name__ == "__main__":
    os.environ.update(environment())
    main()
