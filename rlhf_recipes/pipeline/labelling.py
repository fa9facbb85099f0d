"""The labelling page beside a recipe, a run or a file: what is asked, and what comes after it."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_recipes.errors import PeopleNeeded, UsageError
from rlhf_recipes.feedback import agreement, winrate
from rlhf_recipes.feedback.items import ANSWERS, Item, items_of, read_items
from rlhf_recipes.feedback.serving import serve
from rlhf_recipes.feedback.store import QUESTION, Store
from rlhf_recipes.pipeline import runner
from rlhf_recipes.pipeline.plan import Plan, PlannedStage, plan_run
from rlhf_recipes.pipeline.runner import RunOutcome
from rlhf_recipes.recipe.kinds import makes
from rlhf_recipes.recipe.load import Recipe, load_recipe
from rlhf_recipes.recipe.tables import form_of, located
from rlhf_recipes.store.digests import digest
from rlhf_recipes.store.layout import REPORT


@dataclass(frozen=True)
class People:
    """Who judges, and how they are asked. None: as the recipe says."""

    names: Sequence[str]
    votes: int | None
    guideline: Path | None
    strength: bool
    port: int
    tell: Callable[[str], None]


def is_rows(source: str) -> bool:
    return bool(form_of(source))


def run(
    recipe: Recipe, people: People, runs: Path, *, name: str | None = None, rehearse: bool = True
) -> RunOutcome | None:
    """Run a recipe, with the page wherever people have to judge. None: they did not end it.

    Raises what `runner.run` does.
    """
    while True:
        try:
            return runner.run(recipe, runs=runs, name=name, rehearse=rehearse)
        except PeopleNeeded as stopped:
            people.tell(stopped.message)
        gc.collect()  # the base model goes, while people judge
        if not _judge(plan_run(recipe, runs, name=name), people):
            people.tell("the same command goes on from here")
            return None


def _waits(stage: PlannedStage) -> bool:
    return makes(stage.kind, "judgements") and not stage.done


def _judge(plan: Plan, people: People) -> bool:
    """Serve the page of the stage that waits. True where it was ended to train."""
    from rlhf_recipes.stages.label import for_people, missing

    recipe, stages = plan.recipe, {one.name: one for one in plan.stages}
    table = recipe.table(next(one.name for one in plan.stages if _waits(one)))
    extras, samples = table.extras, stages[table.answers or ""]
    items = list(read_items(samples.folder / "output" / ANSWERS))
    if people.votes:
        extras = {**extras, "votes": people.votes}
    asked, votes = for_people(extras, items)
    store = Store(plan.runs)
    guideline = people.guideline
    if guideline is None and extras["guideline"]:
        guideline = located(extras["guideline"], recipe.model.base)
    return _page(
        store,
        asked,
        people,
        queue=samples.key if len(asked) == len(items) else digest([one.id for one in asked]),
        title=recipe.title,
        votes=votes,
        guideline=guideline,
        strength=people.strength or extras["strength"],
        missing=lambda: missing(extras, items, store.judged(one.id for one in asked)),
    )


def rows(file: Path, people: People, runs: Path) -> str:
    """Judge what is in a file of answers; what came of it, in a line."""
    items = items_of(file, people.tell)
    ids, store = [one.id for one in items], Store(runs)
    _page(
        store,
        items,
        people,
        queue=digest(ids),
        title=file.name,
        votes=people.votes or 1,
        guideline=people.guideline,
        strength=people.strength,
        end="Finish",
    )
    judged = {one.item for one in store.judged(ids) if one.verdict != "skip"}
    return f"{len(judged)} of {len(ids)} are judged, in {store.file}"


def evaluated(run_folder: Path, people: People, pairs: int) -> str:
    """Judge a run's last policy against its start; the report is written again."""
    from rlhf_recipes.report import run_page

    store = Store(run_folder.parent)
    items = winrate.evaluation_items(run_folder, pairs)
    _page(
        store,
        items,
        people,
        queue=winrate.queue(run_folder),
        question=winrate.QUESTION_EVALUATION,
        title=f"{run_folder.name}: which answer is better?",
        votes=people.votes or 1,
        guideline=people.guideline,
        end="Finish",
    )
    winrate.write(run_folder)
    run_page.write(run_folder)
    told = "\n".join(f"{name}: {value}" for name, value in winrate.people_lines(run_folder, store))
    return f"{told}\nreport   {run_folder / REPORT}"


