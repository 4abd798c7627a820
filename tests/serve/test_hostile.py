"""Requests and clients that nobody wants: the right status, no traceback in the reply, the server lives."""

import asyncio
import contextlib
import json
import logging
import re
import resource
import socket
import threading
import time
from http.client import HTTPConnection
from urllib.parse import urlsplit

import pytest
from support.serving import Scripted, ask, busy, post, serving, tiny_chat_model, wait_until

from tinyllm import Error
from tinyllm.serve import app, look, streams
from tinyllm.serve import connection as module

CHAT, TEXT, LOOK = "/v1/chat/completions", "/v1/completions", "/tinyllm/inspect"


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    return tiny_chat_model(tmp_path_factory.mktemp("scripted"), Scripted)


@pytest.fixture(scope="module")
def server(scripted):
    with serving(*scripted, page=True) as (url, engine):
        yield url, engine
        assert_lives(url)


def assert_lives(url):
    status, _, body = post(url, CHAT, ask())
    assert status == 200 and body["choices"][0]["message"]["content"] == "Hello."


def assert_error(reply, *statuses):
    status, _, body = reply
    assert status in statuses, reply
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    text = json.dumps(body)
    assert len(text) < 2000 and not re.search(r"Traceback|File \"|\.py", text)


def assert_raw_error(found, status):
    """The same of a reply with its head."""
    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status)
    assert b"content-type: application/json" in head.lower() and b"connection: close" in head.lower()
    assert_error((status, {}, json.loads(body)), status)


def connect(url):
    host, port = urlsplit(url).netloc.split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def answer_to(url, data):
    """What the server sends back to these bytes, until it closes the connection or is silent for a second."""
    with connect(url) as connection:
        connection.sendall(data)
        connection.settimeout(1)
        found = b""
        with contextlib.suppress(OSError):
            while chunk := connection.recv(65536):
                found += chunk
        return found


def request_of(body, length=None, path=CHAT):
    """The bytes of a POST request."""
    length = len(body) if length is None else length
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    return f"{head}\r\nContent-Length: {length}\r\n\r\n".encode() + body


