"""Hostile requests and texts: refused or inert, the store as it was, and the next one served.

The numbers are those of a list of 24; what only a browser can show is in `test_browser.py`.
"""

import json
import re
import socket
import threading
import time

import pytest

from rlhf_recipes.errors import UsageError
from rlhf_recipes.feedback import guard
from rlhf_recipes.feedback.items import item
from rlhf_recipes.feedback.serving import serve
from rlhf_recipes.feedback.store import Store
from tests.feedback.conftest import ADA, ADDRESS, BOB, raw

FORM = {"content-type": "application/x-www-form-urlencoded"}


@pytest.fixture
def made(labelling):
    """A page with an ask of ada's that waits; whatever a test does, nothing is written."""
    made = labelling(people={ADA: "ada", BOB: "bob"})
    made.address = made.next()
    before = dump(made.store)
    yield made
    assert dump(made.store) == before
    assert made.client.get(made.address).status_code == 200
    assert made.say(made.address, "left").status_code == 303
    assert len(made.kept) == 1


def dump(store: Store) -> list:
    tables = ("item", "queue", "ask", "judgement")
    with store.reading() as db:
        return [tuple(row) for table in tables for row in db.execute(f"select * from {table}")]


def post(made, body, path=None, **headers):
    return made.client.post(path or made.address, content=body, headers=FORM | headers)


# ---- who asks: 1 to 11


def test_1_2_3_without_the_right_token_there_is_nothing(made):
    ask = made.address.rpartition("/")[2]
    for token in ("", "c" * 32, "a" * 31, "a" * 33, "é" * 32, BOB):
        for place in (ask, f"{ask}/before") + (("", "all") if token != BOB else ()):
            assert made.client.get(f"/{token}/{place}").status_code == 404, (token, place)
        assert post(made, "verdict=left", f"/{token}/{ask}").status_code == 404
    assert post(made, "", f"/{'c' * 32}/end").status_code == 404
    assert not made.ended


HOSTS = ["evil.example", "127.0.0.1.evil.example", "127.0.0.1:8017.evil.example", "localhost."]
HOSTS += ["127.0.0.1@evil.example", "127.0.0.1:", "127.0.0.2", "[::1].evil.example", "0.0.0.0:8017"]


def test_4_5_another_host_is_refused(made):
    for host in HOSTS:
        for answer in (
            made.client.get(made.address, headers={"host": host}),
            post(made, "verdict=tie", host=host),
        ):
            assert answer.status_code == 400, host
            assert "It is" not in answer.text
    for host in ("localhost:9", "127.0.0.1", "[::1]:8017"):
        assert made.client.get(made.address, headers={"host": host}).status_code == 200


def test_6_two_hosts_or_none_are_refused(made):
    get = f"GET {made.address} HTTP/1.1\r\n"
    with made.live() as port:
        assert " 400 " in raw(port, get, "host: localhost\r\nhost: localhost\r\n")
        assert " 400 " in raw(port, get, "")
        assert " 400 " in raw(port, f"GET {made.address} HTTP/1.0\r\n", "")
        assert " 200 " in raw(port, get)


