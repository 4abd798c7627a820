"""``python -m parity``: what tinyllm computes, and how fast, beside PyTorch."""

import importlib.util
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import tyro

from parity.bench import cuda as bench_cuda
from parity.bench import cuda_variants as bench_cuda_variants
from parity.bench import decode as bench_decode
from parity.bench import reach as bench_reach
from parity.bench import scaling as bench_scaling
from parity.bench import train as bench
from parity.bench.train_variants import what_is_missing
from tinyllm.backend.device import pick_device
from tinyllm.cli import parse_options
from tinyllm.errors import Error
from tinyllm.models import ARCHITECTURES, load_model
from tinyllm.weights import hub


@dataclass(frozen=True)
class BenchTrain:
    """Time training steps of tinyllm and its peers, each in its own process, in turn.

    Without --work: on every work of the table of reach, with the variants it needs, and then that table.
    Exit code 1 if a bound of that table was missed. The peers are PyTorch's: eager, eager with its fused
    loss, compiled. JAX is left out: transformers has no GPT-2 in JAX.
    """

    work: str | None = None  # one only: gpt2-124m (4 x 256 tokens), gpt2-124m-1x1024, llama-124m, small …
    variants: tuple[
        str, ...
    ] = ()  # tinyllm, gemms (its matrix products alone), torch-eager, -linear-ce, -compile
    peers: bool = False  # instead: all of them
    rounds: int = 3  # how many times every variant is measured
    warmup: int = 4  # untimed steps at the start of each measurement
    steps: int = 5  # timed steps of each measurement
    threads: int = 2  # threads of every variant
    json: Path | None = None  # also write everything measured to this file

    def run(self) -> int:
        """Check the request, measure, print the report; an ``Error`` says what is wrong with the request."""
        if self.work is not None and self.work not in bench.WORKS:
            raise Error(f"--work {self.work} is unknown; choose one of {', '.join(bench.WORKS)}")
        for name, least in {"rounds": 1, "warmup": 0, "steps": 1, "threads": 1}.items():
            _check_at_least(least, name, getattr(self, name))
        if self.json:
            _check_writable("json", self.json)
        variants = self._variants()
        _check_variants({variant for chosen in variants.values() for variant in chosen}, self.warmup)

        result = bench.train(variants, self.rounds, self.warmup, self.steps, self.threads)
        print(bench.report(result))
        _write_json(self.json, result)
        return 1 if any(row["verdict"] == bench_reach.MISSED for row in result["reach"]) else 0

    def _variants(self) -> dict[str, list[str]]:
        """Work -> the variants to measure on it, the first of which is compared with the others."""
        works = bench_reach.REACH_WORKS if self.work is None else (self.work,)
        if self.variants and self.peers:
            raise Error("--variants says which, and --peers means all: give one of the two")
        if len(set(self.variants)) < len(self.variants):
            raise Error(f"--variants {' '.join(self.variants)} names one twice; name each once")
        if self.variants or self.peers:
            return {work: list(self.variants or bench.VARIANTS) for work in works}
        if self.work is None:
            return {work: bench_reach.needed_variants(work) for work in works}
        return {self.work: ["tinyllm", "torch-eager"]}


