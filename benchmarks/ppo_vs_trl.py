"""PPO here against TRL 1.12's own: seconds and bytes of an update; with --learning, scores.

Three sides, in turn, each in a fresh process: `ours` (stages/ppo.py as it stands: policy,
reference, value and reward are adapters on one base), `trl` (scripts/ppo.py, in the layout of TRL's
example: its value model trains in full) and `trl_frozen_value` (that model frozen). Fair in:

- one model and dtype, the same prompts and chat template, left-padded with the same pad token, EOS
  ends an answer, the same LoRA, and every setting of the [ppo] table below on every side; among
  them no gradient checkpointing, which TRL's loop never turns on;
- one reward model: a classifier with a seeded random head over the untouched base. Ours reads it
  through an adapter that changes nothing, and so the policy and the reference: with trained
  adapters the work is the same. TRL's reference is its bare base, which costs it less;
- seconds are those of the updates after the first one, which warms up; bytes are those of all live
  parameters, buffers and optimizer states; peak memory is the process's, imports included.

--learning, on the smoke recipe and its trained reward model: the mean score of the last five
updates after the same episodes, over seeds. The batch is one micro-batch, where TRL's count of
optimizer steps is right. TRL's sides run at the recipe's learning rate and at 0.3 of it, of which
the better is compared, for it has one rate for the policy's LoRA and the whole value model. No
worse means: at most a tenth of the reward's deviation below the best of TRL's.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import Measured, child, module, spread, trl_words
from rlhf_recipes.recipe.load import load_recipe

SIDES = ("ours", "trl", "trl_frozen_value")
KEYS = ("scores", "kl")

RECIPE = """\
stages = ["sft", "reward", "ppo"]

[model]
name = "{model}"
dtype = "{dtype}"

[lora]
r = 16

[dataset]
path = "{rows}"
validation_fraction = 0.0
test_fraction = 0.0
judge_fraction = 0.0

