"""Options of the ``python -m parity bench`` commands."""

import importlib.util
import shlex
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from parity import tables
from parity.bench import decode, llamacpp, pages, scaling, serve, targets, train
from parity.bench.cuda import measure
from parity.bench.cuda.variants import VARIANTS
from parity.bench.cuda.works import PRECISIONS, WORKS
from parity.bench.decode_texts import prompts
from parity.bench.isa import Isa, check_isa, in_use
from parity.bench.process import machine
from parity.bench.train_variants import what_is_missing
from parity.options import check_at_least, check_installed, check_names, check_writable, write_json
from tinyllm.backend.device import pick_device
from tinyllm.errors import Error
from tinyllm.models import load_model
from tinyllm.weights import hub


@dataclass(frozen=True)
class BenchTrain:
    """Time whole training steps of tinyllm and PyTorch.

    Each measurement runs in a process of its own, and the variants take turns. Without --work, every work
    that has a target is measured with the variants that its targets need. Exit code 1 if a target is not met.
    """

    work: str | None = None  # only this one, such as gpt2-124m, first-run or tiny
    variants: tuple[str, ...] = ()  # tinyllm, gemms, torch-eager, torch-linear-ce, torch-compile
    peers: bool = False  # measure all variants
    rounds: int = 3  # measurements of every variant
    warmup: int = 4  # untimed steps at the start of each measurement
    steps: int = 5  # timed steps of each measurement; works whose step takes milliseconds do more
    threads: int = 2  # threads of every variant
    isa: Isa = "native"  # avx2 holds both sides to AVX2 on a processor that has more
    json: Path | None = None  # also write the complete result to this file
    write: bool = False  # also write the tables of measured/ and README.md; needs every work

    def run(self) -> int:
        """Check the arguments, measure and print the report; return the exit code."""
        if self.work is not None:
            check_names("work", [self.work], train.WORKS)
        _check_counts(self, rounds=1, warmup=0, steps=1, threads=1)
        check_isa(self.isa, facts := machine())
        table = _table("train", self.isa, facts)
        variants = self._variants()
        _check_variants({variant for chosen in variants.values() for variant in chosen}, self.warmup)
        if self.write and (self.work or self.variants):
            raise Error("--write needs every work and its variants: omit --work and --variants")
        if self.write:
            pages.check_pages(table, facts)

        result = train.train(variants, self.rounds, self.warmup, self.steps, self.threads, self.isa)
        print(train.report(result))
        write_json(self.json, result)
        if self.write:
            tables.write(pages.page_of(result["machine"]), table, train.markdown(result))
            pages.write_front_page()
        return int(targets.any_not_met(result))

    def _variants(self) -> dict[str, list[str]]:
        """Work -> the variants to measure on it; the first of them is compared with the others."""
        works = targets.TARGET_WORKS if self.work is None else (self.work,)
        if self.variants and self.peers:
            raise Error("--variants selects some variants and --peers selects all: give one of the two")
        if self.variants:
            check_names("variants", self.variants, train.VARIANTS)
        if self.variants or self.peers:
            return {work: list(self.variants or train.VARIANTS) for work in works}
        if self.work is None:
            return {work: targets.needed_variants(work) for work in works}
        return {self.work: ["tinyllm", "torch-eager"]}


@dataclass(frozen=True)
class BenchScaling:
    """Time training steps of a small model as its batch, context, width, depth and threads grow.

    Prints the time and memory of tinyllm and PyTorch at every size, and plots them.
    """

    out: Path = Path(".")  # folder for the plot, scaling.png; created if it does not exist
    axes: tuple[str, ...] = tuple(scaling.AXES)  # the sizes to vary
    rounds: int = 1  # measurements of every point
    warmup: int = 3  # untimed steps at the start of each measurement
    steps: int = 5  # timed steps of each measurement
    isa: Isa = "native"  # avx2 holds both sides to AVX2 on a processor that has more
    json: Path | None = None  # also write the complete result to this file
    write: bool = False  # also write the table into a page of measured/; needs all axes

    def run(self) -> int:
        """Check the arguments, measure, print the tables and write the plot; return the exit code."""
        check_names("axes", self.axes, scaling.AXES)
        _check_counts(self, rounds=1, warmup=0, steps=1)
        check_isa(self.isa, facts := machine())
        table = _table("scaling", self.isa, facts)
        if self.write and set(self.axes) != set(scaling.AXES):
            raise Error("--write needs every axis: omit --axes")
        if self.write:
            tables.check_page(pages.page_of(facts), table)
        _check_variants(set(scaling.VARIANTS), self.warmup)
        check_installed("bench scaling", ("matplotlib",))
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"--out {self.out} cannot be created ({error.strerror})"
            raise Error(f"{problem}: choose another folder") from error

        axes = {axis: scaling.AXES[axis] for axis in self.axes}
        labels = {axis: label for axis, (label, *_) in axes.items()}
        result = scaling.scaling(axes, scaling.BASE, self.rounds, self.warmup, self.steps, self.isa)
        print(scaling.report(result, labels))
        write_json(self.json, result)
        scaling.plot(result, labels, self.out / "scaling.png")
        print(f"\nThe plot is {self.out / 'scaling.png'}")
        if self.write:
            tables.write(pages.page_of(result["machine"]), table, scaling.markdown(result, labels))
        return 0


