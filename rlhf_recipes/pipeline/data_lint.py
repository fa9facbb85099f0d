"""What is odd about a recipe's rows, after its own template and limits, before anything is trained.

Rows are looked at as the stages get them: the same ids, sides and reasons for dropping.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rlhf_recipes.data.dataset import COPY, NEEDS, lacking
from rlhf_recipes.data.first_rows import check_rows
from rlhf_recipes.data.rows import IDS, answered
from rlhf_recipes.data.shapes import ALONE
from rlhf_recipes.data.tokens import THINK, TODAY, render
from rlhf_recipes.errors import ModelError, RlhfRecipesError
from rlhf_recipes.findings import Finding, Found
from rlhf_recipes.recipe.kinds import EVALUATION
from rlhf_recipes.recipe.wiring import columns_of, judged_before
from rlhf_recipes.screen import quietly
from rlhf_recipes.sources import mirror
from rlhf_recipes.sources import resolve as sources
from rlhf_recipes.sources.fetch import datasets
from rlhf_recipes.stages.session import Session, check_models

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_recipes.data.dataset import Data
    from rlhf_recipes.data.rows import Example
    from rlhf_recipes.data.tokens import Tokens
    from rlhf_recipes.pipeline.plan import Plan
    from rlhf_recipes.recipe.load import Recipe

LOOKED = 20_000  # prompts of a side, and pairs; more say nothing new
NEAR = 0.7  # of two prompts' words, and of their neighbours, are the same
BIASED = 0.65  # of pairs prefer the longer answer; then length alone is a judge
MANY = 0.05
SURE = 10.0  # points, that a win rate may be wrong by
TESTED = 0.25  # of the prompts, at most, that a small file can give to its test
ROOM = 1.2  # times the longest answer, for the policy to be a little longer and still end
WEIGHT = "beyond the dataset's weight"  # as data.py says it
MARKUP = re.compile(
    r"\[/?INST\]|<</?SYS>>|<\|\w+\|>|<(start|end)_of_turn>|^### ?\w+:", re.MULTILINE
)
SHOWN = 320  # characters of an example


def data_lint(plan: Plan, session: Session) -> list[Finding]:
    """What a person should know of the rows. Reads what is on this machine, and brings nothing."""
    recipe = plan.recipe
    if gone := away(plan):
        change = f"rlhf-recipes fetch {recipe.path}"
        return [Finding("note", "rows", f"not looked at: {gone} is not on this machine", change)]
    try:
        session.check_foreign()
        session.check_adapters()
        tables = {"": recipe.dataset}
        tables |= {f"{name}.": t.dataset for name, t in recipe.tables.items() if t.dataset}
        found = []
        for place, table in tables.items():
            data = session.data(table)
            found += [*_counts(place, data), *_lengths(place, data, recipe), *_pairs(place, data)]
            if not place:
                found += [
                    *_marked(data),
                    *_template(data, session.tokens),
                    *_leaks(data, session.tokens),
                    *_shown(data, session.tokens),
                ]
        return [*found, *_lacks(plan, session)]
    except RlhfRecipesError as error:
        about = "model" if isinstance(error, ModelError) else "rows"
        return [Finding("fault", about, error.message, error.hint.partition("; or the shapes")[0])]


def found_wrong(recipe: Recipe) -> dict[str, RlhfRecipesError]:
    """What a run would stop for, by "rows" and "model", as far as a first look can tell."""
    found = {}
    for about, look in (("rows", check_rows), ("model", check_models)):
        try:
            with quietly():
                look(recipe)
        except RlhfRecipesError as error:
            found[about] = error
    return found


def provable(plan: Plan, session: Session) -> Found:
    """How sure a win rate of the evaluation can be: what its test prompts can prove."""
    recipe, table = plan.recipe, plan.recipe.dataset
    if recipe.evaluation is None or away(plan):
        return
    columns = columns_of(recipe, EVALUATION)
    held = len(session.data(table).learned("test_prompts", columns))
    asked = min(held, recipe.evaluation.prompts)
    if not asked:
        return
    text = f"{asked} test prompts: a win rate is right to ±{_points(asked):.0f} points"
    change, own = "", [one.test_split for one in (table, *table.more) if one.test_split]
    if asked < held:
        change = f"--set evaluation.prompts={held} for ±{_points(held):.0f}"
    elif not own and table.test_fraction < TESTED:
        change = f"--set dataset.test_fraction={TESTED} for "
        change += f"±{_points(held * TESTED / table.test_fraction):.0f}"
    yield _noted(_points(asked) > SURE, "proof", text, change or "more test rows tell more")


def _points(prompts: float) -> float:
    """Half the width of a 95 % interval of a share near a half, in points."""
    return 100 * 1.96 * 0.5 / math.sqrt(prompts)


def away(plan: Plan) -> str:
    """What would have to be brought before rows can be looked at; nothing where all is here."""
    recipe = plan.recipe
    here = recipe.model.is_local or sources.base_repo(recipe).cached()
    if "mirror" in plan.model:
        here = mirror.folder_of(recipe.model.mirror).is_dir()
    rows = (repo.name for repo in datasets(recipe) if not repo.cached())
    return next(rows, "") if here else recipe.model.name


def _all(data: Data) -> list[Example]:
    return [*data.train, *data.validation, *data.test]


def _counts(place: str, data: Data) -> Found:
    sides = [f"{len(getattr(data, side)):,} {side}" for side in ("train", "validation", "test")]
    held = f", {len(data.judge):,} of the training rows for the judge alone" if data.judge else ""
    yield Finding("note", f"{place}rows", f"{data.rows:,} read: {', '.join(sides)}{held}")
    reasons = [f"{count:,} × {why}" for why, count in data.dropped.most_common(6) if count]
    if reasons:
        wrong = [(why, n) for why, n in data.dropped.most_common() if why not in (WEIGHT, COPY)]
        many = sum(n for _, n in wrong) > 0.2 * data.rows
        first = next((data.first[why] for why, _ in wrong if why in data.first), None)
        way = (first[2] or f"look at row {first[0]}") if first else ""
        yield _noted(many, f"{place}dropped", "; ".join(reasons), way)
    for words in data.spoken():
        yield Finding("note", f"{place}read", words)


def _lacks(plan: Plan, session: Session) -> Found:
    """Stages that would end, some hours in, because they find no rows of their kind."""
    recipe, none = plan.recipe, []
    for name in (stage.name for stage in plan.stages if not stage.done):
        data = session.data_of(name)
        wanted = "" if judged_before(recipe, name) else recipe.kind(name).learns_from
        none += [name] if wanted and not data.learned(wanted) else []
        if what := lacking(data.named, columns_of(recipe, name)):
            yield Finding("fault", "rows", f"{name}: {what}")
    if none:
        text = f"none for {', '.join(none)}"
        _, _, way = session.data(recipe.dataset).first.get(ALONE, (0, {}, ""))
        yield Finding("fault", "rows", text, way or NEEDS)


def _lengths(place: str, data: Data, recipe: Any) -> Found:
    rows = _all(data)
    groups = {
        name: [count for e in rows if (count := e.count(f"{name}_ids"))]
        for name in ("prompt", "chosen", "rejected")
    }
    said = [f"{name} {_spread(lengths)}" for name, lengths in groups.items() if lengths]
    yield Finding("note", f"{place}tokens", f"{'; '.join(said)} (half · 95 % · most)")
    for stage in recipe.stages if not place else ():
        table = recipe.table(stage)
        room, named = table.said("response_length"), f"{stage}.{table.called('response_length')}"
        over = sum(length > room for length in groups["chosen"]) if room else 0
        longest = max(groups["chosen"], default=0)
        if room and not over and room < ROOM * longest:
            text = f"the longest chosen answer has {longest} tokens, {named} is "
            text += f"{room}: an answer that is a little longer is cut off, and cannot learn to end"
            change = f"--set {named}={math.ceil(ROOM * longest)}"
            yield Finding("note", "room", text, change)
        if over:
            share = over / len(groups["chosen"])
            text = f"{share:.1%} of the chosen answers are longer than {named}"
            longest = sorted(groups["chosen"])[int(0.99 * (len(groups["chosen"]) - 1))]
            change = f"--set {named}={longest}, or a lower max_answer_tokens"
            level = "doubt" if share > MANY else "note"
            yield Finding(level, "too long", f"{text}, {room}", change)


def _spread(lengths: Sequence[int]) -> str:
    ordered = sorted(lengths)
    half, most = ordered[len(ordered) // 2], ordered[-1]
    return f"{half} · {ordered[int(0.95 * (len(ordered) - 1))]} · {most}"


def _pairs(place: str, data: Data) -> Found:
    """Pairs that stand twice, that contradict one another, and what length alone would say."""
    pairs = [e for e in _all(data) if e.count("rejected_ids")][:LOOKED]
    if not pairs:
        return
    seen = Counter((*map(e.packed, IDS),) for e in pairs)
    twice = sum(count - 1 for count in seen.values())
    turned = sum(min(n, seen[(p, r, c)]) for (p, c, r), n in seen.items() if (p, r, c) in seen) // 2
    for count, what, cure in (
        (twice, "are copies of others", f"--set {place or 'dataset.'}dedup=true"),
        (turned, "say the opposite of another", "take them out"),
    ):
        if count:
            text = f"{count:,} of {len(pairs):,} pairs {what}"
            yield _noted(count > MANY * len(pairs), f"{place}pairs", text, cure)
    more = [e.count("chosen_ids") - e.count("rejected_ids") for e in pairs]
    longer, shorter = sum(n > 0 for n in more), sum(n < 0 for n in more)
    share = 0.5 + (longer - shorter) / 2 / len(pairs)
    text = f"the chosen answer is the longer one in {share:.0%} of pairs (ties ½)"
    change = "the reward model may learn length: look at gain by length in the report"
    yield _noted(not 1 - BIASED <= share <= BIASED, f"{place}length", text, change)


def _noted(doubtful: bool, about: str, text: str, change: str) -> Finding:
    """What is there to be known, or where it is doubtful, what to do about it."""
    return Finding("doubt", about, text, change) if doubtful else Finding("note", about, text)


def _marked(data: Data) -> Found:
    """Prompts that another chat template has gone over already."""
    rows = _all(data)
    marked = [e.prompt for e in rows if MARKUP.search(e.prompt)]
    if marked:
        text = f"{len(marked):,} of {len(rows):,} prompts hold a template's marks"
        change = f"give turns alone, not {_cut(marked[0], 60)!r}: the model's template is added"
        yield Finding("doubt", "markup", text, change)


def _template(data: Data, tokens: Tokens) -> Found:
    """What the model's template writes into prompts that a person may not expect."""
    template = str(tokens.tokenizer.chat_template)
    if "strftime_now" in template:
        text = f"the template writes the day's date; here it is always {TODAY:%d %b %Y}"
        yield Finding("note", "template", text)
    rows = answered(_all(data))[:LOOKED]
    asked = [{"role": "user", "content": "?"}]
    if rows and render(tokens.tokenizer, asked, add_generation_prompt=True).rstrip().endswith(
        THINK
    ):
        endless = sum("</think>" not in tokens.tokenizer.decode(e.chosen_ids or []) for e in rows)
        text = f"the template begins {THINK}, and {endless:,} of {len(rows):,} answers never end it"
        change = 'answers with their thoughts; or chat_template = "plain" in [model]'
        yield _noted(endless > 0, "template", text, change)


