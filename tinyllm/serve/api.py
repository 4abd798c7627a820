"""Requests of OpenAI's API: what each parameter may be, and what it means here.

A parameter that is absent or null has its default. One that this server does not have is refused by name if
it would change the answer, and ignored if it would not: a client must not believe that it got something else
than it got. Values with no effect, such as a penalty of 0, are accepted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from tinyllm.checks import is_integer
from tinyllm.serve.errors import APIError

# Parameters that do not change the answer
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
           "prompt_cache_retention", "prediction", "parallel_tool_calls"}  # fmt: skip

# Parameters of others, and the values that have no effect
NEUTRAL = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "add_generation_prompt": (True,),
    "stream": (False,),  # where there is nothing to stream
}

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MAX_STOPS, MAX_STOP_LENGTH, MAX_TOP, MAX_CHOICES = 16, 1000, 20, 128
LONGEST_TOKEN = 256  # characters; the longest token of GPT-2, and of Llama 3, has 128


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for."""

    context: int  # tokens of a prompt and its answer
    max_tokens: int  # of an answer
    vocab_size: int
    choices: int = MAX_CHOICES  # prompts · n: more would not fit the queue

    def check_characters(self, count: int) -> None:
        """Raise ``APIError`` for a text that cannot fit the context, before it is rendered and encoded."""
        if count > self.context * LONGEST_TOKEN:
            raise too_long(count, "characters", self.context * LONGEST_TOKEN)


@dataclass(kw_only=True)
class Options:
    """What both endpoints have in common."""

    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stops: list[str] = field(default_factory=list)
    top: int | None = None  # alternatives per token; None: no log-probabilities
    stream: bool = False
    include_usage: bool = False

    def arguments(self, ids: list[int], number: int) -> dict:
        """The arguments of ``Request`` for the choice with this number.

        The first choice has the seed itself, so that it is what ``generate`` samples with ``rng=seed``.
        """
        seed = self.seed if self.seed is None or number == 0 else [self.seed, number]
        options = dict(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, top=self.top)
        return options | dict(ids=ids, seed=seed, max_new_tokens=self.max_tokens)


@dataclass(kw_only=True)
class ChatRequest(Options):
    messages: list[dict[str, str]]
    goes_on: bool = False  # the last message is the beginning of the answer


@dataclass(kw_only=True)
class CompletionRequest(Options):
    prompts: list[str | list[int]]


class Parameters:
    """The parameters of a request, taken one by one; what is left at the end is unknown."""

    def __init__(self, body):
        if not isinstance(body, dict):
            raise APIError(400, f"the body is {_kind(body)}: send a JSON object")
        self.left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str, check, expected: str, default=None):
        """The value of a parameter for which ``check`` is true; ``expected`` describes such values."""
        if name not in self.left:
            return default
        value = self.left.pop(name)
        if not check(value):
            raise APIError(400, f"{name} is {_shown(value)}: give {expected}", name)
        return value

    def flag(self, name: str) -> bool:
        return self.take(name, lambda x: isinstance(x, bool), "true or false", False)

    def integer(self, name: str, least: int, most: int, default: int | None = None) -> int | None:
        expected = f"a whole number from {least} to {most}"
        return self.take(name, lambda x: is_integer(x) and least <= x <= most, expected, default)

    def number(self, name: str, check, expected: str, default: float | None = None) -> float | None:
        def is_valid(x):
            return isinstance(x, int | float) and not isinstance(x, bool) and check(x)

        return self.take(name, is_valid, expected, default)

    def finish(self) -> None:
        """Raise ``APIError`` for a parameter that is left and would have an effect."""
        for name, value in self.left.items():
            if name in IGNORED or any(value == x and type(value) is type(x) for x in _neutral(name)):
                continue
            known = ", ".join(map(json.dumps, NEUTRAL.get(name, ())))
            remedy = f"only {known} is supported, or omit it" if known else "omit it"
            message = f"{_shown_name(name)} is not supported here: {remedy}"
            raise APIError(400, message, _shown_name(name), "unsupported_parameter")


