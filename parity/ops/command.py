"""Options of ``python -m parity proof``."""

from dataclasses import dataclass
from pathlib import Path

from parity import tables
from parity.options import check_installed
from tinyllm.errors import Error


@dataclass(frozen=True)
class Proof:
    """Run the tests against PyTorch, and plant faults that they must catch; print two Markdown tables.

    The tables list the worst error of every op, layer, model and training recipe, and for every fault the
    tests that caught it. Exit code 1 if a test fails.
    """

    tests: Path = Path("tests")  # the tests folder of a checkout
    write: bool = False  # also write the tables into parity/README.md, unless a test fails

    def run(self) -> int:
        """Check the arguments, run the tests and print the tables; return the exit code."""
        if not self.tests.is_dir():
            raise Error(f"--tests {self.tests} is not a folder: give the tests folder of a checkout")
        if self.write:
            tables.check_page(tables.PAGE, "proof")
        check_installed("proof", ("pytest", "hypothesis", "torch", "transformers"))
        from parity.ops import proof

        return proof.run(self.tests, self.write)
