"""Options of ``python -m parity report``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from parity.options import check_at_least, check_installed, check_writable
from tinyllm.errors import Error
from tinyllm.files import write_whole
from tinyllm.models import ARCHITECTURES, full_name
from tinyllm.weights import hub

RANDOM_SIZES = dict(n_layer=4, n_head=4, n_embd=64, vocab_size=256, n_positions=64)


@dataclass(frozen=True)
class Report:
    """Compare every layer and gradient of a model with PyTorch and transformers; write an HTML page.

    Exit code 1 if a layer differs.
    """

    model: tyro.conf.Positional[str | None] = None  # a model's folder or hub id (owner/name, or gpt2)
    random: bool = False  # a model with random weights, including norms and biases, instead
    arch: str = "gpt2"  # architecture of --random, such as llama (with GPT-2's names for the sizes)
    n_layer: int | None = None  # blocks of --random; default 4
    n_head: int | None = None  # heads of --random; default 4
    n_embd: int | None = None  # channels of --random; default 64
    vocab_size: int | None = None  # vocabulary of --random; default 256
    n_positions: int | None = None  # longest sequence of --random; default 64
    dtype: Literal["float32", "float64"] = "float64"  # float64 distinguishes a bug from rounding
    seed: int = 0  # seed of the random weights, tokens and targets
    batch: int = 2  # number of random sequences
    tokens: int = 32  # tokens of each sequence
    ids: tuple[int, ...] = ()  # token ids of one sequence, instead of random sequences
    out: Path = Path("parity-report.html")  # file of the HTML page

    def run(self) -> int:
        """Check the arguments, compare, print the table and write the page; return the exit code."""
        self._check()
        from parity.compare import page, report

        if self.random:
            models = report.random_models(
                full_name(self.arch), RANDOM_SIZES | self._sizes(), self.dtype, self.seed
            )
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
            write_whole(self.out, page.render(findings).encode())
        except OSError as error:
            problem = f"--out {self.out} cannot be written ({error.strerror})"
            raise Error(f"{problem}: choose another file") from error
        print(f"The page is {self.out}")
        return 0 if findings.first is None else 1

    def _check(self) -> None:
        if self.random == (self.model is not None):
            raise Error("give either a model (a folder or hub id) or --random")
        if full_name(self.arch) not in ARCHITECTURES:
            raise Error(f"--arch {self.arch} is not supported; supported: {', '.join(ARCHITECTURES)}")
        if (given := [*self._sizes()]) and not self.random:
            raise Error(f"--{given[0].replace('_', '-')} is only for --random: omit it for a saved model")
        for name, least in {"seed": 0, "batch": 1, "tokens": 1}.items():
            check_at_least(least, name, getattr(self, name))
        check_writable("out", self.out)
        check_installed("report", ("torch", "transformers"))

    def _sizes(self) -> dict[str, int]:
        """The sizes that were given."""
        return {name: getattr(self, name) for name in RANDOM_SIZES if getattr(self, name) is not None}
