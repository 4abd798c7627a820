"""Replies of OpenAI's API, whole and in pieces."""

from __future__ import annotations

import secrets
import time

from tinyllm.serve.engine import Piece
from tinyllm.serve.scheduler import Sampled
from tinyllm.tokenizers.base import Tokenizer
from tinyllm.version import __version__

LOWEST = -9999.0  # what OpenAI writes for log 0, which JSON cannot express


class Chat:
    """Shapes of ``/v1/chat/completions``."""

    whole, part, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def opening(self) -> dict:
        """What the first chunk of a stream says: who speaks."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def chunk(self, piece: Piece, with_logprobs: bool) -> dict:
        delta = {"content": piece.text} if piece.text else {}
        return {"delta": delta, "logprobs": self.logprobs(piece.tokens, with_logprobs), "finish_reason": None}

    def closing(self, reason: str) -> dict:
        return {"delta": {}, "logprobs": None, "finish_reason": reason}

    def choice(self, text: str, tokens, with_logprobs: bool, reason: str) -> dict:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": self.logprobs(tokens, with_logprobs), "finish_reason": reason}

    def logprobs(self, tokens, wanted: bool) -> dict | None:
        if not wanted:
            return None
        return {"content": [self._entry(sampled) for sampled, _ in tokens], "refusal": None}

    def _entry(self, sampled: Sampled) -> dict:
        top = [self._token(*pair) for pair in sampled.top]
        return self._token(sampled.id, sampled.logprob) | {"top_logprobs": top}

    def _token(self, token: int, logprob: float) -> dict:
        data = self.tokenizer.decode_bytes([token])
        text = data.decode("utf-8", errors="replace")
        return {"id": token, "token": text, "bytes": list(data), "logprob": max(logprob, LOWEST)}


class Completion:
    """Shapes of ``/v1/completions``."""

    whole = part = "text_completion"
    prefix = "cmpl"

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer

    def opening(self) -> None:
        """A stream begins with its first text."""

    def chunk(self, piece: Piece, with_logprobs: bool) -> dict:
        return self.choice(piece.text, piece.tokens, with_logprobs, None)

    def closing(self, reason: str) -> dict:
        return self.choice("", (), False, reason)

    def choice(self, text: str, tokens, with_logprobs: bool, reason: str | None) -> dict:
        logprobs = self.logprobs(tokens) if with_logprobs else None
        return {"text": text, "logprobs": logprobs, "finish_reason": reason}

    def logprobs(self, tokens) -> dict:
        return {
            "tokens": [self._text(sampled.id) for sampled, _ in tokens],
            "token_logprobs": [max(sampled.logprob, LOWEST) for sampled, _ in tokens],
            "top_logprobs": [self._top(sampled) for sampled, _ in tokens],
            "text_offset": [offset for _, offset in tokens],
            # With ids and bytes, as for a chat; llama.cpp's server has the same key.
            "content": Chat(self.tokenizer).logprobs(tokens, True)["content"],
        }

    def _top(self, sampled: Sampled) -> dict[str, float]:
        """Text -> its log-probability; of several tokens with the same text, the most likely one's."""
        return {self._text(i): max(p, LOWEST) for i, p in reversed(sampled.top)}

    def _text(self, token: int) -> str:
        return self.tokenizer.decode_bytes([token]).decode("utf-8", errors="replace")


class Envelope:
    """What all chunks of a reply have in common."""

    def __init__(self, shapes: Chat | Completion, model: str):
        self.shapes = shapes
        self.common = {
            "id": f"{shapes.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": f"tinyllm-{__version__}",
        }

    def whole(self, choices: list[dict], usage: dict) -> dict:
        return self.common | {"object": self.shapes.whole, "choices": choices, "usage": usage}

    def part(self, choices: list[dict], **more) -> dict:
        return self.common | {"object": self.shapes.part, "choices": choices} | more


def usage_of(prompts: list[list[int]], answers) -> dict:
    """Tokens processed and generated, and those kept from before; of a prompt's choices the first one counts.

    ``answers`` has equally many choices of each prompt, one prompt after the other.
    """
    prompt, generated = sum(map(len, prompts)), sum(answer.tokens for answer in answers)
    cached = sum(answer.request.cached_tokens for answer in answers[:: len(answers) // len(prompts)])
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def model_object(name: str, created: int) -> dict:
    return {"id": name, "object": "model", "created": created, "owned_by": "tinyllm"}
