"""``python -m parity``: what tinyllm computes, and how fast, beside PyTorch."""

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from parity import bench
from tinyllm.cli import parse_options
from tinyllm.errors import Error


@dataclass(frozen=True)
class BenchTrain:
    """Time training steps of tinyllm and of PyTorch, each in its own process, in turn."""

    work: str = "gpt2-124m"  # gpt2-124m (4 x 256 tokens), gpt2-124m-1x1024, small or tiny
    rounds: int = 3  # how many times every variant is measured
    warmup: int = 4  # untimed steps at the start of each measurement
    steps: int = 5  # timed steps of each measurement
    threads: int = 2  # threads of every variant
    json: Path | None = None  # also write everything measured to this file

    def run(self) -> None:
        """Check the request, measure, print the report; an ``Error`` says what is wrong with the request."""
        if self.work not in bench.WORKS:
            raise Error(f"--work {self.work} is unknown; choose one of {', '.join(bench.WORKS)}")
        for name, least in {"rounds": 1, "warmup": 0, "steps": 1, "threads": 1}.items():
            if getattr(self, name) < least:
                raise Error(f"--{name} {getattr(self, name)} is too small; give at least {least}")
        if self.json and (self.json.is_dir() or not self.json.parent.is_dir()):
            raise Error(f"--json {self.json} cannot be written; name a file in a folder that exists")
        for module in ("resource", "torch", "transformers"):
            if not importlib.util.find_spec(module):
                raise Error(f"bench needs {module}: pip install 'tinyllm[parity]', on Linux or macOS")

        result = bench.train(self.work, self.rounds, self.warmup, self.steps, self.threads)
        print(bench.report(result))
        if self.json:
            self.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


COMMANDS = {"bench train": BenchTrain}  # words on the command line -> dataclass of its options, with run()


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit code: 0 done, 2 the request was wrong, 130 interrupted."""
    try:
        parse(arguments).run()
    except Error as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # 128 + SIGINT
    return 0


def parse(arguments: list[str]):
    """The options of the command that ``arguments`` begin with."""
    for words, options in COMMANDS.items():
        length = len(words.split())
        if arguments[:length] == words.split():
            return parse_options(options, f"python -m parity {words}", arguments[length:])
    known = " or ".join(f"python -m parity {words} --help" for words in COMMANDS)
    if {"--help", "-h"} & set(arguments):
        print(f"What tinyllm computes, and how fast, beside PyTorch: see {known}.")
        sys.exit()
    raise Error(f"there is no command '{' '.join(arguments)}'; try {known}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
