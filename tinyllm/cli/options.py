"""Options that several commands share, and how words become options."""

from __future__ import annotations

import contextlib
import io
import itertools
from dataclasses import dataclass
from pathlib import Path

import tyro

from tinyllm.backend.device import open_device
from tinyllm.backend.dtypes import Precision, weights_dtype
from tinyllm.backend.memory import keep_memory
from tinyllm.errors import Error
from tinyllm.inference.chat import load_model_and_tokenizer
from tinyllm.models import load_model
from tinyllm.nn import Module
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tokenizers.base import Tokenizer, check_fits
from tinyllm.weights.runs import last_checkpoint


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    run: Path | None = None
    """Folder of a run: its newest checkpoint and its tokenizer are used."""
    model: str | None = None
    """Instead of --run: smollm2, a model's folder, a .gguf file or a hub id."""

    def load(self, dtype) -> tuple[Module, Tokenizer]:
        """The model that --run or --model names, and its tokenizer; ``Error`` for both or none."""
        if (self.run is None) == (self.model is None):
            raise Error("say which model: either --run DIR or --model FOLDER")
        if self.model is not None:
            return load_model_and_tokenizer(self.model, dtype)
        model, tokenizer = load_model(last_checkpoint(self.run), dtype), load_tokenizer(self.run)
        check_fits(tokenizer, model)
        return model, tokenizer


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    max_new_tokens: int = 100
    """Tokens to write at most."""
    temperature: float = 0.8
    """0 always takes the most likely token; above 1 gets wilder."""
    top_k: int | None = 40
    """Draw from this many most likely tokens (None: all)."""
    top_p: float | None = None
    """Draw from the most likely tokens whose probabilities first reach this sum."""
    seed: int = 0
    """The same seed and the same words get the same text."""

    @property
    def sampling(self) -> tuple[float, int | None, float | None]:
        """Temperature, top-k and top-p, as ``generate`` takes them."""
        return self.temperature, self.top_k, self.top_p

    def check_seed(self) -> None:
        if self.seed < 0:
            raise Error(f"--seed is {self.seed}: choose a whole number of at least 0")


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    device: str = "cpu"
    """cpu, cuda, cuda:1 …, or auto: a GPU if CuPy sees one; it says which."""
    dtype: Precision = "float32"
    """What the weights are kept and multiplied in (tf32: kept in float32). All but float32 and float64 need
    a GPU."""
    gpu_memory: float | None = None
    """Gigabytes (10^9 bytes) of a GPU's memory to take at most; all of it if not given."""

    def open_device(self) -> str:
        """Make the device ready; returns its name. ``Error`` for one that cannot do what is asked of it."""
        return open_device(self.device, self.dtype, self.gpu_memory)

    @property
    def weights_dtype(self):
        return weights_dtype(self.dtype)


def move(model: Module, device: str) -> None:
    """To the device it will compute on, where memory that was freed is kept for the next step."""
    keep_memory()
    model.to(device)


def parse_options(options: type, program: str, args: list[str], **more):
    """An instance of the dataclass ``options`` from command-line words; tyro's box becomes one ``Error``.

    ``more`` goes to ``tyro.cli``. After ``--help`` the program ends, with exit code 0.
    """
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(options, prog=program, args=args, **more)
    except SystemExit as stop:
        if not stop.code:
            raise
    rows = [row.strip("│ ") for row in box.getvalue().splitlines()[1:]]
    # In a terminal without UTF-8 a line made of hyphens is there below the title, too.
    text = itertools.dropwhile(_is_line, rows)
    sentence = " ".join(itertools.takewhile(lambda row: not _is_line(row), text))
    raise Error(f"{sentence.rstrip('.')}; see {program} --help")


def _is_line(row: str) -> bool:
    return not row.strip("─-")
