"""How far people agree: numbers that can be counted by hand, and α as its own package has it."""

import krippendorff
import pytest

from rlhf_recipes.feedback.agreement import agreement, alpha, lines
from rlhf_recipes.feedback.items import item
from rlhf_recipes.feedback.store import Judged, Store
from rlhf_recipes.stats import wilson
from tests.helpers.people import say

ITEMS = [item([{"role": "user", "content": f"{n}?"}], ["yes", "no"]) for n in range(6)]
IDS = [one.id for one in ITEMS]


def test_people_with_each_other_with_the_rest_and_with_themselves(tmp_path):
    store = Store(tmp_path)
    for person, verdicts in {
        "ada": ["first", "second", "both_bad", "first", "skip"],
        "bob": ["first", "first", "tie", "second", "first"],
        "cy": ["first", "second"],
    }.items():
        for one, verdict in zip(ITEMS, verdicts, strict=False):
            say(store, one, person, verdict, seconds={"ada": 8, "bob": 500}.get(person, 0))
    say(store, ITEMS[0], "ada", "first", again=True, flipped=True)
    say(store, ITEMS[1], "ada", "tie", again=True, flipped=True)
    say(store, ITEMS[4], "ada", "first", again=True)  # skipped before: says nothing
    found = agreement(store, IDS)
    assert found.items == 5
    # Of the items: all three, one pair of three, both, and neither.
    assert found.raw.value == pytest.approx((1 + 1 / 3 + 1 + 0) / 4) and found.raw.count == 4
    ada, bob, cy = found.people
    assert (ada.judged, bob.judged, cy.judged) == (4, 5, 2)
    assert (ada.seconds, bob.seconds, cy.seconds) == (8, None, None)
    assert ada.rest[:] == (0.625, *wilson(0.625, 4), 4)
    assert ada.itself[:] == (0.5, *wilson(0.5, 2), 2) == found.itself[:]
    assert bob.itself is None
    assert ada.left[:] == (0.6, *wilson(0.6, 5), 5)  # of three verdicts, and two asked again
    nan = float("nan")
    table = [[0, 2, 1, 0, nan], [0, 0, 1, 2, 0], [0, 2, nan, nan, nan]]
    assert found.alpha == krippendorff.alpha(table, level_of_measurement="ordinal")

    said = dict(lines(store, IDS))
    assert said["judged"] == "5 items, by 3 people"
    assert said["ada"] == "4 judged, 8 s each" and said["bob"] == "5 judged"
    assert said["people agree on"] == "58 % of 4 items (20–89)"
    assert said["ada with themselves"] == "50 % of 2 asked again (9–91)"
    assert said["ada with the others"].startswith("62 % of 4 items")
    alone = dict(lines(store, IDS, without=["bob", "cy"]))
    assert "Krippendorff's α" not in alone and "ada with the others" not in alone
    assert lines(store, IDS[5:]) == [("judged", "nothing yet")]


@pytest.mark.parametrize(
    "said",
    [
        {},
        {("ada", 0): "first", ("ada", 1): "tie"},
        {("ada", 0): "first", ("bob", 1): "tie"},
        {("ada", 0): "first", ("bob", 0): "first"},
        {("ada", 0): "first", ("bob", 0): "first", ("ada", 1): "second"},
    ],
    ids=["nothing", "one person", "no overlap", "one value", "one value where they overlap"],
)
def test_alpha_is_not_to_be_had(said):
    rows = [Judged(IDS[n], who, verdict, False) for (who, n), verdict in said.items()]
    assert alpha(rows) is None


def test_alpha_of_good_and_bad():
    said = [("a", "good", "good"), ("b", "bad", "bad"), ("c", "good", "bad"), ("d", "bad", "bad")]
    both = [(key, who, v) for key, *vs in said for who, v in zip(("ada", "bob"), vs, strict=True)]
    found = alpha([Judged(key, who, verdict, False) for key, who, verdict in both])
    table = [[0, 1, 0, 1], [0, 1, 1, 1]]
    assert found == pytest.approx(krippendorff.alpha(table, level_of_measurement="nominal"))
