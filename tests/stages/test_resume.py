"""A stage that was interrupted goes on from its checkpoint and ends as one in one piece."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes import signals
from rlhf_recipes.errors import Interrupted, MachineError, StageError
from rlhf_recipes.models.base import Base
from rlhf_recipes.pipeline import runner
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.screen import StageProgress
from rlhf_recipes.stages import checkpoints
from rlhf_recipes.stages.sft import Trainer
from rlhf_recipes.store import layout
from tests.helpers.tiny import RECIPE

pytestmark = pytest.mark.train

KINDS = ("sft", "reward", "ppo", "dpo", "kto", "rloo", "grpo")
STOCK = ("sft", "reward", "dpo", "kto")
# 68 rows are five steps an epoch, and the checkpoints of even steps fall between lines of numbers.
CHAIN = {
    "stages": list(KINDS),
    "evaluation": False,
    "lora.lora_dropout": 0.2,
    **{f"{kind}.max_steps": 9 for kind in STOCK},
    **{f"{kind}.per_device_train_batch_size": 16 for kind in STOCK},
    **{f"{kind}.logging_steps": 3 for kind in STOCK},
    **{f"{kind}.save_steps": 2 for kind in KINDS},
    "dpo.learning_rate": 1e-2,
    "kto.learning_rate": 1e-2,
    **{f"{kind}.max_completion_length": 6 for kind in ("rloo", "grpo")},
    **{f"{kind}.num_iterations": 2 for kind in ("rloo", "grpo")},
    **{f"{kind}.max_steps": 10 for kind in ("rloo", "grpo")},
    "rloo.policy": "sft",
    "grpo.eval_steps": 2,
    "ppo.total_episodes": 80,
    "ppo.keep": "best",
    "ppo.eval_steps": 1,
    "ppo.lr_scheduler_type": "cosine",
}
SFT = {key: value for key, value in CHAIN.items() if key.split(".")[0] not in KINDS[3:]} | {
    "stages": ["sft"]
}
WALL_CLOCK = ("seconds", "eps")
Go = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture(autouse=True)
def quick(stages_alone: None) -> None: ...


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Go:
    """What a recipe with these settings ends with where nothing interrupts it."""
    text, found = RECIPE.format(model=tiny_model, data=tiny_pairs), {}

    def go(sets: dict[str, Any]) -> dict[str, Any]:
        if repr(sets) not in found:
            found[repr(sets)] = train(text, tmp_path_factory.mktemp("whole"), sets)
        return found[repr(sets)]

    return go


@pytest.fixture
def go(tiny_model: Path, tiny_pairs: Path, tmp_path: Path) -> Go:
    """Takes the same recipe as far as it comes, in `tmp_path`."""
    text = RECIPE.format(model=tiny_model, data=tiny_pairs)
    return lambda sets: train(text, tmp_path, sets)


def train(recipe: str, folder: Path, sets: dict[str, Any]) -> dict[str, Any]:
    """Digests of all outputs; each stage's metrics.jsonl, its record's metrics and summary."""
    (folder / "tiny.toml").write_text(recipe)
    told = [f"{k}={json.dumps(v, separators=(', ', ' = '))}" for k, v in sets.items()]
    runner.run(load_recipe(folder / "tiny.toml", set=told), runs=folder)
    found: dict[str, Any] = {}
    for stage in sorted((folder / ".stages").glob("[!.]*-*")):
        for file in sorted((stage / "output").rglob("*.*")):
            name = str(file.relative_to(stage.parent))
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
        lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
        record = json.loads((stage / "stage.json").read_text())
        lines.append({**record["metrics"], "summary": record["summary"]})
        found[stage.name] = [
            {key: value for key, value in line.items() if key not in WALL_CLOCK} for line in lines
        ]
    return found


@contextlib.contextmanager
def cut(kind: str, step: int) -> Iterator[None]:
    """A stage of this kind is interrupted in its `step`th step."""
    update = StageProgress.update

    def until(self: StageProgress, done: int, total: int, **numbers: float) -> None:
        if self._folder.name.startswith(kind) and done == step:
            raise KeyboardInterrupt
        update(self, done, total, **numbers)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(StageProgress, "update", until)
        yield


@contextlib.contextmanager
def asked_to_stop(kind: str, step: int) -> Iterator[None]:
    """A stage of this kind is asked to stop in its `step`th step, after which it takes no other."""
    asked, update = [], StageProgress.update

    def until(self: StageProgress, done: int, total: int, **numbers: float) -> None:
        update(self, done, total, **numbers)
        if self._folder.name.startswith(kind) and done >= step:
            asked.append(done)

    @contextlib.contextmanager
    def deferred() -> Iterator[None]:
        yield
        if asked:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(StageProgress, "update", until)
        patch.setattr(signals, "requested", lambda: bool(asked))
        patch.setattr(signals, "deferred", deferred)
        yield
    assert set(asked) == {step}


def left(folder: Path, kind: str) -> list[Path]:
    (work,) = (folder / ".stages").glob(f"{kind}-*/work")
    return sorted(work.iterdir())


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_every_kind_of_stage_ends_as_in_one_piece(whole: Go, go: Go, tmp_path: Path) -> None:
    """Some of the checkpoints are damaged in between, and all of DPO's."""
    for interrupted, kind, step, saved, damaged in [
        (cut, "sft", 3, [2], []),
        (cut, "sft", 8, [4, 6], [6]),
        (cut, "reward", 6, [2, 4], []),
        (asked_to_stop, "ppo", 3, [2, 3], []),
        (cut, "ppo", 5, [3, 4], [4]),
        (cut, "dpo", 5, [2, 4], [2, 4]),
        (asked_to_stop, "rloo", 3, [2, 3], []),
        (cut, "grpo", 5, [2, 4], [4]),
    ]:
        with interrupted(kind, step):
            go(CHAIN)
        assert [layout.step_of(folder) for folder in left(tmp_path, kind)] == saved
        for folder in left(tmp_path, kind):
            if layout.step_of(folder) in damaged:
                file = folder / "optimizer.pt"
                file.write_bytes(file.read_bytes()[:-100])
    found = go(CHAIN)
    assert found == whole(CHAIN)
    assert sum(name.endswith(".safetensors") for name in found) == 10
    log = next(tmp_path.glob("*/log.txt")).read_text()
    assert log.count("is not used: optimizer.pt is not what was written") == 5
    steps = re.findall("goes on from its checkpoint after step (\\d)", log)
    assert steps == ["2", "4", "4", "3", "3", "3", "2"]


