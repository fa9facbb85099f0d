"""SIGINT and SIGTERM at five points in each stage: the same command ends with the same bytes.

`python -m tests.end_to_end.test_signals SIGNAL KIND POINT run tiny.toml` is the real command, which
sends itself the signal there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from rlhf_recipes.errors import Interrupted
from rlhf_recipes.pipeline.runner import run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.screen import StageProgress
from rlhf_recipes.store import layout
from tests.helpers.whole import command, digests

pytestmark = pytest.mark.train

KINDS = ["sft", "reward", "ppo", "dpo", "evaluation"]
POINTS = ["loading", "first", "middle", "last", "record"]
DPO = "\n[dpo]\nmax_steps = 4\nlearning_rate = 1e-3\ngradient_checkpointing = false\n"


def send_at(kind: str, point: str, send: Callable[[], Any], patch: Callable) -> None:
    """Have `send` called once, at this point of the stage of this kind."""
    due = [send]

    def at(reached: str, folder: Path, done: int = 0, total: int = 0) -> None:
        named = folder.name.removeprefix(".").partition("-")[0]
        steps = {"first": 1, "middle": (total + 1) // 2, "last": total}
        there = reached == point or (reached == "step" and done >= steps.get(point, total + 1))
        if named == kind and there and due:
            due.pop()()

    enter, update, record = StageProgress.__enter__, StageProgress.update, layout.write_record

    def entered(self: StageProgress) -> StageProgress:
        at("loading", self._folder)
        return enter(self)

    def updated(self: StageProgress, done: int, total: int, **numbers: float) -> None:
        update(self, done, total, **numbers)
        at("step", self._folder, done, total)

    def recorded(folder: Path, made: dict[str, Any]) -> None:
        at("record", folder)
        record(folder, made)

    patch(StageProgress, "__enter__", entered)
    patch(StageProgress, "update", updated)
    patch(layout, "write_record", recorded)


@pytest.mark.usefixtures("stages_alone")
def test_one_signal_in_one_stage(
    tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(tiny_recipe)
    run(recipe, runs=tmp_path / "whole", until="sft")
    send = partial(os.kill, os.getpid(), signal.SIGTERM)
    send_at("sft", "middle", send, monkeypatch.setattr)
    with pytest.raises(Interrupted) as caught:
        run(recipe, runs=tmp_path / "runs", until="sft")
    assert caught.value.exit_code == 143
    run(recipe, runs=tmp_path / "runs", until="sft")
    assert digests(tmp_path / "runs") == digests(tmp_path / "whole") != {}


@pytest.mark.torture
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_five_points_in_each_stage(
    tiny_recipe: Path, tmp_path: Path, signum: int, code: int, record_property: Callable
) -> None:
    """One chain, interrupted at each point in turn; afterwards all of it is moved."""
    text = tiny_recipe.read_text().replace('"ppo"]', '"ppo", "dpo"]')
    tiny_recipe.write_text(text.replace("total_episodes = 32", "total_episodes = 96") + DPO)
    whole = command("run", tiny_recipe, "--runs", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    passed = 0
    for kind in KINDS:
        for point in POINTS:
            ended = subprocess.run(
                [sys.executable, "-m", __name__, str(int(signum)), kind, point, "run", tiny_recipe],
                cwd=tmp_path,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
                capture_output=True,
                text=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            assert time.time() - float((tmp_path / "sent").read_text()) < 30
            assert ended.returncode == code, (kind, point, ended.stderr)
            assert ended.stderr.splitlines()[-1] == (
                "run tiny was interrupted "
                "(the same command goes on from what is finished and saved)"
            )
            passed += 1
    done = command("run", tiny_recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "runs") == digests(tmp_path / "whole")
    results = [(tmp_path / runs / "tiny/results.json").read_bytes() for runs in ("runs", "whole")]
    assert results[0] == results[1]
    (tmp_path / "runs").rename(tmp_path / "moved")
    exported = command("export", "tiny", "out", "--runs", "moved", cwd=tmp_path)
    assert exported.returncode == 0, exported.stderr
    record_property("cases", f"{passed} of {len(KINDS) * len(POINTS)}")


def main() -> None:
    signum, kind, point = int(sys.argv[1]), *sys.argv[2:4]
    del sys.argv[1:4]

    def send() -> None:
        Path("sent").write_text(str(time.time()))
        os.kill(os.getpid(), signum)

    send_at(kind, point, send, setattr)
    from rlhf_recipes.cli import main as run_command

    run_command()


if __name__ == "__main__":
    main()
