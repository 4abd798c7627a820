"""How does a model hold a conversation?

For each answer the model continues a prompt that contains the whole conversation so far, in the format of its
training data (``tokenizers/chat_template.py``), and ends where the answer begins. The prompt of a turn begins
with that of the turn before, whose keys and values are kept in a cache: only the new tokens are processed.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllm.checks import check_at_least
from tinyllm.errors import Error
from tinyllm.inference.generate import generate
from tinyllm.models import empty_model, load_model
from tinyllm.models.cache import Cache
from tinyllm.nn import Module
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import Tokenizer, check_fits, check_text
from tinyllm.tokenizers.chat_template import encode_chat, end_of_answer
from tinyllm.weights.adapter_config import base_of
from tinyllm.weights.hub import find_model
from tinyllm.weights.safetensors import is_adapter

TOKENIZER_FILES = ("*tokenizer*", "vocab.json", "*.gguf")


def load_model_and_tokenizer(name: str, dtype=np.float32) -> tuple[Module, Tokenizer]:
    """Load a model in ``dtype``, as ``load_model`` does, and its tokenizer.

    Raises ``Error`` as ``load_model`` and ``load_tokenizer`` do, and if the tokenizer has more ids than the
    model.
    """
    tokenizer = load_tokenizer(find_tokenizer(name))
    model = load_model(name, dtype)
    check_fits(tokenizer, model, padded=True)
    return model, tokenizer


def find_tokenizer(name: str | Path) -> str | Path:
    """The argument of ``load_tokenizer`` for the model that ``load_model(name)`` loads.

    An adapter without a tokenizer has that of its base model. For a model folder without one, such as
    ``GPT2.save_pretrained`` writes, GPT-2's is used if the model has 50,257 ids.
    """
    if (folder := own_tokenizer(name)) is not None:
        return folder
    path = find_model(name)
    if is_adapter(path):
        return find_tokenizer(base_of(path))
    return "gpt2" if empty_model(path).config.vocab_size == 50257 else path


def own_tokenizer(name: str | Path) -> Path | None:
    """The folder or file with the tokenizer of a model, an adapter or a run; None if there is none.

    A training run has its tokenizer in the run's folder, next to the checkpoints.
    """
    path = find_model(name)
    folder = path.parent if path.parent == Path(name).expanduser() else path
    if folder.is_dir() and not any(next(folder.glob(files), None) for files in TOKENIZER_FILES):
        return None
    return folder


def text_stream(tokenizer: Tokenizer, steps: Iterator[np.ndarray], stop_ids: Sequence[int]) -> Iterator[str]:
    """Decode the first row of ``generate``'s steps, one string per step, until a stop id.

    A token may end inside a UTF-8 character; its incomplete bytes are held back until the character is
    complete.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for tokens in steps:
        if tokens[0] in stop_ids:
            break
        yield decoder.decode(tokenizer.decode_bytes([int(tokens[0])]))
    yield decoder.decode(b"", final=True)


