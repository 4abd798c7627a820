"""The command line. Every command is a class of options and a function, in a file of its own."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import warnings

import tyro

from tinyllm.backend import distributed
from tinyllm.backend.memory import out_of_memory
from tinyllm.cli.options import as_typed, did_you_mean, parse_options, wrap_help
from tinyllm.errors import Error
from tinyllm.training.output import robust_output, silence
from tinyllm.version import __version__

__all__ = ["COMMANDS", "main", "options_of", "parse_options"]

DONE, FAILED, WRONG = 0, 1, 2  # exit codes; 128 + signal when interrupted

COMMANDS = {  # the name of a command, and of its file -> the class of its options
    "train": "TrainConfig",
    "finetune": "FinetuneOptions",
    "generate": "GenerateConfig",
    "chat": "ChatConfig",
    "classify": "ClassifyConfig",
    "eval": "EvalConfig",
    "merge": "MergeConfig",
    "export": "ExportConfig",
    "judge": "JudgeConfig",
    "serve": "ServeConfig",
    "pull": "PullConfig",
    "tokenize": "TokenizeConfig",
    "inspect": "InspectConfig",
    "info": "InfoConfig",
    "plot": "PlotConfig",
}
TRAINING = ("train", "finetune")  # they have a ``parse`` of their own, as some options set others


def options_of(name: str) -> type:
    """The class of a command's options."""
    return getattr(_module(name), COMMANDS[name])


def _module(name: str):
    """The file of a command. Importing only that one takes half as long as all of them."""
    return importlib.import_module(f"tinyllm.cli.{name}")


def _help() -> str:
    summaries = {name: options_of(name).__doc__.splitlines()[0] for name in COMMANDS}
    return "\n".join(
        [
            "usage: tinyllm COMMAND [OPTIONS]",
            "",
            "Train, run and inspect language models.",
            "",
            *(f"  {name:9} {summary}" for name, summary in summaries.items()),
            "",
            "To list the options of a command: tinyllm COMMAND --help",
            "To start, in about three minutes and without a download: tinyllm train",
        ]
    )


def _parse(args: list[str]):
    """The options of a command line, as an instance of its command's class."""
    name, *rest = args or ["--help"]
    if name == "help" and rest:
        return _parse([*rest, "--help"])
    if name in ("--help", "-h", "help"):
        print(wrap_help(_help()), end="")
        sys.exit(DONE)
    if name == "--version":
        print(f"tinyllm {__version__}")
        sys.exit(DONE)
    if name not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise Error(f"unknown command {name!r}{did_you_mean(name, COMMANDS)}: choose one of {known}")
    if name in TRAINING:
        return _module(name).parse(rest)
    only_positive_flags = (tyro.conf.FlagCreatePairsOff,)
    return parse_options(options_of(name), f"tinyllm {name}", rest, config=only_positive_flags)


def main(args: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 1 the run failed, 2 the request was wrong."""
    _reopen_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character shows a ?
            stream.reconfigure(errors="replace")
    with robust_output("stderr"), warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            try:
                return _main(args)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:  # the reader of our output closed the pipe, as `head` does
            silence(sys.stdout)
            return DONE
        except OSError as error:
            silence(sys.stdout)
            return _fail(_not_accessible(error), FAILED)


def _reopen_closed_streams() -> None:
    """Replace streams that the caller closed: a file opened later would get their number, and our messages.

    The new ones cannot be written, as the caller expects.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDONLY)
            setattr(sys, name, open(null, mode, encoding="utf-8"))  # noqa: SIM115


def _main(args: list[str] | None) -> int:
    config = None
    args = sys.argv[1:] if args is None else list(args)
    try:
        kind = _distributed(args)  # first, so that all processes agree on every mistake
        with distributed.opened(kind) if kind else contextlib.nullcontext():
            config = _parse(args)
            _module(args[0]).run(config)
    except Error as error:
        return _fail(str(error) if config is None else as_typed(str(error), config), WRONG)
    except FloatingPointError as error:
        return _fail(error, FAILED)
    except MemoryError as error:
        return _fail(_out_of_memory(error, config), FAILED)
    except KeyboardInterrupt as interrupt:
        number, message = interrupt.args if len(interrupt.args) == 2 else (2, "interrupted")
        return _fail(message, 128 + number)
    return DONE


def _distributed(args: list[str]) -> str | None:
    """The value of --distributed, if it is given to a command that has it."""
    for word, after in zip(args, [*args[1:], ""]):
        name, equals, value = word.partition("=")
        if name == "--distributed" and args[0] in TRAINING:
            return value if equals else after
    return None


def _not_accessible(error: OSError) -> str:
    """The message of an error of the system, or of our own, which has no number."""
    if error.errno is None:
        return str(error)
    if error.filename is None:  # an open stream's
        return f"the output cannot be written ({error.strerror})"
    return f"{os.fsdecode(error.filename)} cannot be read or written ({error.strerror}): check the path"


def _show_warning(message, *_) -> None:
    if distributed.is_first():
        print(f"tinyllm: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _fail(message, code: int) -> int:
    if distributed.is_first():  # what is wrong with another process was told to this one
        print(f"tinyllm: {message}", file=sys.stderr)
    return code


def _out_of_memory(error: MemoryError, config) -> str:
    """The message with options that need less memory. That of ``train`` is complete already."""
    if hasattr(config, "smaller"):
        return out_of_memory(error, config.dtype, config.smaller)
    return str(error) or "the memory is full"


if __name__ == "__main__":
    sys.exit(main())
