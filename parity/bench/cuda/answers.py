"""Comparison of the variants' losses or logits, so that only equal computations are timed."""

import sys
from pathlib import Path

from parity.bench.cuda.works import Work

# Largest allowed difference of two variants: each loss relative to itself, logits relative to the largest.
# Products round to 24, 11 and 8 bits. On a CPU, PyTorch in bfloat16 differs from PyTorch in float32 by 4e-4
# in the third loss of GPT-2 124M (2 x 128 tokens), and by 0.012 in the logits of 16 layers of 256 channels.
BOUNDS = {
    "losses": {"float32": 5e-5, "tf32": 1e-3, "bfloat16": 5e-3},
    "logits": {"float32": 5e-5, "tf32": 1e-2, "bfloat16": 5e-2},
}


def answers_of(task: str) -> str:
    """The name of the numbers that are compared for a task."""
    return "losses" if task == "train" else "logits"


def reference_of(variants: list[str]) -> str:
    """The variant with which the others are compared."""
    return "torch-eager" if "torch-eager" in variants else variants[0]


def bound_of(work: Work, precision: str) -> float:
    """The largest allowed relative difference."""
    return BOUNDS[answers_of(work.task)][precision]


def differences(task: str, answers: dict[str, Path]) -> dict[str, float]:
    """The relative difference of each variant's answers (files) from the reference's; nan if not finite."""
    import numpy as np

    if not answers:
        return {}
    reference = np.load(answers[reference_of(list(answers))])
    scale = np.abs(reference) if task == "train" else np.abs(reference).max()
    found = {}
    for variant, path in answers.items():
        array = np.load(path)
        if array.shape != reference.shape:
            sys.exit(
                f"{variant}'s {answers_of(task)} have shape {array.shape}, not {reference.shape}: no report"
            )
        with np.errstate(invalid="ignore"):  # infinities give nan, which exceeds every bound
            found[variant] = float(np.max(np.abs(array - reference) / scale))
    return found


def check_difference(variant: str, difference: float, work: Work, precision: str) -> None:
    """Exit with code 1 if the difference exceeds the bound or is nan."""
    if not difference <= bound_of(work, precision):  # nan is not
        sys.exit(
            f"{work}, {precision}: {variant}'s {answers_of(work.task)} differ from the reference by "
            f"{difference:.2g}, but the bound is {bound_of(work, precision):g}: no report"
        )