def _page(
    store: Store,
    items: Sequence[Item],
    people: People,
    *,
    queue: str,
    title: str,
    votes: int,
    guideline: Path | None,
    question: str = QUESTION,
    strength: bool = False,
    missing: Callable[[], int] = int,
    end: str = "Train now",
) -> bool:
    store.put(items, queue)
    ids = [one.id for one in items]
    return serve(
        store,
        queue,
        title=title,
        people=people.names,
        votes=votes,
        guideline=guideline,
        question=question,
        strength=strength,
        port=people.port,
        missing=missing,
        end=end,
        about=lambda: agreement.lines(store, ids, question),
        tell=people.tell,
    )


def sampled(
    run_folder: Path, policies: Sequence[str], out: Path | None, settings: Sequence[str]
) -> tuple[str, int]:
    """Items of a run's policy, or of two against each other, as lines; and how many.

    A file that is there is continued: what it has already is not written again. `settings` are
    words of --set for [sample]. Raises UsageError where the run has no such policy, or the file
    holds other rows.
    """
    known = _known(out) if out else set()
    recipe = load_recipe(run_folder / "resolved.toml")
    able = [name for name in recipe.stages if recipe.kind(name).makes == "policy"]
    for name in policies:
        if name not in able:
            raise UsageError(f"{run_folder} has no policy {name!r}", f"there are {', '.join(able)}")
    if not able:
        raise UsageError(f"{run_folder} has no policy", "run its recipe first")
    named = [*policies, *able[-1:]][: max(1, len(policies))]
    place = max(recipe.stages.index(name) for name in named) + 1
    title = next(f"asked{n or ''}" for n in range(99) if f"asked{n or ''}" not in recipe.stages)
    words = [f"stages={json.dumps([*recipe.stages[:place], title, *recipe.stages[place:]])}"]
    words += [f"{title}.kind=sample", f"{title}.policy={named[0]}"]
    words += [f"{title}.against={one}" for one in named[1:]]
    words += [f"{title}.{word}" for word in settings]
    text = f"{recipe.text}\n[{title}]\n"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{run_folder.name}.toml"
        file.write_text(text)
        asked = load_recipe(file, set=words)
        runs, name = run_folder.parent, f"{run_folder.name}-{title}"
        planned = {one.name: one for one in plan_run(asked, runs, name=name).stages}
        gone = [one for one in asked.stages[:place] if not planned[one].done]
        if gone:
            what = f"{', '.join(gone)} of {run_folder.name} would have to run again"
            raise UsageError(what, f"rlhf-recipes run {run_folder / 'resolved.toml'}")
        runner.run(asked, runs=runs, until=title, name=name, rehearse=False, model=False)
    made = (planned[title].folder / "output" / ANSWERS).read_text(encoding="utf-8")
    lines = [line for line in made.splitlines() if json.loads(line)["id"] not in known]
    if out:
        with out.open("a", encoding="utf-8") as stream:
            stream.writelines(f"{line}\n" for line in lines)
    return "\n".join(lines), len(lines)


def _known(out: Path) -> set[str]:
    """The ids of the items that a file has already."""
    try:
        return {one.id for one in read_items(out)}
    except FileNotFoundError:
        return set()
    except (KeyError, TypeError, ValueError):
        what = f"{out} holds other rows than answers to be judged"
        raise UsageError(what, "name another file with --out") from None