@dataclass(frozen=True)
class BenchScaling:
    """Time and memory of a small model's training step against batch, context, width, depth and threads."""

    out: Path = Path(".")  # folder of the plot, scaling.png; made if need be
    axes: tuple[str, ...] = tuple(bench_scaling.AXES)  # which of them
    rounds: int = 1  # how many times every point is measured
    warmup: int = 3  # untimed steps at the start of each measurement
    steps: int = 5  # timed steps of each measurement
    json: Path | None = None  # also write everything measured to this file

    def run(self) -> int:
        """Check the request, measure, print the tables, write the plot."""
        if unknown := [axis for axis in self.axes if axis not in bench_scaling.AXES]:
            raise Error(f"--axes {unknown[0]} is unknown; choose from {', '.join(bench_scaling.AXES)}")
        if not self.axes:
            raise Error(f"--axes is empty; name at least one of {', '.join(bench_scaling.AXES)}")
        for name, least in {"rounds": 1, "warmup": 0, "steps": 1}.items():
            _check_at_least(least, name, getattr(self, name))
        _check_variants(set(bench_scaling.VARIANTS), self.warmup)
        if not importlib.util.find_spec("matplotlib"):
            raise Error("bench scaling needs matplotlib: pip install 'tinyllm[plot]'")
        if self.json:
            _check_writable("json", self.json)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"--out {self.out} cannot be made ({error.strerror})"
            raise Error(f"{problem}: choose another folder") from error

        axes = {axis: bench_scaling.AXES[axis] for axis in self.axes}
        labels = {axis: label for axis, (label, *_) in axes.items()}
        result = bench_scaling.scaling(axes, bench_scaling.BASE, self.rounds, self.warmup, self.steps)
        print(bench_scaling.report(result, labels))
        _write_json(self.json, result)
        bench_scaling.plot(result, labels, self.out / "scaling.png")
        print(f"\nThe plot is {self.out / 'scaling.png'}")
        return 0


