"""``tinyllm serve``: an HTTP server with OpenAI's API, and a page to chat, look inside and watch runs."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from tinyllm.backend.dtypes import autocast
from tinyllm.checks import pip_install
from tinyllm.cli.options import DeviceOptions, TextModelOptions, move, option
from tinyllm.errors import Error
from tinyllm.files import printable
from tinyllm.models.rope import longest_cached
from tinyllm.serve.engine import Engine
from tinyllm.training.config import flag

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LONGEST = 8192  # tokens of a conversation, unless --context says otherwise
LONGEST_ANSWER = 2048  # unless --max-tokens does
ABOUT_MODEL = "adapter no_bos device dtype gpu_memory slots queue context max_tokens".split()
KEY = "TINYLLM_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeConfig(DeviceOptions, TextModelOptions):
    """Serve a model over HTTP, with OpenAI's API and a page for the browser.

    On the page, click a word of an answer to see what else it might have been, where the model looked, and
    how the word formed.

    Prints its address on stdout, and a line for each request, without its content, on stderr. Ctrl-C or
    SIGTERM ends it; answers in progress have five seconds to finish.

    Example: tinyllm serve --model smollm2 --port 8080

    To watch runs in progress: tinyllm serve --watch runs/small runs/llama
    """

    smaller: ClassVar = ["fewer --slots", "a smaller --context"]

    watch: Annotated[tuple[Path, ...], option("DIR ...", "")] = ()
    """Show the losses, samples and throughput of runs on the page; --run and --model are then optional."""
    host: Annotated[str, option("NAME")] = "127.0.0.1"
    """Address to listen on. Other than this one, anyone in the network can use the server: give --api-key."""
    port: Annotated[int, option("N")] = 8080
    """Port to listen on; 0 chooses a free one."""
    slots: Annotated[int, option("N")] = 4
    """Number of answers that are generated at once, and of conversations whose beginning is kept."""
    queue: Annotated[int, option("N")] = 32
    """Number of requests that may wait for a slot; more get status 503."""
    context: Annotated[int | None, option("N", f"the model's, at most {LONGEST}")] = None
    """Most tokens of a conversation, its answer included. Memory grows with the longest, and --slots."""
    max_tokens: Annotated[int | None, option("N", f"{LONGEST_ANSWER}, at most the context")] = None
    """Maximum number of tokens of an answer, and their number if a chat request does not say it."""
    api_key: Annotated[str | None, option("KEY", f"the environment variable {KEY}, if set")] = None
    """Key that clients must send. On the command line other users of the machine can see it."""
    cors: Annotated[str | None, option("ORIGIN", "none")] = None
    """Let web pages of this origin use the server, such as http://localhost:3000; * stands for all."""

    @property
    def serves_model(self) -> bool:
        return not self.watch or self.run is not None or self.model is not None

    @property
    def name(self) -> str:
        """The model's name in the API."""
        name = self.model if self.run is None else str(self.run)
        return printable(Path(name).name if Path(name).expanduser().exists() else name)


def run(config: ServeConfig) -> None:
    """Load the model and serve it until a signal arrives.

    Raises Error before the model is loaded if an option is out of range or the port cannot be used, and
    KeyboardInterrupt, with the signal's number and a message, at the end.
    """
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise Error(f"serve needs {' and '.join(missing)}: {pip_install('serve')}")
    config.check_least(slots=1, queue=1, max_tokens=1, context=2)
    given = [flag(name) for name in ABOUT_MODEL if getattr(config, name) != getattr(ServeConfig, name)]
    if given and not config.serves_model:
        raise Error(f"{given[0]} is about a model, and only runs are watched: give --model or --run, too")
    if not 0 <= config.port <= 65535:
        raise Error(f"port is {config.port}: choose a number from 0 to 65535")
    api_key = config.api_key if config.api_key is not None else os.environ.get(KEY) or None
    if api_key is not None and not re.fullmatch("[!-~]+", api_key):
        raise Error("api_key is empty or has spaces or unusual characters: use letters and digits")
    if config.cors is not None and not re.fullmatch(r"\*|https?://[^/\s]+", config.cors):
        raise Error(f"cors is {config.cors!r}: give an origin such as http://localhost:3000, or * for all")
    from tinyllm.serve.server import bound, serve  # needs the extra
    from tinyllm.serve.watch import watched

    device = config.open_device()
    if config.serves_model:
        config.find()
    runs = watched(config.watch)
    listening = bound(config.host, config.port)
    try:
        _log_to_stderr()
        with autocast(config.dtype):
            app = _app(config, device, runs, api_key)
            address = _address(config.host, listening.getsockname()[1])
            number = serve(app, listening, lambda: _welcome(config, address))
    finally:
        listening.close()
    raise KeyboardInterrupt(number, "the server has ended")


def _app(config: ServeConfig, device, runs: list, api_key: str | None):
    """The application: the page, and the endpoints of the model, of looking into it, and of the runs."""
    from tinyllm.serve.app import create_app
    from tinyllm.serve.look import look_routes
    from tinyllm.serve.page import OPEN_PATHS, page_routes
    from tinyllm.serve.watch import watch_routes

    engine, max_tokens, routes = None, None, [*page_routes(bool(runs)), *(watch_routes(runs) if runs else [])]
    if config.serves_model:
        model, tokenizer = config.load(config.weights_dtype)
        move(model, device)
        capacity = config.context or min(longest_cached(model.config), LONGEST)
        engine = Engine(model, tokenizer, config.name, config.slots, capacity, config.queue)
        max_tokens = config.max_tokens or min(capacity, LONGEST_ANSWER)
        routes += look_routes(engine)
    hosts = LOOPBACK if config.host in LOOPBACK and api_key is None else ()
    cors = () if config.cors is None else (config.cors,)
    return create_app(engine, max_tokens, api_key, cors, hosts, routes, OPEN_PATHS)


def _address(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _welcome(config: ServeConfig, address: str) -> None:
    if config.serves_model:
        print(f"serving {config.name} at {address}/v1, with a page at {address}/", flush=True)
    else:
        print(f"watching {', '.join(map(str, config.watch))} at {address}/", flush=True)


def _log_to_stderr() -> None:
    """A line for each request, and errors of the server with their traceback."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (("tinyllm.serve", logging.INFO), ("uvicorn.error", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.addHandler(handler)
        logger.propagate = False
