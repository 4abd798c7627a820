"""How does a model hold a conversation?

Every answer continues one growing text: all that was said so far, in the format the model was trained on
(``tokenizers/chat_template.py``), and the beginning of its answer. The model itself remembers nothing.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinyllm.errors import Error
from tinyllm.inference.generate import generate
from tinyllm.models import empty_model, load_model
from tinyllm.nn import Module
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import Tokenizer, check_fits, check_text
from tinyllm.tokenizers.chat_template import encode_chat
from tinyllm.weights.hub import find_model

TOKENIZER_FILES = ("*tokenizer*", "vocab.json", "*.gguf")


def load_model_and_tokenizer(name: str, dtype=np.float32) -> tuple[Module, Tokenizer]:
    """A model as ``load_model`` finds it, in ``dtype``, and the tokenizer that came with it.

    A run's is in its folder, beside the checkpoints. A folder without any, such as ``GPT2.save_pretrained``
    writes, gets GPT-2's if the model has as many ids. Raises Error if there is no tokenizer, it is damaged,
    or it does not fit.
    """
    path = find_model(name)
    place = path.parent if path.parent == Path(name).expanduser() else path  # a run, and its checkpoint
    bare = place.is_dir() and not any(next(place.glob(files), None) for files in TOKENIZER_FILES)
    tokenizer = load_tokenizer("gpt2" if bare and empty_model(path).config.vocab_size == 50257 else place)
    model = load_model(path, dtype)
    check_fits(tokenizer, model, padded=True)
    return model, tokenizer


def text_stream(tokenizer: Tokenizer, steps: Iterator[np.ndarray], stop_ids: Sequence[int]) -> Iterator[str]:
    """The text of the first row of ``generate``'s steps as it comes, up to a stop id.

    A token may end inside a character: its bytes wait for the rest.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for tokens in steps:
        if tokens[0] in stop_ids:
            break
        yield decoder.decode(tokenizer.decode_bytes([int(tokens[0])]))
    yield decoder.decode(b"", final=True)


class Answer(NamedTuple):
    """How an answer came: what was read for it, how fast it was decoded, and what ended it."""

    prompt_tokens: int
    prompt_seconds: float  # until the first token of the answer
    tokens: int
    seconds: float  # from the first token of the answer to its last
    end: str  # "stop" (the model ended it), "length" (max_new_tokens), "context" (it is full) or "interrupt"


class Conversation:
    """What was said so far, and who answers."""

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
    ):
        self.model, self.tokenizer = model, tokenizer
        self.system, self.max_new_tokens = system, max_new_tokens
        self.sampling = (temperature, top_k, top_p)
        self.rng = np.random.default_rng(seed)
        self.messages: list[dict[str, str]] = []

    def said(self) -> list[dict[str, str]]:
        """The messages so far, the instructions first, as a chat template takes them."""
        instructions = [] if self.system is None else [{"role": "system", "content": self.system}]
        return instructions + self.messages

    def reset(self) -> None:
        """Forget what was said; the instructions stay."""
        self.messages = []

    def instruct(self, system: str | None) -> None:
        """Begin anew with these instructions; None: the model's own."""
        if system is not None:
            check_text(system)
        self.system, self.messages = system, []

    def prompt(self, words: str) -> list[int]:
        """The ids of all that was said and of these words, ready for the model's answer."""
        messages = [*self.said(), {"role": "user", "content": words}]
        ids = encode_chat(self.tokenizer, self.tokenizer.chat_template, messages)
        if len(ids) >= self.model.context:
            raise Error(
                f"the conversation has {len(ids):,} tokens, and the model's context {self.model.context:,}: "
                "reset it, or say less"
            )
        return ids

    def answer(self, words: str, write: Callable[[str], None]) -> Answer:
        """Stream the answer through ``write``.

        Ctrl-C ends the answer and keeps what came. Before the first word there is nothing to keep: the
        conversation stays as it was, and KeyboardInterrupt is raised.
        """
        stop_ids, ids = self.tokenizer.eos_ids, self.prompt(words)
        steps = generate(self.model, [ids], self.max_new_tokens, *self.sampling, self.rng, stop_ids)
        tokens, times, pieces = [], [time.perf_counter()], []

        def watched() -> Iterator[np.ndarray]:
            for step in steps:
                times.append(time.perf_counter())
                tokens.append(int(step[0]))
                yield step

        try:
            for piece in text_stream(self.tokenizer, watched(), stop_ids):
                pieces.append(piece)
                write(piece)
            full = "length" if len(tokens) == self.max_new_tokens else "context"
            end = "stop" if tokens[-1] in stop_ids else full
        except KeyboardInterrupt:
            if not any(pieces):
                raise
            end = "interrupt"
        self.messages += [
            {"role": "user", "content": words},
            {"role": "assistant", "content": "".join(pieces)},
        ]
        return Answer(len(ids), times[1] - times[0], len(tokens), times[-1] - times[1], end)