# -------------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    "body",
    [
        b"", b"Hello", b"{", b"{'a': 1}", b"\xff\xfe", b"\x00" * 100, b"[" * 100_000, b'{"a":' * 100_000,
        b'{"messages": NaN}', b'{"temperature": Infinity}', b'{"a": 1e999}', b'{"a": 1, "a": 2}',
        b'{"a": "\\ud800"}', b'{"a": ' + b"9" * 10_000 + b"}", b"[]", b'"x"', b"5", b"null", b"true",
        b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_bodies_that_are_no_requests(server, path, body):
    assert_error(post(server[0], path, body), 400)


@pytest.mark.parametrize(
    "values",
    [
        {"messages": {"role": "user"}}, {"messages": [[[]]]}, {"messages": "x"}, {"messages": [None]},
        {"temperature": -1}, {"temperature": "hot"}, {"max_tokens": -5}, {"max_tokens": 10**30}, {"n": -1},
        {"seed": 2**70}, {"top_p": -0.5}, {"stop": {"a": []}}, {"stream": "yes"}, {"logprobs": 3},
        {"stop": [""]},
        {"messages": [{"role": "user", "content": {"a": "b"}}]}, {"no_such_parameter": 1}, {"tools": [{}]},
        {"a" * 10_000: 1}, {"temperature": 10**4000}, {"top_logprobs": True},
    ],
)  # fmt: skip
def test_values_of_the_wrong_kind(server, values):
    assert_error(post(server[0], CHAT, ask() | values), 400)


def test_unknown_models_and_paths_and_wrong_methods(server):
    url = server[0]
    assert_error(post(url, CHAT, ask(model="gpt-5")), 404)
    assert_error(post(url, CHAT, ask(model="../" * 500)), 404)
    for path in ("/v1/embeddings", CHAT + "/", "/" + "x" * 5000, "/%2e%2e/etc/passwd", "/v1/models/a/b"):
        assert_error(post(url, path, None, method="GET"), 404)
    for method, path in (("GET", CHAT), ("DELETE", "/v1/models"), ("PUT", TEXT), ("PATCH", "/health")):
        reply = post(url, path, None, method=method)
        assert_error(reply, 405)
        assert reply[1]["allow"]


def test_a_body_of_100_megabytes_is_refused_and_not_kept(server):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chunk, size = b"x" * 2**20, 100 * 2**20
    with connect(server[0]) as connection:
        connection.sendall(request_of(b"", size))
        for _ in range(100):
            connection.sendall(chunk)
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    with connect(server[0]) as connection:  # without a length that says so
        connection.sendall(request_of(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
        for _ in range(100):
            connection.sendall(b"100000\r\n" + chunk + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 413 ")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kB


def test_a_long_prompt_is_refused(server):
    assert_error(post(server[0], CHAT, ask("x" * 2_000_000)), 400)
    assert_error(post(server[0], TEXT, {"prompt": "x" * 100_000}), 400)
    assert_error(post(server[0], TEXT, {"prompt": ["x"] * 1000}), 400)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, ask("x" * 80_000)),
        (TEXT, {"prompt": "x" * 80_000}),
        (TEXT, {"prompt": ["a", [5] * 257]}),
        ("/tinyllm/inspect", {"prompt": "x" * 80_000}),
        ("/tinyllm/inspect", {"messages": ask("x" * 80_000)["messages"]}),
    ],
)
def test_what_cannot_fit_the_context_is_neither_rendered_nor_encoded(server, monkeypatch, path, body):
    monkeypatch.setattr(app, "in_thread", None)
    monkeypatch.setattr(look, "in_thread", None)
    reply = post(server[0], path, body)
    assert_error(reply, 400)
    assert reply[2]["error"]["code"] == "context_length_exceeded"


# ------------------------------------------------------------------------------------- clients


def test_requests_that_are_not_http(server):
    for data in (
        b"\x16\x03\x01\x02\x00" + b"\x00" * 100,  # TLS
        b"GET\r\n\r\n",
        b"\r\n" * 3,
        b"GET / HTTP/1.1\r\nHost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
    ):
        assert_raw_error(answer_to(server[0], data), 400)


@pytest.mark.parametrize("size", [100, 100_000])
def test_a_flood_of_headers(server, size):
    flood = b"".join(b"X-%d: %s\r\n" % (i, b"y" * size) for i in range(200_000 // size))
    found = answer_to(server[0], b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + flood + b"\r\n")
    assert found.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 ")) or found == b""


def test_200_connections_at_once(server):
    url, engine = server
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(url)) for _ in range(100)]
        for connection in idle[:50]:  # half a request
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Le")
        replies = []
        threads = [
            threading.Thread(target=lambda: replies.append(post(url, CHAT, ask(), timeout=60)))
            for _ in range(100)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(replies) == 100
        for reply in replies:
            if reply[0] == 200:
                assert reply[2]["choices"][0]["message"]["content"] == "Hello."
            else:
                assert_error(reply, 503)
                assert int(reply[1]["retry-after"]) >= 1
        assert sum(reply[0] == 200 for reply in replies) >= 7  # what the slots and the queue hold
        assert_lives(url)
    wait_until(lambda: busy(engine) == 0)


def test_a_body_that_does_not_arrive_is_given_up(server, monkeypatch):
    monkeypatch.setattr(app, "BODY_TIMEOUT", 0.2)
    assert_raw_error(answer_to(server[0], request_of(b'{"model":', 100)), 408)


def test_headers_that_do_not_arrive_are_given_up(server, monkeypatch):
    """Also those of a second request, and though a byte comes now and then."""
    monkeypatch.setattr(module, "HEAD_TIMEOUT", 0.4)
    part, whole = b"GET /health HTTP/1.1\r\nHost: local", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for before in (b"", whole):
        with connect(server[0]) as connection:
            connection.sendall(before)
            found = b""
            while before and not found.endswith(b"}"):
                found += connection.recv(65536)
            started = time.monotonic()
            for byte in part:
                time.sleep(0.03)
                with contextlib.suppress(OSError):  # it is closed
                    connection.sendall(bytes([byte]))
            assert_raw_error(connection.recv(65536), 408)
            assert time.monotonic() - started < 5
    assert answer_to(server[0], b"") == b""


@pytest.mark.parametrize("rest", [b"x", b"x" * 100], ids=["a part", "all"])
@pytest.mark.parametrize(("path", "length", "status"), [("/nope", 100, 404), (CHAT, 10**9, 413)])
def test_a_body_that_comes_after_the_answer_is_given_up(server, monkeypatch, path, length, status, rest):
    monkeypatch.setattr(module, "HEAD_TIMEOUT", 0.2)
    with connect(server[0]) as connection:
        connection.sendall(request_of(b"", length, path))
        found = b""
        while not found.endswith(b"}"):
            found += connection.recv(65536)
        assert found.startswith(b"HTTP/1.1 %d " % status)
        connection.sendall(rest)
        connection.settimeout(4)  # less than the time after which idle connections are closed
        assert connection.recv(65536) == b""


def test_a_body_that_is_wrong_after_the_answer_ends_the_connection(server, caplog):
    head = b"POST /nope HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(server[0]) as connection:
        connection.sendall(head)
        assert connection.recv(65536).startswith(b"HTTP/1.1 404 ")
        connection.sendall(b"no length\r\n")
        while found := connection.recv(65536):
            assert b"HTTP/1.1" not in found
    assert "LocalProtocolError" not in caplog.text


def test_a_request_that_takes_longer_than_its_headers_may(scripted, monkeypatch):
    monkeypatch.setattr(module, "HEAD_TIMEOUT", 0.2)
    monkeypatch.setattr(Scripted, "seconds", 0.1)
    with (
        serving(*scripted) as (url, _),
        contextlib.closing(HTTPConnection(urlsplit(url).netloc)) as connection,
    ):
        for _ in range(2):  # the second on the same connection
            connection.request("POST", CHAT, json.dumps(ask()))
            assert json.loads(connection.getresponse().read())["choices"][0]["message"]["content"] == "Hello."


def test_connections_beyond_the_limit_are_refused(scripted, monkeypatch):
    monkeypatch.setattr(module, "CONNECTIONS", 3)
    with serving(*scripted) as (url, _), contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(url)) for _ in range(3)]
        for _ in range(2):
            found = answer_to(url, request_of(json.dumps(ask()).encode()))
            assert_raw_error(found, 503)
            assert b"retry-after: " in found.lower()
        for connection in idle:
            connection.close()
        wait_until(lambda: post(url, CHAT, ask())[0] == 200)


