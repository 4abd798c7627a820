"""``tinyllm generate``: a model continues a prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tinyllm.backend.dtypes import autocast
from tinyllm.cli.options import DeviceOptions, ModelOptions, SamplingOptions, move
from tinyllm.errors import Error
from tinyllm.inference.chat import text_stream
from tinyllm.inference.generate import generate
from tinyllm.nn import Module
from tinyllm.tokenizers.base import Tokenizer
from tinyllm.tokenizers.chat_template import encode_chat
from tinyllm.tools.console import shows_blocks
from tinyllm.tools.show import watch_probabilities

GRID_TOP_K, GRID_TEMPERATURE = (1, 3, 5, 10, 100), (0.0, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(DeviceOptions, SamplingOptions, ModelOptions):
    """Continue a prompt with a model that `tinyllm train` made, or one from a Hugging Face folder."""

    smaller: ClassVar = ["fewer --max-new-tokens"]

    prompt: str
    """The text to continue."""
    chat: bool = False
    """The prompt is a question to a chat model, put into the format it was trained on."""
    special: str = "refuse"
    """Special tokens such as <|endoftext|> in the prompt: refuse, allow (as their ids), or text."""
    slide: bool = False
    """A Llama goes on past its context and forgets the oldest tokens (GPT-2 always does)."""
    grid: bool = False
    """Instead of one text, a line for every top-k in 1, 3, 5, 10, 100 and temperature in 0, 0.5 … 2."""
    show_probabilities: bool = False
    """Instead of the text, the likeliest tokens at each step as bars, and which one was drawn."""


def run(config: GenerateConfig) -> None:
    if config.grid and config.show_probabilities:
        raise Error("--grid and --show-probabilities are two ways to print: choose one")
    config.check_seed()
    device = config.open_device()
    model, tokenizer = config.load(config.weights_dtype)
    ids = _prompt(config, tokenizer)
    move(model, device)
    with autocast(config.dtype):
        (_print_grid if config.grid else _print_text)(config, model, tokenizer, ids)


def _prompt(config: GenerateConfig, tokenizer: Tokenizer) -> list[int]:
    if config.chat:
        return encode_chat(tokenizer, tokenizer.chat_template, [{"role": "user", "content": config.prompt}])
    try:
        ids = tokenizer.encode(config.prompt, config.special)
    except Error as error:
        raise Error(f"--prompt: {error}") from None
    if not ids:
        raise Error("--prompt is empty: give at least one character to continue")
    return ids


def _print_text(config: GenerateConfig, model: Module, tokenizer: Tokenizer, ids: list[int]) -> None:
    rng = np.random.default_rng(config.seed)
    steps = generate(
        model, [ids], config.max_new_tokens, *config.sampling, rng, tokenizer.eos_ids, slide=config.slide
    )
    if len(ids) + config.max_new_tokens > model.context:
        print(_at_the_end_of_the_context(model, config.slide), file=sys.stderr)
    if config.show_probabilities:
        bars = watch_probabilities(tokenizer, steps, *config.sampling, blocks=shows_blocks(sys.stdout))
        for step in bars:
            print(step, flush=True)
        return
    if not config.chat:
        print(config.prompt, end="", flush=True)
    print_stream(tokenizer, steps)


def _at_the_end_of_the_context(model: Module, slide: bool) -> str:
    if slide or model.learned_positions:
        return f"(past {model.context} tokens the oldest are forgotten: the model's context)"
    return f"(it ends at {model.context} tokens, the model's context, unless told to --slide)"


def print_stream(tokenizer: Tokenizer, steps: Iterable[Sequence[int]]) -> None:
    """Print ``generate``'s tokens as they come, up to one that ends the text."""
    for piece in text_stream(tokenizer, steps, tokenizer.eos_ids):
        print(piece, end="", flush=True)
    print()


def _print_grid(config: GenerateConfig, model: Module, tokenizer: Tokenizer, ids: list[int]) -> None:
    for top_k in GRID_TOP_K:
        for temperature in GRID_TEMPERATURE:
            rng = np.random.default_rng(config.seed)
            steps = generate(model, [ids], config.max_new_tokens, temperature, top_k, config.top_p, rng)
            text = tokenizer.decode([int(tokens[0]) for tokens in steps])
            print(f"top-k {top_k:3}  temperature {temperature:.1f}  {' '.join(text.split())}", flush=True)
