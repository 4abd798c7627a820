"""Options of ``python -m parity reliability``."""

from dataclasses import dataclass
from pathlib import Path

from parity import tables
from parity.durability.processes import launcher
from parity.options import check_at_least, check_installed, check_writable, write_json
from tinyllm.errors import Error

SMALL = dict(kills=20, flips=160, cases=950)
LARGE = dict(kills=100, flips=2_000, cases=10_000)


@dataclass(frozen=True)
class Reliability:
    """Test crash recovery: kill runs, inject disk errors, flip bits of checkpoints, fuzz every file format.

    Prints a table and every failure. Exit code 1 if anything failed.
    """

    large: bool = False  # the sizes of the published table, with --checkpoint-124m: about ten minutes
    kills: int | None = None  # number of times to kill -9 a run; default 20, with --large 100
    flips: int | None = None  # bits of a checkpoint to flip; default 160, with --large 2,000
    cases: int | None = None  # broken files to read; default 950, with --large 10,000
    checkpoint_124m: bool = False  # also time a checkpoint of GPT-2 124M; needs 3 GB of memory
    processes: int | None = None  # also kill one of so many processes of a run; needs mpi4py and mpiexec
    seed: int = 0  # seed of the random choices
    keep: Path | None = None  # folder to which failed runs and files are copied
    json: Path | None = None  # also write the complete result to this file
    write: bool = False  # also write the table into parity/README.md, unless anything failed; needs --large

    def run(self) -> int:
        """Check the arguments, run the tests and print the table; return the exit code."""
        sizes = LARGE if self.large else SMALL
        given = {name: getattr(self, name) for name in sizes}
        sizes = sizes | {name: size for name, size in given.items() if size is not None}
        for name, size in sizes.items():
            check_at_least(1, name, size)
        check_at_least(0, "seed", self.seed)
        check_writable("json", self.json)
        if self.write and sizes != LARGE:
            raise Error("--write needs the sizes of --large: add it and omit --kills, --flips and --cases")
        if self.write:
            tables.check_page(tables.PAGE, "reliability")
        check_installed("reliability", ("gguf", "sentencepiece", "tokenizers"))
        if self.processes is not None:
            check_at_least(2, "processes", self.processes)
            launcher()
        from parity.durability import reliability

        rows = reliability.proofs(**sizes, seed=self.seed, keep=self.keep, processes=self.processes)
        result = reliability.report(rows, self.seed, costs=self.large or self.checkpoint_124m)
        write_json(self.json, result)
        if reliability.failed(result):
            return 1
        if self.write:
            tables.write(tables.PAGE, "reliability", reliability.markdown(result))
        return 0
