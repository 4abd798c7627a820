"""A client of a local model server: Ollama's ``/api/chat``, or an OpenAI-compatible ``/v1/chat/completions``.

The second is what Ollama, llama.cpp's server, vLLM, LM Studio and xllamacpp offer alike. A server may be
absent, busy, slow or broken: every request has a time limit for the whole reply, is repeated a few times if
that may help, and fails with one sentence.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from base64 import b64encode
from collections.abc import Callable
from urllib.parse import quote, unquote, urlsplit

from tinyllm.errors import Error
from tinyllm.files import parse_json

OLLAMA, OPENAI = "/api/chat", "/v1/chat/completions"

LONGEST = 10**6  # seconds; a socket's timeout has a limit

KEPT = "/%:@!$&'()*+,;=?~-._"  # characters of a path and a query that stay as they are; others are encoded

PAUSE = 1.0  # seconds before a request is repeated for the first time

MOST_BYTES = 2**22  # of a reply; a judge's has less than a thousand
CHUNK = 2**16

REPEATED = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses that may differ the next time


class ServerFailure(OSError):
    """The server did not give a usable reply, however often it was asked."""


class ModelServer:
    """A chat model behind a URL.

    ``url`` is that of the server or of its chat endpoint: one that ends in ``/api/chat`` is spoken to in
    Ollama's protocol, any other in OpenAI's. A reply may take ``timeout`` seconds in total. A request that
    failed in a way that may pass is repeated up to ``retries`` times, after one second, then two, four and
    so on. A query in the URL is sent, and a name and password as HTTP's basic authentication. Raises
    ``Error`` for a URL that is not one, and for a ``timeout`` that is none.
    """

    def __init__(
        self,
        url: str,
        model: str,
        timeout: float = 120.0,
        retries: int = 3,
        on_retry: Callable[[str], None] = print,
    ):
        if not 0 < timeout <= LONGEST:
            raise Error(f"timeout is {timeout}: choose a number of seconds above 0 and up to {LONGEST:,}")
        try:
            parts = urlsplit(url)
            path, query = (quote(part, safe=KEPT) for part in (parts.path.rstrip("/"), parts.query))
            parts.hostname.encode("idna")
            known = parts.scheme in ("http", "https") and parts.port != 0 and not parts.fragment
        except (ValueError, AttributeError):  # brackets, port, or name of the host; there is none
            known = False
        if not known or re.search(r"[\x00-\x20\x7f]", url):  # urlsplit removes some of these
            raise Error(f"{url!r} is not the URL of a server: give one such as http://localhost:11434")
        if not path.endswith((OLLAMA, OPENAI)):
            path = path.removesuffix("/v1") + OPENAI
        self.https, self.address, self.path = parts.scheme == "https", parts.netloc.rpartition("@")[2], path
        self.target, self.headers = f"{path}?{query}" if query else path, {"Content-Type": "application/json"}
        if parts.username is not None:
            name = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self.headers["Authorization"] = f"Basic {b64encode(name).decode()}"
        self.url, self.model = f"{parts.scheme}://{self.address}{path}", model
        self.timeout, self.retries, self.on_retry = timeout, retries, on_retry

    def check(self) -> None:
        """Ask for a short reply, once. Raises ``Error`` if the server is absent or does not give one."""
        try:
            self._ask(self._request("Reply with the word yes.", max_tokens=8))
        except (ServerFailure, OSError) as error:
            raise Error(
                f"no model server replies at {self.url} ({_reason(error)}): start one, for example Ollama "
                "with `ollama serve`, or give the URL of another with --server"
            ) from None

    def chat(self, question: str, max_tokens: int = 512, seed: int = 0) -> str:
        """The reply to a user's message, at temperature 0.

        Raises ``ServerFailure`` if the server fails ``retries + 1`` times, and ``Error`` if it refuses the
        request, for example because it does not have the model.
        """
        request = self._request(question, max_tokens, seed)
        for attempt in range(self.retries + 1):
            try:
                return self._ask(request)
            except OSError as error:  # also of ServerFailure
                failure = _reason(error)
            if attempt < self.retries:
                self.on_retry(f"{self.url}: {failure}; asking again")
                time.sleep(PAUSE * 2**attempt)
        raise ServerFailure(f"the model server {self.url} failed {self.retries + 1} times ({failure})")

    def _request(self, question: str, max_tokens: int, seed: int = 0) -> dict:
        request = {"model": self.model, "messages": [{"role": "user", "content": question}], "stream": False}
        if not self.path.endswith(OLLAMA):
            return request | {"temperature": 0, "seed": seed, "max_tokens": max_tokens}
        # Without num_ctx, Ollama silently drops the beginning of a prompt that exceeds its default.
        context = 2048 + len(question.encode()) // 2
        options = {"temperature": 0, "seed": seed, "num_predict": max_tokens, "num_ctx": context}
        return request | {"options": options}

    def _ask(self, request: dict) -> str:
        deadline = time.monotonic() + self.timeout
        kind = http.client.HTTPSConnection if self.https else http.client.HTTPConnection
        connection = kind(self.address, timeout=self.timeout)
        try:
            body = json.dumps(request).encode()
            connection.request("POST", self.target, body, self.headers)
            socket = connection.sock  # the connection may hand it over to the response
            response = connection.getresponse()
            data = _read(response, socket, deadline)
        except http.client.HTTPException as error:
            raise ServerFailure(f"its reply is not HTTP ({type(error).__name__})") from None
        finally:
            connection.close()
        if response.status in REPEATED:
            raise ServerFailure(f"status {response.status}: {_excerpt(data)}")
        if response.status != 200:
            raise Error(
                f"the model server {self.url} refuses the request for the model {self.model!r} (status "
                f"{response.status}: {_excerpt(data)}): correct --server or --judge"
            )
        return self._content(data)

    def _content(self, data: bytes) -> str:
        try:
            match parse_json(data):
                case {"choices": [{"message": {"content": str(content)}}, *_]}:  # OpenAI
                    return content
                case {"message": {"content": str(content)}}:  # Ollama
                    return content
        except ValueError:
            pass
        raise ServerFailure(f"its reply has no message: {_excerpt(data)}")


def _read(response, socket, deadline: float) -> bytes:
    """The whole reply; a server that sends a byte now and then does not extend its time."""
    data = b""
    while len(data) <= MOST_BYTES:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        socket.settimeout(left)
        chunk = response.read1(CHUNK)
        if not chunk:
            return data
        data += chunk
    raise ServerFailure(f"its reply has more than {MOST_BYTES:,} bytes")


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no reply in time"
    return error.strerror or str(error)


def _excerpt(data: bytes) -> str:
    """The beginning of a reply, for a message."""
    return " ".join(data[:200].decode("utf-8", errors="replace").split()) or "empty"
