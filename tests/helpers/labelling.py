"""The labelling page in a process of its own, to be killed.

python -m tests.helpers.labelling RUNS PORT VOTES
"""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf_recipes.feedback.asks import Asks
from rlhf_recipes.feedback.page import Page
from rlhf_recipes.feedback.serving import listening, served
from rlhf_recipes.feedback.store import Store

PEOPLE = {"a" * 32: "ada", "b" * 32: "bob"}


def main(runs: str, port: str, votes: str) -> None:
    store = Store(Path(runs))
    page = Page(Asks(store, "q", votes=int(votes)), PEOPLE, "sums", soonest=0.0)
    with listening(int(port)) as listener, store.reading():
        print("serving", flush=True)
        print("ended" if served(page, listener) else "stopped", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
