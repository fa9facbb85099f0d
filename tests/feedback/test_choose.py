"""Which pairs come first, by scores alone."""

import pytest

from rlhf_recipes.feedback.choose import RANDOM, UNSURE, closest, in_order, part_at_random
from rlhf_recipes.feedback.items import ANSWERS, item, write_items
from rlhf_recipes.feedback.store import Store
from rlhf_recipes.pipeline.plan import plan_run
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stats import Share
from rlhf_recipes.store import layout
from tests.helpers.people import say

RECIPE = """
title = "Chosen"
stages = ["sample", "label", "reward", "more", "label-2"]
[model]
name = "./model"
[dataset]
path = "./prompts.jsonl"
[more]
kind = "sample"
choose = "unsure"
[label-2]
kind = "label"
"""


def itself(value: float, count: int) -> Share:
    return Share(value, 0.0, 1.0, count)


@pytest.mark.parametrize(
    ("said", "part"),
    [
        (None, 0.5),
        (itself(1.0, 19), 0.5),
        (itself(0.75, 20), 0.25),
        (itself(0.74, 20), 0.5),
        (itself(0.65, 20), 0.5),
        (itself(0.64, 20), 1.0),
    ],
)
def test_the_less_people_agree_with_themselves_the_more_is_drawn_at_random(said, part):
    assert part_at_random(said) == part


def test_of_a_prompt_the_two_closest_answers_are_taken():
    assert closest([3.0, 0.0, 1.5, 1.0]) == (2, 3)
    assert closest([1.0, 1.0, 1.0]) == (0, 1)


@pytest.mark.parametrize("part", [0.25, 0.5, 1.0])
def test_each_first_so_many_holds_the_part_at_random(part):
    margins = [abs(place - 50) + 0.5 for place in range(100)]
    order = in_order(margins, part, seed=1)
    assert sorted(place for place, _ in order) == [*range(100)]
    for first in (4, 20, 60):
        assert sum(why == RANDOM for _, why in order[:first]) == part * first
    near = [margins[place] for place, why in order if why == UNSURE]
    assert near == sorted(near)
    assert len(near) == 0 or near[0] == 0.5
    assert in_order(margins, part, seed=1) == order
    drawn = [place for place, why in order if why == RANDOM]
    assert drawn != [place for place, why in in_order(margins, part, seed=2) if why == RANDOM]
    assert drawn != sorted(drawn) and drawn != sorted(drawn, key=lambda place: margins[place])


@pytest.mark.parametrize(("same", "part"), [(20, 0.25), (12, 1.0)])
def test_the_part_at_random_is_in_the_key_by_what_was_said_before(tmp_path, same, part):
    """Of the items of `label` stages before alone: judging what was chosen does not choose anew."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "red"}\n')
    (tmp_path / "mine.toml").write_text(RECIPE)
    runs, recipe = tmp_path / "runs", load_recipe(tmp_path / "mine.toml")

    def planned():
        return {one.name: one for one in plan_run(recipe, runs).stages}

    def ask(stage, answers, again):
        items = [item([{"role": "user", "content": f"{n}?"}], answers) for n in range(20)]
        (stage.folder / "output").mkdir(parents=True)
        write_items(stage.folder / "output" / ANSWERS, items)
        layout.write_record(stage.folder, {"name": stage.name, "key": stage.key, "payload": {}})
        for at, one in enumerate(items):
            say(Store(runs), one, "ada", "first")
            say(Store(runs), one, "ada", "first" if at < again else "second", again=True)

    before = planned()
    assert before["more"].payload["judgements"] == {"random": 0.5}
    ask(before["sample"], ["yes", "no"], same)
    after = planned()
    assert after["more"].payload["judgements"] == {"random": part}
    assert after["sample"].key == before["sample"].key
    ask(after["more"], ["yes", "maybe"], 0)
    assert planned()["more"].key == after["more"].key
