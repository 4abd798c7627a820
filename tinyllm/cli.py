"""What can be done from the command line: ``tinyllm train`` and ``tinyllm generate``."""

from __future__ import annotations

import codecs
import contextlib
import io
import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tinyllm.errors import Error
from tinyllm.generate import generate
from tinyllm.models import load_model
from tinyllm.tokenizer import Tokenizer, load_tokenizer
from tinyllm.train import PRESETS, TrainConfig, last_checkpoint, train

GRID_TOP_K, GRID_TEMPERATURE = (1, 3, 5, 10, 100), (0.0, 0.5, 1.0, 1.5, 2.0)
DONE, FAILED, WRONG = 0, 1, 2  # exit codes; 128 + signal when interrupted


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt with a model that `tinyllm train` made, or one from a Hugging Face folder."""

    prompt: str
    """The text to continue."""
    run: Path | None = None
    """Folder of a run: its newest checkpoint and its tokenizer are used."""
    model: str | None = None
    """Instead of --run: a model's folder or hub id (GPT-2's tokenizer is used)."""
    max_new_tokens: int = 100
    """Tokens to write."""
    temperature: float = 0.8
    """0 always takes the most likely token; above 1 gets wilder."""
    top_k: int | None = 40
    """Draw from this many most likely tokens (None: all)."""
    top_p: float | None = None
    """Draw from the most likely tokens whose probabilities first reach this sum."""
    seed: int = 0
    """The same seed writes the same text."""
    grid: bool = False
    """Instead of one text, a line for every top-k in 1, 3, 5, 10, 100 and temperature in 0, 0.5 … 2."""


def _generate(config: GenerateConfig) -> None:
    if (config.run is None) == (config.model is None):
        raise Error("say which model: either --run DIR or --model FOLDER")
    if config.run is not None:
        model, tokenizer = load_model(last_checkpoint(config.run)), load_tokenizer(config.run)
    else:
        model, tokenizer = load_model(config.model), load_tokenizer("gpt2")
    if tokenizer.vocab_size != model.config.vocab_size:
        raise Error(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} ids and the model "
            f"{model.config.vocab_size}: they do not belong together"
        )
    if config.seed < 0:
        raise Error(f"--seed is {config.seed}: choose a whole number of at least 0")
    try:
        ids = tokenizer.encode(config.prompt)
    except Error as error:
        raise Error(f"--prompt: {error}") from None
    if not ids:
        raise Error("--prompt is empty: give at least one character to continue")
    if config.grid:
        return _print_grid(model, tokenizer, ids, config)
    rng = np.random.default_rng(config.seed)
    steps = generate(model, [ids], config.max_new_tokens, config.temperature, config.top_k, config.top_p, rng)
    if len(ids) + config.max_new_tokens > model.context:
        print(f"(past {model.context} tokens the oldest are forgotten: the model's context)", file=sys.stderr)
    print(config.prompt, end="", flush=True)
    print_stream(tokenizer, (int(tokens[0]) for tokens in steps))


def _print_grid(model, tokenizer: Tokenizer, ids: list[int], config: GenerateConfig) -> None:
    for top_k in GRID_TOP_K:
        for temperature in GRID_TEMPERATURE:
            rng = np.random.default_rng(config.seed)
            steps = generate(model, [ids], config.max_new_tokens, temperature, top_k, config.top_p, rng)
            text = tokenizer.decode([int(tokens[0]) for tokens in steps])
            print(f"top-k {top_k:3}  temperature {temperature:.1f}  {' '.join(text.split())}", flush=True)


def print_stream(tokenizer: Tokenizer, ids) -> None:
    """Print tokens as they come. A token may end inside a character: its bytes wait for the rest."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        print(decoder.decode(tokenizer.decode_bytes([token])), end="", flush=True)
    print(decoder.decode(b"", final=True))


def parse_options(options: type, program: str, args: list[str], **more):
    """An instance of the dataclass ``options`` from command-line words; tyro's box becomes one ``Error``.

    ``more`` goes to ``tyro.cli``. After ``--help`` the program ends, with exit code 0.
    """
    import tyro

    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(options, prog=program, args=args, **more)
    except SystemExit as stop:
        if not stop.code:
            raise
    rows = [row.strip("│ ") for row in box.getvalue().splitlines()[1:]]
    sentence = " ".join(itertools.takewhile(lambda row: not row.startswith("─"), rows))
    raise Error(f"{sentence.rstrip('.')}; see {program} --help")


def _train_options(args: list[str]) -> TrainConfig:
    preset, rest, words = "small", [], iter(args)
    for word in words:  # taken out first: it sets the defaults that the other options override
        name, equals, value = word.partition("=")
        if name == "--preset":
            preset = value if equals else next(words, "")
        else:
            rest.append(word)
    if preset not in PRESETS:
        raise Error(f"--preset {preset!r} is unknown: choose one of {', '.join(PRESETS)}")
    return parse_options(
        TrainConfig,
        "tinyllm train",
        rest,
        default=TrainConfig(**PRESETS[preset]),
        description=f"{TrainConfig.__doc__} --preset NAME ({', '.join(PRESETS)}) sets the defaults below.",
    )


def _parse(args: list[str]) -> TrainConfig | GenerateConfig:
    if args[:1] == ["train"]:
        return _train_options(args[1:])
    if args[:1] == ["generate"]:
        return parse_options(GenerateConfig, "tinyllm generate", args[1:])
    usage = "tinyllm train --help or tinyllm generate --help"
    if args[:1] in (["--help"], ["-h"]):
        print(f"Train a language model and let it write: see {usage}.")
        sys.exit(DONE)
    raise Error(f"there is no command {' '.join(args[:1])!r}: try {usage}")


def main(args: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0 done, 1 the run failed, 2 the request was wrong."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character shows a ?
            stream.reconfigure(errors="replace")
    try:
        config = _parse(sys.argv[1:] if args is None else list(args))
        if isinstance(config, TrainConfig):
            train(config)
        else:
            _generate(config)
    except Error as error:
        print(f"tinyllm: {error}", file=sys.stderr)
        return WRONG
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (FloatingPointError, OSError) as error:
        print(f"tinyllm: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as interrupt:
        number, said = interrupt.args if len(interrupt.args) == 2 else (2, "interrupted")
        print(f"tinyllm: {said}", file=sys.stderr)
        return 128 + number
    return DONE


if __name__ == "__main__":
    sys.exit(main())
