"""Checkpoints: what PPO goes on from, what becomes of damaged ones, and how they are written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from rlhf_recipes.recipe.kinds import Limits
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages import checkpoints
from rlhf_recipes.stages.ppo.trainer import PPOTrainer
from rlhf_recipes.store import layout
from tests.helpers.chains import Chain
from tests.helpers.killed import Killed, build
from tests.helpers.tiny import RECIPE

pytestmark = pytest.mark.train


def weights(trainer: PPOTrainer) -> list[torch.Tensor]:
    return [*trainer.policy_model.trainable(), *trainer.value_model.trainable()]


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> PPOTrainer:
    """A training that nothing cut short."""
    trainer = build(tiny_model, tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


@pytest.mark.parametrize("killed_after", [2, 3])
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    tiny_model: Path, tmp_path: Path, whole: PPOTrainer, killed_after: int
) -> None:
    cut = build(tiny_model, tmp_path / "cut", killed_after=killed_after)
    with pytest.raises(Killed):
        cut.train()
    again = build(tiny_model, tmp_path / "cut")
    again.train()
    first = 2 * (killed_after // 2)
    assert again.seen == whole.seen[first:]
    assert again.best.update == whole.best.update
    for one, other in zip(weights(again), weights(whole), strict=True):
        assert torch.equal(one, other)
    states = [list(t.optimizer.state_dict()["state"].values()) for t in (again, whole)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_out_of_memory_a_smaller_micro_batch_goes_on(
    tiny_model: Path, tmp_path: Path, whole: PPOTrainer
) -> None:
    with pytest.raises(Killed):
        build(tiny_model, tmp_path / "cut", killed_after=2).train()
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    again = build(tiny_model, tmp_path / "cut", **smaller)
    again.train()
    assert len(again.seen) == 3
    for mine, other in zip(again.seen, whole.seen[2:], strict=True):
        assert mine == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize(
    ("config", "kept"),
    [
        ({}, [2, 4]),
        ({"save_steps": 1, "save_total_limit": 3}, [3, 4, 5]),
        ({"save_steps": 0.4}, [2, 4]),
        ({"save_total_limit": None, "save_steps": 1}, [1, 2, 3, 4, 5]),
        ({"save_strategy": "no"}, []),
    ],
)
def test_what_is_saved_and_kept(tiny_model: Path, tmp_path: Path, config, kept) -> None:
    build(tiny_model, tmp_path, **config).train()
    assert sorted(f.name for f in tmp_path.glob("checkpoint*")) == [
        f"checkpoint-{update:06d}" for update in kept
    ]


def test_a_run_that_a_guard_stopped_does_not_go_on(tiny_model: Path, tmp_path: Path) -> None:
    trainer = build(tiny_model, tmp_path, save_steps=1)
    trainer.guard.limits = Limits(max_kl=1e-9)
    trainer.train()
    assert trainer.stopped
    again = build(tiny_model, tmp_path)
    again.train()
    assert again.stopped == trainer.stopped and again.seen == []


def test_a_checkpoint_of_a_run_from_other_weights_is_not_gone_on_from(
    tiny_model: Path, tmp_path: Path
) -> None:
    build(tiny_model, tmp_path).train()
    other = build(tiny_model, tmp_path, killed_after=2)
    other.value_model.score.weight.data[0, 0] += 1e-3
    with pytest.raises(Killed):
        other.train()
    assert len(other.seen) == 3
    assert [f.name for f in tmp_path.glob("checkpoint*")] == ["checkpoint-000002"]
    assert other.progress.notes == [
        f"checkpoint-00000{step} is not used: it is another run's;"
        f" it was set aside as damaged-00000{step}"
        for step in (4, 2)
    ]


# ---- damage -------------------------------------------------------------------------------------

FILES = ["checkpoint.json", "optimizer.pt", "rng_state.pth", "scheduler.pt"]
FILES += ["trainer_state.json", "weights.safetensors"]


@pytest.fixture(scope="module", params=["ppo", "sft"])
def made(request, tiny_model: Path, tiny_pairs: Path, tmp_path_factory) -> list[Path]:
    """The work folders, each with two checkpoints, of a stage and of one of another seed."""
    folders = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp(f"{request.param}-{seed}")
        if request.param == "ppo":
            build(tiny_model, folder, seed=seed, learning_rate=seed * 1e-3).train()
        else:
            file = folder / "tiny.toml"
            file.write_text(RECIPE.format(model=tiny_model, data=tiny_pairs))
            sets = [f"seed={seed}", f"sft.learning_rate={seed}e-3", "sft.save_steps=2"]
            Chain(load_recipe(file, set=sets), folder).run("sft", {})
            folder = folder / "sft" / "work"
        folders.append(folder)
    return folders


def take(work: Path) -> tuple[str, list[str]]:
    """Which checkpoint is gone on from, and what is said of the others."""
    notes: list[str] = []
    record = json.loads((work / "checkpoint-000002" / "checkpoint.json").read_text())
    return checkpoints.newest(work, record["start"], notes.append).name, notes


DAMAGES = {
    "missing": lambda file, other: file.unlink(),
    "empty": lambda file, other: file.write_bytes(b""),
    "half": lambda file, other: os.truncate(file, file.stat().st_size // 2),
    "a bit": lambda file, other: flip(file, file.stat().st_size // 3, 4),
    "another run's": lambda file, other: shutil.copy(other / file.name, file),
}


def flip(file: Path, place: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    made: list[Path], tmp_path: Path, name: str, damage: str
) -> None:
    work = tmp_path / "work"
    shutil.copytree(made[0], work)
    last = work / "checkpoint-000004"
    assert sorted(file.name for file in last.iterdir()) == FILES
    assert take(work) == ("checkpoint-000004", [])
    DAMAGES[damage](last / name, made[1] / last.name)
    found, (note,) = take(work)
    assert found == "checkpoint-000002"
    assert note.startswith("checkpoint-000004 is not used: ") and note.endswith("damaged-000004")
    assert name in note or name == "checkpoint.json"
    left = {"missing": set(FILES) - {name}}.get(damage, set(FILES))
    assert {file.name for file in (work / "damaged-000004").iterdir()} == left
    assert not last.exists()


def test_any_bit_of_a_record_matters(made: list[Path], tmp_path: Path) -> None:
    work = tmp_path / "work"
    shutil.copytree(made[0], work)
    last = work / "checkpoint-000004"
    for place in range(0, (last / "checkpoint.json").stat().st_size, 3):
        flip(last / "checkpoint.json", place, place % 8)
        assert take(work)[0] == "checkpoint-000002", place
        (work / "damaged-000004").rename(last)
        flip(last / "checkpoint.json", place, place % 8)
    assert take(work) == ("checkpoint-000004", [])


def test_a_checkpoint_under_another_step_or_with_a_file_too_many(
    made: list[Path], tmp_path: Path
) -> None:
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-000004").rename(tmp_path / "checkpoint-000040")
    assert take(tmp_path)[0] == "checkpoint-000002"
    (tmp_path / "damaged-000040").rename(tmp_path / "checkpoint-000004")
    (tmp_path / "checkpoint-000004" / "scaler.pt").write_text("")
    assert take(tmp_path)[0] == "checkpoint-000002"
    (tmp_path / "checkpoint-000004").mkdir()
    assert take(tmp_path)[0] == "checkpoint-000002"
    assert (tmp_path / "damaged-000004-again").exists()


# ---- writing ------------------------------------------------------------------------------------


def write(work: Path, *steps: int, keep: int | None = 2) -> None:
    for step in steps:
        with checkpoints.written(work, step, "start", keep) as folder:
            (folder / "weights").write_text(str(step))


def there(work: Path) -> list[str]:
    return sorted(file.name for file in work.iterdir())


def test_the_last_are_kept_by_number_not_by_name(tmp_path: Path) -> None:
    write(tmp_path, 9, 999_999, 1_000_000)
    assert there(tmp_path) == ["checkpoint-1000000", "checkpoint-999999"]
    found = checkpoints.newest(tmp_path, "start", print)
    assert layout.step_of(found) == 1_000_000


@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_write_that_fails_leaves_those_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    write(tmp_path, 1, 2)

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"write": (Path, "write_text"), "fsync": (os, "fsync"), "rename": (Path, "rename")}
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(*target[call], full)
        write(tmp_path, 3)
    assert there(tmp_path) == ["checkpoint-000001", "checkpoint-000002"]
    assert checkpoints.newest(tmp_path, "start", print).name == "checkpoint-000002"


def test_a_disk_that_is_full_without_a_word_is_noticed(tmp_path: Path) -> None:
    """torch does not look at whether the last bytes of its archive were written."""
    write(tmp_path, 1)
    with (
        pytest.raises(OSError, match="No space left"),
        checkpoints.written(tmp_path, 2, "start", 2) as aside,
    ):
        torch.save({"step": 2}, aside / "scheduler.pt")
        os.truncate(aside / "scheduler.pt", (aside / "scheduler.pt").stat().st_size - 9)
    assert there(tmp_path) == ["checkpoint-000001"]


def test_a_record_that_cannot_be_read_is_damage_as_any_other(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    (tmp_path / "checkpoint-000002" / "checkpoint.json").unlink()
    (tmp_path / "checkpoint-000002" / "checkpoint.json").mkdir()
    said: list[str] = []
    assert checkpoints.newest(tmp_path, "start", said.append).name == "checkpoint-000001"
    assert "checkpoint.json cannot be read (Is a directory)" in said[0]


def test_what_a_kill_left_of_a_write_is_in_nobodys_way(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "half").write_text("")
    assert checkpoints.newest(tmp_path, "start", print).name == "checkpoint-000001"
    write(tmp_path, 2)
    assert there(tmp_path / "checkpoint-000002") == ["checkpoint.json", "weights"]
    assert there(tmp_path) == ["checkpoint-000001", "checkpoint-000002"]


def test_a_kill_while_an_old_one_is_deleted_leaves_none_by_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(folder: Path, **_) -> None:
        if folder.exists():
            (folder / "weights").unlink()
            raise KeyboardInterrupt

    write(tmp_path, 1, 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", half)
        write(tmp_path, 3)
    assert there(tmp_path) == ["checkpoint-000002", "checkpoint-000003", "partial"]
    write(tmp_path, 4)
    assert there(tmp_path) == ["checkpoint-000003", "checkpoint-000004"]


def test_all_is_on_disk_before_a_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, calls = tmp_path / "work", []
    work.mkdir()
    (tmp_path / "metrics.jsonl").write_text("{}")
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", lambda a, b: (calls.append(b.name), rename(a, b)))
    write(work, 1)
    assert calls[:2] == ["metrics.jsonl", "weights"]
    assert calls[2].startswith(".checkpoint.json")
    assert calls[3:] == ["partial", "checkpoint-000001", "work"]
