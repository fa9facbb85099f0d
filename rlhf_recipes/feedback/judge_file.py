"""`rlhf-recipes judge FILE`: a model's verdicts on a file of pairs, as rows to train on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_recipes.errors import DataError, UsageError
from rlhf_recipes.feedback.items import Item, items_of
from rlhf_recipes.feedback.judging import JudgeSettings, judge_items
from rlhf_recipes.feedback.store import Store
from rlhf_recipes.feedback.verdicts import Verdicts
from rlhf_recipes.sources import trust
from rlhf_recipes.sources.resolve import content_digest, model_repo
from rlhf_recipes.store.files import to_json, whole
from rlhf_recipes.text import cut, plain

SHOWN = 300  # characters of a text


def judge_file(
    file: Path,
    judge: JudgeSettings,
    runs: Path,
    tell: Callable[[str], Any],
    *,
    limit: int | None = None,
    output: Path | None = None,
) -> tuple[list[Item], Verdicts]:
    """The pairs, and what the judge says of them; those that are kept go to `output`.

    Raises as `judge_items` does; DataError where the file holds no pairs.
    """
    if output and output.resolve() == file.resolve():
        raise UsageError(f"{output} is the file to be judged", "name another one with -o")
    items = [one for one in items_of(file, tell) if len(one.answers) == 2][:limit]
    if not items:
        raise DataError(f"{file} holds no pairs", "a row has a prompt and two answers")
    if not judge.url:
        judge = located_here(judge, runs)
    steps = {"tenth": 0}

    def update(done: int, total: int) -> None:
        if (tenth := 10 * done // total) > steps["tenth"]:
            steps["tenth"] = tenth
            tell(f"{done} of {total} calls")

    found = judge_items(items, judge, Store(runs), tell, update=update, typed=True)
    if output:
        with whole(output) as stream:
            for row in kept(items, found, judge.model):
                stream.write((to_json(row) + "\n").encode())
    return items, found


def located_here(judge: JudgeSettings, runs: Path) -> JudgeSettings:
    """The settings with the folder of a local model and what it holds.

    A folder that is there is meant by its name, else a model of the hub. Raises ModelError.
    """
    folder = Path(judge.model).expanduser()
    if folder.is_dir():
        trust.check_model(folder)
        return replace(judge, folder=folder.resolve(), content=content_digest(folder, runs))
    repo = model_repo(judge.model)
    commit = repo.commit()
    return replace(judge, folder=repo.snapshot(commit), content=commit)


def kept(items: Iterable[Item], found: Verdicts, who: str) -> Iterator[dict[str, Any]]:
    """A row for each pair with a better answer: as TRL reads it, with its p and its judge."""
    for one in items:
        verdict, chance = found.verdict(one.id), found.better[one.id]
        if verdict in ("first", "second") and chance is not None:
            better, worse = one.answers if verdict == "first" else one.answers[::-1]
            prompt = [dict(turn) for turn in one.prompt]
            row = {"prompt": prompt, "chosen": better, "rejected": worse}
            yield row | {"p": round(max(chance, 1 - chance), 4), "judge": who}


def shown(items: Iterable[Item], found: Verdicts) -> str:
    """Each pair with its verdict, for a person to read."""
    lines = []
    for one in items:
        chance = found.better[one.id]
        verdict = found.verdict(one.id) or "no verdict"
        told = verdict if chance is None else f"{verdict} ({chance:.2f} that the first is better)"
        lines.append(cut(plain(one.prompt[-1]["content"]), SHOWN))
        lines += [f"  {n}. {cut(plain(text), SHOWN)}" for n, text in enumerate(one.answers, 1)]
        lines.append(f"  → {told}\n")
    return "\n".join(lines)