def parse_chat(body, limits: Limits) -> ChatRequest:
    """The request of ``/v1/chat/completions``. Raises ``APIError``, 400 unless said otherwise."""
    parameters = Parameters(body)
    messages, goes_on = take_messages(parameters, limits)
    logprobs, top = parameters.flag("logprobs"), parameters.integer("top_logprobs", 0, MAX_TOP)
    if top and not logprobs:
        raise APIError(400, "top_logprobs needs logprobs: set it to true", "top_logprobs")
    options = _options(parameters, limits, ("max_completion_tokens", "max_tokens"), limits.max_tokens)
    parameters.finish()
    top = (top or 0) if logprobs else None
    return ChatRequest(**options, messages=messages, goes_on=goes_on, top=top)


def parse_completion(body, limits: Limits) -> CompletionRequest:
    """The request of ``/v1/completions``: its prompt is a text or token ids, or a list of either."""
    parameters = Parameters(body)
    prompts = take_prompts(parameters, limits)
    top = parameters.integer("logprobs", 0, MAX_TOP)
    options = _options(parameters, limits, ("max_tokens",), min(16, limits.max_tokens))
    parameters.finish()
    request = CompletionRequest(**options, prompts=prompts, top=top)
    count = len(prompts) * request.n
    if count > limits.choices:
        raise APIError(
            400, f"{count} texts are too many for one request: ask for at most {limits.choices}", "n"
        )
    return request


def take_messages(parameters: Parameters, limits: Limits) -> tuple[list[dict[str, str]], bool]:
    """The messages of a chat, and whether the last one is the beginning of the answer."""
    messages = parameters.take(
        "messages", lambda x: isinstance(x, list) and x, "a list of messages that is not empty"
    )
    if messages is None:
        raise APIError(400, "messages is missing: give a list of messages", "messages")
    goes_on = parameters.flag("continue_final_message")
    messages = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    limits.check_characters(sum(len(message["content"]) for message in messages))
    if goes_on and messages[-1]["role"] != "assistant":
        message = "continue_final_message needs an assistant's message at the end: add it"
        raise APIError(400, message, "continue_final_message")
    if goes_on and parameters.flag("add_generation_prompt"):  # vLLM wants it to be false
        message = "add_generation_prompt begins another message than continue_final_message: omit one of them"
        raise APIError(400, message, "add_generation_prompt")
    return messages, goes_on


def take_prompts(parameters: Parameters, limits: Limits) -> list[str | list[int]]:
    """The prompt of a completion, a text or token ids, or those in a list of either."""
    given = parameters.left.pop("prompt", None)
    if given is None:
        raise APIError(400, "prompt is missing: give a text, token ids, or a list of either", "prompt")
    prompts = given if isinstance(given, list) and given and not is_integer(given[0]) else [given]
    for prompt in prompts:
        _check_prompt(prompt, limits)
    return prompts


def too_long(length: int, unit: str, most: int) -> APIError:
    message = f"the prompt has {length:,} {unit}, but at most {most:,} fit: shorten it"
    return APIError(400, message, code="context_length_exceeded")


def check_model(body, names: set[str]) -> None:
    """Raise ``APIError`` 404 if a request names another model. One that names none gets the only one."""
    model = body.get("model") if isinstance(body, dict) else None
    if model is not None and not isinstance(model, str):
        raise APIError(400, f"model is {_shown(model)}: give a name", "model")
    if model is not None and model not in names:
        raise APIError(
            404, f"there is no model {_shown(model)} here: use {min(names)!r}", "model", "model_not_found"
        )