@pytest.mark.parametrize(
    ("steps", "sets"),
    [
        ([4], {"lora": False}),
        ([4], {"model.quantization": "4bit"}),
        # What is logged, evaluated and drawn between two epochs.
        ([6], {"sft.logging_strategy": "epoch", "sft.eval_strategy": "epoch", "sft.save_steps": 1}),
        ([7], {"sft.eval_strategy": "epoch", "sft.save_strategy": "epoch"}),
        # Orders of rows that are drawn as an epoch begins, or by the epoch's number.
        ([4, 8], {"sft.train_sampling_strategy": "group_by_length", "sft.eval_on_start": True}),
        ([6, 8], {"sft.train_sampling_strategy": "group_by_length", "sft.save_steps": 1}),
        ([8], {"sft.train_sampling_strategy": "batch_rebalance"}),
    ],
)
def test_so_it_does_in_other_settings(
    whole: Go, go: Go, steps: list[int], sets: dict[str, Any]
) -> None:
    sets = SFT | sets
    if "lora" in sets:
        del sets["lora.lora_dropout"]
    for step in steps:
        with cut("sft", step):
            go(sets)
    assert go(sets) == whole(sets)


def test_so_does_ppo_on_rules_with_its_counts(
    whole: Go, go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers over a bound are counted on from where the checkpoint was written."""
    monkeypatch.setattr("rlhf_recipes.stages.rewards.rule.LARGEST", 12)
    ppo = {key: value for key, value in CHAIN.items() if key.startswith("ppo")}
    rules = [{"rule": "words", "at_most": 2}, {"rule": "json", "weight": 0.5}]
    sets = SFT | ppo | {"stages": ["sft", "ppo"], "ppo.rewards": rules}
    for step in (2, 4):
        with cut("ppo", step):
            go(sets)
    found = go(sets)
    assert found == whole(sets)
    [ppo_stage] = [
        lines for name, lines in found.items() if name.startswith("ppo") and "/" not in name
    ]
    assert ppo_stage[-1]["ppo.over.json"] > 0


def test_a_request_to_stop_is_no_end_of_the_epoch(whole: Go, go: Go, tmp_path: Path) -> None:
    sets = SFT | {"sft.logging_strategy": "epoch", "sft.save_steps": 100}
    with asked_to_stop("sft", 3):
        go(sets)
    assert [folder.name for folder in left(tmp_path, "sft")] == ["checkpoint-000003"]
    assert go(sets) == whole(sets)


def test_after_the_last_step_no_other_is_taken(
    whole: Go, go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Base, "save", killed)
        go(SFT)
    wanted = whole(SFT)
    monkeypatch.setattr(Trainer, "training_step", killed)
    assert go(SFT) == wanted


def test_a_full_disk_stops_the_stage_and_loses_nothing(
    whole: Go, go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = checkpoints.save_file, []

    def full(tensors: Any, file: Path) -> None:
        calls.append(file)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, file)

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(MachineError, match="stage sft: No space left on device"):
        go(SFT)
    assert [folder.name for folder in left(tmp_path, "sft")] == ["checkpoint-000002"]
    with cut("sft", 6):
        go(SFT | {"sft.save_steps": 3})  # how often they are written is heeded at once
    assert left(tmp_path, "sft")[-1].name == "checkpoint-000003"
    assert go(SFT) == whole(SFT)


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_what_is_no_number_ends_the_stage_and_no_checkpoint_holds_it(
    whole: Go, go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Weights after the fourth step, at whose end a checkpoint is due; then a loss."""
    chain = {**CHAIN, "stages": ["sft", "reward"]}
    chain = {key: value for key, value in chain.items() if key.split(".")[0] not in KINDS[2:]}

    def spoil(self: Any, *rest: Any) -> Any:
        loss = stock(self, *rest)
        if self.state.global_step == 3:
            for parameter in self.role.trainable():
                parameter.grad.fill_(float("nan"))
        return loss

    module = importlib.import_module(f"rlhf_recipes.stages.{kind}")
    stock = module.Trainer.training_step
    for save_steps, said in [(2, "weights"), (3, "losses")]:
        with monkeypatch.context() as patch, pytest.raises(StageError) as caught:
            patch.setattr(module.Trainer, "training_step", spoil)
            go(chain | {f"{kind}.save_steps": save_steps})
        assert caught.value.message == f"stage {kind}: {said} that are no numbers"
        assert "lower learning_rate" in caught.value.hint
        assert layout.step_of(left(tmp_path, kind)[-1]) == save_steps
    assert go(chain) == whole(chain)


def test_out_of_memory_a_smaller_micro_batch_goes_on_with_the_same_rows(
    whole: Go, go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, set[tuple[int, ...]]] = defaultdict(set)
    stock = Trainer.training_step

    def spy(self: Trainer, model: Any, inputs: dict[str, Any], *rest: Any) -> Any:
        rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].sum(1), strict=True)
        seen[self.state.global_step] |= {tuple(ids[:length]) for ids, length in rows}
        return stock(self, model, inputs, *rest)

    monkeypatch.setattr(Trainer, "training_step", spy)
    sets = SFT | {"lora.lora_dropout": 0.0}
    wanted, rows = whole(sets), dict(seen)
    seen.clear()
    with cut("sft", 5):
        go(sets)
    halved = {"sft.per_device_train_batch_size": 8, "sft.gradient_accumulation_steps": 2}
    found = go(sets | halved)
    assert seen == rows and len(rows) == 9
    (folder,) = (name for name in wanted if "/" not in name)
    for name in ("loss", "validation_loss"):
        mine, other = ([line[name] for line in r[folder] if name in line] for r in (found, wanted))
        assert mine == pytest.approx(other, abs=1e-5) and mine


def test_a_reward_model_of_labels_goes_on_with_its_threshold(
    go: Go, whole: Go, tiny_pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its loss has a bias that is in no output."""
    rows = [json.loads(line) for line in tiny_pairs.read_text().splitlines()]
    lines = [
        {
            "prompt": r["prompt"],
            "label": n % 3 > 0,
            "completion": r["chosen" if n % 3 else "rejected"],
        }
        for n, r in enumerate(rows)
    ]
    file = tmp_path_factory.mktemp("labels") / "thumbs.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = {key: value for key, value in CHAIN.items() if key.startswith(("reward", "lora"))}
    sets = {"stages": ["reward"], "evaluation": False, "dataset.path": str(file), **own}
    with cut("reward", 5):
        go(sets)
    assert go(sets) == whole(sets)
