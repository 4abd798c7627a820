"""``python -m parity``: what tinyllm computes, and how fast, beside PyTorch."""

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from parity import bench
from tinyllm import pretrained
from tinyllm.cli import parse_options
from tinyllm.errors import Error
from tinyllm.models import ARCHITECTURES


@dataclass(frozen=True)
class BenchTrain:
    """Time training steps of tinyllm and of PyTorch, each in its own process, in turn."""

    work: str = "gpt2-124m"  # gpt2-124m (4 x 256 tokens), gpt2-124m-1x1024, small or tiny
    rounds: int = 3  # how many times every variant is measured
    warmup: int = 4  # untimed steps at the start of each measurement
    steps: int = 5  # timed steps of each measurement
    threads: int = 2  # threads of every variant
    json: Path | None = None  # also write everything measured to this file

    def run(self) -> int:
        """Check the request, measure, print the report; an ``Error`` says what is wrong with the request."""
        if self.work not in bench.WORKS:
            raise Error(f"--work {self.work} is unknown; choose one of {', '.join(bench.WORKS)}")
        for name, least in {"rounds": 1, "warmup": 0, "steps": 1, "threads": 1}.items():
            _check_at_least(least, name, getattr(self, name))
        if self.json:
            _check_writable("json", self.json)
        for module in ("resource", "torch", "transformers"):
            if not importlib.util.find_spec(module):
                raise Error(f"bench needs {module}: pip install 'tinyllm[parity]', on Linux or macOS")

        result = bench.train(self.work, self.rounds, self.warmup, self.steps, self.threads)
        print(bench.report(result))
        if self.json:
            self.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return 0


RANDOM_SIZES = dict(n_layer=4, n_head=4, n_embd=64, vocab_size=256, n_positions=64)


@dataclass(frozen=True)
class Report:
    """Compare every layer and gradient of a model with PyTorch and transformers; write an HTML page."""

    model: tyro.conf.Positional[str | None] = None  # a model's folder or hub id (owner/name, or gpt2)
    random: bool = False  # instead: random weights, norms and biases included, so that nothing hides
    arch: str = "gpt2"  # architecture of --random
    n_layer: int | None = None  # blocks of --random; 4 if not given
    n_head: int | None = None  # heads of --random; 4 if not given
    n_embd: int | None = None  # channels of --random; 64 if not given
    vocab_size: int | None = None  # vocabulary of --random; 256 if not given
    n_positions: int | None = None  # longest sequence of --random; 64 if not given
    dtype: Literal["float32", "float64"] = "float64"  # float64 tells a bug from rounding
    seed: int = 0  # of random weights, tokens and targets
    batch: int = 2  # random sequences
    tokens: int = 32  # tokens of each
    ids: tuple[int, ...] = ()  # instead of random sequences: the token ids of one
    out: Path = Path("parity-report.html")  # the page

    def run(self) -> int:
        """Check the request, compare, print the table, write the page; 1 if a layer diverges, else 0."""
        self._check()
        from parity import page, report

        if self.random:
            models = report.random_models(RANDOM_SIZES | self._sizes(), self.dtype, self.seed)
            name, source = f"{self.arch}, random weights, seed {self.seed}", report.COPIED
        else:
            *models, source = report.models_of(pretrained.find_folder(self.model), self.dtype)
            name = self.model
        if self.ids:
            batch = report.given_batch(models[0], self.ids)
        else:
            batch = report.random_batch(models[0], self.batch, self.tokens, self.seed)
        findings = report.examine(*models, *batch)
        sizes = ", ".join(f"{size} {getattr(models[0].config, size)}" for size in RANDOM_SIZES)
        findings.facts = {"model": name, "sizes": sizes, **findings.facts}
        findings.notes.append(source)
        print(findings)
        try:
            self.out.write_text(page.render(findings), encoding="utf-8")
        except OSError as error:
            problem = f"--out {self.out} cannot be written ({error.strerror})"
            raise Error(f"{problem}: choose another file") from error
        print(f"The page is {self.out}")
        return 0 if findings.first is None else 1

    def _check(self) -> None:
        if self.random == (self.model is not None):
            raise Error("say which model: either its folder or hub id, or --random")
        if self.arch not in ARCHITECTURES:
            raise Error(f"--arch {self.arch} is not supported; supported: {', '.join(ARCHITECTURES)}")
        if (given := [*self._sizes()]) and not self.random:
            raise Error(f"--{given[0].replace('_', '-')} is for --random: a model has its own sizes")
        for name, least in {"seed": 0, "batch": 1, "tokens": 1}.items():
            _check_at_least(least, name, getattr(self, name))
        _check_writable("out", self.out)
        for module in ("torch", "transformers"):
            if not importlib.util.find_spec(module):
                raise Error(f"report needs {module}: pip install 'tinyllm[parity]'")

    def _sizes(self) -> dict[str, int]:
        """Those that were given."""
        return {name: getattr(self, name) for name in RANDOM_SIZES if getattr(self, name) is not None}


def _check_at_least(least: int, name: str, value: int) -> None:
    if value < least:
        raise Error(f"--{name} {value} is too small; give at least {least}")


def _check_writable(name: str, path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise Error(f"--{name} {path} cannot be written; name a file in a folder that exists")


COMMANDS = {"bench train": BenchTrain, "report": Report}  # words -> dataclass of its options, with run()


def main(arguments: list[str]) -> int:
    """Run one command; the exit code: 0 done, 1 a layer diverges, 2 a wrong request, 130 interrupted."""
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
        if arguments[:length] == words.split():
            return parse_options(options, f"python -m parity {words}", arguments[length:])
    known = " or ".join(f"python -m parity {words} --help" for words in COMMANDS)
    if {"--help", "-h"} & set(arguments):
        print(f"What tinyllm computes, and how fast, beside PyTorch: see {known}.")
        sys.exit()
    raise Error(f"there is no command '{' '.join(arguments)}'; try {known}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