def _options(parameters: Parameters, limits: Limits, lengths: tuple[str, ...], default: int) -> dict:
    """The arguments of ``Options`` but ``top``; ``lengths`` are names of the maximum number of tokens."""
    parameters.left.pop("model", None)
    given = {parameters.integer(name, 1, limits.max_tokens) for name in lengths} - {None}
    if len(given) > 1:
        raise APIError(400, f"{' and '.join(lengths)} are not equal: give one of them", lengths[0])
    stream = parameters.flag("stream")
    top_k = parameters.integer("top_k", -1, 2**31, 0)  # 0 and -1 mean all tokens, as in other servers
    return dict(
        max_tokens=next(iter(given), default),
        n=parameters.integer("n", 1, min(MAX_CHOICES, limits.choices), 1),
        temperature=parameters.number(
            "temperature", lambda x: 0 <= x <= 1e30, "a number from 0 to 1e30", 1.0
        ),
        top_p=parameters.number("top_p", lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
        top_k=top_k if top_k > 0 else None,
        seed=_seed(parameters),
        stops=_stops(parameters),
        stream=stream,
        include_usage=_include_usage(parameters, stream),
    )


def _seed(parameters: Parameters) -> int | None:
    """Any 64-bit integer; negative ones are taken modulo 2**64."""
    seed = parameters.integer("seed", -(2**63), 2**64 - 1)
    return seed if seed is None else seed % 2**64


def _stops(parameters: Parameters) -> list[str]:
    def is_valid(value):
        stops = [value] if isinstance(value, str) else value
        is_list = isinstance(stops, list) and len(stops) <= MAX_STOPS
        return is_list and all(isinstance(x, str) and 0 < len(x) <= MAX_STOP_LENGTH for x in stops)

    expected = f"a text, or at most {MAX_STOPS} of them, each of 1 to {MAX_STOP_LENGTH} characters"
    stops = parameters.take("stop", is_valid, expected, [])
    return [stops] if isinstance(stops, str) else stops


def _include_usage(parameters: Parameters, stream: bool) -> bool:
    options = parameters.take("stream_options", lambda x: isinstance(x, dict), "an object", {})
    if options and not stream:
        raise APIError(400, "stream_options needs stream: set it to true", "stream_options")
    inner = Parameters(options)
    inner.flag("include_obfuscation")  # padding against observers of the network: there is none
    try:
        found = inner.flag("include_usage")
        inner.finish()
    except APIError as error:
        raise APIError(400, f"stream_options: {error.message}", "stream_options") from None
    return found


def _message(message, where: str) -> dict[str, str]:
    """A message's role and text. A null or empty extra, as in a reply that is sent back, has no effect."""
    if not isinstance(message, Mapping):
        raise APIError(400, f"{where} is {_kind(message)}: give an object with role and content", where)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise APIError(400, f"{where}: the role is {_shown(role)}: use {', '.join(ROLES)}", where)
    for name, value in message.items():
        if name not in ("role", "content") and value not in (None, [], {}, ""):
            raise APIError(
                400, f"{where}: {_shown_name(name)} is not supported by this server: omit it", where
            )
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(x, str) and part.get("type") == "text" for x, part in zip(parts, content)):
            raise APIError(400, f"{where}: only parts of type text are supported", where)
        content = "".join(parts)
    if not isinstance(content, str):
        raise APIError(400, f"{where}: the content is {_kind(content)}: give a text", where)
    return {"role": ROLES[role], "content": content}


def _check_prompt(prompt, limits: Limits) -> None:
    if isinstance(prompt, str):
        limits.check_characters(len(prompt))
        return
    if isinstance(prompt, list) and len(prompt) > limits.context:
        raise too_long(len(prompt), "tokens", limits.context)
    if not isinstance(prompt, list) or not prompt or not all(map(is_integer, prompt)):
        raise APIError(400, "prompt must be a text, token ids, or a list of either, and not empty", "prompt")
    wrong = next((x for x in prompt if not 0 <= x < limits.vocab_size), None)
    if wrong is not None:
        last = limits.vocab_size - 1
        raise APIError(400, f"prompt has the token id {_shown(wrong)}: they run from 0 to {last}", "prompt")


def _neutral(name: str) -> tuple:
    """Numbers also as floats: 0 and 0.0 mean the same."""
    return tuple(y for x in NEUTRAL.get(name, ()) for y in ((x, float(x)) if is_integer(x) else (x,)))


def _kind(value) -> str:
    """What a value of JSON is, for a message."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _shown(value) -> str:
    """A value for a message: huge ones are not repeated."""
    if isinstance(value, dict | list):
        return _kind(value) if value else repr(value)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**20:
        return "a number of more than 20 digits"
    text = json.dumps(value) if isinstance(value, bool | None) else repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _shown_name(name: str) -> str:
    return name if len(name) <= 100 and name.isidentifier() else _shown(name)
