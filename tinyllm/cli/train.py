"""``tinyllm train``: a new run, the rest of one, or a profile of its step."""

from __future__ import annotations

from pathlib import Path

from tinyllm.cli.options import parse_options
from tinyllm.errors import Error
from tinyllm.tools.profile import profile
from tinyllm.training.config import PRESETS, TrainConfig
from tinyllm.training.run import what_to_try
from tinyllm.training.run_folder import begun_config
from tinyllm.training.tasks.pretrain import parts_of_a_step, train


def run(config: TrainConfig) -> None:
    if not config.profile or config.resume is not None:
        train(config)
        return
    try:
        print(profile(*parts_of_a_step(config)))
    except MemoryError as error:
        raise MemoryError(what_to_try(config, error)) from None


def preset(name: str) -> TrainConfig:
    if name not in PRESETS:
        raise Error(f"--preset {name!r} is unknown: choose one of {', '.join(PRESETS)}")
    return TrainConfig(**PRESETS[name])


def parse(args: list[str]) -> TrainConfig:
    """--preset and --resume are taken out first: they set the defaults that the other options override."""
    taken, rest, words = {}, [], iter(args)
    for word in words:
        option, equals, value = word.partition("=")
        if option in ("--preset", "--resume"):
            taken[option] = value if equals else next(words, "")
        else:
            rest.append(word)
    if len(taken) == 2:
        raise Error("--resume takes the run's own options: omit --preset")
    default = preset(taken.get("--preset", "small"))
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
