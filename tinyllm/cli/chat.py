"""``tinyllm chat``: a conversation in a terminal or through a pipe."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from tinyllm.backend.dtypes import autocast
from tinyllm.cli.options import DeviceOptions, SamplingOptions, move
from tinyllm.errors import Error
from tinyllm.inference.chat import Answer, Conversation, load_model_and_tokenizer
from tinyllm.inference.sampling import check_sampling
from tinyllm.weights.pull import KNOWN_MODELS, find_pulled, pull

HELP = (
    "/reset forgets the conversation, /system TEXT instructs the model and begins anew, /save FILE keeps "
    "what was said, /quit (or Ctrl-D) ends; Ctrl-C breaks off an answer"
)


@dataclass(frozen=True, kw_only=True)
class ChatConfig(DeviceOptions, SamplingOptions):
    """Talk with a chat model; it is downloaded the first time, after a question."""

    smaller: ClassVar = ["fewer --max-new-tokens"]

    model: str = "smollm2"
    """smollm2, a model's folder, a .gguf file or a hub id."""
    yes: bool = False
    """Download without asking."""
    system: str | None = None
    """Instructions for the model; if not given, its own."""
    max_new_tokens: int = 1000
    temperature: float = 0.2
    top_k: int | None = None
    top_p: float | None = 0.9


def run(config: ChatConfig) -> None:
    """Read lines from the terminal, or from a pipe, and answer them until there are no more.

    Answers go to stdout, all else to stderr. Raises Error, before the first line is read, if an option is
    out of range, the model is not there and not wanted, or it brings no chat template. After that a
    line that cannot be answered gets a sentence, and the conversation goes on.
    """
    check_sampling(*config.sampling)
    config.check_seed()
    if config.max_new_tokens < 1:
        raise Error(f"--max-new-tokens is {config.max_new_tokens}: choose a whole number of at least 1")
    device = config.open_device()
    if config.model in KNOWN_MODELS and not Path(config.model).exists() and find_pulled(config.model) is None:
        pull(config.model, ask=None if config.yes else _ask)
    model, tokenizer = load_model_and_tokenizer(config.model, config.weights_dtype)
    move(model, device)
    conversation = Conversation(
        model, tokenizer, config.system, config.max_new_tokens, *config.sampling, config.seed
    )
    conversation.prompt("")  # a model without a chat template is refused before the first word
    with autocast(config.dtype):
        _answer_lines(conversation, f"{config.model}, {model.num_parameters():,} parameters. {HELP}.")


def _answer_lines(conversation: Conversation, welcome: str) -> None:
    terminal = sys.stdin.isatty()
    if terminal:
        print(welcome, file=sys.stderr)
        with contextlib.suppress(ImportError):  # Windows has none: its console edits lines by itself
            import readline  # noqa: F401  (arrow keys then edit the line that input() reads)
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is not text is refused as such, line by line
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
            said = _command(conversation, line)
        elif line:
            answer = conversation.answer(line, lambda piece: print(piece, end="", flush=True))
            print(" …" if answer.end == "interrupt" else "", flush=True)
            said = _how_it_came(conversation, answer)
        else:
            return
    except Error as error:  # one wrong line does not end a conversation
        said = str(error)
    print(f"({said})", file=sys.stderr)


def _how_it_came(conversation: Conversation, answer: Answer) -> str:
    said = f"{answer.prompt_tokens:,} tokens read in {answer.prompt_seconds:.1f} s"
    if answer.tokens > 1:
        said += f", then {(answer.tokens - 1) / answer.seconds:.1f} tokens/s"
    context = conversation.model.context
    return (
        said
        + {
            "stop": "",
            "interrupt": "; broken off",
            "length": f"; cut off after {answer.tokens:,} tokens: --max-new-tokens allows more",
            "context": f"; cut off, the context of {context:,} tokens is full: say /reset to begin anew",
        }[answer.end]
    )


def _command(conversation: Conversation, line: str) -> str:
    """Do what a line that begins with / asks; returns what to say about it."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        conversation.reset()
        return "forgotten"
    if name == "/system":
        conversation.instruct(rest or None)
        return f"{'instructed anew' if rest else 'with its own instructions'}, from the beginning"
    if name == "/save" and rest:
        _save(conversation, rest)
        return f"saved in {rest}"
    return HELP


def _save(conversation: Conversation, name: str) -> None:
    """Write what was said as JSON into a new file, as ``apply_chat_template`` would take it."""
    try:
        with open(Path(name).expanduser(), "x", encoding="utf-8") as file:
            json.dump(conversation.said(), file, ensure_ascii=False, indent=2)
            file.write("\n")
    except (OSError, ValueError, RuntimeError) as error:  # a name, or a home, that does not exist
        reason = getattr(error, "strerror", None) or error
        raise Error(f"{name!r} cannot be written ({reason}): choose another file") from None


def _ask(text: str) -> bool:
    print(f"{text}\nDownload it? [y/N] ", end="", file=sys.stderr, flush=True)
    try:
        return input().strip().lower() in ("y", "yes")
    except EOFError:
        return False
