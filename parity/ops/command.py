"""The options of ``python -m parity proof``."""

from dataclasses import dataclass
from pathlib import Path

from parity.options import check_installed
from tinyllm.errors import Error


@dataclass(frozen=True)
class Proof:
    """Run the published proof: the tests against PyTorch, and the planted faults that they must catch."""

    tests: Path = Path("tests")  # the tests folder of a checkout

    def run(self) -> int:
        """Check the request, run the tests, print two Markdown tables; 1 if a test failed, else 0."""
        if not self.tests.is_dir():
            raise Error(f"--tests {self.tests} is not a folder: give the tests folder of a checkout")
        check_installed("proof", ("pytest", "hypothesis", "torch", "transformers"), "test")
        from parity.ops import proof

        return proof.run(self.tests)
