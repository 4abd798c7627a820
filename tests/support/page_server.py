"""``tinyllm serve`` with a tiny chat model, in a thread, whose answers are scripted."""

import contextlib
import json
import socket
import threading
import time
import urllib.error
import urllib.request

import numpy as np
import pytest
from support.chat_model import BYTE_ID, CHATML, END, write_model
from support.instructions import render_in_process

from tinyllm.inference.chat import load_model_and_tokenizer

uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

import tinyllm.serve.scheduler  # noqa: E402
from tinyllm.serve.app import create_app  # noqa: E402
from tinyllm.serve.engine import Engine  # noqa: E402
from tinyllm.serve.look import look_routes  # noqa: E402
from tinyllm.serve.page import OPEN_PATHS, page_routes  # noqa: E402
from tinyllm.serve.watch import watch_routes, watched  # noqa: E402


class Answers:
    """In place of ``choose_tokens``: the tokens of scripted answers, one after the other.

    An answer is a str, which ends, or a list of str, of numbers (seconds to wait) and of byte values, which
    ends too. Without an answer, the model ends at once. ``sampling`` records the arguments of every call.
    """

    def __init__(self):
        self.sampling, self.replaced = [], threading.Event()
        self.say()

    def say(self, *answers):
        """Replace what is left of the script, and end its waiting."""
        self.replaced.set()
        self.replaced = threading.Event()
        self.waiting, self.current = list(answers), iter(())

    def __call__(self, logits, random, *sampling):
        self.sampling.append(sampling)
        token = next(self.current, None)
        if token is None:
            self.current = self._tokens(self.waiting.pop(0) if self.waiting else "")
            token = next(self.current)
        return np.array([token])

    def _tokens(self, answer):
        replaced = self.replaced
        for part in [answer] if isinstance(answer, str) else answer:
            if isinstance(part, float):
                replaced.wait(part)
                continue
            yield from [part] if isinstance(part, int) else [BYTE_ID[byte] for byte in part.encode()]
        yield END


class PageServer:
    """A context manager; ``say`` sets the next answers, ``url`` is where the page is.

    ``runs`` are watched; ``chat=False`` is a model without a chat template, ``model=False`` none at all.
    """

    def __init__(self, folder, runs=(), chat=True, model=True, api_key=None):
        self.answers = Answers()
        self.say = self.answers.say
        self.engine, routes = None, [*page_routes(bool(runs)), *watch_routes(watched(runs))]
        if model:
            folder.mkdir(exist_ok=True)
            write_model(folder, CHATML if chat else None, context=1024)
            self.model, self.tokenizer = load_model_and_tokenizer(str(folder))
            self.engine = Engine(self.model, self.tokenizer, "tiny")
            routes += look_routes(self.engine)
        self.app = create_app(self.engine, api_key=api_key, routes=routes, open_paths=OPEN_PATHS)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/"
        config = uvicorn.Config(self.app, log_config=None, lifespan="on", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)

    def __enter__(self):
        self.patches = pytest.MonkeyPatch()
        self.patches.setattr(tinyllm.serve.scheduler, "choose_tokens", self.answers)
        render_in_process(self.patches)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        return self

    def stop(self):
        """End the server; an answer in progress breaks off after a second."""
        self.server.should_exit = True
        self.thread.join()

    def __exit__(self, *_):
        self.stop()
        self.patches.undo()

    def post(self, path, body, **headers):
        """The status and the JSON of the reply."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
        )
        return self._read(request)

    def get(self, path):
        return self._read(urllib.request.Request(self.url + path))

    def _read(self, request):
        with contextlib.ExitStack() as stack:
            try:
                reply = stack.enter_context(urllib.request.urlopen(request, timeout=20))
            except urllib.error.HTTPError as error:
                reply = error
            return reply.status, json.loads(reply.read())
