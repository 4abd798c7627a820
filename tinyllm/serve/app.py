"""The endpoints: OpenAI's API for one model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import Callable, Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from tinyllm.checks import check_at_least
from tinyllm.errors import Error
from tinyllm.files import parse_json
from tinyllm.serve.api import Limits, Options, check_model, parse_chat, parse_completion, too_long
from tinyllm.serve.engine import Answers, Cancelled, Engine, Stopped
from tinyllm.serve.errors import APIError, internal
from tinyllm.serve.guard import Guard
from tinyllm.serve.prompts import chat_prompt, text_prompt
from tinyllm.serve.replies import Chat, Completion, Envelope, model_object, usage_of
from tinyllm.serve.scheduler import Busy
from tinyllm.serve.streams import EventStream, watched

log = logging.getLogger("tinyllm.serve")

MAX_BODY = 8 * 2**20  # bytes: a context of a million tokens as text
BODY_TIMEOUT = 30.0  # seconds in which a body must arrive
AT_ONCE = 2  # prompts that are rendered and encoded at a time


def create_app(
    engine: Engine | None,
    max_tokens: int | None = None,
    api_key: str | None = None,
    cors: Sequence[str] = (),
    hosts: Sequence[str] = (),
    routes: Sequence[BaseRoute] = (),
    open_paths: Sequence[str] = (),
) -> Starlette:
    """The application for an engine, which it starts and stops; for None, of ``/health`` and ``routes``.

    An answer has at most ``max_tokens``, by default as many as the engine's capacity; for more ``Error`` is
    raised. With an ``api_key`` every path except ``/health`` and ``open_paths`` needs it. Pages of the
    origins ``cors``, and of no others, may send requests. Unless ``hosts`` is empty, a request must name one
    of them as its host (see ``Guard``). ``routes`` are additional endpoints, which find the engine in
    ``request.app.state.engine``.
    """
    always = [Route("/health", health, methods=["GET"])]
    endpoints = [
        Route("/v1/models", models, methods=["GET"]),
        Route("/v1/models/{name:path}", model, methods=["GET"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/completions", completions, methods=["POST"]),
    ]
    allowed = dict(allow_origins=list(cors), allow_methods=["GET", "POST"], allow_headers=["*"])
    guard = dict(api_key=api_key, origins=cors, hosts=hosts, open_paths=("/health", *open_paths))
    app = Starlette(
        routes=[*always, *([] if engine is None else endpoints), *routes],
        middleware=[*([Middleware(CORSMiddleware, **allowed)] if cors else []), Middleware(Guard, **guard)],
        exception_handlers={
            APIError: on_api_error,
            HTTPException: on_http_error,
            ClientDisconnect: on_disconnect,
            Error: on_error,
        },
        lifespan=_lifespan,
    )
    app.router.redirect_slashes = False
    app.state.engine = engine
    if engine is None:
        return app
    most = engine.capacity if max_tokens is None else check_at_least(max_tokens, 1, "max_tokens")
    if most > engine.capacity:
        raise Error(f"max_tokens is {most}: choose at most {engine.capacity:,}, the context")
    rows = engine.scheduler.queue + len(engine.scheduler.rows)
    vocab_size = engine.model.config.vocab_size
    app.state.prompts_at_once = asyncio.Semaphore(AT_ONCE)
    app.state.limits = Limits(context=engine.capacity, max_tokens=most, vocab_size=vocab_size, choices=rows)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: Starlette):
    engine = app.state.engine
    if engine is None:
        yield
        return
    engine.start()
    yield
    engine.close()
    await asyncio.to_thread(engine.join)


# ----------------------------------------------------------------------------------- endpoints


async def health(request: Request) -> Response:
    if request.app.state.engine is None:
        return JSONResponse({"status": "ok"})
    scheduler = request.app.state.engine.scheduler
    slots, idle, queued = len(scheduler.rows), scheduler.rows.count(None), len(scheduler.waiting)
    return JSONResponse({"status": "ok", "slots": slots, "busy": slots - idle, "queued": queued})


async def models(request: Request) -> Response:
    engine = request.app.state.engine
    return JSONResponse({"object": "list", "data": [model_object(engine.name, engine.created)]})


async def model(request: Request) -> Response:
    engine, name = request.app.state.engine, request.path_params["name"]
    check_model({"model": name}, {engine.name})
    return JSONResponse(model_object(engine.name, engine.created))


async def chat_completions(request: Request) -> Response:
    engine = request.app.state.engine
    body = await read_json(request)
    check_model(body, {engine.name})
    wanted = parse_chat(body, request.app.state.limits)
    if engine.tokenizer.chat_template is None:
        raise APIError(400, f"{engine.name} has no chat template: use /v1/completions", "messages")
    calls = [(chat_prompt, engine.tokenizer, wanted.messages, wanted.goes_on)]
    return await _answer(request, wanted, calls, Chat(engine.tokenizer))


async def completions(request: Request) -> Response:
    engine = request.app.state.engine
    body = await read_json(request)
    check_model(body, {engine.name})
    wanted = parse_completion(body, request.app.state.limits)
    calls = [(text_prompt, engine.tokenizer, prompt) for prompt in wanted.prompts]
    return await _answer(request, wanted, calls, Completion(engine.tokenizer))


async def _answer(request: Request, wanted: Options, calls, shapes: Chat | Completion) -> Response:
    """The reply, whole or as a stream, to the prompts that the ``calls`` (function, arguments) return.

    They take a while, so there must be a place in the queue first.
    """
    engine = request.app.state.engine
    try:
        with engine.scheduler.held(wanted.n * len(calls)):
            prompts = [await in_thread(request, *call) for call in calls]
        for ids in prompts:
            check_length(ids, engine.capacity)
        arguments = [wanted.arguments(ids, number) for ids in prompts for number in range(wanted.n)]
        answers = engine.submit(arguments, wanted.stops)
    except Busy:
        raise busy(engine.retry_after) from None
    except Stopped:
        raise stopped() from None
    envelope = Envelope(shapes, engine.name)
    if wanted.stream:
        return EventStream(_events(request, wanted, prompts, answers, envelope), answers.cancel)
    return JSONResponse(await _whole(request, wanted, prompts, answers, envelope))


async def _whole(request: Request, wanted: Options, prompts, answers: Answers, envelope: Envelope) -> dict:
    """The whole reply, when all answers are complete."""
    texts, tokens = [[] for _ in answers.each], [[] for _ in answers.each]
    ends = [None] * len(texts)
    async with watched(request.receive, answers.cancel):
        try:
            async for number, piece in answers:
                texts[number].append(piece.text)
                tokens[number] += piece.tokens
                ends[number] = piece.end
        except Cancelled:
            raise ClientDisconnect from None
        except Stopped:
            raise stopped() from None
        finally:
            answers.cancel()  # the others, if one failed
    parts = zip(map("".join, texts), tokens, ends)
    choices = [
        {"index": i} | envelope.shapes.choice(text, each, wanted.top is not None, end)
        for i, (text, each, end) in enumerate(parts)
    ]
    usage = usage_of(prompts, answers.each)
    _note(request, usage)
    return envelope.whole(choices, usage)


async def _events(request: Request, wanted: Options, prompts, answers: Answers, envelope: Envelope):
    """The events of a stream: who speaks, pieces of text, why each text ended, what was used."""
    shapes, more = envelope.shapes, {"usage": None} if wanted.include_usage else {}

    def part(number: int, choice: dict) -> str:
        return json.dumps(envelope.part([{"index": number} | choice], **more))

    try:
        if opening := shapes.opening():
            for number in range(len(answers.each)):
                yield part(number, opening)
        async for number, piece in answers:
            if piece.text or piece.tokens:
                yield part(number, shapes.chunk(piece, wanted.top is not None))
            if piece.end:
                yield part(number, shapes.closing(piece.end))
        usage = usage_of(prompts, answers.each)
        _note(request, usage)
        if wanted.include_usage:
            yield json.dumps(envelope.part([], usage=usage))
        yield "[DONE]"
    except Stopped:
        yield json.dumps(stopped().body)
    except Cancelled:
        return
    except Error as error:
        yield json.dumps(APIError(500, str(error)).body)
    except Exception:
        log.exception("an answer failed")
        yield json.dumps(internal().body)


# ------------------------------------------------------------------------- what they share


async def read_json(request: Request):
    """The body of a request, parsed. Raises ``APIError`` if it is too long, too slow or not JSON."""
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY:
        raise too_large()
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MAX_BODY:
                    raise too_large()
    except TimeoutError:
        message = f"the body did not arrive in {BODY_TIMEOUT:g} seconds"
        raise APIError(408, message, headers={"Connection": "close"}) from None
    try:
        return await asyncio.to_thread(parse_json, bytes(data))
    except ValueError as error:
        raise APIError(400, f"the body is not JSON: {str(error)[:200]}") from None


async def in_thread(request: Request, function: Callable, *args):
    """``function(*args)`` beside the event loop, a few at a time, with ``Error`` as status 400."""
    async with request.app.state.prompts_at_once:
        try:
            return await asyncio.to_thread(function, *args)
        except Error as error:
            raise APIError(400, str(error)) from None


def check_length(ids: list[int], capacity: int) -> None:
    if not ids:
        raise APIError(400, "the prompt is empty: give at least one token", "prompt")
    if len(ids) > capacity:
        raise too_long(len(ids), "tokens", capacity)


def too_large() -> APIError:
    return APIError(413, f"the body has more than {MAX_BODY:,} bytes: shorten the prompt")


def busy(seconds: int) -> APIError:
    message = f"all slots are busy and the queue is full: try again in {seconds} s"
    return APIError(503, message, code="busy", retry_after=seconds)


def stopped() -> APIError:
    return APIError(503, "the server is shutting down", code="shutting_down", retry_after=10)


def _note(request: Request, usage: dict) -> None:
    """For the access log: numbers of tokens."""
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    request.state.note = f"{usage['prompt_tokens']} ({cached} cached) + {usage['completion_tokens']} tokens"


# -------------------------------------------------------------------------------------- errors


async def on_api_error(request: Request, error: APIError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def on_http_error(request: Request, error: HTTPException) -> Response:
    path = request.scope["path"][:100]  # request.url fails for some Host headers
    message = {404: f"there is no {path!r} here", 405: f"{request.method[:20]} is not allowed for {path!r}"}
    headers = dict(error.headers or {})
    found = APIError(error.status_code, message.get(error.status_code, str(error.detail)), headers=headers)
    return JSONResponse(found.body, found.status, found.headers)


async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
    """Nobody reads this reply; the access log has its status, which is nginx's for this case."""
    return Response(status_code=499)


async def on_error(request: Request, error: Error) -> Response:
    """What ended a row has a message for the client. ``Guard`` answers for a defect."""
    return await on_api_error(request, APIError(500, str(error)))
