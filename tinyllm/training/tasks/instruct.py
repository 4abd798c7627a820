"""The task ``instruct`` of ``tinyllm finetune``: a model learns to answer as the examples do."""

from __future__ import annotations

from dataclasses import dataclass

from tinyllm.training.tasks.finetune import FinetuneOptions, Finetuning


@dataclass(frozen=True, kw_only=True)
class InstructOptions(FinetuneOptions):
    """Teach a model to follow instructions, from examples of instructions with answers.

    Example: tinyllm finetune --task instruct --model smollm2 --data instruction-data --epochs 2
    """

    task = "instruct"


class InstructionTuning(Finetuning):
    """The next token of every answer is learned; the prompts before them are only read."""
