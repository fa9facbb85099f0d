"""Memory by rule: what it says, what does not fit, and the words that make it fit."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from rlhf_recipes.errors import Interrupted, MachineError, UsageError
from rlhf_recipes.models.fake_model import (
    ACTIVATIONS,
    ADAPTERS,
    CACHE,
    LOGITS_ROLE,
    OPTIMIZER,
    WEIGHTS,
    Lengths,
    Sim,
)
from rlhf_recipes.pipeline import cards, fit, memory, rehearsal, runner
from rlhf_recipes.pipeline.estimate import reckoning
from rlhf_recipes.pipeline.plan import Plan, plan_run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages.answers import sampling_memory
from rlhf_recipes.stages.contract import Work
from rlhf_recipes.stages.session import Session

pytestmark = pytest.mark.train


def planned(file: Path, *changes: str) -> tuple[Plan, Session]:
    plan = plan_run(load_recipe(file, set=changes), file.parent / "runs")
    return plan, Session(plan.recipe, plan.model)


def held(file: Path, *changes: str, stage: str = "ppo") -> Counter[str]:
    plan, session = planned(file, *changes)
    room = fit.Room(plan.recipe, fit.architecture(session.model_folder), session)
    room.card = False
    return next(room.need(asked) for asked in plan.stages if asked.name == stage)


def test_what_is_held_all_along_is_exact(tiny_recipe: Path, tiny_model: Path) -> None:
    """Weights as the file has them; four adapters of PPO and two heads; AdamW's two moments."""
    lm = 4 * sum(tensor.numel() for tensor in load_file(tiny_model / "model.safetensors").values())
    lora = 4 * 2 * 4 * (32 + 32 + 32 + 16)  # float32, two layers, rank 4, of q_proj and v_proj
    found = held(tiny_recipe, 'lora.target_modules=["q_proj", "v_proj"]')
    head = 4 * (32 + 1)
    assert found[WEIGHTS] == pytest.approx(lm, abs=200)  # and the rotary embedding's buffer
    assert found[ADAPTERS] == 4 * lora + 2 * head
    assert found[OPTIMIZER] == 2 * (2 * lora + head)


def test_keys_and_values_are_not_activations(tiny_recipe: Path) -> None:
    """Of sampling's memory; an out-of-memory message names the largest part."""
    plan, session = planned(tiny_recipe, "evaluation.response_length=200")
    room = fit.Room(plan.recipe, fit.architecture(session.model_folder), session)
    lengths = Lengths(prompt=16, row=216, answer=200, validation=0)
    sim = Sim(plan.recipe, "evaluation", False, lengths, False, room.config)
    *_, last = sampling_memory(sim)
    config = room.config.get_text_config()
    width = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    rows = plan.recipe.evaluation.prompts
    cached = 2 * config.num_hidden_layers * rows * 216 * width * 4
    assert last[CACHE] == pytest.approx(cached, rel=0.02)
    assert last[ACTIVATIONS] < last[CACHE]


def test_what_grows_with_what(tiny_recipe: Path) -> None:
    def of(*changes: str, stage: str = "sft") -> Counter[str]:
        return held(tiny_recipe, *changes, stage=stage)

    sft = of()
    twice = of("sft.per_device_train_batch_size=16")
    assert twice[ACTIVATIONS] == pytest.approx(2 * sft[ACTIVATIONS], rel=0.05)
    less = of("sft.gradient_checkpointing=true")
    assert less[ACTIVATIONS] < 0.7 * sft[ACTIVATIONS]
    assert of("sft.optim=sgd")[OPTIMIZER] == 0
    whole = of("lora=false")
    assert whole[ADAPTERS] == 0 and whole[OPTIMIZER] == 2 * whole[WEIGHTS]
    packed = of("model.quantization=4bit")
    assert packed[WEIGHTS] < 0.5 * sft[WEIGHTS]
    dpo = ['stages=["sft", "dpo"]', "dpo.per_device_train_batch_size="]
    four, eight = (of(dpo[0], f"{dpo[1]}{n}", stage="dpo") for n in (4, 8))
    assert eight[LOGITS_ROLE] == pytest.approx(2 * four[LOGITS_ROLE], rel=0.05)
    assert of(stage="evaluation").total() > sft[WEIGHTS]
    assert of("ppo.response_length=1", stage="ppo").total() < of(stage="ppo").total()


def test_a_size_of_memory() -> None:
    for text, count in (("24GB", 24e9), ("80 gib", 80 * 2**30), ("1.5TB", 1.5e12)):
        assert memory.read_size(text) == count
    for text in ("24", "GB", "much", "-1GB"):
        with pytest.raises(UsageError, match="as in --device 24GB"):
            memory.read_size(text)


