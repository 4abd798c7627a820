"""How does one talk with a model in a terminal?

Every answer continues one growing text: all that was said so far, in the shape the model was trained on
(``chat.py``), and the beginning of its answer. The model itself remembers nothing.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllm.backend.device import open_device
from tinyllm.backend.dtypes import Precision, weights_dtype
from tinyllm.backend.memory import keep_memory
from tinyllm.errors import Error
from tinyllm.inference.generate import generate
from tinyllm.inference.sampling import check_sampling
from tinyllm.models import empty_model, load_model
from tinyllm.nn import Module
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import Tokenizer, check_fits, check_text
from tinyllm.tokenizers.chat_template import encode_chat
from tinyllm.weights.hub import find_model
from tinyllm.weights.pull import KNOWN_MODELS, find_pulled, pull

TOKENIZER_FILES = ("*tokenizer*", "vocab.json", "*.gguf")

HELP = (
    "/reset forgets the conversation, /system TEXT instructs the model and begins anew, /save FILE keeps "
    "what was said, /quit (or Ctrl-D) ends; Ctrl-C breaks off an answer"
)


@dataclass(frozen=True)
class ChatConfig:
    """Talk with a chat model; it is downloaded the first time, after a question."""

    model: str = "smollm2"
    """smollm2, a model's folder, a .gguf file or a hub id."""
    yes: bool = False
    """Download without asking."""
    system: str | None = None
    """Instructions for the model; if not given, its own."""
    max_new_tokens: int = 1000
    """Tokens of an answer at most."""
    temperature: float = 0.2
    """0 always takes the most likely token; above 1 gets wilder."""
    top_k: int | None = None
    """Draw from this many most likely tokens (None: all)."""
    top_p: float | None = 0.9
    """Draw from the most likely tokens whose probabilities first reach this sum."""
    seed: int = 0
    """The same seed and the same words get the same answers."""
    device: str = "cpu"
    """cpu, cuda, cuda:1 …, or auto: a GPU if CuPy sees one; it says which."""
    dtype: Precision = "float32"
    """What the weights are kept and multiplied in (tf32: kept in float32). All but float32 and float64 need
    a GPU."""
    gpu_memory: float | None = None
    """Gigabytes (10^9 bytes) of a GPU's memory to take at most; all of it if not given."""


def load_model_and_tokenizer(name: str, dtype=np.float32) -> tuple[Module, Tokenizer]:
    """A model as ``load_model`` finds it, in ``dtype``, and the tokenizer that came with it.

    A folder without any, such as ``GPT2.save_pretrained`` writes, gets GPT-2's if the model has as many
    ids. Raises Error if there is no tokenizer, it is damaged, or it does not fit.
    """
    path = find_model(name)
    bare = path.is_dir() and not any(next(path.glob(files), None) for files in TOKENIZER_FILES)
    tokenizer = load_tokenizer("gpt2" if bare and empty_model(path).config.vocab_size == 50257 else path)
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