class Answer(NamedTuple):
    """Statistics of an answer: tokens and times of prefill and decoding, and why it ended."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, from earlier turns: the others are processed
    prompt_seconds: float  # prefill: until the first token of the answer
    tokens: int
    seconds: float  # decoding: from the first token of the answer to the last
    end: str  # "stop" (a stop id), "length" (max_new_tokens), "context" (it is full) or "interrupt"


class Conversation:
    """A chat with a model: the messages so far, and the settings for sampling the next answer.

    ``system`` holds the instructions (a system message) or None; ``messages`` the turns as dicts of role and
    content. The sampling arguments and ``speculate`` are those of ``generate``, with one generator, seeded by
    ``seed``, for all answers. ``enable_thinking`` is a variable of the chat template, see ``render_chat``.
    """

    def __init__(
        self,
        model: Module,
        tokenizer: Tokenizer,
        system: str | None = None,
        max_new_tokens: int = 1000,
        temperature: float = 0.2,
        top_k: int | None = None,
        top_p: float | None = 0.9,
        seed: int = 0,
        speculate=None,
        enable_thinking: bool | None = None,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.system = system
        self.max_new_tokens = check_at_least(max_new_tokens, 1, "max_new_tokens")
        self.sampling = (temperature, top_k, top_p)
        self.rng = np.random.default_rng(seed)
        self.speculate = speculate
        self.enable_thinking = enable_thinking
        self.stop_ids = (*tokenizer.eos_ids, *end_of_answer(tokenizer))
        self.messages: list[dict[str, str]] = []
        self.cache: Cache | None = None  # of the last turn

    def history(self) -> list[dict[str, str]]:
        """The system message, if there is one, and the messages so far: the input of a chat template."""
        instructions = [] if self.system is None else [{"role": "system", "content": self.system}]
        return instructions + self.messages

    def reset(self) -> None:
        """Start a new conversation with the same instructions."""
        self.messages = []

    def instruct(self, system: str | None) -> None:
        """Start a new conversation with these instructions; None leaves them to the chat template."""
        if system is not None:
            check_text(system)
        self.system, self.messages = system, []

    def prompt(self, words: str) -> list[int]:
        """The ids of the conversation so far and this user message, up to where the answer begins.

        A BOS token that the model expects is added unless the template already begins with it.

        Raises ``Error`` if they do not fit in the model's context, and as ``encode_chat`` does.
        """
        messages = [*self.history(), {"role": "user", "content": words}]
        template = self.tokenizer.chat_template
        ids = encode_chat(self.tokenizer, template, messages, enable_thinking=self.enable_thinking)
        ids = self.tokenizer.with_bos(ids)
        if len(ids) >= self.model.context:
            raise Error(
                f"the conversation has {len(ids):,} tokens, but the model's context is "
                f"{self.model.context:,}: reset it, or write a shorter message"
            )
        return ids

    def answer(self, words: str, write: Callable[[str], None]) -> Answer:
        """Generate the answer to a user message, pass its text to ``write`` in pieces, and record both.

        Ctrl-C ends the answer and keeps the text so far. If there is none yet, the conversation stays as it
        was and KeyboardInterrupt is raised. Raises ``Error`` as ``prompt`` and ``generate`` do.
        """
        stop_ids, ids = self.stop_ids, self.prompt(words)
        unused = self.tokenizer.unused_ids(self.model.config.vocab_size)
        options = self.max_new_tokens, *self.sampling, self.rng, stop_ids
        cache = self._cache_for(ids)
        cached = len(cache.texts[0])
        more = dict(suppress_ids=unused, cache=cache, speculate=self.speculate)
        steps = generate(self.model, [ids], *options, **more)
        tokens, times, pieces = [], [time.perf_counter()], []

        def timed() -> Iterator[np.ndarray]:
            for step in steps:
                times.append(time.perf_counter())
                tokens.append(int(step[0]))
                yield step

        try:
            for piece in text_stream(self.tokenizer, timed(), stop_ids):
                pieces.append(piece)
                write(piece)
            limit = "length" if len(tokens) == self.max_new_tokens else "context"
            end = "stop" if tokens[-1] in stop_ids else limit
        except KeyboardInterrupt:
            if not any(pieces):
                raise
            end = "interrupt"
        self.messages += [
            {"role": "user", "content": words},
            {"role": "assistant", "content": "".join(pieces)},
        ]
        return Answer(len(ids), cached, times[1] - times[0], len(tokens), times[-1] - times[1], end)

    def _cache_for(self, ids: list[int]) -> Cache:
        """The cache of earlier turns, with what it has in common with the prompt, and large enough."""
        tokens = min(len(ids) + self.max_new_tokens, self.model.context)
        if self.cache is None:
            self.cache = self.model.new_cache(1, tokens)
        elif self.cache.capacity < tokens:  # at least doubled, so that it is not copied at every turn
            self.cache = self.cache.with_capacity(
                min(max(tokens, 2 * self.cache.capacity), self.model.context)
            )
        self.cache.keep_prefix([ids])
        return self.cache
