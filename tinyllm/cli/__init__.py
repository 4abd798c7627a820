"""The command line: every command is a class of options and a function, in a file of its own."""

from __future__ import annotations

import io
import os
import sys

from tinyllm.backend.memory import out_of_memory
from tinyllm.cli import chat, eval, generate, info, plot, pull, tokenize, train
from tinyllm.cli.options import parse_options
from tinyllm.errors import Error
from tinyllm.training.config import TrainConfig

__all__ = ["COMMANDS", "main", "parse_options"]

DONE, FAILED, WRONG = 0, 1, 2  # exit codes; 128 + signal when interrupted

COMMANDS = {
    "train": (TrainConfig, train.run),
    "generate": (generate.GenerateConfig, generate.run),
    "chat": (chat.ChatConfig, chat.run),
    "eval": (eval.EvalConfig, eval.run),
    "pull": (pull.PullConfig, pull.run),
    "tokenize": (tokenize.TokenizeConfig, tokenize.run),
    "info": (info.InfoConfig, info.run),
    "plot": (plot.PlotConfig, plot.run),
}


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
        return train.parse(rest)
    return parse_options(COMMANDS[name][0], f"tinyllm {name}", rest)


def main(args: list[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0 done, 1 the run failed, 2 the request was wrong."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character shows a ?
            stream.reconfigure(errors="replace")
    try:
        config = _parse(sys.argv[1:] if args is None else list(args))
        run = next(function for options, function in COMMANDS.values() if options is type(config))
        run(config)
    except Error as error:
        return _say(error, WRONG)
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (FloatingPointError, OSError) as error:
        return _say(error, FAILED)
    except MemoryError as error:
        return _say(_out_of_memory(error, config), FAILED)
    except KeyboardInterrupt as interrupt:
        number, said = interrupt.args if len(interrupt.args) == 2 else (2, "interrupted")
        return _say(said, 128 + number)
    return DONE


def _say(what, code: int) -> int:
    print(f"tinyllm: {what}", file=sys.stderr)
    return code


def _out_of_memory(error: MemoryError, config) -> str:
    """What needs less memory; ``train``, whose run has a checkpoint besides, says all of it itself."""
    if hasattr(config, "smaller"):
        return out_of_memory(error, config.dtype, config.smaller)
    return str(error) or "the memory is full"


if __name__ == "__main__":
    sys.exit(main())
