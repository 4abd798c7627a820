"""What happened inside the model when it chose a token: the endpoint behind a click on the page.

``POST /tinyllm/inspect`` takes the ``messages`` (or the ``prompt``, for a base model) and the ``ids`` of the
answer so far, as a completion reports them; or, as for a completion, an answer's beginning as the last
message with ``continue_final_message``. Nothing is sampled or streamed: parameters of that are refused. The
model reads these tokens once more. What is returned belongs to the last of them, the place where the next
token was chosen:

    tokens      the text that was read: id, text, and whether it is a special token
    attention   of each head of ``layer`` (or of ``head`` alone), how much that place attends to every token
    lens        for the embeddings and after every layer, the most likely next tokens (``tools/inspect.py``)
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from tinyllm.checks import is_integer
from tinyllm.errors import Error
from tinyllm.serve.api import Parameters, check_model, take_messages, take_prompts
from tinyllm.serve.app import busy, check_length, in_thread, read_json, stopped
from tinyllm.serve.engine import Engine, Stopped
from tinyllm.serve.errors import APIError
from tinyllm.serve.prompts import chat_prompt, text_prompt
from tinyllm.serve.scheduler import Busy
from tinyllm.serve.streams import watched
from tinyllm.tokenizers.base import Tokenizer
from tinyllm.tools.inspect import Inspection, inspect

MOST_TOKENS = 4096  # of a text: the queries and keys of all layers are kept, 92 KB per token for SmolLM2
TOP = 10  # next tokens in a row of the lens
DIGITS = 4  # after the point: the page draws the weights


class Looker:
    """Looks at texts with one model. The last one is kept: its other layers need no forward pass.

    ``look`` must be called in the model's thread.
    """

    def __init__(self, tokenizer: Tokenizer, unused: Sequence[int] = (), most_tokens: int = MOST_TOKENS):
        self.tokenizer, self.unused, self.most_tokens = tokenizer, unused, most_tokens
        self.special = frozenset(tokenizer.special_tokens.values())
        self._kept: tuple[list[int], Inspection] | None = None

    def look(self, model, ids: list[int], layer: int | None, head: int | None) -> dict:
        """The reply for a text; ``layer`` None is the middle one, ``head`` None all heads.

        Raises ``Error`` for a text that is too long, and as ``inspect`` and ``Inspection.attention`` do.
        """
        found = self._inspect(model, ids)
        if layer is None:
            layer = len(found.blocks) // 2
        weights = found.attention(layer, head)  # (H, T, T) or (T, T)
        return {
            "layers": len(found.blocks),
            "heads": found.heads[layer],
            "layer": layer,
            "tokens": [self._token(i) | {"special": i in self.special} for i in ids],
            "attention": np.atleast_2d(weights[..., -1, :]).round(DIGITS).tolist(),  # (H or 1, T)
            "lens": [{"top": self._likely(*row)} for row in zip(*found.lens)],
        }

    def _likely(self, ids: np.ndarray, probabilities: np.ndarray) -> list[dict]:
        """The tokens (1, top) of a row of the lens, with their probabilities."""
        pairs = zip(ids[0].tolist(), probabilities[0].tolist())
        return [self._token(i) | {"probability": probability} for i, probability in pairs]

    def _inspect(self, model, ids: list[int]) -> Inspection:
        if len(ids) > self.most_tokens:
            raise Error(
                f"the text has {len(ids):,} tokens, and looking inside is limited to {self.most_tokens:,}: "
                "choose an earlier token, or begin a new conversation"
            )
        if self._kept is None or self._kept[0] != ids:
            self._kept = None  # before another takes its memory
            last = [len(ids) - 1]
            found = inspect(model, ids, top=TOP, positions=last, surprise=False, suppress_ids=self.unused)
            self._kept = ids, found
        return self._kept[1]

    def _token(self, token: int) -> dict:
        return {"id": token, "text": self.tokenizer.decode([token])}


def look_routes(engine: Engine) -> list[Route]:
    """``POST /tinyllm/inspect`` for the engine's model."""
    looker = Looker(engine.tokenizer, engine.tokenizer.unused_ids(engine.model.config.vocab_size))

    async def endpoint(request: Request) -> JSONResponse:
        try:
            ids, layer, head = await _request(request, engine)
            looking = asyncio.ensure_future(engine.run(lambda model: looker.look(model, ids, layer, head)))
            async with watched(request.receive, looking.cancel):
                return JSONResponse(await looking)
        except asyncio.CancelledError:
            raise ClientDisconnect from None
        except Busy:
            raise busy(engine.retry_after) from None
        except Stopped:
            raise stopped() from None
        except Error as error:
            raise APIError(400, str(error)) from None

    return [Route("/tinyllm/inspect", endpoint, methods=["POST"])]


async def _request(request: Request, engine: Engine) -> tuple[list[int], int | None, int | None]:
    """The ids to look at, the layer and the head. Raises ``APIError`` 400 for a request that is wrong."""
    limits = replace(request.app.state.limits, context=engine.model.context)
    body = await read_json(request)
    check_model(body, {engine.name})
    parameters = Parameters(body)
    parameters.left.pop("model", None)
    answer = parameters.take("ids", _are_ids(limits.vocab_size), "the ids of tokens", [])
    layer, head = (parameters.integer(name, 0, 2**31) for name in ("layer", "head"))
    tokenizer = engine.tokenizer
    if "prompt" in parameters.left:
        prompts = take_prompts(parameters, limits)
        parameters.finish()
        if len(prompts) > 1:
            raise APIError(400, "prompt has several texts: look into one at a time", "prompt")
        call = (text_prompt, tokenizer, prompts[0])
    else:
        messages, goes_on = take_messages(parameters, limits)
        parameters.finish()
        if tokenizer.chat_template is None:
            raise APIError(400, f"{engine.name} has no chat template: give a prompt", "messages")
        call = (chat_prompt, tokenizer, messages, goes_on)
    with engine.scheduler.held(1):  # as for a completion
        ids = [*await in_thread(request, *call), *answer]
    check_length(ids, engine.model.context)
    return ids, layer, head


def _are_ids(vocab_size: int):
    return lambda x: isinstance(x, list) and all(is_integer(i) and 0 <= i < vocab_size for i in x)
