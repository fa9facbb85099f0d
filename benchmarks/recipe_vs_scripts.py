"""A whole chain by `rlhf-recipes run` against three TRL scripts in a row: wall time.

Two sides, in turn: `recipe` (the command, into an empty runs folder, its evaluation included) and
`scripts` (scripts/sft.py, reward.py, ppo.py, each a process that loads from disk and saves its
model there). Fair in: the scripts are handed the recipe's own settings of every stage (steps,
batches, rates, LoRA, dtype) and train on its data, and every run has an empty datasets cache. The
scripts evaluate nothing and split nothing off; the recipe always measures its stages on rows left
out. TRL takes fewer optimizer steps in PPO than the settings ask for (`num_mini_batches` adds
none), which saves it time here.

The chain is the smoke recipe's; with --real, a short one on SmolLM2-135M (200 rows, 10 steps of
SFT, 10 of the reward model, 2 PPO updates of 16 episodes), where the training outweighs the
loading.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Measured, child, module, trl_words
from rlhf_recipes.recipe.load import Recipe, load_recipe

SMOKE = common.ROOT / "recipes/smoke.toml"
QUICK = ["sft.max_steps=2", "reward.max_steps=2", "ppo.total_episodes=64", "evaluation.prompts=8"]
REAL = """\
title = "A short real chain"
stages = ["sft", "reward", "ppo"]

[model]
name = "{model}"
dtype = "bfloat16"

[dataset]
path = "{data}"
max_rows = 200

[sft]
max_steps = 10
per_device_train_batch_size = 8
gradient_checkpointing = false

[reward]
max_steps = 10
per_device_train_batch_size = 4
gradient_checkpointing = false

[ppo]
total_episodes = 32
response_length = 32
per_device_train_batch_size = 8
gradient_accumulation_steps = 2
num_ppo_epochs = 2
gradient_checkpointing = false

[evaluation]
prompts = 32
"""


def main() -> None:
    parser = common.parser(__doc__, pairs=3)
    parser.add_argument("--real", action="store_true", help="the chain on SmolLM2-135M")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct, for --real")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        recipe = SMOKE
        if args.real:
            model = common.SMOKE_MODEL if args.quick else common.find_model(args.model)
            recipe = Path(work, "real.toml")
            text = REAL.format(model=model, data=common.ROOT / "recipes/smoke/pairs.jsonl")
            recipe.write_text(text)
        found = compare(recipe, QUICK if args.quick else [], 1 if args.quick else args.pairs)
    common.report(f"recipe_vs_scripts{'_real' * args.real}", args, found)


def compare(recipe: Path, words: list[str], pairs: int) -> Measured:
    sides = {
        "recipe": partial(run_recipe, recipe, words),
        "scripts": partial(run_scripts, load_recipe(recipe, set=words)),
    }
    runs = common.in_turn(sides, pairs)
    ratio = common.ratios(*([run["seconds"] for run in runs[side]] for side in sides))
    return {"ratio": ratio, "targets": {"wall": common.at_most(0.75, ratio)}, "runs": runs}


def run_recipe(recipe: Path, words: list[str]) -> Measured:
    with tempfile.TemporaryDirectory() as work:
        command = module("rlhf_recipes", "run", recipe, "--runs", Path(work, "runs"))
        command += [f"--set={word}" for word in words]
        return {"seconds": child(command, HF_DATASETS_CACHE=str(Path(work, "cache")))}


def run_scripts(recipe: Recipe) -> Measured:
    """SFT, reward and PPO, each from the files that the one before it wrote."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        commands = script_commands(recipe, work)
        cache = str(work / "cache")
        parts = {
            name: child(module(f"benchmarks.scripts.{name}", *words), HF_DATASETS_CACHE=cache)
            for name, words in commands.items()
        }
    return {"seconds": sum(parts.values()), "parts": parts}


def script_commands(recipe: Recipe, work: Path) -> dict[str, list[str]]:
    sft, reward, pairs = work / "sft", work / "reward", recipe.dataset.file
    base: dict[str, Any] = {"model_name_or_path": recipe.model.folder}
    if recipe.model.folder != common.SMOKE_MODEL:
        base["pad_token"] = "<|endoftext|>"  # SmolLM2's own is its EOS, which breaks TRL's PPO
    own = recipe.table("sft").dataset
    return {
        "sft": trl_words(recipe, "sft", data=(own or recipe.dataset).file, output_dir=sft, **base),
        "reward": trl_words(
            recipe, "reward", data=pairs, model_name_or_path=sft, output_dir=reward
        ),
        "ppo": trl_words(
            recipe,
            "ppo",
            data=pairs,
            sft_model_path=sft,
            reward_model_path=reward,
            stop_token="eos",
            output_dir=work / "ppo",
        ),
    }


if __name__ == "__main__":
    main()
