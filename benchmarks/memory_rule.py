"""The rule of memory against rehearsals, on a CPU: models with random weights.

Each setting is a chain of stages, in a process of its own, and each stage a line, in bytes: of its
tensors what the rule says, and the most that the allocator had given out in its rehearsal; of the
process what the rule says, and the most that another rehearsal took.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import common
from rlhf_recipes.pipeline import fit
from rlhf_recipes.pipeline.plan import Plan, plan_run
from rlhf_recipes.pipeline.rehearsal import Ahead, rehearse
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages.session import Session
from tests.helpers.tiny import RECIPE, WORDS, word_tokenizer

SIZE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6}
SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
SIZE |= {"vocab_size": 4096}
WIDE = {"vocab_size": 65_536, "tie_word_embeddings": False}
LARGE = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
LARGE |= {"vocab_size": 49_152}
BF16, BITS4 = 'model.dtype="bfloat16"', 'model.quantization="4bit"'
SAVING = [f"{stage}.gradient_checkpointing=true" for stage in ("sft", "reward", "ppo")]
SAVING += ["sft.gradient_accumulation_steps=2", "reward.per_device_train_batch_size=32"]
# name: the architecture, what differs from SIZE; the stages, and what differs in their recipe
SETTINGS: dict[str, tuple[str, dict, list[str], list[str]]] = {
    "llama": ("llama", {}, ["sft", "reward", "dpo", "ppo"], []),
    "llama, bfloat16": ("llama", {}, ["sft", "reward", "dpo", "ppo"], [BF16]),
    "llama, 4 bit": ("llama", {}, ["sft", "reward", "ppo"], [BITS4]),
    "llama, 4 bit, bfloat16": ("llama", {}, ["sft", "reward", "ppo"], [BITS4, BF16]),
    "llama, bfloat16, saving": ("llama", {}, ["sft", "reward", "ppo"], [BF16, *SAVING]),
    "llama, larger, bfloat16": ("llama", LARGE, ["sft", "reward", "ppo"], [BF16]),
    "gpt_neox, all weights": ("gpt_neox", {}, ["sft", "reward"], ["lora=false"]),
    "mistral, large vocabulary": ("mistral", WIDE, ["sft", "evaluation"], []),
    "mistral, large vocabulary, bfloat16": ("mistral", WIDE, ["sft", "dpo"], [BF16]),
}  # fmt: skip
LAYOUT = {
    "sft": {"max_steps": 4, "per_device_train_batch_size": 16, "per_device_eval_batch_size": 4},
    "reward": {"max_steps": 4, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 4},
    "dpo": {"max_steps": 4, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4},
    "ppo": {"total_episodes": 16, "per_device_train_batch_size": 8, "response_length": 12},
    "evaluation": {"prompts": 16, "response_length": 16},
}
LAYOUT["dpo"] |= {"gradient_checkpointing": "false"}
LAYOUT["ppo"] |= {"gradient_accumulation_steps": 1, "num_ppo_epochs": 1, "eval_strategy": '"no"'}


def main() -> None:
    parser = common.parser(__doc__, pairs=None)
    parser.add_argument("--only", default="", help="settings whose name has this in it")
    parser.add_argument("--worker", nargs=2, metavar=("NAME", "FILE"), help="one of them, in here")
    args = parser.parse_args()
    if args.worker:
        name, file = args.worker
        Path(file).write_text(json.dumps(measure(Path(file).parent, *SETTINGS[name])))
        return
    found = {}
    for name in SETTINGS:
        if args.only in name:
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder, "found.json")
                words = common.module("benchmarks.memory_rule", "--worker", name, file)
                common.child(words, HF_DEACTIVATE_ASYNC_LOAD="1")  # threads' tensors go unseen
                found[name] = json.loads(file.read_text())
            for stage, line in found[name].items():
                print(f"{name:<32}{stage:<12}{json.dumps(line)}", file=sys.stderr, flush=True)
    common.report("memory_rule", args, found)


def measure(
    folder: Path, kind: str, shape: dict, names: list[str], changes: list[str]
) -> dict[str, dict[str, float]]:
    plan = planned(folder, kind, shape, names, changes)
    session = Session(plan.recipe, plan.model)
    ahead = Ahead(plan, plan.stages, session, lambda *_: contextlib.nullcontext())
    room = fit.Room(plan.recipe, fit.architecture(session.model_folder), session)
    held = {stage.name: room.need(stage) for stage in plan.stages}
    gc.collect()
    found: dict[str, dict[str, float]] = {}
    for took in rehearse(ahead):
        need, process = held[took.name], took.memory["process_bytes"]
        found[took.name] = {"rule": need.total(), "whole": room.beside(need), "process": process}
    for name, most in allocated(ahead).items():
        line = found[name]
        line["tensors"] = most
        line["ratio"] = round(line["rule"] / most, 3)
        line["whole_ratio"] = round(line["whole"] / line["process"], 3)
    return found


def planned(folder: Path, kind: str, shape: dict, names: list[str], changes: list[str]) -> Plan:
    write_model(folder / "model", kind, SIZE | shape)
    write_pairs(folder / "pairs.jsonl")
    file = folder / "recipe.toml"
    file.write_text(RECIPE.format(model=folder / "model", data=folder / "pairs.jsonl"))
    words = [f"stages={json.dumps([n for n in names if n != 'evaluation'])}"]
    words += ["dataset.max_prompt_tokens=192", "dataset.max_answer_tokens=96"]
    words += [f"{name}.{key}={value}" for name in names for key, value in LAYOUT[name].items()]
    words += [] if "evaluation" in names else ["evaluation=false"]
    words += [word for word in changes if word.split(".")[0] in (*names, "model", "lora=false")]
    (folder / "runs").mkdir()
    return plan_run(load_recipe(file, set=words), folder / "runs")


def allocated(ahead: Ahead) -> dict[str, int]:
    """By stage, the most bytes of tensors in its rehearsal."""
    ends = {}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        for took in rehearse(ahead):
            ends[took.name] = time.time_ns()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now, most, left = 0, dict.fromkeys(ends, 0), list(ends)
    for event in sorted(events, key=lambda event: event.start_ns()):
        while left and event.start_ns() > ends[left[0]]:
            left.pop(0)
        now += event.nbytes()
        if left:
            most[left[0]] = max(most[left[0]], now)
    return most


def write_model(folder: Path, kind: str, shape: dict) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape)
    # No setting reads it in this type: else the file's pages would count, which can be let go of.
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)


def write_pairs(file: Path) -> None:
    """Rows of all lengths, so that a batch is padded."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choices(WORDS, k=words))

    with file.open("w") as out:
        for row in range(120):
            words = [max(24, 150 - row), max(12, 60 - row // 4), max(12, 60 - row // 2)]
            named = dict(zip(("prompt", "chosen", "rejected"), map(text, words), strict=True))
            out.write(json.dumps(named) + "\n")


if __name__ == "__main__":
    main()
