"""``tinyllm chat``: a conversation in a terminal or through a pipe."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from tinyllm.backend.dtypes import autocast
from tinyllm.cli.options import (
    DeviceOptions,
    Flag,
    SamplingOptions,
    SpeculationOptions,
    TextModelOptions,
    move,
    option,
)
from tinyllm.cli.pull import confirm
from tinyllm.errors import Error
from tinyllm.files import write_whole
from tinyllm.inference.chat import Answer, Conversation
from tinyllm.inference.thinking import ThoughtFilter, begins_inside, check_can_skip_thinking
from tinyllm.weights.pull import KNOWN_MODELS, find_pulled, pull

DEFAULT_MODEL = "smollm2"

HELP = (
    "/reset starts a new conversation, /system TEXT also gives the model instructions, /save FILE writes the "
    "conversation to a file, /quit (or Ctrl-D) ends; Ctrl-C interrupts an answer"
)


@dataclass(frozen=True, kw_only=True)
class ChatConfig(DeviceOptions, SpeculationOptions, SamplingOptions, TextModelOptions):
    """Chat with a model; it offers to download one the first time.

    Answers are printed on stdout, everything else on stderr, so that questions can come from a pipe: also
    what a model thinks before it answers.

    Example: echo "What is the capital of France?" | tinyllm chat --temperature 0
    """

    smaller: ClassVar = ["fewer --max-new-tokens"]

    model: Annotated[str | None, option("NAME", DEFAULT_MODEL)] = None
    """smollm2, a model's folder, a .gguf file, or a Hugging Face hub id."""
    yes: Flag = False
    """Download the model without asking."""
    system: Annotated[str | None, option("TEXT", "those of the model")] = None
    """Instructions for the model, such as "Answer in one sentence."."""
    no_think: Flag = False
    """Ask a model that can think before it answers, such as Qwen3, to answer at once."""
    max_new_tokens: Annotated[int, option("N")] = 1000
    """Maximum number of tokens in an answer."""
    temperature: Annotated[float, option("T")] = 0.2
    top_k: Annotated[int | None, option("K", "all")] = None
    top_p: Annotated[float | None, option("P")] = 0.9


def run(config: ChatConfig) -> None:
    """Read lines from the terminal or a pipe and answer each of them.

    Answers are written to stdout, everything else, including thoughts, to stderr. Raises Error before the
    first line is read if an option is out of range, the model is missing and not downloaded, or it has no
    chat template. After that, a line that cannot be answered gets an error message, and the conversation
    continues.
    """
    config.check_sampling(min_new_tokens=1)
    if config.run is None and config.model is None:
        config = replace(config, model=DEFAULT_MODEL)
    device = config.open_device()
    config.find()
    config.find_draft()
    if config.model in KNOWN_MODELS and not Path(config.model).exists():
        chats = KNOWN_MODELS[config.model].chats
        if not chats and config.adapter is None:
            raise _no_template(config)
        if chats and find_pulled(config.model) is None:
            pull(config.model, ask=None if config.yes else _ask)
    model, tokenizer = config.load(config.weights_dtype)
    if tokenizer.chat_template is None:
        raise _no_template(config)
    move(model, device)
    draft = config.load_draft(model, config.weights_dtype, device)
    options = config.max_new_tokens, *config.sampling, config.seed, draft
    conversation = Conversation(model, tokenizer, config.system, *options)
    if config.no_think:
        check_can_skip_thinking(tokenizer.chat_template, config.typed)
        conversation.enable_thinking = False
    inside = begins_inside(tokenizer, conversation.prompt(""))  # raises Error now if the template is unusable
    with autocast(config.dtype):
        name = config.run or config.model
        _answer_lines(conversation, f"{name}, {model.num_parameters():,} parameters. {HELP}.", inside)


class _Screen:
    """Writes the thoughts of an answer, dimmed in a terminal, to stderr, and the answer to stdout."""

    def __init__(self):
        self.dim, self.plain = ("\x1b[2m", "\x1b[0m") if sys.stderr.isatty() else ("", "")
        self.thinking = False

    def __call__(self, text: str, is_thought: bool) -> None:
        if is_thought:
            print(f"{self.dim}{text}{self.plain}", end="", file=sys.stderr, flush=True)
        else:
            self.end_thoughts()
            print(text, end="", flush=True)
        self.thinking = is_thought

    def end_thoughts(self) -> None:
        if self.thinking:
            print("\n", file=sys.stderr, flush=True)
        self.thinking = False