@dataclass(frozen=True)
class BenchDevice:
    """Time tinyllm and PyTorch on a GPU: GPT-2 124M training, a Llama of 1B parameters reading and writing.

    In float32, TF32 and bfloat16, each variant in its own process, in turn; tokens/s, the share of the
    FLOP/s of a large matrix product (MFU), memory. Exit code 1 if a bound of the table of reach was missed,
    or if two variants did not compute the same. The weights are written to the temporary folder first, 5.5 GB
    (TMPDIR says where that is). On a CPU: bench train, bench decode, bench scaling.
    """

    device: Literal["cuda", "cpu"]  # cuda; cpu takes --small, and shows only that the program runs
    works: tuple[str, ...] = tuple(bench_cuda_variants.WORKS)  # which of them
    precisions: tuple[str, ...] = ()  # which of float32, tf32, bfloat16; all if not given, on a CPU float32
    variants: tuple[str, ...] = bench_cuda_variants.VARIANTS  # which of them
    small: bool = False  # small models instead: whether everything runs, in a minute
    rounds: int = 3  # how many times every variant is measured
    warmup: int = 3  # untimed steps at the start of each measurement
    steps: int = 10  # timed steps of each measurement
    compiler: str = "inductor"  # the backend of torch.compile
    json: Path | None = None  # also write everything measured to this file

    def run(self) -> int:
        """Check the request, measure, print the tables."""
        precisions = self._precisions()
        self._check_names("works", self.works, tuple(bench_cuda_variants.WORKS))
        self._check_names("precisions", precisions, bench_cuda_variants.PRECISIONS)
        self._check_names("variants", self.variants, bench_cuda_variants.VARIANTS)
        for name, least in {"rounds": 1, "warmup": 0, "steps": 1}.items():
            _check_at_least(least, name, getattr(self, name))
        if self.json:
            _check_writable("json", self.json)
        pick_device(self.device)
        if self.device == "cpu" and (missing := what_is_missing("tinyllm")):
            raise Error(f"bench --device cpu needs {missing}")
        if any(variant.startswith("torch") for variant in self.variants):
            self._check_torch()

        request = bench_cuda.Request(
            self.device,
            self.works,
            precisions,
            self.variants,
            self.small,
            self.rounds,
            self.warmup,
            self.steps,
            self.compiler,
        )
        result = bench_cuda.bench(request, self._command())
        _write_json(self.json, result)
        return 1 if any(row["verdict"] == bench_reach.MISSED for row in result["reach"]) else 0

    def _precisions(self) -> tuple[str, ...]:
        if self.device == "cuda":
            return self.precisions or bench_cuda_variants.PRECISIONS
        if not self.small:
            raise Error("--device cpu takes --small: on a CPU bench train and bench decode measure speed")
        if set(self.precisions) - {"float32"}:
            raise Error(f"--precisions {' '.join(self.precisions)}: a CPU has float32 only, so leave it out")
        return ("float32",)

    def _check_names(self, option: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
        if unknown := [name for name in given if name not in known]:
            raise Error(f"--{option} {unknown[0]} is unknown; choose from {', '.join(known)}")
        if len(set(given)) < len(given) or not given:
            raise Error(f"--{option} {' '.join(given)}: name one or more of {', '.join(known)}, each once")

    def _check_torch(self) -> None:
        for module in ("torch", "transformers"):
            if not importlib.util.find_spec(module):
                raise Error(f"bench --device {self.device} needs {module}: pip install 'tinyllm[parity]'")
        if self.device == "cuda":
            import torch

            if torch.version.cuda is None:
                raise Error(
                    f"torch {torch.__version__} is built without CUDA: install the one for your CUDA "
                    "(pytorch.org/get-started), or choose --variants tinyllm"
                )
            if not torch.cuda.is_available():
                raise Error(
                    f"torch {torch.__version__} for CUDA {torch.version.cuda} finds no GPU: see to the "
                    "driver (nvidia-smi), or choose --variants tinyllm"
                )

    def _command(self) -> str:
        """What to type for this measurement: the options that are not the default."""
        words = ["python", "-m", "parity", "bench", "--device", self.device]
        for option in fields(self)[1:]:
            value = getattr(self, option.name)
            if value != option.default:
                values = value if isinstance(value, tuple) else () if value is True else (value,)
                words += [f"--{option.name}", *map(str, values)]
        return shlex.join(words)


RANDOM_SIZES = dict(n_layer=4, n_head=4, n_embd=64, vocab_size=256, n_positions=64)


@dataclass(frozen=True)
class BenchDecode:
    """Time how tinyllm and transformers write: tokens, the products' share, a long prompt, the start.

    Exit code 1 if a bound of the table of reach was missed.
    """

    model: str | None = None  # a folder, .gguf file or hub id; if not given, SmolLM2's shape at random
    rounds: int = 3  # how many times each side is measured
    threads: int = 2  # threads of each side
    json: Path | None = None  # also write everything measured to this file

    def run(self) -> int:
        """Check the request, measure, print the tables."""
        for name in ("rounds", "threads"):
            _check_at_least(1, name, getattr(self, name))
        if self.json:
            _check_writable("json", self.json)
        for module in ("torch", "transformers"):
            if not importlib.util.find_spec(module):
                raise Error(f"bench decode needs {module}: pip install 'tinyllm[parity]'")
        path = None if self.model is None else hub.find_model(self.model)
        with tempfile.TemporaryDirectory() as folder:
            if path is None:
                bench_decode.write_smollm2(Path(folder) / "model")
            elif path.is_file():  # a GGUF file: both sides read its weights from one folder
                load_model(path).save_pretrained(Path(folder) / "model")
            source = path if path is not None and path.is_dir() else Path(folder) / "model"
            name = self.model or "SmolLM2-135M's shape, random weights"
            result = bench_decode.decode(source, name, self.rounds, self.threads)
        print(bench_decode.report(result))
        _write_json(self.json, result)
        return 1 if bench_decode.missed(result) else 0


@dataclass(frozen=True)
class Report:
    """Compare every layer and gradient of a model with PyTorch and transformers; write an HTML page."""

    model: tyro.conf.Positional[str | None] = None  # a model's folder or hub id (owner/name, or gpt2)
    random: bool = False  # instead: random weights, norms and biases included, so that nothing hides
    arch: str = "gpt2"  # architecture of --random: gpt2 or llama, whose sizes have GPT-2's names here
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
        from parity.compare import page, report

        if self.random:
            asked = RANDOM_SIZES | self._sizes()
            models = report.random_models(self.arch, asked, self.dtype, self.seed)
            name, source = f"{self.arch}, random weights, seed {self.seed}", report.COPIED
        else:
            *models, source = report.models_of(hub.find_folder(self.model), self.dtype)
            name = self.model
        if self.ids:
            batch = report.given_batch(models[0], self.ids)
        else:
            batch = report.random_batch(models[0], self.batch, self.tokens, self.seed)
        findings = report.examine(*models, *batch)
        fields = vars(models[0].config).items()
        sizes = ", ".join(f"{field} {value}" for field, value in fields if type(value) is int)
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


def _check_variants(variants: set[str], warmup: int) -> None:
    for variant in sorted(variants):
        if variant not in bench.VARIANTS:
            raise Error(f"--variants {variant} is unknown; choose from {', '.join(bench.VARIANTS)}")
        if missing := what_is_missing(variant):
            raise Error(f"{variant} needs {missing}")
    if "torch-compile" in variants and warmup == 0:
        raise Error("--warmup 0 would time torch's compiler, which runs in the first step; give at least 1")


def _write_json(path: Path | None, result: dict) -> None:
    if path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


# words -> dataclass of its options, with run()
@dataclass(frozen=True)
class Proof:
    """Run the tests against PyTorch and the sabotage; print the worst errors and what was caught."""

    tests: Path = Path("tests")  # the tests folder of a checkout

    def run(self) -> int:
        """Check the request, run the tests, print two Markdown tables; 1 if a test failed, else 0."""
        if not self.tests.is_dir():
            raise Error(f"--tests {self.tests} is no folder: give the tests folder of a checkout")
        for module in ("pytest", "hypothesis", "torch", "transformers"):
            if not importlib.util.find_spec(module):
                raise Error(f"proof needs {module}: pip install 'tinyllm[test]'")
        from parity.ops import proof

        return proof.run(self.tests)


SMALL_PROOFS = dict(kills=20, flips=160, cases=950)
LARGE_PROOFS = dict(kills=100, flips=2_000, cases=10_000)


@dataclass(frozen=True)
class Reliability:
    """Kill runs, let their disk fail, flip bits of their checkpoints, fuzz every file that we read.

    Prints one table, and every failure; exit code 1 if there is one.
    """

    large: bool = False  # the sizes that the README speaks of, and --checkpoint-124m: about ten minutes
    kills: int | None = None  # kill -9 a run this often; 20 if not given, 100 with --large
    flips: int | None = None  # bits of a checkpoint to flip; 160 if not given, 2,000 with --large
    cases: int | None = None  # broken files to read; 950 if not given, 10,000 with --large
    checkpoint_124m: bool = False  # also time and size of a checkpoint of GPT-2 124M: 3 GB of memory
    seed: int = 0  # of everything drawn
    keep: Path | None = None  # folder for what failed, to look at it
    json: Path | None = None  # also write everything to this file

    def run(self) -> int:
        """Check the request, run the proofs, print the table."""
        sizes = LARGE_PROOFS if self.large else SMALL_PROOFS
        given = {name: getattr(self, name) for name in sizes}
        sizes = sizes | {name: size for name, size in given.items() if size is not None}
        for name, size in sizes.items():
            _check_at_least(1, name, size)
        _check_at_least(0, "seed", self.seed)
        if self.json:
            _check_writable("json", self.json)
        for module in ("gguf", "sentencepiece", "tokenizers"):
            if not importlib.util.find_spec(module):
                raise Error(f"reliability needs {module}: pip install 'tinyllm[models]'")
        from parity.durability import reliability

        rows = reliability.proofs(**sizes, seed=self.seed, keep=self.keep)
        result = reliability.report(rows, self.seed, costs=self.large or self.checkpoint_124m)
        _write_json(self.json, result)
        return 1 if reliability.failed(result) else 0


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
