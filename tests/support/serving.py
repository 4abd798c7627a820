"""A server in a thread of the test's process, a model that says what a test wants, and raw HTTP."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
from urllib.parse import urlsplit

import pytest
from support.chat_model import ANSWER, BYTE_ID, END, write_model

from tinyllm import Llama, load_model, load_tokenizer
from tinyllm.serve.engine import Engine

pytest.importorskip("uvicorn")

from tinyllm.serve.app import create_app
from tinyllm.serve.look import look_routes
from tinyllm.serve.page import page_routes
from tinyllm.serve.server import Server, bound

PROMPT = [BYTE_ID[byte] for byte in ANSWER.removeprefix("<|im_start|>").encode()]


class Scripted(Llama):
    """A chat model whose answer is ``script``; ``seconds`` is how long a step takes."""

    script, seconds = b"Hello.", 0.0

    def forward(self, ids, *, last_only=False, cache=None):
        time.sleep(self.seconds)
        logits = super().forward(ids, last_only=last_only, cache=cache)
        for row, text in enumerate(cache.texts):
            starts = [n for n in range(len(text) + 1) if text[max(0, n - len(PROMPT)) : n] == PROMPT]
            if starts:
                said = len(text) - starts[-1]
                logits.data[row, -1] = -50.0
                logits.data[row, -1, BYTE_ID[self.script[said]] if said < len(self.script) else END] = 50.0
        return logits


def tiny_chat_model(folder, kind=None):
    """A random chat model with a byte-level tokenizer, and its tokenizer; ``kind`` may be ``Scripted``."""
    write_model(folder)
    return load_model(folder) if kind is None else kind.from_pretrained(folder), load_tokenizer(folder)


@contextlib.contextmanager
def serving(model, tokenizer, slots=3, queue=4, capacity=None, page=False, **options):
    """Serve a model in another thread, with ``page`` also the page and its endpoint; gives (URL, engine)."""
    engine = Engine(model, tokenizer, "tiny", slots, capacity, queue)
    server = Server(
        create_app(engine, routes=[*page_routes(), *look_routes(engine)] if page else (), **options)
    )
    listening, loops = bound("127.0.0.1", 0), []

    async def run():
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[listening])

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", engine
    finally:
        for _ in range(2):  # the second does not wait for answers in progress
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loops[0].call_soon_threadsafe(server.stop)
        thread.join(20)
        assert not thread.is_alive()


def wait_until(condition, seconds=10.0):
    """Wait until a condition is true; fail if that takes too long."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def busy(engine) -> int:
    return sum(row is not None for row in engine.scheduler.rows)


def post(url, path, body, headers=None, method="POST", timeout=20):
    """Status, headers and body (parsed if it is JSON) of one request; ``body`` is bytes or an object."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)
    try:
        connection.request(method, path, data, {"Content-Type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        text = response.read()
        with contextlib.suppress(ValueError):
            text = json.loads(text)
        return response.status, dict(response.getheaders()), text
    finally:
        connection.close()


def ask(words="Hi", **more):
    """The body of a chat request."""
    return {"model": "tiny", "messages": [{"role": "user", "content": words}]} | more
