"""``tinyllm train``: start a run, resume one, or profile a training step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro

from tinyllm.backend import distributed
from tinyllm.cli.options import did_you_mean, option, parse_options, readable, taken, values_of
from tinyllm.errors import Error
from tinyllm.tools.profile import Profile, profile
from tinyllm.training.begun import begun_config
from tinyllm.training.config import DEFAULT_PRESET, PRESETS, TrainConfig, flag
from tinyllm.training.run import what_to_try
from tinyllm.training.start import starting_from
from tinyllm.training.tasks.pretrain import parts_of_a_step, train


@dataclass(frozen=True)
class _Preset:
    preset: Annotated[
        str,
        option(
            "NAME", DEFAULT_PRESET, f"A preset ({', '.join(PRESETS)}) sets the defaults of the other options."
        ),
    ] = DEFAULT_PRESET


@dataclass(frozen=True)
@partial(readable, text="TEXT", prompt="TEXT", pattern="GLOB", gpu_memory="GB")
class _Options(TrainConfig, _Preset):
    """Train a model on a text; everything the run writes is in one folder.

    Example: tinyllm train --text book.txt --steps 500
    """

    start_from: Annotated[
        str | None, tyro.conf.arg(name="from", metavar="RUN|MODEL", help_behavior_hint="")
    ] = None
    """Start from the weights and the tokenizer of a run, a model's folder, a .gguf file or a hub id."""


def run(config: TrainConfig) -> None:
    if not config.profile or config.resume is not None:
        train(config)
        return
    try:
        found = profile(*parts_of_a_step(config))
        if distributed.is_first():
            print(found)
            print(communication(found), end="")
    except MemoryError as error:
        raise MemoryError(what_to_try(config, error)) from None


def communication(found: Profile) -> str:
    """How long several processes exchange arrays in a step; the rest is computing and waiting."""
    moved = sum(row.seconds for row in found.rows if row.place in ("reduce-scatter", "all-gather"))
    return (
        f"communication {1000 * moved:,.1f} ms ({moved / found.seconds:.0%} of the step)\n" if moved else ""
    )


def preset(name: str) -> TrainConfig:
    if name not in PRESETS:
        known = ", ".join(PRESETS)
        raise Error(f"--preset {name!r} is unknown{did_you_mean(name, PRESETS)}: choose one of {known}")
    return TrainConfig(**PRESETS[name])


# The options that set the defaults of the others
SOURCES = {
    "--preset": preset,
    "--resume": lambda folder: begun_config(Path(folder)),
    "--from": starting_from,
}


def parse(args: list[str]) -> TrainConfig:
    """The options of a command line. Those in ``SOURCES`` are read first, wherever they are written."""
    sources, rest = {}, args
    for name in SOURCES:
        value, rest = taken(name, rest, "tinyllm train")
        if value is not None:
            sources[name] = value
    if len(sources) > 1:
        raise Error(f"{' and '.join(sources)} both set the defaults of the other options: give one of them")
    source, value = next(iter(sources.items()), ("--preset", DEFAULT_PRESET))
    default = values_of(SOURCES[source](value))
    given = {word.partition("=")[0].replace("_", "-") for word in rest}
    if source == "--preset" and "--steps" in given and "--warmup" not in given:
        default["warmup"] = None  # that of the preset suits its own steps
    rates = {}
    if "--lr" in given:
        others = (name for name in ("initial_lr", "min_lr") if flag(name) not in given)
        rates = {name: default[name] for name in others if default[name]}
    begun_lr, default = default["lr"], default | dict.fromkeys(rates, 0.0)
    options = parse_options(
        _Options,
        "tinyllm train",
        rest,
        default=_Options(**default, preset=value if source == "--preset" else DEFAULT_PRESET),
    )
    found = {name: value for name, value in values_of(options).items() if name in default}
    for name, rate in rates.items():  # those above a smaller --lr are scaled with it
        found[name] = rate if rate <= found["lr"] else rate * found["lr"] / begun_lr
    config = TrainConfig(**found)
    if "--initial-lr" in given and config.warmup_steps == 0:
        raise Error(
            "--initial-lr is where the warm-up begins, and --warmup is 0: omit it, or choose a warm-up"
        )
    return config