@dataclass(frozen=True)
class BenchDecode:
    """Time decoding and prefill with tinyllm, and compare them with transformers.

    Measures a step against its products, a token, prefills, the second turn of a chat, speculative decoding,
    several rows at once, and the time from starting Python to the first token; llama.cpp is printed beside.
    Speculation and llama.cpp need a trained model: --model smollm2. Exit code 1 if a target is not met.
    """

    model: str | None = None  # smollm2, folder, GGUF or hub id; default: SmolLM2-135M with random weights
    works: tuple[str, ...] = decode.WORKS  # what to measure
    rounds: int = 3  # measurements of each side
    threads: int = 2  # threads of each side
    isa: Isa = "native"  # avx2 holds both sides to AVX2 on a processor that has more
    json: Path | None = None  # also write the complete result to this file
    write: bool = False  # also write the tables of measured/ and README.md; needs a model and every work

    def run(self) -> int:
        """Check the arguments, measure and print the report; return the exit code."""
        check_names("works", self.works, decode.WORKS)
        _check_counts(self, rounds=1, threads=1)
        check_isa(self.isa, facts := machine())
        table = _table("decode", self.isa, facts)
        if self.write and (self.model is None or set(self.works) != set(decode.WORKS)):
            raise Error("--write needs a trained model and every work: give --model smollm2 and omit --works")
        if self.write:
            pages.check_pages(table, facts)
        check_installed("bench decode", ("torch", "transformers"))
        path = None if self.model is None else hub.find_model(self.model)
        with tempfile.TemporaryDirectory() as folder:
            result = self._measure(path, Path(folder))
        print(decode.report(result))
        write_json(self.json, result)
        if self.write:
            tables.write(pages.page_of(result["machine"]), table, decode.markdown(result))
            pages.write_front_page()
        return int(targets.any_not_met(result))

    def _measure(self, path: Path | None, folder: Path) -> dict:
        """Prepare the sides' models (``path``, None for random weights) in ``folder`` and measure them."""
        model, texts, omitted = folder / "model", {}, []
        if path is None:
            decode.write_smollm2(model)
        elif path.is_file():  # a GGUF file: tinyllm and transformers load its weights from one folder
            load_model(path).save_pretrained(model)
        else:
            model = path
        sources = {"tinyllm": str(model)}
        if decode.BY_TRANSFORMERS & {*self.works}:
            sources["transformers"] = str(model)
        if "speculation" in self.works:
            if path is None:
                omitted.append(
                    "Speculation was not measured: random weights write no text (--model smollm2)."
                )
            else:
                texts = prompts(path)
        if "llama.cpp" in self.works:
            if path is None or not path.is_file():
                omitted.append("llama.cpp was not measured: it needs a GGUF file (--model smollm2).")
            elif not importlib.util.find_spec("xllamacpp"):
                omitted.append("llama.cpp was not measured: it needs xllamacpp (pip install xllamacpp).")
            else:
                sources |= llamacpp.files(path, folder)
        name = self.model or "SmolLM2-135M's shape with random weights"
        return decode.decode(
            sources, name, self.rounds, self.threads, self.isa, self.works, texts, tuple(omitted)
        )


