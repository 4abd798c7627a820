"""The task ``dpo`` of ``tinyllm finetune``: a model learns which of two answers is preferred.

``preference.py`` has the loss and its derivation.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from tqdm import tqdm

from tinyllm.backend.device import pick_device
from tinyllm.backend.distributed import current, shared_out
from tinyllm.backend.dtypes import autocast
from tinyllm.data.conversations import conversations, not_used, recognise, unused_keys
from tinyllm.data.examples import Row
from tinyllm.data.instructions import Encoded, encode_conversations
from tinyllm.data.padded import IGNORED, PADDING, pad
from tinyllm.data.preferences import two_examples, unused_of_pairs
from tinyllm.errors import Error
from tinyllm.files import read_sealed, sealed, write_whole
from tinyllm.nn import Module, evaluating
from tinyllm.tensor import Tensor
from tinyllm.training.output import number
from tinyllm.training.preference import Preferences, answer_log_probs, dpo_loss, preferences
from tinyllm.training.step import Check
from tinyllm.training.tasks.chat import ChatOptions, ChatTuning

REFERENCE = "reference.json"  # in a run's folder

PARTS = "train", "valid"


@dataclass(frozen=True, kw_only=True)
class PreferenceOptions(ChatOptions):
    """Teach a model which of two answers is better, by direct preference optimization (DPO).

    Example: tinyllm finetune --task dpo --model smollm2 --data instruction-data-with-preference
    """

    beta: float = 0.1
    """How strongly the model is held at its start: rewards are beta times the change of log-probability."""
    logps: str = "sum"
    """An answer's log-probability: the sum over its tokens, or their mean."""

    task = "dpo"

    # That of TRL is 1e-6 for all weights (the book's 5e-6); LoRA's matrices take larger steps.
    rates: ClassVar[dict[str, float]] = {"lora": 5e-5, "head": 1e-5, "all": 1e-6, "last-blocks": 1e-6}

    def __post_init__(self):
        super().__post_init__()
        self._require("beta", 0 < self.beta < math.inf, "above 0")
        self._require("logps", self.logps in ("sum", "mean"), "sum or mean")


