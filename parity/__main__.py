"""``python -m parity``: proofs, model reports, benchmarks and fault injection."""

import sys

from parity.bench.command import BenchDecode, BenchDevice, BenchScaling, BenchServe, BenchTrain
from parity.compare.command import Report
from parity.durability.command import Reliability
from parity.grade.command import Check, Grade
from parity.ops.command import Proof
from tinyllm.cli.options import did_you_mean, parse_options, readable, wrap_help
from tinyllm.errors import Error

# The words of a command -> the dataclass of its options, whose run() returns the exit code
COMMANDS = {
    "report": Report,
    "proof": Proof,
    "grade": Grade,
    "check": Check,
    "bench train": BenchTrain,
    "bench decode": BenchDecode,
    "bench scaling": BenchScaling,
    "bench serve": BenchServe,
    "bench": BenchDevice,
    "reliability": Reliability,
}

EXIT_CODES = """\
Exit codes: 0 success; 1 a layer differs, a check fails or a target is not met;
2 wrong arguments; 130 interrupted."""


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code (``EXIT_CODES``)."""
    if not arguments or arguments[0] in ("--help", "-h"):
        print(wrap_help(overview()), end="")
        return 0
    try:
        return parse(arguments).run()
    except Error as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:  # of a file or of stdout
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT


def overview() -> str:
    """The text of ``python -m parity --help``: every command with the first line of its description."""
    lines = ["usage: python -m parity COMMAND [OPTIONS]", "", "Compare tinyllm with PyTorch.", ""]
    for words, options in COMMANDS.items():
        shown = "bench --device" if words == "bench" else words
        lines.append(f"  {shown:<15} {options.__doc__.splitlines()[0]}")
    return "\n".join([*lines, "", "For its options: python -m parity COMMAND --help.", EXIT_CODES])


def parse(arguments: list[str]):
    """The parsed options of the command that ``arguments`` begin with."""
    for words, options in COMMANDS.items():
        length = len(words.split())
        rest = arguments[length:]
        if words == "bench" and not (rest and rest[0].startswith("-")):
            continue  # it has options only; a word after it would be a subcommand
        if arguments[:length] == words.split():
            return parse_options(readable(options), f"python -m parity {words}", rest)
    if arguments[0] == "bench":
        kinds = [words.removeprefix("bench ") for words in COMMANDS if words.startswith("bench ")]
        meant, kinds = did_you_mean(" ".join(arguments[1:2]), kinds), ", ".join(kinds)
        raise Error(
            f"'{' '.join(arguments)}' is not a command{meant}: choose bench with {kinds} or --device cuda"
        )
    known = list(dict.fromkeys(words.split()[0] for words in COMMANDS))
    meant, known = did_you_mean(arguments[0], known), ", ".join(known)
    raise Error(
        f"'{arguments[0]}' is not a command{meant}: choose one of {known}, or see python -m parity --help"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