def test_a_client_that_leaves_in_the_middle_of_its_body(server):
    with connect(server[0]) as connection:
        connection.sendall(request_of(b'{"model":', 100))
    assert_lives(server[0])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_within_a_step(scripted, monkeypatch, stream):
    """The row is free at the first step that begins after the server knows: it computes no further token."""
    monkeypatch.setattr(Scripted, "seconds", 0.05)
    monkeypatch.setattr(Scripted, "script", b"x" * 1000)
    with serving(*scripted, slots=1) as (url, engine):
        with connect(url) as connection:
            connection.sendall(request_of(json.dumps(ask(stream=stream)).encode()))
            wait_until(
                lambda: (row := engine.scheduler.rows[0]) and row.left < row.request.max_new_tokens - 3
            )
            (row,) = engine.scheduler.rows
        left = time.monotonic()
        tokens = len(row.text)
        wait_until(lambda: busy(engine) == 0)
        assert time.monotonic() - left < 1.0
        assert row.request.cancelled and len(row.text) <= tokens + 3
        monkeypatch.setattr(Scripted, "script", b"Hello.")
        assert_lives(url)


def test_nothing_is_sent_to_a_client_that_was_lost():
    """asyncio tells so in its next round, however many events wait; from the fifth write on it complains."""
    sent, gone = [], []

    async def events():
        for number in range(9):
            yield str(number)

    async def receive():
        await asyncio.sleep(60)

    async def send(message):
        if not gone:
            sent.append(message)
            asyncio.get_running_loop().call_soon(gone.append, True)

    asyncio.run(streams.EventStream(events(), lambda: None)({}, receive, send))
    assert len(sent) == 2  # the head, and the first event