[ppo]
total_episodes = {episodes}
response_length = {length}
per_device_train_batch_size = 8
gradient_accumulation_steps = 2
gradient_checkpointing = false
num_sample_generations = 0
"""

# TRL's loop has neither: every side does all updates and evaluates nothing between them.
ALIKE = """\
ppo.eval_strategy="no"
ppo.keep="last"
ppo.save_strategy="no"
ppo.guard.max_kl=1e9
ppo.guard.max_score_drop=1e9
ppo.guard.min_entropy=0.0
ppo.guard.min_length=0.0""".splitlines()

QUESTIONS = """\
What should I do first?
How would you explain this to a child of seven?
Which of these two plans is better, and why?
Can you write a short note about it to my colleagues?
What are three things that could still go wrong?
Is there a cheaper way to get the same result?
Who else ought to know about this before Friday?
Please summarise all of this in one plain sentence.""".splitlines()

CONTEXT = """\
My neighbour keeps eleven hens behind the old railway station and sells their eggs on Sundays. \
The kettle in our office takes nine minutes to boil, because somebody filled it with hard water. \
We have to move forty boxes of books from the third floor before the painters arrive. \
Last winter the river came up to the second step and the cellar stayed wet until May. \
A friend of mine learned to play the violin at sixty and now teaches it twice a week. \
The train to the coast leaves at six, stops everywhere, and is full of people with bicycles.\
""".split()


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return WORKERS[sys.argv[2]](*sys.argv[3:])
    parser = common.parser(__doc__, pairs=3)
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 4], help="of PPO [1 4]")
    parser.add_argument("--updates", type=int, default=2, help="timed, after one that warms up [2]")
    parser.add_argument("--learning", action="store_true", help="compare scores, not seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        if args.learning:
            common.report("ppo_learning", args, learning(args, Path(work)))
        else:
            common.report("ppo_vs_trl", args, speed(args, Path(work)))


# ---- seconds and bytes --------------------------------------------------------------------------


def speed(args: Any, work: Path) -> Measured:
    if args.quick:
        args.pairs, args.epochs, args.updates = 1, [1], 1
    model = common.SMOKE_MODEL if args.quick else common.find_model(args.model)
    rows = [{"prompt": text, "chosen": "Yes.", "rejected": "No."} for text in prompts()]
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = work / "recipe.toml"
    text = RECIPE.format(
        model=model,
        dtype="float32" if args.quick else "bfloat16",
        rows=work / "rows.jsonl",
        episodes=16 * (1 + args.updates),
        length=8 if args.quick else 32,
    )
    recipe.write_text(text)
    child(module("benchmarks.ppo_vs_trl", "--worker", "untrained", recipe, work))
    runs, compared, targets = {}, {}, {}
    for epochs in args.epochs:
        name = f"{epochs} epochs"
        words = [f"ppo.num_ppo_epochs={epochs}"]
        sides = {side: partial(run_side, side, recipe, work, words) for side in SIDES}
        runs[name] = common.in_turn(sides, args.pairs)
        compared[name] = {other: compare(runs[name], other) for other in SIDES[1:]}
    settings = text.replace(str(model), model.name).replace(f"{work}/", "")
    if "4 epochs" in compared:
        four = compared["4 epochs"]["trl"]
        targets["episodes_per_second"] = common.at_least(1.5, four["episodes_per_second"])
        targets["weights_and_optimizer"] = common.at_most(0.32, four["weights_and_optimizer"])
        targets["peak_memory"] = common.at_most(0.6, four["peak_memory"])
    return {"ratios": compared, "targets": targets, "settings": settings, "runs": runs}


def run_side(
    side: str,
    recipe: Path,
    work: Path,
    words: list[str],
    learning_rate: float | None = None,
    **more: Any,
) -> Measured:
    """One PPO stage in a process of its own; what its meter found."""
    found, words = work / "found.json", [*ALIKE, *words]
    found.unlink(missing_ok=True)
    shutil.rmtree(work / "side", ignore_errors=True)
    if side == "ours":
        child(module("benchmarks.ppo_vs_trl", "--worker", "ours", recipe, work, found, *words))
    else:
        given = trl_words(
            load_recipe(recipe, set=words),
            "ppo",
            data=work / "prompts.jsonl",
            sft_model_path=work / "policy",
            reward_model_path=work / "classifier",
            frozen_value=side == "trl_frozen_value",
            stop_token="eos",
            output_dir=work / "side",
            measure=found,
            **more,
        )
        if learning_rate is not None:
            given.append(f"--learning_rate={learning_rate}")
        child(module("benchmarks.scripts.ppo", *given))
    out = json.loads(found.read_text())
    if out["seconds"]:
        out["episodes_per_second"] = 16 / statistics.median(out["seconds"])
    return out


def compare(runs: dict[str, list[Measured]], other: str) -> Measured:
    def ratio(key: str) -> dict[str, float]:
        return common.ratios([r[key] for r in runs["ours"]], [r[key] for r in runs[other]])

    for run in (*runs["ours"], *runs[other]):
        run["held_bytes"] = run["weights_bytes"] + run["optimizer_bytes"]
    return {
        "episodes_per_second": ratio("episodes_per_second"),
        "weights_and_optimizer": ratio("held_bytes"),
        "peak_memory": ratio("peak_bytes"),
    }


def prompts() -> list[str]:
    """64 prompts of 5 to 60 words, no two alike: some context, then a question."""
    made = []
    for i in range(64):
        question = QUESTIONS[i % len(QUESTIONS)].split()
        start, count = 17 * i % len(CONTEXT), max(0, 5 + 55 * i // 63 - len(question))
        made.append(" ".join([*(CONTEXT * 2)[start : start + count], *question]))
    return made


# ---- learning -----------------------------------------------------------------------------------


def learning(args: Any, work: Path) -> Measured:
    smoke, runs_folder = common.ROOT / "recipes/smoke.toml", work / "runs"
    seeds = range(1, 2 if args.quick else args.pairs + 1)
    few = ["sft.max_steps=2", "reward.max_steps=2", "ppo.total_episodes=128"] if args.quick else []
    words = [f"--set={word}" for word in few]
    run = ["run", "smoke", "--until", "reward", "--runs", runs_folder, "--name", "smoke"]
    child(module("rlhf_recipes", *run, *words))
    child(module("benchmarks.ppo_vs_trl", "--worker", "trained", runs_folder / "smoke", work))
    layout = ["ppo.per_device_train_batch_size=64", "ppo.gradient_accumulation_steps=1"]
    rate = load_recipe(smoke).table("ppo").given["learning_rate"]
    sides = {"ours": ("ours", None)} | {
        f"{side} at {factor * rate:g}": (side, factor * rate)
        for side in SIDES[1:]
        for factor in ((1.0,) if args.quick else (1.0, 0.3))
    }
    found: dict[str, list[Measured]] = {name: [] for name in sides}
    for seed in seeds:
        settings = [*few, *layout, f"seed={seed}"]
        once = {
            name: partial(run_side, side, smoke, work, settings, lr)
            for name, (side, lr) in sides.items()
        }
        for name, results in common.in_turn(once, 1).items():
            last = results[0]["updates"][-5:]
            mean = {key: statistics.mean(u[f"objective/{key}"] for u in last) for key in KEYS}
            found[name].append({"seed": seed, **mean, "updates": results[0]["updates"]})
    table = {
        name: {key: spread([run[key] for run in runs]) for key in KEYS}
        for name, runs in found.items()
    }
    best = max(row["scores"]["median"] for name, row in table.items() if name != "ours")
    targets = {"score": common.at_least(round(best - 0.1, 4), table["ours"]["scores"])}
    return {"last_five_updates": table, "targets": targets, "runs": found}


# ---- workers: each in a process of its own, for they load torch ---------------------------------


def prepare_untrained(recipe_file: str, work: str, models: bool = True) -> None:
    """Outputs of an SFT and a reward stage whose adapters change nothing, and TRL's models."""
    import torch

    from rlhf_recipes import stats
    from rlhf_recipes.models.base import UNIT
    from rlhf_recipes.models.load import new_head
    from rlhf_recipes.stages.session import Session

    session = Session(load_recipe(recipe_file), {})
    for name in ("sft", "reward"):
        role, folder = session.base.open(name, None, seed=0, trainable=True), Path(work, name)
        folder.mkdir()
        if name == "reward":
            torch.manual_seed(0)
            role.add_head(new_head(role.lm))
            (folder / UNIT).write_text(json.dumps({"format": 1, "mean": 0.0, "std": 1.0}))
            (folder / stats.FILE).write_text(json.dumps({"format": 1, "metrics": {}}))
        session.base.save(role, folder)
        session.base.close(role)
    if models:
        _write_for_trl(session, Path(work))


