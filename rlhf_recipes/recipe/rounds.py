"""`[rounds]`: the stages of one round, written out once for each further one.

A round's stages have the names of the first with its number: `sample-2`, `label-2`, `ppo-2`. They
have the same tables, but for what this module writes into them. So the first round keeps its names,
and with them its keys: one round more computes one round.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_recipes.recipe.kinds import FROM_DATASET, KINDS, Kind
from rlhf_recipes.recipe.tables import RoundsTable, keys_of, kinds_in

MOST = 400  # stages of all rounds: 0.5 s to check

Problem = tuple[tuple[str, ...], str]  # where, and what


def expand(data: dict[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """A recipe without `[rounds]`, and what is wrong with that table, if its types are right.

    All else in the recipe is right: see `check_stages.check`.
    """
    written, stages = data.get("rounds"), data.get("stages")
    if not isinstance(written, dict) or not isinstance(stages, list):
        return data, []
    keys = keys_of("rounds")
    if any(name not in keys or _unfit(keys[name], value) for name, value in written.items()):
        return data, []
    rounds = RoundsTable(**{("from_" if k == "from" else k): v for k, v in written.items()})
    kinds = kinds_in(data)
    problems = list(_wrong(rounds, data, stages, kinds))
    if problems:
        return data, problems
    made, names = copy.deepcopy(data), list(stages)
    again = stages[stages.index(rounds.from_) :]
    for number in range(2, rounds.count + 1):
        for stage in again:
            kind = KINDS[kinds[stage]]
            table = {"kind": kind.name, **copy.deepcopy(data.get(stage, {}))}
            for role in kind.roles:  # of this round, where the first round's is of its own
                if table.get(role) in again:
                    table[role] = named(table[role], number)
            table |= _further(rounds, data, stages, kinds, stage, number)
            made[named(stage, number)] = table
            names.append(named(stage, number))
    return made | {"stages": names}, []


def named(stage: str, number: int) -> str:
    return stage if number == 1 else f"{stage}-{number}"


def _unfit(field: Any, value: Any) -> bool:
    return bool(field.check(value)[1])


def _wrong(
    rounds: RoundsTable, data: Mapping[str, Any], stages: Sequence[str], kinds: Mapping[str, str]
) -> Iterator[Problem]:
    if rounds.from_ not in stages:
        yield ("rounds", "from"), f"must be one of stages: {', '.join(map(str, stages))}"
        return
    again = stages[stages.index(rounds.from_) :]
    if (count := rounds.count * len(again)) > MOST:
        yield ("rounds", "count"), f"makes {count} stages of {len(again)}: {MOST} are the most"
        return
    for stage in again:
        for number in range(2, rounds.count + 1):
            if named(stage, number) in data:
                what = f"[rounds] writes {named(stage, number)} itself"
                yield (named(stage, number),), f"{what}: leave [rounds] out, and list every stage"
    for stage in again:
        start = _start(stages, kinds, data, stage)
        if KINDS[kinds[stage]].explores and rounds.reference == "first" and start is None:
            what = f"{stage} starts from the base: put a stage that makes a policy before it"
            yield ("rounds", "reference"), f'{what}, or say reference = "last"'


def _start(
    stages: Sequence[str], kinds: Mapping[str, str], data: Mapping[str, Any], stage: str
) -> str | None:
    """The policy that a stage of the first round starts from."""
    if given := data.get(stage, {}).get("policy"):
        return given
    before = stages[: stages.index(stage)]
    able = [s for s in before if s in kinds and KINDS[kinds[s]].makes == "policy"]
    return able[-1] if able else None


def _further(
    rounds: RoundsTable,
    data: Mapping[str, Any],
    stages: Sequence[str],
    kinds: Mapping[str, str],
    stage: str,
    number: int,
) -> dict[str, Any]:
    """What a further round's table says in another way than the first one's."""
    kind: Kind = KINDS[kinds[stage]]
    table, start = data.get(stage, {}), _start(stages, kinds, data, stage)
    again = stages[stages.index(rounds.from_) :]
    found: dict[str, Any] = {}
    if kind.makes == "policy":
        # The latest policy, that of the round before, unless the round starts anew.
        found |= {"policy": start} if rounds.policy == "first" and start else {}
        if rounds.reference == "first" and "reference" in kind.roles:
            found |= {"reference": table.get("reference") or start}
    elif kind.makes == "reward_model" and start:
        found |= {"policy": start}  # a reward model begins where the first one did
    elif kind.makes == "answers" and rounds.prompts == "new":
        found |= {"skip": table.get("skip", 0) + (number - 1) * _prompts(kind, table)}
    if kind.compares:
        labels = [s for s in again if KINDS[kinds[s]].makes == "judgements"]
        given = table.get("pairs")
        given = [given] if isinstance(given, str) else given
        if rounds.pairs == "last":
            own = [one for one in given or [FROM_DATASET] if one not in labels]
            found |= {"pairs": own + [named(one, number) for one in labels]}
        elif given is not None:
            more = [named(one, n) for n in range(2, number + 1) for one in labels if one in given]
            found |= {"pairs": [*given, *more]}
    return found


def _prompts(kind: Kind, table: Mapping[str, Any]) -> int:
    field: Any = kind.extras["prompts"]
    given = table.get("prompts")
    return given if isinstance(given, int) else field.default