def test_looks_inside_do_not_keep_answers_waiting(scripted, monkeypatch):
    """One runs between two steps, none whose client has left, and no more wait than the queue has places."""
    order, go, forward = [], threading.Event(), Scripted.forward
    request = {"prompt": "Hi"}

    def slow(*_):
        order.append("look")
        return {} if go.wait(10) else None

    def step(*args, **options):
        order.append("step")
        return forward(*args, **options)

    monkeypatch.setattr(look.Looker, "look", slow)
    monkeypatch.setattr(Scripted, "forward", step)
    with serving(*scripted, page=True, queue=2) as (url, engine), contextlib.ExitStack() as clients:

        def send(path, body):
            connection = clients.enter_context(connect(url))
            connection.sendall(request_of(json.dumps(body).encode(), path=path))
            return connection

        def wait_for(count):
            wait_until(lambda: sum(not future.cancelled() for _, future in engine._functions) == count)

        clients.callback(go.set)
        send(LOOK, request)
        wait_until(lambda: order == ["look"])
        gone = send(LOOK, request)
        wait_for(1)
        gone.close()
        wait_for(0)
        for _ in range(2):
            send(LOOK, request)
        wait_for(2)
        assert_error(post(url, LOOK, request), 503)
        answer = send(TEXT, request)
        wait_until(lambda: engine.scheduler.waiting)
        go.set()
        assert b" 200 OK" in answer.recv(65536)
        wait_until(lambda: busy(engine) == 0)
        with engine.scheduler.held(5):  # all slots and places, for prompts that are being prepared
            assert_error(post(url, LOOK, request), 503)
    assert order[:6] == ["look", "step"] * 3 and order.count("look") == 3


