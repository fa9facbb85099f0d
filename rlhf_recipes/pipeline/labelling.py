"""The labelling page beside a recipe, a run or a file: what is asked, and what comes after it."""

from __future__ import annotations

import gc
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
        if not of_stage(plan_run(recipe, runs, name=name), people.votes).serve(people):
            people.tell("the same command goes on from here")
            return None


@dataclass(frozen=True)
class Asking:
    """What a page asks."""

    store: Store
    queue: str
    items: Sequence[Item]
    words: Mapping[str, Any]  # of `serving.paged`

    def put(self) -> dict[str, Any]:
        """Put the items in their queue; gives the words of `serving.paged`."""
        self.store.put(self.items, self.queue)
        ids, question = [one.id for one in self.items], self.words.get("question", QUESTION)
        return {"about": lambda: agreement.lines(self.store, ids, question), **self.words}

    def serve(self, people: People) -> bool:
        """With what `people` say of how they are asked. True where the page was ended."""
        given = {"votes": people.votes, "guideline": people.guideline}
        said = {"people": people.names, "strength": people.strength or None, **given}
        words = self.put() | {key: value for key, value in said.items() if value is not None}
        return serve(self.store, self.queue, port=people.port, tell=people.tell, **words)


def _waits(stage: PlannedStage) -> bool:
    return makes(stage.kind, "judgements") and not stage.done


def of_stage(plan: Plan, votes: int | None = None) -> Asking:
    """What the stage asks that waits for people."""
    from rlhf_recipes.stages.label import for_people, missing

    recipe, stages = plan.recipe, {one.name: one for one in plan.stages}
    table = recipe.table(next(one.name for one in plan.stages if _waits(one)))
    extras, samples = table.extras, stages[table.answers or ""]
    items = list(read_items(samples.folder / "output" / ANSWERS))
    if votes:
        extras = {**extras, "votes": votes}
    asked, votes = for_people(extras, items)
    store = Store(plan.runs)
    words: dict[str, Any] = {"title": recipe.title, "votes": votes, "strength": extras["strength"]}
    if extras["guideline"]:
        words["guideline"] = located(extras["guideline"], recipe.model.base)
    words["missing"] = lambda: missing(extras, items, store.judged(one.id for one in asked))
    queue = samples.key if len(asked) == len(items) else digest([one.id for one in asked])
    return Asking(store, queue, asked, words)


def of_rows(file: Path, runs: Path, tell: Callable[[str], None]) -> Asking:
    """What is in a file of answers."""
    items = items_of(file, tell)
    queue = digest([one.id for one in items])
    return Asking(Store(runs), queue, items, {"title": file.name, "end": "Finish"})


def of_evaluation(run_folder: Path, pairs: int) -> Asking:
    """A run's last policy against its start."""
    words = {"title": f"{run_folder.name}: which answer is better?", "end": "Finish"}
    return Asking(
        Store(run_folder.parent),
        winrate.queue(run_folder),
        winrate.evaluation_items(run_folder, pairs),
        words | {"question": winrate.QUESTION_EVALUATION},
    )


def rows(file: Path, people: People, runs: Path) -> str:
    """Judge what is in a file of answers; what came of it, in a line."""
    asking = of_rows(file, runs, people.tell)
    asking.serve(people)
    ids, store = [one.id for one in asking.items], asking.store
    judged = {one.item for one in store.judged(ids) if one.verdict != "skip"}
    return f"{len(judged)} of {len(ids)} are judged, in {store.file}"


def evaluated(run_folder: Path, people: People, pairs: int) -> str:
    """Judge a run's last policy against its start; the report is written again."""
    from rlhf_recipes.report import run_page

    asking = of_evaluation(run_folder, pairs)
    asking.serve(replace(people, strength=False))
    winrate.write(run_folder)
    run_page.write(run_folder)
    told = winrate.people_lines(run_folder, asking.store)
    said = "\n".join(f"{name}: {value}" for name, value in told)
    return f"{said}\nreport   {run_folder / REPORT}"


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