@dataclass(frozen=True)
class BenchServe:
    """Put tinyllm's server under load: clients at once, second turns, and a crowd for two minutes.

    Prints the tokens/s of 1, 4, 8 and 16 clients, the time to the first token, and what a crowd larger than
    the queue got. Exit code 1 if batching does not pay, a stream is not whole, or memory grows.
    """

    model: str = "smollm2"  # or a chat model's folder, .gguf file or hub id
    seconds: int = 120  # that the crowd stays
    crowd: int = 32  # clients of the crowd
    threads: int = 2  # threads of the server
    json: Path | None = None  # also write the complete result to this file
    write: bool = False  # also write the table into a page of measured/

    def run(self) -> int:
        """Check the arguments, measure and print the tables; return the exit code."""
        _check_counts(self, seconds=1, crowd=1, threads=1)
        check_installed("bench serve", ("starlette", "uvicorn"))
        hub.find_model(self.model)
        if self.write:
            tables.check_page(pages.page_of(machine()), "serve")
        sizes = serve.Sizes(seconds=self.seconds, crowd=self.crowd)
        result = serve.serve(self.model, self.threads, sizes)
        print(serve.report(result))
        write_json(self.json, result)
        if self.write:
            tables.write(pages.page_of(result["machine"]), "serve", serve.markdown(result))
        return int(bool(serve.not_met(result)))


@dataclass(frozen=True)
class BenchDevice:
    """Time tinyllm and PyTorch on a GPU: GPT-2 124M in training, a Llama of 1B in prefill and decoding.

    Measures tokens/s, memory, and the share of the FLOP/s of a large matrix product (MFU) in float32, TF32
    and bfloat16. Each measurement runs in a process of its own, and the variants take turns. Exit code 1 if a
    target is not met, or if two variants compute different numbers. The weights need 5.5 GB in the temporary
    folder (set TMPDIR to move it). On a CPU, use bench train, bench decode and bench scaling.
    """

    device: Literal["cuda", "cpu"]  # cpu needs --small and only shows that the program runs
    works: tuple[str, ...] = tuple(WORKS)  # the works to measure
    precisions: tuple[str, ...] = ()  # float32, tf32, bfloat16; default: all, on a CPU float32
    variants: tuple[str, ...] = VARIANTS  # the variants to measure
    small: bool = False  # small models, to check in a minute that everything runs
    rounds: int = 3  # measurements of every variant
    warmup: int = 3  # untimed steps at the start of each measurement
    steps: int = 10  # timed steps of each measurement
    compiler: str = "inductor"  # backend of torch.compile
    json: Path | None = None  # also write the complete result to this file

    def run(self) -> int:
        """Check the arguments, measure and print the tables; return the exit code."""
        precisions = self._precisions()
        check_names("works", self.works, WORKS)
        check_names("precisions", precisions, PRECISIONS)
        check_names("variants", self.variants, VARIANTS)
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
        return int(targets.any_not_met(result))

    def _precisions(self) -> tuple[str, ...]:
        if self.device == "cuda":
            return self.precisions or PRECISIONS
        if not self.small:
            raise Error("--device cpu needs --small: on a CPU use bench train and bench decode")
        if set(self.precisions) - {"float32"}:
            raise Error(f"--precisions {' '.join(self.precisions)}: a CPU has float32 only, so omit it")
        return ("float32",)

    def _check_torch(self) -> None:
        check_installed(f"bench --device {self.device}", ("torch", "transformers"))
        if self.device == "cuda":
            import torch

            if torch.version.cuda is None:
                raise Error(
                    f"torch {torch.__version__} is built without CUDA: install the build for your CUDA "
                    "(pytorch.org/get-started), or choose --variants tinyllm"
                )
            if not torch.cuda.is_available():
                raise Error(
                    f"torch {torch.__version__} for CUDA {torch.version.cuda} does not find a GPU: check the "
                    "driver with nvidia-smi, or choose --variants tinyllm"
                )

    def _command(self) -> str:
        """The command line that repeats this measurement: the options that differ from their defaults."""
        words = ["python", "-m", "parity", "bench", "--device", self.device]
        for option in fields(self)[1:]:
            value = getattr(self, option.name)
            if value != option.default:
                values = value if isinstance(value, tuple) else () if value is True else (value,)
                words += [f"--{option.name}", *map(str, values)]
        return shlex.join(words)


def _table(command: str, isa: Isa, facts: dict) -> str:
    """The name of the table for the instruction set in use: decode-avx2, decode-avx512."""
    return f"{command}-{in_use(isa, facts).replace('-', '').lower()}"


def _check_counts(options, **least: int) -> None:
    """Check that every count is large enough and that the JSON file can be written."""
    for name, smallest in least.items():
        check_at_least(smallest, name, getattr(options, name))
    check_writable("json", options.json)


def _check_variants(variants: set[str], warmup: int) -> None:
    for variant in sorted(variants):
        if missing := what_is_missing(variant):
            raise Error(f"{variant} needs {missing}")
    if "torch-compile" in variants and warmup == 0:
        raise Error("--warmup 0 would time torch's compiler, which runs in the first step; give at least 1")