@pytest.mark.parametrize(
    "requests",
    [
        [request_of(json.dumps(ask(stream=True, logprobs=True, top_logprobs=20, n=3)).encode())],
        [b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n"] * 200,
        [b"GET /page.js HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"],
    ],
    ids=["stream", "pipeline", "close"],
)
def test_a_client_that_does_not_read_is_given_up(scripted, monkeypatch, requests):
    """The buffers between them and the server are full: sending takes forever."""
    monkeypatch.setattr(module, "SEND_TIMEOUT", 0.2)
    monkeypatch.setattr(Scripted, "script", b"x" * 200)
    made, lost, ended = module.Connection.connection_made, module.Connection.connection_lost, []

    def connection_made(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(module.Connection, "connection_made", connection_made)
    monkeypatch.setattr(module.Connection, "connection_lost", lambda *args: ended.append(lost(*args)))
    with serving(*scripted, page=True) as (url, engine), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, port = urlsplit(url).netloc.split(":")
        connection.connect((host, int(port)))
        for request in requests:
            connection.sendall(request)
        wait_until(lambda: ended, 4)
        wait_until(lambda: busy(engine) == 0)


def test_a_client_that_reads_slowly_does_not_keep_others_waiting(scripted, monkeypatch):
    monkeypatch.setattr(Scripted, "script", b"x" * 200)
    with serving(*scripted, slots=2) as (url, engine), connect(url) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = ask(stream=True, logprobs=True, top_logprobs=20, n=2)
        for _ in range(3):  # a megabyte of events each
            connection.sendall(request_of(json.dumps(body).encode()))
        wait_until(lambda: busy(engine) == 2)
        wait_until(lambda: post(url, CHAT, ask(max_tokens=3))[0] == 200)


@pytest.mark.parametrize(
    ("error", "told", "logged"),
    [
        (RuntimeError("secret of file"), "an internal error: the server's log has the details", True),
        (Error("the weights are damaged"), "the weights are damaged", False),
    ],
)
def test_an_error_of_the_model_is_500_without_details(scripted, monkeypatch, caplog, error, told, logged):
    """Also for a page of an allowed origin, which needs the headers of CORS, and in the access log."""

    def fail(*_, **options):
        raise error

    origin = {"Origin": "http://allowed.example"}
    monkeypatch.setattr(logging.getLogger("tinyllm.serve"), "propagate", True)
    caplog.set_level(logging.INFO, "tinyllm.serve")
    with serving(*scripted, cors=tuple(origin.values())) as (url, engine):
        with monkeypatch.context() as patch:
            patch.setattr(Scripted, "forward", fail)
            reply = post(url, CHAT, ask(), origin)
            assert_error(reply, 500)
            assert (reply[2]["error"]["message"], "secret" in str(reply)) == (told, False)
            assert reply[1]["access-control-allow-origin"] == "http://allowed.example"
            _, _, data = post(url, CHAT, ask(stream=True))
            (event,) = [json.loads(line[6:]) for line in data.decode().splitlines() if "error" in line]
            assert event["error"]["message"] == told and b"[DONE]" not in data and b"secret" not in data
        assert busy(engine) == 0
        assert_lives(url)
    assert f"POST {CHAT} 500 " in caplog.text and ("RuntimeError: secret" in caplog.text) == logged


# ------------------------------------------------------------------------------------ browsers


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "[::1]"}, 200),
        ({"Host": "[", "Origin": "http://["}, 403),
        ({"Host": "127.0.0.1:5", "Origin": "http://127.0.0.1:5"}, 200),
        ({"Host": "127.0.0.1:5", "Origin": "http://127.0.0.1:6"}, 403),
        ({"Origin": "http://allowed.example"}, 200),
    ],
)
def test_pages_of_other_origins_are_refused(scripted, headers, status):
    options = dict(hosts=("127.0.0.1", "localhost", "::1"), cors=("http://allowed.example",))
    with serving(*scripted, **options) as (url, _):
        reply = post(url, CHAT, ask(), headers)
        assert reply[0] == status
        if status == 403:
            assert_error(reply, 403)
        allowed = reply[1].get("access-control-allow-origin")
        assert allowed == ("http://allowed.example" if "allowed" in headers.get("Origin", "") else None)
        preflight = {"Access-Control-Request-Method": "POST", "Origin": "http://evil.example"}
        assert post(url, CHAT, None, preflight, "OPTIONS")[0] == 400


def test_headers_that_are_not_addresses(server):
    """An origin that cannot be parsed is another one; a host that cannot be changes nothing."""
    for origin in ("http://[x", "http://[::1", "//[v1.a]b"):
        reply = post(server[0], "/health", None, {"Origin": origin}, "GET")
        assert_error(reply, 403)
        assert reply[2]["error"]["code"] == "wrong_origin"
    assert_error(post(server[0], "/nothing", None, {"Host": "[x"}, "GET"), 404)
    assert post(server[0], "/", None, {"Host": "[x"}, "GET")[0] == 200


def test_no_page_of_another_origin_may_use_a_server_without_cors(server):
    preflight = {"Access-Control-Request-Method": "POST", "Origin": "http://evil.example"}
    status, headers, _ = post(server[0], CHAT, None, preflight, "OPTIONS")
    assert status == 403 and not [name for name in headers if name.startswith("access-control")]