class Pairs:
    """Encoded pairs: token ids and targets of both answers, and the reference's log-probabilities."""

    def __init__(self, pairs: Sequence[tuple[Encoded, Encoded]]):
        self.pairs = [
            [(ids[:-1], np.where(learned[1:], ids[1:], IGNORED)) for ids, learned, _ in pair]
            for pair in pairs
        ]
        self.lengths = np.array([max(len(ids) for ids, _ in pair) for pair in self.pairs])
        self.reference = np.zeros((len(pairs), 2))

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and targets (P, 2, T), padded on the right to the longest, and log π_ref (P, 2)."""
        answers = [answer for i in indices for answer in self.pairs[i]]
        arrays = [pad(part, fill) for part, fill in zip(zip(*answers), (PADDING, IGNORED))]
        ids, targets = (array.reshape(len(indices), 2, -1) for array in arrays)
        return ids, targets, self.reference[indices]


def last_answer(example: Encoded) -> Encoded:
    """The example up to the end of its last answer, of which only that is learned."""
    learned = np.flatnonzero(example.learned)
    start = learned[np.diff(learned, prepend=-2) > 1][-1]
    ids = example.ids[: learned[-1] + 1]
    return Encoded(ids, np.arange(len(ids)) >= start, example.divided)


class PreferenceTuning(ChatTuning):
    """The log-probabilities of the preferred answers rise relative to those of the others.

    The reference is the model before the first step, in eval mode. Its log-probabilities of all answers are
    computed once and kept in the run's folder, so no second model is in memory, and a resumed run has the
    same ones.
    """

    rows = "pairs"

    config: PreferenceOptions

    def encode(self) -> tuple[Pairs, Pairs]:
        self.add_special_tokens()
        parts = {part: [two_examples(row) for row in getattr(self.examples, part)] for part in PARTS}
        flat = [row for pairs in parts.values() for pair in pairs for row in pair]
        self.format = recognise(flat)
        self.set_template()
        chats = conversations(flat, self.format)
        given = [row for part in PARTS for row in getattr(self.examples, part)]
        unused = [*unused_of_pairs(given), *unused_keys(flat, self.format)]
        self.notes = [
            f"pairs of answers as in the format {self.format.name}{not_used(unused)}; chat template: "
            f"{self.template_name}"
        ]
        self.questions = self.questions_from([preferred for preferred, _ in parts["valid"]])
        encoded = iter(encode_conversations(self.tokenizer, flat, chats))
        return tuple(
            self._pairs(part, [(row, next(encoded), next(encoded)) for row, _ in pairs])
            for part, pairs in parts.items()
        )

    def _pairs(self, part: str, rows: Sequence[tuple[Row, Encoded, Encoded]]) -> Pairs:
        """The pairs of a part; equal answers and too long ones are counted in ``notes`` and left out."""
        pairs, equal, long = [], 0, 0
        for row, *pair in rows:
            preferred, other = map(last_answer, pair)
            if np.array_equal(preferred.ids, other.ids):
                equal += 1
            elif max(len(preferred.ids), len(other.ids)) > self.max_length + 1:
                long += 1
            elif not np.array_equal(*(each.ids[~each.learned] for each in (preferred, other))):
                raise Error(
                    f"{row.where}: the chat template writes another prompt before the other answer: choose "
                    "another --template"
                )
            else:
                pairs.append((preferred, other))
        for count, why in (
            (equal, "whose answers are equal"),
            (long, f"of more than {self.max_length:,} tokens"),
        ):
            if count:
                self.notes.append(f"{part}: {count:,} of {len(rows):,} pairs {why} are left out")
        if not pairs:
            found = "; ".join(self.notes)
            raise Error(f"{self.examples.name} has no pairs to compare ({found}): give others")
        return Pairs(pairs)

    def load(self, folder: Path, about: dict) -> None:
        super().load(folder, about)
        self.kept = read_sealed(folder / REFERENCE) if about else None

    def model(self) -> Module:
        model = super().model()
        for part, rows in self._parts().items():
            rows.reference = self._reference(model, part, rows)
        return model

    def _parts(self) -> dict[str, Pairs]:
        return dict(zip(PARTS, (self.train_rows, self.valid_rows)))

    def _reference(self, model: Module, part: str, rows: Pairs) -> np.ndarray:
        """log π_ref (n, 2) of the pairs of a part, as kept or computed."""
        if self.kept is not None:
            return np.array(self.kept[part])
        config, batches = self.config, self.spread(rows, len(rows))
        model.to(pick_device(config.device))
        bar = tqdm(total=len(batches), desc=f"reference of {part}", unit="batch", disable=None)

        def log_probs(chosen: np.ndarray) -> np.ndarray:
            ids, targets, _ = rows[chosen]
            found = answer_log_probs(model, ids, targets, config.logps == "mean")
            bar.update(current().size)
            return found

        with bar, evaluating(model), autocast(config.dtype):
            parts = shared_out(log_probs, batches)
        found = np.empty((len(rows), 2))
        found[np.concatenate(batches)] = np.concatenate(parts)
        return found

    # A step and its batch

    def loss(self, model: Module, *rows, num_targets: int) -> Tensor:
        config = self.config
        return dpo_loss(model, *rows, num_targets, beta=config.beta, mean=config.logps == "mean")

    def count(self, batch: tuple) -> int:
        return len(batch[0])

    # An evaluation

    def evaluate(self, model: Module, check: Check, final: bool) -> dict[str, float]:
        """Loss, rewards, margin and accuracy of validation pairs, and of as many training pairs."""
        most, found = min(len(self.valid_rows), self.config.eval_examples), {}
        for prefix, rows in (("val_", self.valid_rows), ("train_eval_", self.train_rows)):
            numbers = self._measure(model, rows, most, check)
            found |= {prefix + name: value for name, value in numbers.items()}
        return found

    def _measure(self, model: Module, rows: Pairs, most: int, check: Check) -> dict[str, float]:
        def measured(chosen: np.ndarray) -> Preferences:
            check()
            ids, targets, reference = rows[chosen]
            log_probs = answer_log_probs(model, ids, targets, self.config.logps == "mean")
            return preferences(log_probs, reference, self.config.beta)

        with evaluating(model):
            found = shared_out(measured, self.spread(rows, most))
        losses = np.concatenate([part.losses for part in found])
        preferred, other = np.concatenate([part.rewards for part in found]).T
        return {
            "loss": losses.mean().item(),
            "chosen_reward": preferred.mean().item(),
            "rejected_reward": other.mean().item(),
            "margin": (preferred - other).mean().item(),
            "accuracy": (preferred > other).mean().item(),
        }

    # Records and messages

    def data(self) -> dict[str, dict]:
        arrays = b"".join(rows.reference.tobytes() for rows in self._parts().values())
        return super().data() | {"reference": {"sha256": hashlib.sha256(arrays).hexdigest()}}

    def save(self, folder: Path) -> None:
        super().save(folder)
        reference = {part: rows.reference.tolist() for part, rows in self._parts().items()}
        write_whole(folder / REFERENCE, sealed(reference))

    def describe_evaluation(self, record: dict) -> str:
        train, val = (number(record[key], 4) for key in ("train_eval_loss", "val_loss"))
        chosen, rejected = (number(record[f"val_{name}_reward"], 3) for name in ("chosen", "rejected"))
        right = f"{record['val_accuracy']:.0%}"
        return f"train {train}  val {val}  rewards {chosen} and {rejected}  accuracy {right}"
