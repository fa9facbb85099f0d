"""Nothing that was acknowledged is lost and nothing is doubled, whenever the server is killed."""

from __future__ import annotations

import http.client
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

from rlhf_recipes.feedback.asks import Asks
from rlhf_recipes.feedback.serving import listening
from rlhf_recipes.feedback.store import Store
from tests.feedback.conftest import pairs
from tests.helpers.labelling import PEOPLE

VERDICTS = ("left", "right", "tie", "both_bad", "skip")
VOTES = 2


class Tab(threading.Thread):
    """A person's tab: looks, chooses, sometimes twice, and goes where it is led; for ever."""

    def __init__(self, ports: list[int], token: str, seed: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.ports, self.token, self.stop = ports, token, stop
        self.draw = random.Random(seed)
        self.said: dict[str, list[str]] = {}  # by ask: what was sent, and then acknowledged
        self.sent: dict[str, list[str]] = {}
        self.done, self.count = False, 0

    def run(self) -> None:
        while not self.stop.is_set() and not self.done:
            try:
                self.judge_one()
            except (OSError, http.client.HTTPException):
                time.sleep(0.01)

    def judge_one(self) -> None:
        place = self.ask("GET", f"/{self.token}/")
        if place.endswith("/all"):
            self.done = True
            return
        self.ask("GET", place)
        ask = place.rpartition("/")[2]
        verdict = self.draw.choice(VERDICTS)
        for _ in range(1 + (self.draw.random() < 0.2)):  # a double click
            self.sent.setdefault(ask, []).append(verdict)
            self.ask("POST", place, f"verdict={verdict}")
            self.said.setdefault(ask, []).append(verdict)
            self.count += 1

    def ask(self, method: str, path: str, body: str = "") -> str:
        """Where it leads. Raises OSError where there is no answer."""
        port = self.draw.choice(self.ports)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            headers = {"content-type": "application/x-www-form-urlencoded"} if body else {}
            connection.request(method, path, body or None, headers)
            answer = connection.getresponse()
            answer.read()
            if answer.status == 503:
                raise OSError("busy")
            assert answer.status in (200, 303), (answer.status, path)
            return answer.headers.get("location", path)
        finally:
            connection.close()


def kill_and_count(folder: Path, kills: int, items: int, servers: int = 1) -> dict[str, int]:
    """Kill the servers of two people and three tabs so often; what was kept must be what was said.

    Returns how many judgements were acknowledged, and kept though no answer came.
    """
    store = Store(folder)
    store.put(pairs(items), "q")
    ports = []
    for _ in range(servers):
        with listening(0) as free:
            ports.append(free.getsockname()[1])
    ada, bob = PEOPLE
    stop, draw = threading.Event(), random.Random(kills)
    tabs = [Tab(ports, token, seed, stop) for seed, token in enumerate((ada, ada, bob))]
    running = {port: start(folder, port) for port in ports}
    for tab in tabs:
        tab.start()
    try:
        for _ in range(kills):
            wait_for(tabs, draw.randrange(14))
            time.sleep(draw.uniform(0.0, 0.03))
            port = draw.choice(ports)
            running[port].send_signal(signal.SIGKILL)
            running[port].communicate()
            running[port] = start(folder, port)
        stop.set()
        for tab in tabs:
            tab.join(30)
    finally:
        for process in running.values():
            process.kill()
            process.communicate()
    return compared(store, tabs)


def wait_for(tabs: list[Tab], more: int) -> None:
    """Until so many more judgements are acknowledged, however slow this machine is."""
    until, limit = sum(tab.count for tab in tabs) + more, time.monotonic() + 20
    while sum(tab.count for tab in tabs) < until and time.monotonic() < limit:
        if all(tab.done for tab in tabs):
            return
        time.sleep(0.002)


def start(folder: Path, port: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "tests.helpers.labelling", str(folder), str(port), str(VOTES)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stdout and process.stdout.readline() == "serving\n"
    return process


def compared(store: Store, tabs: list[Tab]) -> dict[str, int]:
    with store.reading() as db:
        assert db.execute("pragma integrity_check").fetchone()[0] == "ok"
        asks = {row["id"]: row for row in db.execute("select * from ask")}
        rows = db.execute("select * from judgement order by n").fetchall()
    made = Asks(store, "q", votes=VOTES)
    unanswered, acknowledged = 0, 0
    own: dict[str, list[str]] = {}
    for row in rows:
        own.setdefault(row["ask"], []).append(row["verdict"])
    for ask in {*own, *(ask for tab in tabs for ask in tab.sent)}:
        senders = [tab for tab in tabs if ask in tab.sent]
        said = [verdict for tab in senders for verdict in tab.said.get(ask, [])]
        sent = [verdict for tab in senders for verdict in tab.sent[ask]]
        kept = own.get(ask, [])
        person = PEOPLE[senders[0].token]
        acknowledged += len({*said})
        assert len(kept) <= len(sent), "more was kept than was said"
        if said:
            assert kept, "an acknowledged judgement is lost"
        unanswered += bool(kept) and not said
        if kept and len(senders) == 1:
            last = made.get(ask, person).verdict
            assert last in sent, "what was kept was not said"
            if len({*sent}) == 1:
                assert len(kept) == 1, "one judgement is there twice"
    # By item: never more people than votes, and each of them once.
    people = Counter(
        (asks[ask]["item"], asks[ask]["person"]) for ask in own if not asks[ask]["again"]
    )
    assert max(people.values()) == 1, "a person judged an item twice"
    votes: Counter[str] = Counter()
    for ask, verdicts in own.items():
        if not asks[ask]["again"] and verdicts[-1] != "skip":
            votes[asks[ask]["item"]] += 1
    assert max(votes.values()) <= VOTES
    return {"acknowledged": acknowledged, "kept unanswered": unanswered, "judged": len(own)}


def test_ten_kills_lose_and_double_nothing(tmp_path):
    found = kill_and_count(tmp_path, 10, items=300)
    assert found["acknowledged"] > 20


def test_two_servers_on_one_store_keep_to_the_votes(tmp_path):
    found = kill_and_count(tmp_path, 2, items=40, servers=2)
    assert found["acknowledged"] > 10


@pytest.mark.torture
def test_two_hundred_kills_lose_and_double_nothing(tmp_path, record_property):
    found = kill_and_count(tmp_path, 200, items=3000)
    print(found)
    assert found["acknowledged"] > 500
    record_property("cases", f"200 kills, {found['acknowledged']} kept")
