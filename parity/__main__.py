"""``python -m parity``: what tinyllm computes, and how fast, beside PyTorch."""

import sys

from parity.bench.command import BenchDecode, BenchDevice, BenchScaling, BenchTrain
from parity.compare.command import Report
from parity.durability.command import Reliability
from parity.ops.command import Proof
from tinyllm.cli import parse_options
from tinyllm.errors import Error

# The words of a command -> the dataclass of its options, with run() -> exit code
COMMANDS = {
    "bench train": BenchTrain,
    "bench scaling": BenchScaling,
    "bench decode": BenchDecode,
    "bench": BenchDevice,
    "report": Report,
    "proof": Proof,
    "reliability": Reliability,
}


def main(arguments: list[str]) -> int:
    """Run one command; the exit code.

    0 done, 1 a layer diverges, a test or another proof fails, or a bound of speed or memory is missed,
    2 a wrong request, 130 interrupted.
    """
    try:
        return parse(arguments).run()
    except Error as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT


def parse(arguments: list[str]):
    """The options of the command that ``arguments`` begin with."""
    for words, options in COMMANDS.items():
        length = len(words.split())
        rest = arguments[length:]
        if words == "bench" and not (rest and rest[0].startswith("-")):
            continue  # it has options only: another word would be another command
        if arguments[:length] == words.split():
            return parse_options(options, f"python -m parity {words}", rest)
    known = " or ".join(f"python -m parity {words} --help" for words in COMMANDS)
    if {"--help", "-h"} & set(arguments):
        print(f"What tinyllm computes, and how fast, beside PyTorch: see {known}.")
        sys.exit()
    raise Error(f"there is no command '{' '.join(arguments)}'; try {known}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
