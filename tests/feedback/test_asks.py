"""Who is asked what next, and what is kept of what they say."""

import random

import pytest

from rlhf_recipes.feedback.asks import LEASE, Asks
from rlhf_recipes.feedback.items import item
from rlhf_recipes.feedback.store import Store


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def prompt(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"How much is {number}?"}]


def pairs(count: int, held_out: int = 0) -> list:
    sides = ["test"] * held_out + ["train"] * (count - held_out)
    return [
        item(prompt(n), [f"It is {n}.", f"It may be {n}."], {"side": side})
        for n, side in enumerate(sides)
    ]


def asks(tmp_path, count=6, held_out=0, **words) -> Asks:
    store = Store(tmp_path)
    store.put(pairs(count, held_out), "q")
    return Asks(store, "q", **{"clock": Clock(), "draw": random.Random(0)} | words)


def judgements(asks) -> list:
    with asks.store.reading() as db:
        rows = db.execute("select ask, verdict, strength, note from judgement order by n")
        return [tuple(row) for row in rows]


def test_the_queue_is_asked_in_its_order_and_then_nothing(tmp_path):
    made = asks(tmp_path, 3)
    seen = []
    while (id := made.next("ada")) is not None:
        seen.append(made.get(id, "ada").item.id)
        made.judge(id, "ada", "left")
    assert seen == [one.id for one in pairs(3)]


def test_what_was_seen_is_stored_by_content_whatever_the_sides(tmp_path):
    made = asks(tmp_path, 40)
    flips = set()
    for _ in range(12):
        id = made.next("ada")
        made.judge(id, "ada", "left")
        ask = made.get(id, "ada")
        flips.add(ask.flipped)
        (row,) = [row for row in judgements(made) if row[0] == id]
        assert row[1] == ("second" if ask.flipped else "first")
        assert ask.verdict == "left"
        assert ask.answers[0] == ask.item.answers[0 if row[1] == "first" else 1]
    assert flips == {True, False}


def test_said_twice_is_written_once_and_otherwise_the_latest_counts(tmp_path):
    made = asks(tmp_path)
    id = made.next("ada")
    for verdict in ("left", "left", "tie", "tie", "left"):
        made.judge(id, "ada", verdict)
    assert len(judgements(made)) == 3
    assert made.get(id, "ada").verdict == "left"
    assert len(made.store.judged([made.get(id, "ada").item.id])) == 1
    made.judge(id, "ada", "left", 3, "a reason")
    assert made.get(id, "ada").strength == 3
    assert made.get(id, "ada").note == "a reason"


def test_a_second_tab_gets_another_item_until_nothing_else_is_left(tmp_path):
    made = asks(tmp_path, 2)
    first, second = made.next("ada"), made.next("ada")
    assert made.get(first, "ada").item != made.get(second, "ada").item
    assert made.next("ada") == first
    made.judge(first, "ada", "tie")
    assert made.next("ada") == second
    made.judge(second, "ada", "tie")
    assert made.next("ada") is None


def test_a_lease_ends_after_ten_minutes_also_where_the_clock_was_set_back(tmp_path):
    for moved in (LEASE + 1, -3600):
        clock = Clock()
        made = asks(tmp_path / str(moved), 2, clock=clock)
        first = made.next("ada")
        assert made.get(made.next("bob"), "bob").item != made.get(first, "ada").item
        clock.now += moved
        assert made.get(made.next("bob"), "bob").item == made.get(first, "ada").item


def test_no_more_people_are_asked_than_there_are_votes_and_begun_items_come_first(tmp_path):
    made = asks(tmp_path, 3, votes=2)
    own = {}
    for person in ("ada", "bob", "cy"):
        id = made.next(person)
        own[person] = made.get(id, person).item.id
    first, second, _ = [one.id for one in pairs(3)]
    assert own == {"ada": first, "bob": first, "cy": second}
    told = {"ada": set(), "bob": set(), "cy": set()}
    for _ in range(6):
        for person, seen in told.items():
            if id := made.next(person):
                seen.add(made.get(id, person).item.id)
                made.judge(id, person, "left")
    voted = [key for seen in told.values() for key in seen]
    assert {key: voted.count(key) for key in voted} == {one.id: 2 for one in pairs(3)}