def test_what_does_not_fit_is_refused_before_weights_are_loaded(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the words that make it fit, in the line that says so; with them it is not refused."""

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(rehearsal, "SHORT", 0.0)
    monkeypatch.setattr(Session, "load_base", stop)
    monkeypatch.setattr(fit, "LIBRARIES", 0.0)
    recipe = load_recipe(tiny_recipe)
    need = held(tiny_recipe, stage="sft").total()
    monkeypatch.setattr(memory, "free", lambda: 0.8 * need)
    with pytest.raises(MachineError) as caught:
        runner.run(recipe, runs=tiny_recipe.parent / "runs", until="sft")
    told = str(caught.value)
    assert told.startswith("stage sft needs ")
    assert "most of it for activations" in told and "this machine has" in told
    assert "\n" not in told
    said = told.partition("(add --set ")[2].partition(";")[0]
    words = said.split(" --set ")
    assert all("=" in word for word in words)
    assert "batch_size" in words[0]  # what changes no result comes first
    assert held(tiny_recipe, *words, stage="sft").total() <= 0.8 * need
    with pytest.raises(Interrupted):  # it is at loading them
        again = load_recipe(tiny_recipe, set=words)
        runner.run(again, runs=tiny_recipe.parent / "runs", until="sft")


def test_plan_says_what_it_takes_of_a_card_or_what_was_measured(tiny_recipe: Path) -> None:
    plan, session = planned(tiny_recipe, 'stages=["sft"]', "evaluation=false")
    first, *more = reckoning(plan, plan.stages, session, "24GB", False).splitlines()
    assert first.split() == ["stage", "memory", "time", "of", "which"]
    assert more[0].startswith("sft") and "activations" in more[0]
    assert more[-1] == "by rule; a card with 24 GB has 23.3 GB"
    small = reckoning(plan, plan.stages, session, "0.7005GB", False).splitlines()[-1]
    assert "; sft does not fit: --set sft.per_device_train_batch_size=" in small
    took, last = reckoning(plan, plan.stages, session, "", True).splitlines()
    assert took.startswith("sft") and "s a step, about" in took
    assert last == "measured, by a rehearsal"
    with pytest.raises(UsageError):
        reckoning(plan, plan.stages, session, "much", False)


def test_sampling_on_a_card_takes_its_launches_and_bytes(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As measured: 48 to 71 ms a step of a 1.5B model on an H200, for 16 to 256 rows."""
    plan, session = planned(tiny_recipe)
    config = fit.architecture(session.model_folder)
    room = fit.Room(plan.recipe, config, session)
    work = Work(1, 0.0, tokens=1)
    assert room.seconds(work, 1.5e9) == 0  # on a CPU operations are all
    card = {"multi_processor_count": 132, "clock_rate": 1_980_000, "major": 9}
    card |= {"memory_clock_rate": 3_201_000, "memory_bus_width": 6144}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**card))
    room.card, config.num_hidden_layers = True, 28
    assert 0.048 < room.seconds(work, 1.5e9) < 0.071
    assert room.seconds(Work(1, 0.0, tokens=64), 1.5e9) == pytest.approx(3.6, abs=0.5)
    by_operations = fit.Work(1, 2.0 * 64).total * 1.5e9 / room.speed()
    assert room.seconds(work, 1.5e9) > 20 * by_operations
    found = {stage.name: rehearsal.work_of(plan.recipe, stage, session.data(plan.recipe.dataset))
             for stage in plan.stages}  # fmt: skip
    assert found["sft"].tokens == found["reward"].tokens == 0
    assert found["ppo"].tokens == 6 * (2 + 3)  # two updates, and three looks at validation prompts
    assert found["evaluation"].tokens == 3 * 6  # the base, SFT and PPO
    room.here = False
    assert room.seconds(work, 1.5e9) is None


def test_stages_without_a_trainer_are_reckoned_too(tiny_recipe: Path) -> None:
    stages = 'stages=["sft", "sample", "label", "reward", "ppo"]'
    plan, session = planned(tiny_recipe, stages)
    room = fit.Room(plan.recipe, fit.architecture(session.model_folder), session)
    room.settled(plan.stages)
    sample, label = plan.stages[1:3]
    assert room.need(sample)[CACHE] > 0 and room.need(label).total() == 0
    room.bytes = 0
    assert room.words([sample]) == "a smaller model: no setting makes this one fit"


