"""The options of ``python -m parity bench``: of training, of growth, of decoding, and on a GPU."""

import shlex
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from parity.bench import decode, reach, scaling, train
from parity.bench.cuda import measure
from parity.bench.cuda.variants import VARIANTS
from parity.bench.cuda.works import PRECISIONS, WORKS
from parity.bench.train_variants import what_is_missing
from parity.options import check_at_least, check_installed, check_writable, write_json
from tinyllm.backend.device import pick_device
from tinyllm.errors import Error
from tinyllm.models import load_model
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
        if self.work is not None and self.work not in train.WORKS:
            raise Error(f"--work {self.work} is unknown; choose one of {', '.join(train.WORKS)}")
        _check_counts(self, rounds=1, warmup=0, steps=1, threads=1)
        variants = self._variants()
        _check_variants({variant for chosen in variants.values() for variant in chosen}, self.warmup)

        result = train.train(variants, self.rounds, self.warmup, self.steps, self.threads)
        print(train.report(result))
        write_json(self.json, result)
        return int(reach.missed(result))

    def _variants(self) -> dict[str, list[str]]:
        """Work -> the variants to measure on it, the first of which is compared with the others."""
        works = reach.REACH_WORKS if self.work is None else (self.work,)
        if self.variants and self.peers:
            raise Error("--variants says which, and --peers means all: give one of the two")
        if len(set(self.variants)) < len(self.variants):
            raise Error(f"--variants {' '.join(self.variants)} names one twice; name each once")
        if self.variants or self.peers:
            return {work: list(self.variants or train.VARIANTS) for work in works}
        if self.work is None:
            return {work: reach.needed_variants(work) for work in works}
        return {self.work: ["tinyllm", "torch-eager"]}


@dataclass(frozen=True)
class BenchScaling:
    """Time and memory of a small model's training step against batch, context, width, depth and threads."""

    out: Path = Path(".")  # folder of the plot, scaling.png; made if need be
    axes: tuple[str, ...] = tuple(scaling.AXES)  # which of them
    rounds: int = 1  # how many times every point is measured
    warmup: int = 3  # untimed steps at the start of each measurement
    steps: int = 5  # timed steps of each measurement
    json: Path | None = None  # also write everything measured to this file

    def run(self) -> int:
        """Check the request, measure, print the tables, write the plot."""
        if unknown := [axis for axis in self.axes if axis not in scaling.AXES]:
            raise Error(f"--axes {unknown[0]} is unknown; choose from {', '.join(scaling.AXES)}")
        if not self.axes:
            raise Error(f"--axes is empty; name at least one of {', '.join(scaling.AXES)}")
        _check_counts(self, rounds=1, warmup=0, steps=1)
        _check_variants(set(scaling.VARIANTS), self.warmup)
        check_installed("bench scaling", ("matplotlib",), "plot")
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"--out {self.out} cannot be made ({error.strerror})"
            raise Error(f"{problem}: choose another folder") from error

        axes = {axis: scaling.AXES[axis] for axis in self.axes}
        labels = {axis: label for axis, (label, *_) in axes.items()}
        result = scaling.scaling(axes, scaling.BASE, self.rounds, self.warmup, self.steps)
        print(scaling.report(result, labels))
        write_json(self.json, result)
        scaling.plot(result, labels, self.out / "scaling.png")
        print(f"\nThe plot is {self.out / 'scaling.png'}")
        return 0


@dataclass(frozen=True)
class BenchDecode:
    """Time decoding with tinyllm and transformers: tokens, the products' share, a long prompt, the start.

    Exit code 1 if a bound of the table of reach was missed.
    """

    model: str | None = None  # a folder, .gguf file or hub id; if not given, SmolLM2's shape at random
    rounds: int = 3  # how many times each side is measured
    threads: int = 2  # threads of each side
    json: Path | None = None  # also write everything measured to this file

    def run(self) -> int:
        """Check the request, measure, print the tables."""
        _check_counts(self, rounds=1, threads=1)
        check_installed("bench decode", ("torch", "transformers"), "parity")
        path = None if self.model is None else hub.find_model(self.model)
        with tempfile.TemporaryDirectory() as folder:
            if path is None:
                decode.write_smollm2(Path(folder) / "model")
            elif path.is_file():  # a GGUF file: both sides read its weights from one folder
                load_model(path).save_pretrained(Path(folder) / "model")
            source = path if path is not None and path.is_dir() else Path(folder) / "model"
            name = self.model or "SmolLM2-135M's shape, random weights"
            result = decode.decode(source, name, self.rounds, self.threads)
        print(decode.report(result))
        write_json(self.json, result)
        return int(reach.missed(result))


