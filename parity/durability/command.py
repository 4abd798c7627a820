"""The options of ``python -m parity reliability``."""

from dataclasses import dataclass
from pathlib import Path

from parity.options import check_at_least, check_installed, check_writable, write_json

SMALL = dict(kills=20, flips=160, cases=950)
LARGE = dict(kills=100, flips=2_000, cases=10_000)


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
        sizes = LARGE if self.large else SMALL
        given = {name: getattr(self, name) for name in sizes}
        sizes = sizes | {name: size for name, size in given.items() if size is not None}
        for name, size in sizes.items():
            check_at_least(1, name, size)
        check_at_least(0, "seed", self.seed)
        check_writable("json", self.json)
        check_installed("reliability", ("gguf", "sentencepiece", "tokenizers"), "models")
        from parity.durability import reliability

        rows = reliability.proofs(**sizes, seed=self.seed, keep=self.keep)
        result = reliability.report(rows, self.seed, costs=self.large or self.checkpoint_124m)
        write_json(self.json, result)
        return 1 if reliability.failed(result) else 0
