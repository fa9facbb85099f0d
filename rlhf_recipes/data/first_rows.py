"""What `check` can tell of a recipe's rows without a tokenizer, by the first of them."""

from __future__ import annotations

import itertools
import re
from typing import Any

from rlhf_recipes.data.dataset import NEEDS, Data, check_share, lacking
from rlhf_recipes.data.names import guess
from rlhf_recipes.data.shapes import Row, understand
from rlhf_recipes.data.splits import load_split
from rlhf_recipes.errors import DataError
from rlhf_recipes.recipe.wiring import columns_of, judged_before

LOOKED = 200  # rows, where only their shape is asked for


def check_rows(recipe: Any) -> None:
    """Raise DataError where a run would, as far as the first rows of its files can tell."""
    tables = {repr(table): table for table in map(recipe.dataset_of, recipe.stages)}
    for key, table in tables.items():
        found: list[Any] = []
        whole, hint, names, labels = True, "", set[str](), False
        for one in (table, *table.more):
            data = Data()
            rows = load_split(one, one.split or "train", data.read_as) if one.is_local else ()
            for number, columns in enumerate(itertools.islice(rows, LOOKED), 1):
                hint = hint or guess(columns)
                names |= columns.keys()
                with data.counted(one, number, columns):
                    found.append(understand(row := Row(columns, one.columns)))
                    labels |= "label" in row.used
            whole = whole and 0 < data.rows < LOOKED
            if data.rows or one.is_local:
                check_share(data, one)
        held = {
            "answers": any(chosen is not None for _, chosen, _ in found),
            "pairs": any(None not in answers for _, *answers in found),
        }
        held["feedback"] = held["pairs"] or labels
        readers = [s for s in recipe.all_stages if repr(recipe.dataset_of(s)) == key]
        wanted = {column for name in readers for column in columns_of(recipe, name)}
        if whole and names and (what := lacking(names, sorted(wanted))):
            raise DataError(f"{table.path}: {what}")
        stages = [name for name in recipe.stages if repr(recipe.dataset_of(name)) == key]
        readers = [name for name in stages if not judged_before(recipe, name)]
        none = [name for name in readers if not held.get(recipe.kind(name).learns_from, True)]
        told = not any(held.values()) and re.search("chosen|completion", hint)
        if none and (whole or told):  # further rows will not have answers under other names
            raise DataError(
                f"{table.path} has no rows for {', '.join(none)}",
                NEEDS if held["answers"] else hint,
            )