class Conversation:
    """What was said so far, and who answers."""

    def __init__(self, model: Module, tokenizer: Tokenizer, config: ChatConfig):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.rng = np.random.default_rng(config.seed)
        self.system, self.messages = config.system, []

    def said(self) -> list[dict[str, str]]:
        """The messages so far, the instructions first, as a chat template takes them."""
        instructions = [] if self.system is None else [{"role": "system", "content": self.system}]
        return instructions + self.messages

    def prompt(self, words: str) -> list[int]:
        """The ids of all that was said and of these words, ready for the model's answer."""
        messages = [*self.said(), {"role": "user", "content": words}]
        ids = encode_chat(self.tokenizer, self.tokenizer.chat_template, messages)
        if len(ids) >= self.model.context:
            raise Error(
                f"the conversation has {len(ids):,} tokens, and the model's context {self.model.context:,}: "
                "say /reset to begin anew, or say less"
            )
        return ids

    def answer(self, words: str, write: Callable[[str], None]) -> str:
        """Stream the answer through ``write``; returns how fast it came and, if cut off, by what.

        Ctrl-C ends the answer and keeps what came. Before the first word there is nothing to keep: the
        conversation stays as it was, and KeyboardInterrupt is raised.
        """
        config, stop_ids, ids = self.config, self.tokenizer.eos_ids, self.prompt(words)
        sampling = (config.temperature, config.top_k, config.top_p, self.rng)
        steps = generate(self.model, [ids], config.max_new_tokens, *sampling, stop_ids)
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
            cut_off = "" if tokens[-1] in stop_ids else self._cut_off(len(tokens))
        except KeyboardInterrupt:
            if not any(pieces):
                raise
            cut_off = "; broken off"
            write(" …")
        write("\n")
        self.messages += [
            {"role": "user", "content": words},
            {"role": "assistant", "content": "".join(pieces)},
        ]
        speed = ""
        if len(tokens) > 1:
            speed = f", then {(len(tokens) - 1) / (times[-1] - times[1]):.1f} tokens/s"
        return f"({len(ids):,} tokens read in {times[1] - times[0]:.1f} s{speed}{cut_off})"

    def _cut_off(self, count: int) -> str:
        """Why an answer of ``count`` tokens ended that the model did not end itself."""
        if count == self.config.max_new_tokens:
            return f"; cut off after {count:,} tokens: --max-new-tokens allows more"
        return f"; cut off, the context of {self.model.context:,} tokens is full: say /reset to begin anew"

    def command(self, line: str) -> str:
        """Do what a line that begins with / asks; returns what to say about it."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/reset":
            self.messages = []
            return "(forgotten)"
        if name == "/system":
            check_text(rest)
            self.system, self.messages = rest or None, []
            return f"({'instructed anew' if rest else 'with its own instructions'}, from the beginning)"
        if name == "/save" and rest:
            self._save(rest)
            return f"(saved in {rest})"
        return f"({HELP})"

    def _save(self, name: str) -> None:
        """Write what was said as JSON into a new file, as ``apply_chat_template`` would take it."""
        try:
            with open(Path(name).expanduser(), "x", encoding="utf-8") as file:
                json.dump(self.said(), file, ensure_ascii=False, indent=2)
                file.write("\n")
        except (OSError, ValueError, RuntimeError) as error:  # a name that is none, a home that is none
            reason = getattr(error, "strerror", None) or error
            raise Error(f"{name!r} cannot be written ({reason}): choose another file") from None


def chat(config: ChatConfig) -> None:
    """Read lines from the terminal, or from a pipe, and answer them until there are no more.

    Answers go to stdout, all else to stderr. Raises Error, before the first line is read, if an option is
    out of range, the model is not there and not wanted, or it brings no chat template. After that a
    line that cannot be answered gets a sentence, and the conversation goes on.
    """
    _check_options(config)
    device = open_device(config.device, config.dtype, config.gpu_memory)
    if config.model in KNOWN_MODELS and not Path(config.model).exists() and find_pulled(config.model) is None:
        pull(config.model, ask=None if config.yes else _ask)
    model, tokenizer = load_model_and_tokenizer(config.model, weights_dtype(config.dtype))
    keep_memory()
    model.to(device)
    conversation = Conversation(model, tokenizer, config)
    conversation.prompt("")  # a model without a chat template is refused before the first word
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{config.model}, {model.num_parameters():,} parameters. {HELP}.", file=sys.stderr)
        with contextlib.suppress(ImportError):  # Windows has none: its console edits lines by itself
            import readline  # noqa: F401  (arrow keys then edit the line that input() reads)
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is no text is refused as such, line by line
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input("> " if terminal else "").strip()
            if line == "/quit":
                return
            _answer_line(conversation, line)
        except EOFError:
            if terminal:
                print(file=sys.stderr)  # the shell's own prompt goes on a line of its own
            return
        except KeyboardInterrupt:  # pressed a moment too late or too early: the conversation is not lost
            if not terminal:
                raise
            print("\n(broken off; /quit or Ctrl-D ends)", file=sys.stderr)


def _answer_line(conversation: Conversation, line: str) -> None:
    try:
        if line.startswith("/"):
            said = conversation.command(line)
        elif line:
            said = conversation.answer(line, lambda piece: print(piece, end="", flush=True))
        else:
            return
    except Error as error:  # one wrong line does not end a conversation
        said = f"({error})"
    print(said, file=sys.stderr)


def _check_options(config: ChatConfig) -> None:
    check_sampling(config.temperature, config.top_k, config.top_p)
    if config.max_new_tokens < 1:
        raise Error(f"--max-new-tokens is {config.max_new_tokens}: choose a whole number of at least 1")
    if config.seed < 0:
        raise Error(f"--seed is {config.seed}: choose a whole number of at least 0")


def _ask(text: str) -> bool:
    print(f"{text}\nDownload it? [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        return False
