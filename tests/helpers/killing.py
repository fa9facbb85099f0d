"""Kills a run where it is told to, runs it again, and says what it ended with.

    python -m tests.helpers.killing RECIPE FOLDER POINTS [STAGE ...]

One process imports what a run needs and forks for each: a run in one piece first, whose calls are
counted, then for every point a run that is killed there and the same run again. POINTS is how many
to a stage. Where stages are named, only these are killed. Prints a JSON line for each: the stage,
the point, and what differs from the first run.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_recipes.feedback.items import ANSWERS, read_items
from rlhf_recipes.feedback.store import NAME, Store
from tests.helpers.people import say

CLOCKS = {"seconds", "eps"}  # what a clock says may differ
KINDS = {"step": 13, "checkpoint": 5, "record": 2}  # of twenty points in a stage


class Places:
    """Counts the places of each kind that a process comes to, and dies at one of them."""

    def __init__(self, deadly: tuple[str, int] | None, counts: Path | None) -> None:
        self.deadly = deadly
        self.counts = counts
        self.seen: Counter[str] = Counter()
        self.within = ""

    def come_to(self, kind: str, descriptor: int | None = None) -> None:
        self.seen[kind] += 1
        if self.counts:
            self.counts.write_text(json.dumps(self.seen))
        if (kind, self.seen[kind]) == self.deadly:
            if descriptor is not None:
                _lose_what_is_not_synced(descriptor)
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Patch this process: a step told, a file synced in a checkpoint or before the record."""
        from rlhf_recipes.screen import StageProgress
        from rlhf_recipes.stages import checkpoints
        from rlhf_recipes.store import layout

        update, written = StageProgress.update, checkpoints.written
        record, sync = layout.write_record, os.fsync

        def updating(*args: Any, **kwargs: Any) -> None:
            self.come_to("step")
            update(*args, **kwargs)

        @contextlib.contextmanager
        def writing(*args: Any, **kwargs: Any) -> Iterator[Path]:
            with self.inside("checkpoint"), written(*args, **kwargs) as aside:
                yield aside

        def recording(*args: Any, **kwargs: Any) -> None:
            with self.inside("record"):
                record(*args, **kwargs)

        def syncing(descriptor: int) -> None:
            if self.within:
                self.come_to(self.within, descriptor)
            sync(descriptor)

        StageProgress.update = updating
        checkpoints.written, layout.write_record, os.fsync = writing, recording, syncing

    @contextlib.contextmanager
    def inside(self, kind: str) -> Iterator[None]:
        self.within = kind
        try:
            yield
        finally:
            self.within = ""


def _lose_what_is_not_synced(descriptor: int) -> None:
    """Half of a file that was just written, as a power cut would have it (on Linux)."""
    link = Path(f"/proc/self/fd/{descriptor}")
    file = link.resolve() if link.is_symlink() else Path()
    if file.is_file() and file.parent.name in ("partial", "output"):
        os.truncate(file, file.stat().st_size // 2)


def forked(recipe: Path, runs: Path, until: str, places: Places | None, log: Path) -> int:
    """Run the recipe in a child; its exit status as `waitpid` tells it."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        with log.open("a") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        from rlhf_recipes.pipeline.runner import run
        from rlhf_recipes.recipe.load import load_recipe

        if places is not None:
            places.watch()
        run(load_recipe(recipe), runs=runs, until=until, model=False)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def left(runs: Path, stage: str) -> dict[str, Any]:
    """What a finished stage left, less what a clock said."""
    (folder,) = (path for path in (runs / ".stages").glob(f"{stage}-*") if path.is_dir())
    found: dict[str, Any] = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "output").rglob("*"))
        if path.is_file()
    }
    for name in ("metrics.jsonl", "samples.jsonl"):
        lines = (folder / name).read_text().splitlines() if (folder / name).exists() else []
        found[name] = [
            {key: value for key, value in json.loads(line).items() if key not in CLOCKS}
            for line in lines
        ]
    record, store = json.loads((folder / "stage.json").read_text()), runs / NAME
    found[NAME] = hashlib.sha256(store.read_bytes()).hexdigest() if store.exists() else ""
    return found | {"metrics": record["metrics"], "summary": record["summary"]}


def saved(runs: Path, stage: str) -> int:
    """How many steps its last checkpoint holds."""
    found = (runs / ".stages").glob(f"{stage}-*/work/checkpoint-*")
    return max((int(path.name.rpartition("-")[2]) for path in found), default=0)


def judge(runs: Path) -> None:
    """People say of all answers that were sampled which is better, as a label stage needs it."""
    for file in runs.glob(f".stages/sample-*/output/{ANSWERS}"):
        for one in read_items(file):
            say(Store(runs), one, "ada", "first")


def spread(count: int, points: int) -> list[int]:
    """`points` places of 1 … count, from the first to the last."""
    if not count:
        return []
    if points == 1:
        return [max(1, count // 2)]
    return sorted({1 + round(i * (count - 1) / (points - 1)) for i in range(points)})


def main(recipe: Path, folder: Path, points: int, killed: list[str]) -> None:
    # Once, for all children.
    import matplotlib.backends.backend_svg  # noqa: F401

    import rlhf_recipes.pipeline.fit
    import rlhf_recipes.report.run_page
    import rlhf_recipes.stages.ppo.trainer
    import rlhf_recipes.stages.reward
    import rlhf_recipes.stages.session
    import rlhf_recipes.stages.sft  # noqa: F401
    from rlhf_recipes.recipe.load import load_recipe

    gc.freeze()  # a child's collector would look at all of it a dozen times
    folder.mkdir(parents=True)
    log, before = folder / "log.txt", folder / "before"  # `before` holds the stages above
    before.mkdir()
    for stage in load_recipe(recipe).stages:
        if stage == "label":
            judge(before)
        whole, counts = folder / f"{stage}-whole", folder / f"{stage}.json"
        shutil.copytree(before, whole)
        if forked(recipe, whole, stage, Places(None, counts), log):
            raise SystemExit(log.read_text())
        wanted, seen = left(whole, stage), json.loads(counts.read_text())
        for kind, share in KINDS.items() if not killed or stage in killed else ():
            for number in spread(seen.get(kind, 0), max(1, share * points // 20)):
                runs = folder / "runs"
                shutil.copytree(before, runs)
                status = forked(recipe, runs, stage, Places((kind, number), None), log)
                kept, counts = saved(runs, stage), folder / "again.json"
                counts.write_text("{}")
                again = forked(recipe, runs, stage, Places(None, counts), log)
                differs = ["it was not killed"] if not os.WIFSIGNALED(status) else []
                if json.loads(counts.read_text()).get("step", 0) > seen.get("step", 0) - kept:
                    differs.append(f"it began anew, with {kept} steps saved")
                if again:
                    differs.append("it did not end well")
                else:
                    found = left(runs, stage)
                    differs += [key for key in wanted | found if wanted.get(key) != found.get(key)]
                line = {"stage": stage, "at": f"{kind} {number} of {seen[kind]}"}
                print(json.dumps(line | {"differs": differs}), flush=True)
                shutil.rmtree(runs)
        shutil.rmtree(before)
        whole.rename(before)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