def _no_template(config: ChatConfig) -> Error:
    remedy = f"continue a text with `tinyllm generate {config.typed} --prompt TEXT`"
    return Error(f"{config.typed} has no chat template: {remedy}, or choose a chat model such as smollm2")


def _answer_lines(conversation: Conversation, welcome: str, inside: bool) -> None:
    terminal = sys.stdin.isatty()
    if terminal:
        print(welcome, file=sys.stderr)
        with contextlib.suppress(ImportError):  # not on Windows, whose console edits lines by itself
            import readline  # noqa: F401  (input() then supports arrow keys)
    if isinstance(sys.stdin, io.TextIOWrapper):  # bytes that are not UTF-8 spoil only their own line
        sys.stdin.reconfigure(errors="surrogateescape")
    while True:
        try:
            line = input("> " if terminal else "").strip()
            if line == "/quit":
                return
            _answer_line(conversation, line, inside)
        except EOFError:
            if terminal:
                print(file=sys.stderr)  # so that the shell's prompt starts on a new line
            return
        except KeyboardInterrupt:  # Ctrl-C between answers must not lose the conversation
            if not terminal:
                raise
            print("\n(interrupted; /quit or Ctrl-D ends)", file=sys.stderr)


def _answer_line(conversation: Conversation, line: str, inside: bool) -> None:
    try:
        if line.startswith("/"):
            note = _command(conversation, line)
        elif line:
            screen = _Screen()
            divide = ThoughtFilter(screen, inside)
            answer = conversation.answer(line, divide)
            divide.finish()
            screen.end_thoughts()
            print(" …" if answer.end == "interrupt" else "", flush=True)
            note = _statistics(conversation, answer)
        else:
            return
    except Error as error:  # the conversation continues
        note = str(error)
    print(f"({note})", file=sys.stderr)


def _statistics(conversation: Conversation, answer: Answer) -> str:
    new = answer.prompt_tokens - answer.cached_tokens
    of_all = f" of {answer.prompt_tokens:,}" if answer.cached_tokens else ""
    note = f"prefill {new:,}{of_all} tokens in {answer.prompt_seconds:.1f} s"
    if answer.tokens > 1:
        note += f", decoding {(answer.tokens - 1) / answer.seconds:.1f} tokens/s"
    context = conversation.model.context
    ends = {
        "stop": "",
        "interrupt": "; interrupted",
        "length": f"; cut off after {answer.tokens:,} tokens: raise --max-new-tokens",
        "context": f"; cut off, the context of {context:,} tokens is full: /reset starts a new conversation",
    }
    return note + ends[answer.end]


def _command(conversation: Conversation, line: str) -> str:
    """Execute a line that begins with /; returns the message to show."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if name == "/reset":
        if rest:
            raise Error("/reset takes no text: enter it alone to start a new conversation")
        conversation.reset()
        return "new conversation"
    if name == "/system":
        conversation.instruct(rest or None)
        return f"new conversation with {'these' if rest else 'the default'} instructions"
    if name == "/save" and rest:
        _save(conversation, rest)
        return f"saved in {rest}"
    return HELP


def _save(conversation: Conversation, name: str) -> None:
    """Write the messages to a new JSON file, in the form that ``apply_chat_template`` takes."""
    try:
        path = Path(name).expanduser()
        if os.path.lexists(path):
            raise FileExistsError("File exists")
        text = json.dumps(conversation.history(), ensure_ascii=False, indent=2)
        write_whole(path, f"{text}\n".encode())
    except (OSError, ValueError, RuntimeError) as error:  # an invalid name, or a home that does not exist
        reason = getattr(error, "strerror", None) or error
        raise Error(f"{name!r} cannot be written ({reason}): choose another file") from None


def _ask(text: str) -> bool:
    if confirm(text, "Download it?"):
        return True
    raise Error(
        "the model was not downloaded: answer yes, give --yes, or --model with the path of a local model"
    )