def test_a_skip_is_not_a_vote_and_is_not_asked_again(tmp_path):
    made = asks(tmp_path, 1)
    made.judge(made.next("ada"), "ada", "skip")
    assert made.next("ada") is None
    made.judge(made.next("bob"), "bob", "left")
    assert made.next("cy") is None
    assert (made.progress("ada").yours, made.progress("ada").judged) == (1, 1)


def test_every_fifth_is_held_out_and_every_twentieth_again_with_the_sides_swapped(tmp_path):
    made = asks(tmp_path, 100, held_out=30)
    seen, flipped = [], {}
    for _ in range(80):
        id = made.next("ada")
        ask = made.get(id, "ada")
        made.judge(id, "ada", "left")
        seen.append(ask)
        if ask.again:
            place, way = flipped[ask.item.id]
            assert len(seen) - place > 15
            assert way != ask.flipped
        else:
            flipped[ask.item.id] = len(seen), ask.flipped
    again = [n for n, ask in enumerate(seen, 1) if ask.again]
    assert again == [20, 40, 60, 80]
    held = [n for n, ask in enumerate(seen, 1) if ask.item.side == "test" and not ask.again]
    assert held == [n for n in range(5, 80, 5) if n % 20]
    assert made.counts()["ada"]["left"] == 76
    twice = {ask.item.id for ask in seen if ask.again}
    verdicts = [{j.item: j.verdict for j in made.store.judged(twice, again=a)} for a in (0, 1)]
    assert [verdicts[0][key] == verdicts[1][key] for key in twice] == [False] * 4  # left each time


def test_an_ask_is_its_persons_own(tmp_path):
    made = asks(tmp_path)
    id = made.next("ada")
    for use in (made.get, made.before, lambda id, person: made.judge(id, person, "left")):
        with pytest.raises(KeyError):
            use(id, "bob")
        with pytest.raises(KeyError):
            use("' or 1=1 --", "ada")
    assert judgements(made) == []


def test_what_is_not_a_verdict_on_this_item_is_refused(tmp_path):
    made = asks(tmp_path, 1)
    made.store.put([item(prompt(1), ["One."])], "q")
    pair, single = made.next("ada"), made.next("ada")
    for id, verdict, strength in [
        (pair, "good", None), (pair, "first", None), (single, "left", None), (single, "tie", None),
        (pair, "first'); drop table judgement;--", None), (pair, "left", 9), (pair, "tie", 2),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="is not a"):
            made.judge(id, "ada", verdict, strength)
    assert judgements(made) == []
    made.judge(single, "ada", "good")
    assert made.get(single, "ada").verdict == "good"


def test_the_ask_before_is_what_was_judged_before(tmp_path):
    made = asks(tmp_path, 4)
    first = made.next("ada")
    assert made.before(first, "ada") == first
    assert not made.get(first, "ada").earlier
    made.judge(first, "ada", "left")
    second = made.next("ada")
    third = made.next("ada")  # the second waits in another tab
    assert made.before(second, "ada") == made.before(third, "ada") == first
    assert made.get(third, "ada").earlier


def test_progress_is_the_persons_own_and_pauses_are_left_out(tmp_path):
    clock = Clock()
    made = asks(tmp_path, 6, clock=clock)
    for took in (10, 14, 3000, 20):
        id = made.next("ada")
        clock.now += took
        made.judge(id, "ada", "left")
    made.judge(made.next("bob"), "bob", "tie")
    found = made.progress("ada")
    assert (found.yours, found.left, found.items, found.judged) == (4, 1, 6, 5)
    assert found.seconds == 14
    made.judge(id, "ada", "tie")  # said otherwise: as long as it took at first
    assert made.progress("ada").seconds == 14
    assert made.progress("bob").total == 2


def test_a_mended_guideline_asks_nothing_again_and_is_told(tmp_path):
    made = asks(tmp_path, 3, guideline="old")
    assert not made.begun("ada")
    made.judge(made.next("ada"), "ada", "left")
    assert made.begun("ada")
    mended = Asks(made.store, "q", guideline="new", clock=made.clock)
    assert not mended.begun("ada")
    assert mended.progress("ada").left == 2
    assert mended.counts()["ada"]["earlier guideline"] == 1
