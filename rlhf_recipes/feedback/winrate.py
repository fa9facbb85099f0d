"""A human win rate: the last policy against its start, on answers that the evaluation wrote.

People see the two answers without a name, sides drawn. Their judgements have a question of their
own, so that nothing is trained on them. Prompts to which both answer the same are not asked about.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlhf_recipes.errors import UsageError
from rlhf_recipes.feedback import agreement
from rlhf_recipes.feedback.items import Item, item
from rlhf_recipes.feedback.store import NAME, Store, majority
from rlhf_recipes.report import people
from rlhf_recipes.report.facts import PEOPLE, Facts, Json, number
from rlhf_recipes.stats import share_of
from rlhf_recipes.store.digests import digest
from rlhf_recipes.store.files import remove, write_json

QUESTION_EVALUATION = "evaluation"
QUEUE = "evaluation"  # with the key of the stage: see `queue`
PAIRS = 40  # tell a share to within 15 points


def queue(run_folder: Path) -> str:
    """The name of the queue of a run's evaluation."""
    return f"{QUEUE}-{_key(Facts(run_folder))[:12]}"


def compared(run_folder: Path) -> tuple[str, str] | None:
    """How a run's policy and its start are called, where its evaluation has answers that differ."""
    facts = Facts(run_folder)
    if not any(True for _ in _compared(facts)):
        return None
    policy, start = map(facts.plain_title, _policies(facts))
    return policy, start


def evaluation_items(run_folder: Path, pairs: int = PAIRS) -> list[Item]:
    """So many pairs of answers to judge, drawn by lot; more pairs begin with the same ones.

    Raises UsageError where the run has no answers of a policy and its start that differ.
    """
    found = [one for one, *_ in _compared(Facts(run_folder))]
    if not found:
        what = f"{run_folder} has no answers of a policy and its start that differ"
        raise UsageError(what, "run its evaluation first, or train its policy for longer")
    return found[:pairs]


def write(run_folder: Path) -> None:
    """Write people.json from the store of the run's runs folder, or remove it."""
    file = run_folder / PEOPLE
    store = run_folder.parent / NAME
    found = measured(run_folder, Store(store.parent)) if store.exists() else {}
    if found:
        write_json(file, found)
    elif file.exists():
        remove(file)


def measured(run_folder: Path, store: Store) -> Json:
    """What people.json holds; nothing where nobody has judged yet."""
    facts = Facts(run_folder)
    pairs = {one.id: (one, row, first) for one, row, first in _compared(facts)}
    most = majority(store.judged(pairs, QUESTION_EVALUATION))
    if not most:
        return {}
    policy, start = _policies(facts)
    wins: list[float] = []
    scorers: dict[str, list[float]] = {}
    for key, verdict in most.items():
        _, row, first = pairs[key]
        wins.append({"first": float(first), "second": float(not first)}.get(verdict, 0.5))
        for by, gain in _gains(row, policy, start) if wins[-1] != 0.5 else ():
            agrees = gain if wins[-1] else -gain
            scorers.setdefault(by, []).append((agrees > 0) + 0.5 * (agrees == 0))
    share = share_of(wins)
    rate = f"{policy}.people_win_rate"
    own = agreement.agreement(store, pairs, QUESTION_EVALUATION)
    among = {"each other": own.raw, "themselves": own.itself}
    found = {by: share_of(values) for by, values in scorers.items()}
    found |= {by: one for by, one in among.items() if one}
    return {
        "policy": policy,
        "start": start,
        "evaluation": _key(facts),
        "results": {
            rate: share.value,
            f"{rate}_low": share.low,
            f"{rate}_high": share.high,
            f"{policy}.people_pairs": share.count,
        },
        "both_bad": sum(verdict == "both_bad" for verdict in most.values()),
        "agreement": {by: one._asdict() for by, one in found.items()},
    }


def people_lines(run_folder: Path, store: Store) -> list[tuple[str, str]]:
    """What people said of a run, for a page or a terminal, after people.json is written."""
    write(run_folder)
    facts = Facts(run_folder)
    rows = [("win rate", one.text) for one in people.preferred(facts)]
    rows += [(who, value) for who, value in people.table(facts)[1:]]
    ids = [one.id for one, *_ in _compared(facts)]
    return rows + agreement.lines(store, ids, QUESTION_EVALUATION)


def _key(facts: Facts) -> str:
    """Of the evaluation that the answers are of; "" where there is none."""
    keys = [one.record["key"] for one in facts.stages if one.kind == "evaluation" and one.record]
    return str(keys[-1]) if keys else ""


def _policies(facts: Facts) -> tuple[str, str]:
    """The last policy that was evaluated, and its start. Two empty names where there is none."""
    for name, start in reversed(facts.starts().items()):
        given = [row.get("answers") for row in facts.answers]
        if any({name, start} <= {*one} for one in given if isinstance(one, dict)):
            return name, start
    return "", ""


def _gains(row: Json, policy: str, start: str) -> Iterator[tuple[str, float]]:
    """Each scorer of a row, and by how much it prefers the policy's answer."""
    for by in row:
        known = by in ("scores", *people.SCORERS) or by.startswith(people.PART)
        if known and isinstance(row[by], dict):
            now, before = number(row[by], policy), number(row[by], start)
            if now is not None and before is not None:
                yield by, now - before


def _compared(facts: Facts) -> Iterator[tuple[Item, Json, bool]]:
    """Each pair of answers that differ, its row, and whether the policy's is the item's first.

    In an order that is drawn by the prompts' digests.
    """
    both, seen = _policies(facts), set()
    for row in sorted(facts.answers, key=lambda row: digest(str(row.get("prompt")))):
        given = row.get("answers")
        texts = [given.get(name) for name in both] if isinstance(given, dict) else []
        said = [text for text in texts if isinstance(text, str)]
        prompt = row.get("turns") or [{"role": "user", "content": str(row.get("prompt"))}]
        if len({*said}) == 2:
            made = {"run": facts.folder.resolve().name, "stage": [*both], "side": "test"}
            one = item(prompt, said, made)
            if one.id not in seen:
                seen.add(one.id)
                yield one, row, one.answers[0] == said[0]
