"""The server's side of an AI judge: faults, a budget that is a ceiling, and where bytes may go."""

import os

import pytest

from rlhf_recipes.errors import StageError, UsageError
from rlhf_recipes.feedback import endpoint
from rlhf_recipes.feedback.endpoint import place
from rlhf_recipes.feedback.judging import JudgeSettings, judge_items
from rlhf_recipes.feedback.store import Store
from tests.helpers.fake_judge import FakeJudge
from tests.helpers.judged import numbered, odds, right

SOON = (0.0, 0.1, 0.1)
FAULTS = {"busy": 0.2, "error": 0.05, "hang": 0.02, "garbage": 0.02, "broken": 0.01, "forged": 0.01}


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in [name for name in os.environ if name.startswith("OPENAI_") or "JUDGE" in name]:
        monkeypatch.delenv(name)
    monkeypatch.delenv(endpoint.ALLOW, raising=False)


def judged(url, items, folder, told=None, **words):
    asked = JudgeSettings("fake", url, **{"tie": 0.0, **words})
    said = told.append if told is not None else lambda line: None
    return judge_items(items, asked, Store(folder), said, pauses=SOON)


# ---- faults


@pytest.mark.parametrize("logprobs", ["given", "refused", "ignored"])
def test_every_pair_is_judged_or_open_and_the_bill_is_the_servers(tmp_path, logprobs):
    """J2, with shorter waits."""
    items, told = numbered(60, forged=0.2), []
    with FakeJudge(odds, bias=0.05, faults=FAULTS, logprobs=logprobs) as server:
        found = judged(server.url, items, tmp_path, told, timeout=0.5, concurrency=16)
        numbers = found.metrics
        assert numbers["tokens_in"] == server.tokens_in
        assert numbers["tokens_out"] == server.tokens_out
        assert numbers["kept"] + numbers["ties"] + numbers["no_verdict"] == 60
        assert numbers["no_verdict"] == sum(p is None for p in found.better.values()) <= 6
        assert max(server.served.values()) == 1
    named = [one for one in items if found.verdict(one.id) in ("first", "second")]
    assert right(found.better, named) == 1.0
    assert any("log-probabilities" in line for line in told) is (logprobs != "given")
    assert sum("the text of replies is read" in line for line in told) == (logprobs != "given")


def test_what_failed_is_no_tie_and_is_asked_again_by_the_next_command(tmp_path):
    items = numbered(12)
    with FakeJudge(odds, faults={"garbage": 0.5}) as server:
        first = judged(server.url, items, tmp_path, concurrency=2)
        open_ = [key for key, p in first.better.items() if p is None]
        assert open_ and first.metrics["ties"] == 0
        assert first.metrics["failed_calls"] > 0
        server.faults.clear()
        second = judged(server.url, items, tmp_path, concurrency=2)
    assert second.metrics["no_verdict"] == 0 and right(second.better, items) == 1.0
    assert second.metrics["tokens_in"] == server.tokens_in  # of both commands


def test_a_model_that_thinks_is_asked_in_its_own_words(tmp_path):
    items = numbered(4)
    with FakeJudge(odds, thinks=True, logprobs="refused") as server:
        found = judged(server.url, items, tmp_path, concurrency=1)
    assert right(found.better, items) == 1.0
    last = server.bodies[-1]
    assert last["max_completion_tokens"] == endpoint.THOUGHT and "temperature" not in last
    assert server.asked == 8 + 3  # three refusals, and no more


def test_what_holds_for_all_calls_stops_at_the_first(tmp_path, monkeypatch):
    for status, said in (
        (401, "refused the key: 401"),
        (403, "refused access"),
        (404, "has no such"),
    ):
        with FakeJudge(odds, status=status) as server:
            with pytest.raises(StageError, match=said) as caught:
                judged(server.url, numbered(4), tmp_path)
        assert server.asked == 1
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    monkeypatch.setattr(endpoint, "RETRIES", 1)
    with pytest.raises(StageError, match="no connection.*the same command goes on"):
        judged(server.url, numbered(4), tmp_path)  # nothing is there any more


# ---- the budget


def test_the_budget_is_a_ceiling_and_a_larger_one_goes_on(tmp_path):
    items, told, price = numbered(40), [], (10.0, 30.0)
    with FakeJudge(odds, seconds=0.01) as server:
        whole = judged(server.url, items, tmp_path / "whole", price=price).metrics["dollars"]
        server.tokens_in = server.tokens_out = server.billed = 0
        half = judged(server.url, items, tmp_path, told, price=price, budget=whole / 2)
        paid = (server.tokens_in * 10 + server.tokens_out * 30) / 1e6
        assert half.metrics["dollars"] == pytest.approx(paid)
        assert 0.4 * whole < paid <= whole / 2
        assert half.metrics["no_verdict"] >= 20
        assert "is spent: a larger one goes on from here" in told[-1]
        again = judged(server.url, items, tmp_path, price=price, budget=whole / 2)
        assert again.metrics["dollars"] <= whole / 2
        found = judged(server.url, items, tmp_path, price=price, budget=whole * 2)
    assert half.spent and again.spent and not found.spent
    assert found.metrics["no_verdict"] == 0
    assert server.billed == 80 and found.metrics["dollars"] == pytest.approx(whole)