def test_a_stage_is_looked_at_once_and_told_of(
    tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, session = planned(tiny_recipe)
    told, counted = list[str](), list[str]()
    monkeypatch.setattr(fit, "footprint", lambda sim: counted.append(sim.name) or Counter(a=1))
    room = fit.Room(plan.recipe, fit.architecture(session.model_folder), None, tell=told.append)
    for recipe in (plan.recipe, replace(plan.recipe, title="other")):
        for stage in plan.stages:
            room.need(stage, recipe)
    assert counted == [stage.name for stage in plan.stages]
    assert told == [f"  {name}" for name in counted]
    shorter = replace(plan.recipe, evaluation=replace(plan.recipe.evaluation, prompts=1))
    room.need(plan.stages[0], shorter)
    assert len(counted) == len(plan.stages) + 1


def test_what_the_recipe_leaves_open_is_settled_by_the_memory_there_is(tiny_recipe: Path) -> None:
    """Activations are kept, and a card has a merged copy, where 70 % of the memory is enough."""
    text = tiny_recipe.read_text()
    tiny_recipe.write_text(text.replace("gradient_checkpointing = false\n", "", 1))
    plan, session = planned(tiny_recipe, "reward.gradient_checkpointing=true")
    room = fit.Room(plan.recipe, fit.architecture(session.model_folder), None, 24e9)
    stages = plan.stages[:3]

    def kept(recipe: Any) -> list[bool]:
        return [not recipe.tables[s.name].options["gradient_checkpointing"] for s in stages]

    recipe, said = room.settled(stages)
    assert kept(recipe) == [True, False, True] and recipe.model.sampler == "merged"
    assert [line.partition(" ")[0] for line in said] == ["answers", "sft"]
    linear = 32 * (32 + 16 + 16 + 32 + 3 * 64)  # of a layer, less the adapters' own
    more = room.need(stages[2], recipe)["weights"] - room.need(stages[2])["weights"]
    assert more == 2 * 4 * linear
    room.bytes = 1.2 * room.beside(room.need(stages[0]))
    recipe, said = room.settled(stages[:1])
    assert kept(recipe)[0] is False and said == []
    room.bytes = 1.2 * room.beside(room.need(stages[2], recipe))
    assert room.settled(stages[2:])[0].model.sampler == "auto"


def test_what_each_of_several_cards_needs(tiny_recipe: Path) -> None:
    """Copies: the base whole. Sharded: a quarter of it, a layer and the head; adapters whole."""
    plan, session = planned(tiny_recipe, "model.dtype=bfloat16")
    few = plan.stages[:1]
    shape = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
    shape |= {"num_hidden_layers": 32, "num_key_value_heads": 8, "tie_word_embeddings": False}
    large = LlamaConfig(architectures=["LlamaForCausalLM"], **shape)  # as Llama 3.1 8B
    room = fit.Room(plan.recipe, large, session, 24e9)
    weights, whole = cards.base(room)
    assert (weights / 1e9, whole / 1e9) == pytest.approx((16.06, 0.436 + 1.051), rel=1e-3)
    rows = [re.split("  +", line) for line in cards.needs(room, few, 4).splitlines()]
    assert rows[0][:3] == ["stage", "data parallel", "sharded"]
    copies, sharded = (float(cell.removesuffix(" GB")) for cell in rows[1][1:3])
    assert copies - sharded == pytest.approx(fit.LOOSE * (weights * 3 / 4 - whole) / 1e9, abs=0.2)
    assert rows[1][3].startswith("weights 16.1 GB, ")
    there = "a card's memory by rule, not measured; 4 cards, 23.3 GB on each"
    assert rows[-3:] == [["data parallel: fits"], ["sharded: fits"], [there]]
    small = reckoning(plan, few, session, "2 x 0.7001 GB", False).splitlines()
    assert small[-3] == "data parallel: does not fit: sft"

    # The batch is the recipe's, whatever the cards: `stages.order` shares it out.
    own = cards.shared(plan.recipe, "sft", 4).tables["sft"].options
    assert own["per_device_train_batch_size"] == 2
    three = reckoning(plan, few, session, "3x24GB", False)
    assert "sft: a batch of 8 × 1 rows cannot be shared out among 3 processes" in three
    packed = load_recipe(tiny_recipe, set=["model.quantization=4bit"])
    assert cards.unsharded(packed) == "a base in 4bit is whole on each card"
    full = load_recipe(tiny_recipe, set=["lora=false"])
    assert "lora = false" in cards.unsharded(full) and not cards.unsharded(plan.recipe)


def test_cards_and_their_size() -> None:
    assert memory.read_cards("24GB") == (1, 24e9)
    assert memory.read_cards("4x24GB") == memory.read_cards("4 × 24 gb") == (4, 24e9)
    for text in ("0x24GB", "x24GB", "4x", "4x24"):
        with pytest.raises(UsageError):
            memory.read_cards(text)
