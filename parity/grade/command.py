"""Options of ``python -m parity grade`` and ``check``."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from parity.options import check_installed
from tinyllm.errors import Error

EXERCISES = Path("examples/exercises")


@dataclass(frozen=True)
class Grade:
    """Grade exercises against PyTorch; without files, print a table of all of them.

    Exit code 1 if a function of the given files is wrong or not written yet.
    """

    files: tyro.conf.Positional[tuple[Path, ...]] = ()  # exercise files; default: a table of all exercises
    folder: Path = EXERCISES  # the folder of the exercises in a checkout

    def run(self) -> int:
        """Check the arguments, grade the files and print the result; return the exit code."""
        check_installed("grade", ("torch", "hypothesis"))
        from parity.grade import report

        if self.files:
            return report.grade_files(self.files)
        if not self.folder.is_dir():
            raise Error(f"--folder {self.folder} is not a folder: give the examples/exercises of a checkout")
        return report.grade_folder(self.folder)


@dataclass(frozen=True)
class Check:
    """Compare your own op, layer or model with a reference, output and gradients.

    The file defines implementation, reference and inputs(rng): two functions of the same arguments (NumPy
    arrays, tinyllm Tensors or torch tensors) or two modules (of tinyllm or torch, which get the reference's
    weights), and the arguments of one call, NumPy arrays. A NumPy function's gradient may be given as
    implementation_gradient(grad, *inputs). Exit code 1 if they differ.
    """

    file: tyro.conf.Positional[Path]  # a Python file, which is run

    def run(self) -> int:
        """Run the file, compare and print; return the exit code."""
        check_installed("check", ("torch",))
        from parity.grade import check

        return check.check(self.file)