def test_without_a_price_the_budget_is_calls_and_that_is_said(tmp_path):
    told = []
    with FakeJudge(odds) as server:
        found = judged(server.url, numbered(10), tmp_path, told, budget=7)
    assert server.billed == found.metrics["calls"] == 7
    assert sum("no price is set, so the budget of 7 is so many calls" in line for line in told) == 1


# ---- where bytes may go


def test_a_recipe_names_this_machine_or_a_host_that_a_person_allows(tmp_path, monkeypatch):
    for url in ("http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:80/v1"):
        assert place(url, typed=False).local
    foreign = "https://api.openai.com/v1"
    hint = "RLHF_RECIPES_ALLOW_HOSTS=api.openai.com before the same command allows it"
    with pytest.raises(UsageError, match=f"sent to api.openai.com .{hint}"):
        place(foreign, typed=False)
    assert place(foreign, typed=True).host == "api.openai.com"
    monkeypatch.setenv(endpoint.ALLOW, "example.org, API.openai.com")
    assert not place(foreign, typed=False).local
    for url in ("http://api.openai.com.evil.example/v1", "http://evil.example/v1"):
        with pytest.raises(UsageError):
            place(url, typed=False)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1@evil.example/v1",
        "http://evil.example\\@127.0.0.1/v1",
        "http://evil.example#@127.0.0.1/",
        "http://127.0.0.1:8000\n.evil.example/v1",
        "file:///etc/passwd",
        "http://127.0.0.1/v1?a=b",
        "127.0.0.1:8000",
        "",
    ],
)
def test_an_address_that_can_be_read_in_two_ways_is_refused(url):
    with pytest.raises(UsageError, match="is not an address of a server"):
        place(url, typed=True)


@pytest.mark.parametrize("host", ["2130706433", "0.0.0.0", "127.0.0.1.evil.example", "localhost."])
def test_what_looks_like_this_machine_is_not_it(host):
    with pytest.raises(UsageError, match="the recipe has the pairs"):
        place(f"http://{host}/v1", typed=False)


def test_a_foreign_host_that_a_recipe_names_is_sent_nothing(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr(endpoint.Endpoint, "ask", lambda *_: sent.append(1))
    with pytest.raises(UsageError, match="evil.example"):
        judged("https://evil.example/v1", numbered(2), tmp_path)
    assert not sent


def test_a_redirect_is_not_followed(tmp_path):
    with (
        FakeJudge(odds) as other,
        FakeJudge(odds, redirect=f"{other.url}/chat/completions") as server,
    ):
        with pytest.raises(StageError, match=f"sends calls on to {other.url}.*not followed"):
            judged(server.url, numbered(2), tmp_path)
        assert (server.asked, other.asked) == (1, 0)


def test_the_key_goes_to_its_own_host_alone_and_nothing_else_of_the_environment(
    tmp_path, monkeypatch
):
    with FakeJudge(odds) as server, FakeJudge(odds) as proxy:
        for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
            monkeypatch.setenv(name, f"sk-{name.lower()}-0123456789abcdef")
        monkeypatch.setenv("OPENAI_BASE_URL", proxy.url)
        monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer stray\nX-Stray: yes")
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        judged(server.url, numbered(1), tmp_path)
        assert (server.asked, proxy.asked) == (2, 0)
        sent = {name.lower() for headers in server.headers for name in headers}
        assert sent == {"host", "accept", "content-type", "content-length", "user-agent"}
        monkeypatch.setenv("RLHF_RECIPES_JUDGE_KEY", "judge-key-0123456789abcdef")
        told = []
        judged(server.url, numbered(2), tmp_path, told)
        key = {name.lower(): v for name, v in server.headers[-1].items()}["authorization"]
        assert key == "Bearer judge-key-0123456789abcdef"
        assert told[0] == (
            "prompts and answers go to 127.0.0.1, with the key; proxies and redirects are not used"
        )
    assert place("https://api.openai.com/v1", typed=True).key == "judge-key-0123456789abcdef"
    monkeypatch.delenv("RLHF_RECIPES_JUDGE_KEY")
    assert place("https://api.openai.com/v1", typed=True).key.startswith("sk-openai_api_key")
    assert place("http://api.openai.com/v1", typed=True).key == ""
    assert place("https://example.org/v1", typed=True).key == ""


def test_the_key_is_masked_in_messages(tmp_path, monkeypatch):
    monkeypatch.setenv("RLHF_RECIPES_JUDGE_KEY", "judge-key-0123456789abcdef")
    assert "judge-key" not in str(StageError("it said judge-key-0123456789abcdef"))


# ---- a real server


@pytest.mark.skipif("TRY_JUDGE_URL" not in os.environ, reason="no server: set TRY_JUDGE_URL")
def test_a_real_server_judges_or_says_why_not(tmp_path):
    """As llama.cpp's or vLLM's; TRY_JUDGE_MODEL is what it calls its model."""
    items, told = numbered(6), []
    asked = JudgeSettings(os.environ.get("TRY_JUDGE_MODEL", "any"), os.environ["TRY_JUDGE_URL"])
    try:
        found = judge_items(items, asked, Store(tmp_path), told.append, typed=True)
    except StageError as error:
        assert "no reply to 12 calls is a verdict" in str(error), told
    else:
        numbers = found.metrics
        assert numbers["kept"] + numbers["ties"] + numbers["no_verdict"] == 6
        assert numbers["tokens_in"] > 12 * 100 and numbers["uncounted_calls"] == 0