@dataclass(frozen=True)
class BenchDevice:
    """Time tinyllm and PyTorch on a GPU: GPT-2 124M in training, a Llama of 1B in prefill and decoding.

    In float32, TF32 and bfloat16, each variant in its own process, in turn; tokens/s, the share of the
    FLOP/s of a large matrix product (MFU), memory. Exit code 1 if a bound of the table of reach was missed,
    or if two variants did not compute the same. The weights are written to the temporary folder first, 5.5 GB
    (TMPDIR says where that is). On a CPU: bench train, bench decode, bench scaling.
    """

    device: Literal["cuda", "cpu"]  # cuda; cpu takes --small, and shows only that the program runs
    works: tuple[str, ...] = tuple(WORKS)  # which of them
    precisions: tuple[str, ...] = ()  # which of float32, tf32, bfloat16; all if not given, on a CPU float32
    variants: tuple[str, ...] = VARIANTS  # which of them
    small: bool = False  # small models instead: whether everything runs, in a minute
    rounds: int = 3  # how many times every variant is measured
    warmup: int = 3  # untimed steps at the start of each measurement
    steps: int = 10  # timed steps of each measurement
    compiler: str = "inductor"  # the backend of torch.compile
    json: Path | None = None  # also write everything measured to this file

    def run(self) -> int:
        """Check the request, measure, print the tables."""
        precisions = self._precisions()
        self._check_names("works", self.works, tuple(WORKS))
        self._check_names("precisions", precisions, PRECISIONS)
        self._check_names("variants", self.variants, VARIANTS)
        _check_counts(self, rounds=1, warmup=0, steps=1)
        pick_device(self.device)
        if self.device == "cpu" and (missing := what_is_missing("tinyllm")):
            raise Error(f"bench --device cpu needs {missing}")
        if any(variant.startswith("torch") for variant in self.variants):
            self._check_torch()

        options = vars(self) | {"precisions": precisions}
        request = measure.Request(**{field.name: options[field.name] for field in fields(measure.Request)})
        result = measure.bench(request, self._command())
        write_json(self.json, result)
        return int(reach.missed(result))

    def _precisions(self) -> tuple[str, ...]:
        if self.device == "cuda":
            return self.precisions or PRECISIONS
        if not self.small:
            raise Error("--device cpu takes --small: on a CPU bench train and bench decode measure speed")
        if set(self.precisions) - {"float32"}:
            raise Error(f"--precisions {' '.join(self.precisions)}: a CPU has float32 only, so omit it")
        return ("float32",)

    def _check_names(self, option: str, given: tuple[str, ...], known: tuple[str, ...]) -> None:
        if unknown := [name for name in given if name not in known]:
            raise Error(f"--{option} {unknown[0]} is unknown; choose from {', '.join(known)}")
        if len(set(given)) < len(given) or not given:
            raise Error(f"--{option} {' '.join(given)}: name one or more of {', '.join(known)}, each once")

    def _check_torch(self) -> None:
        check_installed(f"bench --device {self.device}", ("torch", "transformers"), "parity")
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


def _check_counts(options, **least: int) -> None:
    """Is every count large enough, and can the JSON file be written?"""
    for name, smallest in least.items():
        check_at_least(smallest, name, getattr(options, name))
    check_writable("json", options.json)


def _check_variants(variants: set[str], warmup: int) -> None:
    for variant in sorted(variants):
        if variant not in train.VARIANTS:
            raise Error(f"--variants {variant} is unknown; choose from {', '.join(train.VARIANTS)}")
        if missing := what_is_missing(variant):
            raise Error(f"{variant} needs {missing}")
    if "torch-compile" in variants and warmup == 0:
        raise Error("--warmup 0 would time torch's compiler, which runs in the first step; give at least 1")
