"""What a run would leave of its stages."""

from __future__ import annotations

from rlhf_recipes.pipeline.plan import Plan
from rlhf_recipes.store import layout


def finish(planned: Plan) -> None:
    """Write the records that a run would have left."""
    for stage in planned.stages:
        record = {"name": stage.name, "key": stage.key, "payload": stage.payload}
        stage.folder.mkdir(parents=True, exist_ok=True)
        layout.write_record(stage.folder, record)
