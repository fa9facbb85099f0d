"""`choose = "unsure"`: which training pairs come first, and that no test pair is chosen so."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import unsure
from rlhf_recipes.feedback.items import ANSWERS, Item, read_items
from rlhf_recipes.models.reward_model import open_reward
from rlhf_recipes.models.sampling import score_ids
from rlhf_recipes.recipe.load import load_recipe
from rlhf_recipes.stages import answers
from rlhf_recipes.stages import sample as samples
from tests.helpers.chains import Chain

pytestmark = pytest.mark.train

TABLE = """
[sample]
prompts = 60
answers = 4
"""


@pytest.fixture
def sampled(tiny_recipe: Path, tmp_path: Path, trained: SimpleNamespace) -> Any:
    """Samples of one policy, by how they are chosen."""
    tiny_recipe.write_text(tiny_recipe.read_text() + TABLE)
    stages = 'stages=["sft", "reward", "sample"]'
    recipe = load_recipe(tiny_recipe, set=[stages, "evaluation=false"])
    chain = Chain(recipe, tmp_path, outputs=dict(trained.outputs))

    def sample(*words: str) -> list[Item]:
        chain.recipe = load_recipe(tiny_recipe, set=[stages, "evaluation=false", *words])
        chain.session.recipe = chain.recipe
        inputs = {"policy": "sft"}
        if "sample.choose=unsure" in words:
            inputs["reward_model"] = "reward"
        chain.run("sample", inputs)
        return [*read_items(chain.outputs["sample"] / ANSWERS)]

    return chain, sample


def test_close_pairs_come_first_and_the_other_sides_are_not_chosen(
    sampled: Any, monkeypatch: pytest.MonkeyPatch
):
    chain, sample = sampled
    read = []

    def scores_of(*words: Any) -> list[float]:
        found = answers.scores_of(*words)
        read.append((words[3][0], found))
        return found

    monkeypatch.setattr(samples, "scores_of", scores_of)
    every, chosen = sample(), sample("sample.choose=unsure")
    assert all(one.place == {} for one in every)
    for side in ("validation", "test"):
        plain, left = ([one.id for one in some if one.side == side] for some in (every, chosen))
        assert plain == left and plain  # the same pairs, in the same order

    # Of the training side, every other one is random; the rest are close, the closest first.
    train = [one for one in chosen if one.side == "train"]
    assert [one.place["why"] for one in train[:6]] == ["unsure", "random"] * 3
    near = [one.place["margin"] for one in train if one.place["why"] == "unsure"]
    assert near == sorted(near)
    assert near[0] < 0.5 * near[-1]
    plain = {one.id for one in every}
    random = [one for one in train if one.place["why"] == "random"]
    assert all(one.id in plain for one in random)
    assert not all(one.id in plain for one in train)

    # A margin is the least that the reward model tells two answers of the prompt apart by.
    [(rows, scores)] = read
    session, by_prompt = chain.session, {}
    model = open_reward(session.base, chain.outputs["reward"])
    again = score_ids(model, [(e.prompt_ids, ids) for e, ids in rows], session.tokens.pad_id, 8)
    session.base.close(model)
    assert scores == pytest.approx(again.tolist(), abs=2e-4)
    for (example, _), score in zip(rows, scores, strict=True):
        by_prompt.setdefault(example.prompt, []).append(score)
    for one in train:
        apart = [abs(a - b) for a, b in combinations(by_prompt[one.prompt[-1]["content"]], 2)]
        least = min(apart) if one.place["why"] == "unsure" else apart[0]
        assert one.place["margin"] == pytest.approx(least, abs=2e-4)

    # `count` takes the first of each side.
    few = sample("sample.choose=unsure", "sample.count=20")
    assert abs(len(few) - 20) <= 1
    for side in ("train", "validation", "test"):
        whole, some = ([one.id for one in found if one.side == side] for found in (chosen, few))
        assert some == whole[: len(some)]
        assert abs(len(some) - len(whole) * 20 / len(chosen)) <= 1


@pytest.fixture(scope="module")
def found() -> dict[float, dict[str, float]]:
    """Linear heads on the smoke model's states: 996 training and 204 test pairs, 40 seeds."""
    lab = unsure.Heads(*unsure.states(*unsure.smoke()))
    told = unsure.compare(lab, 40, tell=lambda *_: None)
    return {
        agree: {key: 100 * sum(values) / len(values) for key, values in rows.items()}
        for agree, rows in told.items()
    }


def test_a_third_of_the_labels_is_saved_where_people_are_steady(found: Any):
    steady = found[1.0]
    assert steady["part_at_random"] == 25
    assert steady["unsure_96"] > steady["random_144"] - 0.5  # over 100 seeds the two are equal
    assert steady["unsure_144"] > steady["random_144"] + 1


def test_little_is_lost_where_people_waver(found: Any):
    waver = found[0.75]
    assert 60 < waver["self_agreement"] < 72 and waver["part_at_random"] > 50
    for count in (96, 144):
        assert waver[f"unsure_{count}"] > waver[f"random_{count}"] - 1


def test_accuracy_on_close_pairs_is_not_that_on_the_test_side(found: Any):
    """What the same model would be said to be worth, if the test side were chosen too."""
    for rows in found.values():
        assert rows["unsure_test"] < rows["start"] - 5