def _leaks(data: Data, tokens: Tokens) -> Found:
    """Prompts of test and validation that are nearly one of the training prompts."""
    import numpy as np

    numbers: dict[str, int] = {}
    train = {e.packed("prompt_ids"): e for e in data.train}
    words = [_words(train[one], tokens, numbers) for one in sorted(train)[:LOOKED]]
    every, counts = np.unique(np.concatenate([np.empty(0, np.int64), *words]), return_counts=True)
    template = every[counts == len(words)] if len(words) > 1 else every[:0]
    words = [np.setdiff1d(one, template, assume_unique=True) for one in words]
    held: dict[int, list[NDArray[Any]]] = defaultdict(list)
    for one in words:
        for word in _rarest(one, every, counts):
            held[word].append(one)
    for side in ("test", "validation"):
        prompts = {e.packed("prompt_ids"): e for e in getattr(data, side)}
        near = []
        for ids in sorted(prompts)[:LOOKED]:
            own = _words(prompts[ids], tokens, numbers)
            own = np.setdiff1d(own, template, assume_unique=True)
            kin = (other for word in _rarest(own, every, counts) for other in held[word][:200])
            if len(own) and any(_is_near(own, other) for other in kin):
                near.append(prompts[ids].prompt)
        if near:
            share = f"{len(near):,} of {len(prompts):,} {side} prompts are nearly a training prompt"
            change = f"as {_cut(near[0], 80)!r}: the {side} is easier than it looks"
            level = "doubt" if len(near) > MANY * len(prompts) else "note"
            yield Finding(level, "splits", share, change)


