"""Do all variants compute the same? Losses or logits beside a reference's: what differs is not timed."""

import sys
from pathlib import Path

from parity.bench.cuda.works import Work

# How far two variants' answers may be apart: losses each by its own size, logits by the largest of them.
# Products round to 24, 11 and 8 bits. PyTorch in bfloat16 is off PyTorch in float32, on a CPU, by 4e-4 in
# the third loss of GPT-2 124M (2 x 128 tokens), and by 0.012 in the logits of 16 layers of 256 channels.
BOUNDS = {
    "losses": {"float32": 5e-5, "tf32": 1e-3, "bfloat16": 5e-3},
    "logits": {"float32": 5e-5, "tf32": 1e-2, "bfloat16": 5e-2},
}


def answers_of(task: str) -> str:
    """What variants are compared in."""
    return "losses" if task == "train" else "logits"


def reference_of(variants: list[str]) -> str:
    """With whose answers the others' are compared."""
    return "torch-eager" if "torch-eager" in variants else variants[0]


def bound_of(work: Work, precision: str) -> float:
    """How large a difference may be."""
    return BOUNDS[answers_of(work.task)][precision]


def differences(task: str, answers: dict[str, Path]) -> dict[str, float]:
    """How far each variant's answers (in files) are from the reference's; nan if one is not a number."""
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
                f"{variant}'s answers have shape {array.shape}, not {reference.shape}: nothing to compare"
            )
        with np.errstate(invalid="ignore"):  # what is not finite makes nan, and that is beyond every bound
            found[variant] = float(np.max(np.abs(array - reference) / scale))
    return found


def check_difference(variant: str, difference: float, work: Work, precision: str) -> None:
    """End the program with exit code 1 if the answers differ by more than the bound, or are not numbers."""
    if not difference <= bound_of(work, precision):  # nan is not
        sys.exit(
            f"{work}, {precision}: {variant}'s answers differ by {difference:.2g}, and the bound is "
            f"{bound_of(work, precision):g}: what does not compute the same is not compared"
        )
