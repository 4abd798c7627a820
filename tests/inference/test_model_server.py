"""The client of a model server, against a small server that fails in every way."""

import base64
import queue
import re
import socket
import threading
import time

import pytest
from support.model_server import FakeServer, dripping

from tinyllm.errors import Error
from tinyllm.inference import model_server
from tinyllm.inference.model_server import ModelServer, ServerFailure


def client(url, **options):
    return ModelServer(url, "judge", **dict(timeout=5.0, retries=2, on_retry=lambda _: None) | options)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr("tinyllm.inference.model_server.PAUSE", 0.001)


@pytest.mark.parametrize("suffix", ["/api/chat", "/api/chat/"])
def test_ollamas_protocol(suffix):
    with FakeServer(lambda question: question.upper()) as server:
        assert client(server.url + suffix).chat("grüße", max_tokens=7, seed=3) == "GRÜSSE"
    ((path, body),) = server.requests
    assert path == "/api/chat"
    assert (body["model"], body["stream"]) == ("judge", False)
    assert body["messages"] == [{"role": "user", "content": "grüße"}]
    options = body["options"]
    assert (options["temperature"], options["seed"], options["num_predict"]) == (0, 3, 7)
    assert options["num_ctx"] == 2048 + 3  # half of the seven bytes


def test_a_reply_is_not_read_after_its_time():
    with pytest.raises(TimeoutError):
        model_server._read(None, None, time.monotonic() - 1)


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_openais_protocol(suffix):
    with FakeServer(lambda question: question.upper()) as server:
        assert client(server.url + suffix).chat("hello", max_tokens=7, seed=3) == "HELLO"
    ((path, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert (body["temperature"], body["seed"], body["max_tokens"], body["stream"]) == (0, 3, 7, False)


@pytest.mark.parametrize(
    "url",
    [
        *("localhost:11434", "", "ftp://a/b", "http://", "http://host:port", "http://a:99999", "http://a:0"),
        *("http://[::1", "http://[x]", "http://a..b", "http:// x", " http://a", "http://a/\n", "http://a b"),
        *("http://a/#part", f"http://{'a' * 64}", "http://a/\udcff"),
    ],
)
def test_what_is_not_a_url_is_refused(url):
    with pytest.raises(Error, match="is not the URL"):
        client(url)


@pytest.mark.parametrize("timeout", [0, -1, 1e30, float("inf"), float("nan")])
def test_a_timeout_that_no_socket_has_is_refused(timeout):
    with pytest.raises(Error, match=re.escape(f"timeout is {timeout}:")):
        client("http://localhost", timeout=timeout)


def test_query_password_and_characters_beyond_ascii_are_sent():
    with FakeServer() as server:
        host = server.url.removeprefix("http://")
        judge = client(f"http://us%20er:p%40ss@{host}/ü/v1?key=5&ä=%20")
        assert judge.chat("x") == "yes"
        assert client(server.url).chat("x") == "yes"
    (path, _), _ = server.requests
    assert path == "/%C3%BC/v1/chat/completions?key=5&%C3%A4=%20"
    name, nothing = (headers["Authorization"] for headers in server.headers)
    assert base64.b64decode(name.removeprefix("Basic ")) == b"us er:p@ss" and nothing is None
    assert "key" not in judge.url and "p%40ss" not in judge.url


@pytest.mark.parametrize(
    "failure",
    [500, 503, 429, b"", b"not JSON", b"[]", b'{"choices": []}', b'{"message": {"content": null}}', b"\xff"],
)
def test_a_failure_is_repeated_up_to_the_limit(failure):
    failures, said = [failure, failure], []
    with FakeServer(lambda _: failures.pop() if failures else "at last") as server:
        assert client(server.url, on_retry=said.append).chat("x") == "at last"
    assert len(server.asked) == 3 and len(said) == 2
    with FakeServer(lambda _: failure) as server:
        with pytest.raises(ServerFailure, match="failed 3 times"):
            client(server.url).chat("x")
        assert len(server.asked) == 3


def test_the_pause_doubles(monkeypatch):
    pauses = []
    monkeypatch.setattr("tinyllm.inference.model_server.PAUSE", 1.0)
    monkeypatch.setattr("time.sleep", pauses.append)
    with FakeServer(lambda _: 500) as server, pytest.raises(ServerFailure):
        client(server.url, retries=3).chat("x")
    assert pauses == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("status", [400, 401, 404, 301])
def test_a_refusal_is_not_repeated(status):
    with FakeServer(lambda _: status) as server, pytest.raises(Error, match=f"status {status}.*on purpose"):
        client(server.url).chat("x")
    assert len(server.asked) == 1


def test_a_server_that_hangs_is_given_up():
    with FakeServer(lambda _: 30.0) as server:
        started = time.monotonic()
        with pytest.raises(ServerFailure, match="no reply in time"):
            client(server.url, timeout=0.1, retries=1).chat("x")
        assert len(server.asked) == 2 and time.monotonic() - started < 5


def test_a_server_that_sends_a_byte_at_a_time_is_given_up():
    ports, stop = queue.Queue(), threading.Event()
    thread = threading.Thread(target=dripping, args=(ports.put, 30, stop), daemon=True)
    thread.start()
    started = time.monotonic()
    with pytest.raises(ServerFailure, match="no reply in time"):
        client(f"http://127.0.0.1:{ports.get()}", timeout=0.2, retries=0).chat("x")
    assert time.monotonic() - started < 5
    stop.set()
    thread.join()


def test_a_reply_without_end_is_given_up(monkeypatch):
    monkeypatch.setattr("tinyllm.inference.model_server.MOST_BYTES", 1000)
    with (
        FakeServer(lambda _: b" " * 100_000) as server,
        pytest.raises(ServerFailure, match="more than 1,000"),
    ):
        client(server.url, retries=0).chat("x")


def test_what_is_no_http_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            connection, _ = listening.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"220 mail.example.org\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(Error, match="not HTTP"):
            client(f"http://127.0.0.1:{listening.getsockname()[1]}").check()


def test_an_absent_server_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with pytest.raises(Error, match=f"no model server replies at http://127.0.0.1:{port}/api/chat") as raised:
        client(f"http://127.0.0.1:{port}/api/chat").check()
    assert "ollama serve" in str(raised.value) and "\n" not in str(raised.value)


def test_check_asks_once():
    with FakeServer() as server:
        client(server.url).check()
    assert len(server.asked) == 1
    with FakeServer(lambda _: 500) as server, pytest.raises(Error, match=r"no model server replies.*500"):
        client(server.url).check()
    assert len(server.asked) == 1