def _words(example: Example, tokens: Tokens, numbers: dict[str, int]) -> NDArray[Any]:
    """A prompt's words and pairs of neighbours, each as a number; `numbers` gets the new words."""
    import numpy as np

    text = tokens.decode(example.prompt_ids).casefold()
    found = [numbers.setdefault(word, len(numbers) + 1) for word in re.findall(r"\w+", text)]
    one = np.array(found, np.int64)
    return np.unique(np.concatenate([one, one[:-1] << 32 | one[1:]]))


def _rarest(words: NDArray[Any], every: NDArray[Any], counts: NDArray[Any]) -> list[int]:
    """Those that a near prompt would share at least one of, most likely."""
    import numpy as np

    places = np.searchsorted(every, words)
    known = places < len(every)
    known[known] = every[places[known]] == words[known]
    return words[known][np.lexsort((words[known], counts[places[known]]))[:4]].tolist()


def _is_near(one: NDArray[Any], other: NDArray[Any]) -> bool:
    import numpy as np

    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared >= NEAR * (len(one) + len(other) - shared)


def _shown(data: Data, tokens: Tokens) -> Found:
    """Three rows as the model sees them, special tokens and line breaks visible."""
    rows = data.train or _all(data)
    for place in sorted({0, len(rows) // 2, len(rows) - 1} if rows else ()):
        row = rows[place]
        parts = [tokens.tokenizer.decode(row.prompt_ids)]
        for mark, ids in ((" ▸ ", row.chosen_ids), (" ✗ ", row.rejected_ids)):
            parts += [mark + tokens.tokenizer.decode(ids)] if ids else []
        text = "".join(_cut(part.replace("\n", "⏎"), SHOWN) for part in parts)
        yield Finding("note", "example", text)


def _cut(text: str, width: int) -> str:
    half = width // 2
    return text if len(text) <= width else f"{text[:half]} … {text[-half:]}"
