"""``tinyllm generate``: continue a prompt with a model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from tinyllm.backend.dtypes import autocast
from tinyllm.cli.options import (
    DeviceOptions,
    Flag,
    SamplingOptions,
    SpecialOptions,
    SpeculationOptions,
    TextModelOptions,
    move,
    option,
)
from tinyllm.errors import Error
from tinyllm.inference.chat import text_stream
from tinyllm.inference.generate import generate
from tinyllm.nn import Module
from tinyllm.tokenizers.base import Tokenizer
from tinyllm.tokenizers.chat_template import encode_chat, end_of_answer
from tinyllm.tools.console import shows_blocks
from tinyllm.tools.show import watch_probabilities

GRID_TOP_K, GRID_TEMPERATURE = (1, 3, 5, 10, 100), (0.0, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    prompt: Annotated[str, option("TEXT")]
    """The text to continue, such as "Once upon a time"."""
    chat: Flag = False
    """Treat the prompt as a message to a chat model, in the format the model was trained on."""
    slide: Flag = False
    """Let a Llama generate past its context by dropping the oldest tokens (GPT-2 always does)."""
    grid: Flag = False
    """Print one line for every combination of top-k 1, 3, 5, 10, 100 and temperature 0, 0.5, 1, 1.5, 2."""
    show_probabilities: Flag = False
    """Instead of the text, show the most likely tokens of each step as bars, and mark the one sampled."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(
    DeviceOptions, SpeculationOptions, SamplingOptions, SpecialOptions, TextModelOptions, _Prompt
):
    """Continue a prompt with a trained model.

    Example: tinyllm generate --run runs/python-docs-1 --prompt "The " --top-k 10
    """

    smaller: ClassVar = ["fewer --max-new-tokens"]


def run(config: GenerateConfig) -> None:
    if config.grid and config.show_probabilities:
        raise Error("--grid and --show-probabilities print different things: choose one")
    if config.grid and config.sampling[:2] != (GenerateConfig.temperature, GenerateConfig.top_k):
        raise Error(
            "--grid has temperatures and numbers of tokens of its own: omit --temperature and --top-k"
        )
    if config.speculate and config.show_probabilities:
        raise Error("--show-probabilities shows plain steps: omit it, or --speculate")
    if not config.prompt:
        raise Error("--prompt is empty: give at least one character to continue")
    config.check_sampling()
    check_chat(config)
    config.find()
    config.find_draft()
    device = config.open_device()
    model, tokenizer = config.load(config.weights_dtype)
    ids = encode_prompt(config, tokenizer, config.prompt, "--prompt")
    if config.chat:
        tokenizer.eos_ids = (*tokenizer.eos_ids, *end_of_answer(tokenizer))
    move(model, device)
    draft = config.load_draft(model, config.weights_dtype, device)
    with autocast(config.dtype):
        (_print_grid if config.grid else _print_text)(config, model, tokenizer, ids, draft)


def check_chat(config) -> None:
    """Raise Error for --special with --chat, which decides how special tokens are encoded."""
    if config.chat and config.special != SpecialOptions.special:
        raise Error("--chat encodes special tokens in a message as text: omit --special, or --chat")


def encode_prompt(config, tokenizer: Tokenizer, prompt: str, source: str) -> list[int]:
    """The ids of a prompt from ``source``; with --chat those of a chat, up to where its answer begins."""
    if config.chat:
        if tokenizer.chat_template is None:
            raise Error(f"{config.typed} has no chat template: omit --chat, or choose a chat model")
        message = {"role": "user", "content": prompt}
        return tokenizer.with_bos(encode_chat(tokenizer, tokenizer.chat_template, [message]))
    try:
        return tokenizer.with_bos(tokenizer.encode(prompt, config.special))
    except Error as error:
        raise Error(f"{source}: {error}") from None


def _print_text(config: GenerateConfig, model: Module, tokenizer: Tokenizer, ids: list[int], draft) -> None:
    unused = tokenizer.unused_ids(model.config.vocab_size)
    options = config.max_new_tokens, *config.sampling, config.seed, tokenizer.eos_ids
    steps = generate(model, [ids], *options, slide=config.slide, suppress_ids=unused, speculate=draft)
    _note_context(config, model, ids)
    if config.show_probabilities:
        blocks = shows_blocks(sys.stdout)
        for step in watch_probabilities(
            tokenizer, steps, *config.sampling, blocks=blocks, suppress_ids=unused
        ):
            print(step, flush=True)
        return
    if not config.chat:
        print(config.prompt, end="", flush=True)
    print_stream(tokenizer, steps)


def _note_context(config: GenerateConfig, model: Module, ids: list[int]) -> None:
    """Say what happens at the end of the context, if that can be reached: the last token is not processed."""
    if len(ids) + config.max_new_tokens - 1 <= model.context:
        return
    if config.slide or model.learned_positions:
        note = f"past the context of {model.context:,} tokens, the oldest tokens are dropped"
    else:
        note = f"stops when the context of {model.context:,} tokens is full; --slide continues"
    print(f"({note})", file=sys.stderr)


def print_stream(tokenizer: Tokenizer, steps: Iterable[Sequence[int]]) -> None:
    """Print the tokens of ``generate`` as they are sampled, up to one that ends the text."""
    for piece in text_stream(tokenizer, steps, tokenizer.eos_ids):
        print(piece, end="", flush=True)
    print()


def _print_grid(config: GenerateConfig, model: Module, tokenizer: Tokenizer, ids: list[int], draft) -> None:
    unused = tokenizer.unused_ids(model.config.vocab_size)
    for top_k in GRID_TOP_K:
        for temperature in GRID_TEMPERATURE:
            options = temperature, top_k, config.top_p, config.seed, tokenizer.eos_ids
            more = dict(slide=config.slide, suppress_ids=unused, speculate=draft)
            steps = generate(model, [ids], config.max_new_tokens, *options, **more)
            text = "".join(text_stream(tokenizer, steps, tokenizer.eos_ids))
            print(f"top-k {top_k:3}  temperature {temperature:.1f}  {' '.join(text.split())}", flush=True)
    _note_context(config, model, ids)
