"""What the last half of the labels gave: a learning curve from the pairs of a reward stage.

The states are those of the reward model before its training: see `feedback/curve.py`.
"""

from __future__ import annotations

import numpy as np

from rlhf_recipes.data.dataset import Data
from rlhf_recipes.data.rows import Example, pairs
from rlhf_recipes.feedback import curve
from rlhf_recipes.models.role import Role
from rlhf_recipes.models.sampling import states_of
from rlhf_recipes.stages.contract import StageContext
from rlhf_recipes.store.files import write_json


def keep_curve(
    context: StageContext, reward: Role, train: list[Example], data: Data, batch: int
) -> None:
    """Write the curve to the stage's output; nothing of too few pairs. `reward` is untrained."""
    learned, test = pairs(train), pairs(data.judged("test"))
    if len(learned) < curve.LEAST or len(test) < curve.LEAST_TEST:
        return
    some, pad = learned[:: -(-len(learned) // curve.MOST)], context.session.tokens.pad_id
    both = [apart(reward, rows, pad, batch) for rows in (some, test)]
    found = curve.curve(both[0], both[1], context.seed("curve"))
    write_json(context.folder / "output" / curve.FILE, found)


def apart(reward: Role, rows: list[Example], pad: int, batch: int) -> np.ndarray:
    """The state [pairs, size] of each better answer less that of the worse."""
    better = states_of(reward, [(e.prompt_ids, e.chosen_ids or []) for e in rows], pad, batch)
    worse = states_of(reward, [(e.prompt_ids, e.rejected_ids or []) for e in rows], pad, batch)
    return (better - worse).double().numpy()