OTHERS = [
    {"origin": "http://evil.example"},
    {"origin": "null"},
    {"origin": "http://localhost:8017"},
]
OTHERS += [{"origin": "https://127.0.0.1:8017"}, {"origin": "http://127.0.0.1"}]
OTHERS += [{"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}]


def test_7_8_9_another_page_is_refused(made):
    for header in OTHERS:
        assert post(made, "verdict=left", **header).status_code == 403, header
        assert made.client.get(made.address, headers=header).status_code == 403
        assert post(made, "", f"/{ADA}/end", **header).status_code == 403
    assert not made.ended
    own = {"origin": ADDRESS, "sec-fetch-site": "same-origin"}
    assert made.client.get(made.address, headers=own).status_code == 200


def test_10_11_a_verdict_comes_by_a_form_alone(made):
    assert made.client.get(f"{made.address}?verdict=left").status_code == 200
    for method in ("PUT", "DELETE", "TRACE", "PATCH", "OPTIONS", "HEAD"):
        assert made.client.request(method, made.address).status_code == 405
    assert made.client.get(f"{made.address}?_method=POST&verdict=left").status_code == 200
    assert post(made, "_method=POST").status_code == 400
    for kind in ("text/plain", "multipart/form-data; boundary=x", "application/json", ""):
        assert post(made, "verdict=left", **{"content-type": kind}).status_code == 415
    assert made.client.get(f"/{ADA}/end").status_code == 404  # an ask that is not there
    assert not made.ended


# ---- what is asked for: 12 to 19


def test_12_an_ask_is_never_part_of_a_statement(made):
    for ask in ("' OR 1=1 --", "%27%20OR%201=1%20--", "*", "%25", "x" * 5000):
        assert made.client.get(f"/{ADA}/{ask}").status_code == 404
        assert post(made, "verdict=left", f"/{ADA}/{ask}").status_code == 404


VERDICTS = ["first%27)%3B+drop+table+judgement%3B--", "best", "first", "", "left-9", "left-1.5"]
VERDICTS += ["left--1", "tie-2", "good", "left&verdict=right"]


def test_13_14_what_is_not_a_verdict_is_refused(made):
    for body in ("", "note=only", *(f"verdict={verdict}" for verdict in VERDICTS)):
        answer = post(made, body)
        assert answer.status_code == 400, body
        assert "Traceback" not in answer.text


def test_15_a_body_without_an_end_is_not_read(made, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.3)
    head = (
        f"POST {made.address} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {FORM['content-type']}"
    )
    with made.live() as port:
        for length in ("content-length: 100000000", "transfer-encoding: chunked"):
            sent = 0
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(f"{head}\r\n{length}\r\n\r\n".encode())
                part = b"note=" + b"x" * 65531
                if "chunked" in length:
                    part = b"10000\r\n" + part + b"\r\n"
                try:
                    while sent < 100_000_000:
                        connection.sendall(part)
                        sent += len(part)
                    pytest.fail("all of it was read")
                except ConnectionError:
                    pass
            assert sent < 20_000_000
        slow = raw(port, f"{head}\r\ncontent-length: 12\r\n\r\nverd".encode())
        assert " 408 " in slow.partition("\r\n")[0]


def test_16_ten_thousand_fields_are_not_taken(made):
    assert post(made, "&".join(f"f{n}=1" for n in range(5000))).status_code == 400
    assert post(made, "a&" * 10_000).status_code == 400
    assert post(made, "&".join(f"verdict{n}=left" for n in range(10_000))).status_code == 413


def test_17_a_note_of_bytes_that_are_no_text(made):
    for note in ("%FF%FE", "%ED%A0%80", "%C0%AF", "é".encode("latin1"), "x" * 5000):
        body = (
            f"verdict=left&note={note}" if isinstance(note, str) else b"verdict=left&note=" + note
        )
        assert post(made, body).status_code == 400, note


def test_17_what_is_not_seen_is_not_kept_in_a_note(labelling):
    made = labelling()
    post(made, "verdict=left&note=a%00b%1B%5B31mc%E2%80%AEd%0D%0Ae", made.next())
    assert [row[3] for row in made.kept] == ["ab[31mcd\ne"]


PATHS = ["/../../etc/passwd", "/%2e%2e%2f%2e%2e%2fetc/passwd", "/..%5c..%5cetc", "/%00"]
PATHS += ["//evil.example/", "//evil.example/%2e%2e", "/page.css/../../feedback.db", f"//{ADA}"]
PATHS += ["/page.css%2f..%2ffeedback.key", f"/{ADA}/../feedback.db", "http://evil.example/"]
PATHS += ["/" + "x" * 20_000, "/" + "x" * 200_000]


def test_18_no_path_leads_out(made):
    with made.live() as port:
        for path in PATHS:
            head = raw(port, f"GET {path} HTTP/1.1\r\n")
            assert re.match(r"HTTP/1.1 4\d\d ", head), path
            assert "location:" not in head.lower()


def test_19_a_note_with_a_script_is_a_text(labelling):
    made = labelling()
    note = "<script>alert(1)</script></textarea><img src=x onerror=alert(1)>"
    made.say(address := made.next(), "left", note=note)
    for page in (made.client.get(address).text, made.client.get(f"/{ADA}/all").text):
        assert "&lt;script&gt;alert(1)" in page
        assert "<script>" not in page
        assert "<img" not in page
    assert json.loads(json.dumps(made.kept[0][3])) == note


# ---- what is judged: 20 to 22

NASTY = """</style></section></form><script>alert(1)</script><img src=x onerror=alert(1)>
[go](javascript:alert(1)) ![p](http://evil.example/p.png) <http://evil.example/> \
[d](data:image/svg+xml;base64,PHN2Zz4=) <svg onload=alert(1)> <form action=http://evil.example>
<meta http-equiv=refresh content="0;url=http://evil.example"> \
<a href="http://evil.example" autofocus onfocus=alert(1)>x</a>

```x" onmouseover="alert(1)
code
```

| a |
|:-:|
| <b>b</b> |

[r]: http://evil.example/r
[r] &lt;script&gt; \ue000script\ue001"""


def test_20_an_answer_makes_no_element_but_those_of_markdown(labelling):
    other = NASTY.replace("code", "cord")  # much alike: differences are marked
    made = labelling([item([{"role": "user", "content": NASTY}], [NASTY, other])])
    page = made.client.get(made.next()).text
    main = page.partition("<main")[2].partition('<div class="bar"')[0]
    tags = {*re.findall(r"<([a-z][\w-]*)", main)}
    allowed = {"form", "div", "h1", "section", "span", "p", "pre", "code", "table", "thead", "tr"}
    assert tags <= allowed | {"th", "tbody", "td", "br", "mark"}
    assert main.count("<form") == page.count("<form") == 1
    assert not re.search(r"<[^>]*\s(on\w+|href|src|style|action)\s*=", main)
    assert "<mark>cord</mark>" in page


def test_21_what_is_slow_to_render_is_shown_as_it_is(labelling):
    prompt = [{"role": "user", "content": "Why?"}]
    made = labelling([item(prompt, ["[" * 100_000, "x " * 2_500_000])])
    with made.live() as port:
        address, times = made.next(), []
        with ThreadedGets(port, address, 4), ThreadedGets(port, f"/{ADA}/all", 1, times):
            pass
        page = made.client.get(address).text
    assert max(times) < 5
    assert page.count('class="rendered"') == 1  # the prompt's
    assert "4,800,000 more characters are not shown." in page
    assert len(page) < 1_000_000


class ThreadedGets:
    """So many requests at once; all are answered when the block has ended."""

    def __init__(self, port, path, count, times=None):
        self.times = [] if times is None else times
        self.threads = [threading.Thread(target=self._get, args=(port, path)) for _ in range(count)]

    def _get(self, port, path):
        begun = time.monotonic()
        assert " 200 " in raw(port, f"GET {path} HTTP/1.1\r\n")
        self.times.append(time.monotonic() - begun)

    def __enter__(self):
        for thread in self.threads:
            thread.start()

    def __exit__(self, *_):
        for thread in self.threads:
            thread.join(60)


def test_22_signs_that_command_a_screen_are_not_shown(labelling, tmp_path):
    nasty = "a\x1b[31mb\u202ec\x07d\x00"
    made = labelling([item([{"role": "user", "content": nasty}], [nasty + "1", nasty + "2"])],
                     title=nasty, guideline=nasty)  # fmt: skip
    made.say(address := made.client.get(f"/{ADA}/?begin").headers["location"], "left")
    for path in (address, f"/{ADA}/all"):
        page = made.client.get(path).text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", page)
        assert "a[31mbcd" in page
    for name in (nasty, "ada\nbob", "", " ", "x" * 61, "\u202eada"):
        with pytest.raises(UsageError, match="not a person's name") as refused:
            serve(made.store, "q", title="t", people=[name], port=0)
        assert str(refused.value).isprintable()
    with pytest.raises(UsageError, match="two people have one name"):
        serve(made.store, "q", title="t", people=["ada", "ada"], port=0)


# ---- again, and many at once: 23 and 24


def test_23_the_same_form_at_once_and_a_day_later_is_one_judgement(labelling):
    made = labelling()
    address = made.next()
    request = f"POST {address} HTTP/1.1\r\ncontent-type: {FORM['content-type']}\r\n"
    request += "content-length: 12\r\nhost: localhost\r\n\r\nverdict=left"
    with made.live() as port:
        said = []
        threads = [
            threading.Thread(target=lambda: said.append(raw(port, request.encode())))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert [answer[9:12] for answer in said] == ["303"] * 8
    now = made.asks.clock()
    made.asks.clock = lambda: now + 86_400
    assert made.say(address, "left").status_code == 303
    assert len(made.kept) == 1


def test_24_half_open_connections_keep_nobody_out(made):
    with made.live() as port:
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        for number, connection in enumerate(held):
            connection.sendall(b"GET / HTTP/1.1\r\nhost: lo"[: number % 25])
        assert " 200 " in raw(port, f"GET {made.address} HTTP/1.1\r\n")
        for connection in held:
            connection.close()


def test_24_every_answer_forbids_frames_scripts_and_keeping(made):
    for path in ("/", made.address, f"/{ADA}/all", "/page.css", "/page.js"):
        headers = made.client.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; ")
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert headers["cross-origin-opener-policy"] == "same-origin"
        assert headers["cache-control"] == ("max-age=86400" if "." in path else "no-store")
        assert "set-cookie" not in headers
        assert not {name for name in headers if name.startswith("access-control")}


def test_no_address_leads_to_another_machine(tmp_path, labelling, monkeypatch):
    made, said = labelling(), []
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.1 1 10.0.0.2 22")
    thread = threading.Thread(
        target=serve,
        args=(made.store, "q"),
        kwargs={"title": "t", "port": 0, "people": ["ada", "bob"], "tell": said.append},
        daemon=True,
    )
    thread.start()
    while len(said) < 3:
        time.sleep(0.02)
    ada, bob, tunnel = said
    found = re.fullmatch(r"ada: http://127\.0\.0\.1:(\d+)(/[0-9a-f]{32}/)", ada)
    port = int(found[1])
    assert re.fullmatch(rf"from your own machine: ssh -L {port}:127\.0\.0\.1:{port} \S+", tunnel)
    for address in {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}:
        if not address.startswith(("127.", "::1")):
            with pytest.raises(OSError):
                socket.create_connection((address, port), timeout=1).close()
    with pytest.raises(UsageError, match=f"port {port} of this machine cannot be used"):
        serve(made.store, "q", title="t", port=port)
    raw(port, f"POST {found[2]}end HTTP/1.1\r\ncontent-type: {FORM['content-type']}\r\n"
              "content-length: 0\r\n")  # fmt: skip
    thread.join(20)
    key = tmp_path / "feedback.key"
    assert key.stat().st_mode & 0o777 == 0o600
    again = []
    key.write_bytes(b"short")
    with pytest.raises(UsageError, match="feedback.key is damaged"):
        serve(made.store, "q", title="t", port=0, tell=again.append)
    assert not again
