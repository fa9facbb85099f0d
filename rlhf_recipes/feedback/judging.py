"""`judge_items`: what a model says of pairs, what that is worth, and what it cost.

Each pair is asked in both orders. A judge's liking for a place cancels in the mean of both orders'
log odds, and shows where replies are texts: then a pair is kept if both orders agree. Every call is
in the store before it counts, so the same command goes on from wherever it stopped.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_recipes.data.turns import Messages
from rlhf_recipes.errors import GateError, StageError
from rlhf_recipes.feedback import calls, endpoint, prompt
from rlhf_recipes.feedback.calls import Ask, Bill
from rlhf_recipes.feedback.items import Item
from rlhf_recipes.feedback.reading import Reply, preference
from rlhf_recipes.feedback.store import Store, majority
from rlhf_recipes.feedback.verdicts import Verdicts, counts, likings, with_people
from rlhf_recipes.store.digests import digest
from rlhf_recipes.text import duration

PILOT = 24  # pairs that are judged first
ONE_PLACE = 0.9  # of the pilot's texts that name one place: such a judge looks at nothing else
SOME_HEAT = 0.7  # the temperature where several samples are drawn
TOKEN = 4  # bytes of English, about


@dataclass(frozen=True)
class JudgeSettings:
    """Who judges, by what, and what it may cost."""

    model: str  # a folder or hub id; with `url` the server's name for it
    url: str = ""  # of an OpenAI-compatible server; none: the model runs here
    folder: Path | None = None  # of a local model
    content: str = ""  # a local model's digest or commit
    quantization: str = "none"  # of a local model
    dtype: str = "auto"  # of a local model, as [model] dtype
    principles: str = ""  # the text: one a paragraph
    question: str = prompt.QUESTION
    reasons: bool = False  # reasons first, then the verdict
    samples: int = 1  # replies an order; above 1 at a temperature, and read as texts
    tie: float = 0.1  # closer to ½ than that: no pair
    people: int = 0  # the stage's: so many pairs are judged by people first
    budget: float | None = None  # dollars at `price`; without a price, calls
    price: tuple[float, float] | None = None  # dollars a million tokens, in and out
    concurrency: int = 8  # calls at a time
    timeout: float = 60.0  # seconds without a byte, after which a call is sent again

    @property
    def mode(self) -> str:
        """How a reply is read at first: "logits", "text" or "reasons"."""
        return "reasons" if self.reasons else "text" if self.samples > 1 and self.url else "logits"

    def identity(self) -> dict[str, Any]:
        """What the verdicts depend on: for the key of a stage."""
        found = self._asked()
        return found | {"samples": self.samples, "tie": self.tie, "people": self.people}

    def _asked(self) -> dict[str, Any]:
        listed = "\n".join(prompt.principles_of(self.principles))
        return {
            "by": "model",
            "model": self.content or self.model,
            "quantization": self.quantization if not self.url else "",
            "prompt": prompt.PROMPT_VERSION,
            "principles": hashlib.sha256(listed.encode()).hexdigest(),
            "question": self.question,
            "reasons": self.reasons,
        }

    @property
    def temperature(self) -> float:
        return SOME_HEAT if self.samples > 1 else 0.0

    @property
    def name(self) -> str:
        """Of the judge, in the store: who replies to equal prompts is one judge."""
        asked = digest([self._asked(), self.temperature])
        return f"{self.model} {asked[:12]}"

    def write(self, ask: Ask, mode: str, specials: Sequence[str] = ()) -> Messages:
        return prompt.prompt(
            ask.item,
            ask.first,
            mode=mode,
            principles=prompt.principles_of(self.principles),
            question=self.question,
            specials=specials,
        )


Tell = Callable[[str], Any]


def judge_items(
    items: Sequence[Item],
    judge: JudgeSettings,
    store: Store,
    tell: Tell,
    *,
    update: Callable[[int, int], Any] = lambda done, total: None,
    typed: bool = False,
    pauses: Sequence[float] = endpoint.PAUSES,
) -> Verdicts:
    """What `judge` says of the items with two answers; of what it said before, nothing is asked.

    `tell` takes lines for a person, `update` the calls done, of all. `typed`: a person has typed
    the address. Raises GateError where the first pairs show that nothing can be kept, StageError
    where no call comes to a verdict, and UsageError for an address that may not be asked.
    """
    pairs = list({one.id: one for one in items if len(one.answers) == 2}.values())
    store.put(pairs)
    asks = [Ask(one, first, n) for one in pairs for first in (0, 1) for n in range(_drawn(judge))]
    known = calls.replies(store, judge.name)
    where = endpoint.place(judge.url, typed=typed) if judge.url else None
    left = [ask for ask in asks if ask.id(judge.name) not in known]
    bill = calls.bill(store, judge.name, pairs)
    if left:
        _announce(judge, where, pairs, left, bill, tell)
    texts = any(reply.logit is None for reply in known.values())  # as the server was read before
    mode = "text" if texts and judge.mode == "logits" else judge.mode
    asker = _opened(judge, where, mode, bill, tell, pauses) if left else None
    fresh: dict[str, Reply] = {}
    failed: Counter[str] = Counter()

    def keep(some: list[tuple[Ask, Reply]]) -> None:
        calls.keep(store, judge.name, some)
        for ask, reply in some:
            if reply.error is None:
                known[ask.id(judge.name)] = fresh[ask.id(judge.name)] = reply
            else:
                failed[reply.error] += 1
        update(len(asks) - len(left) + len(fresh), len(asks))

    pilot = {one.id for one in pairs[:PILOT]}
    try:
        for first in (True, False):
            some = [ask for ask in left if (ask.item.id in pilot) is first]
            if some and asker and not asker.broke:
                asker.ask(some, keep)
            if first:
                _gate([ask for ask in asks if ask.item.id in pilot], known, judge, failed, tell)
                _price(judge, len(left) - len(fresh), calls.bill(store, judge.name, pairs), tell)
    finally:
        if asker:
            asker.close()
    served = {reply.model for ask in asks if (reply := known.get(ask.id(judge.name)))}
    if len(served) > 1:  # a name on a server is not a commit
        tell(f"the server changed its model: {', '.join(sorted(map(str, served)))}")
    bill = calls.bill(store, judge.name, pairs)
    if asker and asker.broke:
        unit = "calls" if judge.price is None else "dollars"
        tell(f"the budget of {judge.budget:g} {unit} is spent: a larger one goes on from here")
    found = _verdicts(pairs, asks, known, judge, store, bill)
    return replace(found, spent=bool(asker and asker.broke))


def _drawn(judge: JudgeSettings) -> int:
    """Replies an order: log-probabilities hold all that samples would tell."""
    return judge.samples if judge.mode != "logits" else 1


def _opened(
    judge: JudgeSettings,
    where: endpoint.Place | None,
    mode: str,
    bill: Bill,
    tell: Tell,
    pauses: Sequence[float],
) -> Any:
    if where is None:
        from rlhf_recipes.feedback.local_judge import LocalJudge

        return LocalJudge(
            judge.folder or Path(judge.model),
            judge.write,
            mode=mode,
            temperature=judge.temperature,
            quantization=judge.quantization,
            dtype=judge.dtype,
            name=judge.model,
        )
    spent = float(bill.calls) if judge.price is None else bill.dollars(judge.price)
    return endpoint.Endpoint(
        where,
        judge.model,
        judge.write,
        mode=mode,
        temperature=judge.temperature,
        purse=endpoint.Purse(judge.budget, judge.price, spent),
        concurrency=judge.concurrency,
        timeout=judge.timeout,
        tell=tell,
        pauses=pauses,
    )


def _announce(
    judge: JudgeSettings,
    where: endpoint.Place | None,
    pairs: Sequence[Item],
    left: Sequence[Ask],
    bill: Bill,
    tell: Tell,
) -> None:
    """Before the first call: what is sent where, and what it may come to."""
    sizes = [len(turn["content"].encode()) for a in left for turn in judge.write(a, judge.mode)]
    tokens = sum(sizes) // TOKEN
    said = f"{len(pairs)} pairs, {len(left)} calls, about {tokens:,} tokens in"
    if bill.calls:
        said += f" ({bill.calls} calls were made before)"
    if where is None:
        tell(f"{judge.model} judges on this machine: {said}")
        return
    if judge.price:
        out = len(left) * endpoint.LENGTHS[judge.mode]
        low, high = (endpoint.Purse(None, judge.price, 0).cost(tokens, n) for n in (0, out))
        said += f", {low:.2f} to {high:.2f} dollars"
    key = "with the key" if where.key else "without a key"
    tell(f"prompts and answers go to {where.host}, {key}; proxies and redirects are not used")
    tell(said)
    if judge.budget is not None and judge.price is None:
        tell(f"no price is set, so the budget of {judge.budget:g} is so many calls")


def _gate(
    asks: Sequence[Ask],
    known: Mapping[str, Reply],
    judge: JudgeSettings,
    failed: Counter[str],
    tell: Tell,
) -> None:
    """Look at the first pairs before the bill for all. Raises GateError and StageError."""
    replies = [known[a.id(judge.name)] for a in asks if a.id(judge.name) in known]
    if failed and not replies:
        [(why, count)] = failed.most_common(1)
        raise StageError(f"no reply to {len(asks)} calls is a verdict ({count}: {why})", WAYS)
    named = [one.named for one in replies if one.named != "tie"]
    if len(named) < PILOT // 2:
        return
    place = max("12", key=named.count)
    share = named.count(place) / len(named)
    if share <= ONE_PLACE:
        return
    said = f"{judge.model} says {place} in {named.count(place)} of {len(named)} replies"
    if any(one.logit is None for one in replies):
        what = f"{said}, whatever is shown there: nothing can be kept"
        raise GateError(what, WAYS)
    tell(f"{said}; the mean of both orders' log odds is kept, in which that cancels")


WAYS = "try reasons = true (--reasons), or another model"


def _price(judge: JudgeSettings, left: int, bill: Bill, tell: Tell) -> None:
    """What the rest takes, at the rate of the calls so far."""
    if not left or bill.calls == bill.failed:
        return
    width = judge.concurrency if judge.url else 1
    said = f"{left} calls are left: about {duration(left * bill.seconds / bill.calls / width)}"
    if judge.price:
        said += f", {left * bill.dollars(judge.price) / bill.calls:.2f} dollars"
    tell(said)


def _verdicts(
    pairs: Sequence[Item],
    asks: Sequence[Ask],
    known: Mapping[str, Reply],
    judge: JudgeSettings,
    store: Store,
    bill: Bill,
) -> Verdicts:
    said: dict[str, tuple[list[Reply], list[Reply]]] = {one.id: ([], []) for one in pairs}
    for ask in asks:
        if reply := known.get(ask.id(judge.name)):
            said[ask.item.id][ask.first].append(reply)
    better = {key: preference(*both) for key, both in said.items()}
    found = Verdicts(better, judge.tie)
    people = {
        key: verdict
        for key, verdict in majority(store.judged(better)).items()
        if verdict in ("first", "second", "tie")
    }
    metrics = counts(found, bill, judge.price) | likings(pairs, said, found, people)
    agreed, bins = with_people(found, people)
    return Verdicts(better, judge.tie, metrics | agreed, bins)