def prepare_trained(run_folder: str, work: str) -> None:
    """The outputs of a run's SFT and reward stages, and the same as TRL's models."""
    from rlhf_recipes.pipeline.export import finished_stage
    from rlhf_recipes.stages.session import Session

    for name in ("sft", "reward"):
        shutil.copytree(finished_stage(Path(run_folder), name)[2], Path(work, name))
    unit = json.loads(Path(work, "reward", "unit.json").read_text())
    del unit["floor"]  # TRL has none: both are to be rewarded alike
    Path(work, "reward", "unit.json").write_text(json.dumps(unit))
    _write_for_trl(Session(load_recipe(Path(run_folder, "resolved.toml")), {}), Path(work))


def _write_for_trl(session: Any, work: Path) -> None:
    from rlhf_recipes.data.rows import unique_prompts
    from rlhf_recipes.pipeline.export import write_model, write_reward_model

    write_model(session, work / "sft", work / "policy")
    write_reward_model(session, work / "reward", work / "classifier", form="merged")
    rows = unique_prompts(session.data(session.recipe.dataset).train)
    text = "".join(json.dumps({"prompt": example.prompt}) + "\n" for example in rows)
    (work / "prompts.jsonl").write_text(text)


def run_ours(recipe_file: str, work: str, found: str, *words: str) -> None:
    """The PPO stage itself, with a meter as its progress display."""
    from rlhf_recipes.stages import contract
    from rlhf_recipes.stages.session import Session

    run = contract.module_of("ppo").run
    from benchmarks.meter import Meter

    class Progress:
        def __init__(self) -> None:
            self.meter = Meter(Path(found))

        def update(self, done: int, total: int, **numbers: float) -> None:
            self.meter.update_ended(done == total, **numbers)

        def sample(self, prompt: str, answer: str, **numbers: float) -> None: ...

        def resume(self, done: int) -> None: ...

        def note(self, text: str) -> None: ...

    recipe, folder = load_recipe(recipe_file, set=words), Path(work, "side")
    for part in ("work", "output"):
        (folder / part).mkdir(parents=True)
    inputs = {"policy": Path(work, "sft"), "reward_model": Path(work, "reward")}
    run(
        contract.StageContext("ppo", "ppo", recipe, folder, inputs, Progress(), Session(recipe, {}))
    )


WORKERS = {"untrained": prepare_untrained, "trained": prepare_trained, "ours": run_ours}

if __name__ == "__main__":
    main()
