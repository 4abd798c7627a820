"""``tinyllm classify``: the classes of texts and their probabilities, under a trained classifier."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np

from tinyllm.backend.dtypes import autocast
from tinyllm.cli.options import DeviceOptions, Flag, ModelOptions, move, option
from tinyllm.data.examples import read_rows
from tinyllm.data.labelled import text_of
from tinyllm.errors import Error
from tinyllm.files import read_text
from tinyllm.inference.classify import EncodedTexts, class_logits, probabilities
from tinyllm.models import SequenceClassifier
from tinyllm.tokenizers import Tokenizer, load_tokenizer
from tinyllm.training.metrics import best_checkpoint
from tinyllm.training.tasks.classify import load_classifier
from tinyllm.weights.hub import find_model
from tinyllm.weights.safetensors import read_config

SHOWN = 60  # characters of a text in the table


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(DeviceOptions, ModelOptions):
    """Print the class of a text, or of every text of a file, with the probabilities of all classes.

    Example: tinyllm classify --run runs/classify-1 --text "a film of rare charm"
    """

    run: Annotated[Path | None, option("DIR", "")] = None
    """Folder of a run of finetune --task classify, whose best checkpoint is used, or of a checkpoint."""
    model: Annotated[str | None, option("NAME", "")] = None
    """Instead of --run: the folder of a classifier in Hugging Face's layout, or a hub id."""
    text: Annotated[str | None, option("TEXT", "")] = None
    """The text to classify."""
    file: Annotated[Path | None, option("PATH", "")] = None
    """Instead of --text: a .txt file with a text on every line, or a .csv, .tsv, .json or .jsonl file."""
    text_column: Annotated[str | None, option("NAME", "a usual name, such as text")] = None
    """Column or key of the text in a --file."""
    max_length: Annotated[int | None, option("N", "that of training, or the model's context up to 1,024")] = (
        None
    )
    """Tokens of a text that are read; of a longer one only the beginning."""
    batch: Annotated[int, option("N")] = 16
    """Texts in a batch."""
    json: Flag = False
    """Print a line of JSON for every text instead of a table."""

    smaller: ClassVar = ["a smaller --batch", "a smaller --max-length"]


def run(config: ClassifyConfig) -> None:
    """Classify the texts, in the order of the file, and print a row for each."""
    config.check_least(batch=1, max_length=1)
    checkpoint = config.find()
    texts = _texts(config)
    device = config.open_device()
    model, tokenizer, max_length = _load(config, checkpoint)
    max_length = config.max_length or max_length or min(model.context, 1024)
    if max_length > model.context:
        raise Error(f"max_length is {max_length}, and the model takes at most {model.context} tokens")
    encoded = EncodedTexts(tokenizer, texts, max_length)
    if encoded.cut:
        print(
            f"{encoded.cut:,} of {len(texts):,} texts have more than {max_length} tokens: only their "
            "beginning was read",
            file=sys.stderr,
        )
    move(model, device)
    with autocast(config.dtype):
        found = probabilities(class_logits(model, encoded, config.batch))
    for line in _lines(texts, model.labels, found, config.json):
        print(line)


def _texts(config: ClassifyConfig) -> list[str]:
    if (config.text is None) == (config.file is None):
        raise Error("choose what to classify with either --text TEXT or --file PATH")
    if config.text_column is not None and (config.text is not None or config.file.suffix.lower() == ".txt"):
        raise Error(
            "--text-column names a column of a table or a key of JSON: omit it, or give such a --file"
        )
    if config.text is not None:
        if not config.text.strip():
            raise Error("--text is empty: give a text of at least one word")
        return [config.text]
    if config.file.suffix.lower() != ".txt":
        texts = [text_of(row, config.text_column) for row in read_rows(config.file)]
    else:
        text = read_text(config.file).removeprefix("\ufeff")  # a byte order mark
        texts = [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]
        for number, text in enumerate(texts, 1):
            if not text.strip():
                raise Error(f"line {number} of {config.file} is empty: remove it")
    if not texts:
        raise Error(f"{config.file} is empty: give a file with at least one text")
    return texts


def _load(
    config: ClassifyConfig, checkpoint: Path | None
) -> tuple[SequenceClassifier, Tokenizer, int | None]:
    """The classifier, its tokenizer, and the most tokens of a text in its training if that is known."""
    dtype = config.weights_dtype
    if checkpoint is None:
        path = find_model(config.model)
        return SequenceClassifier.from_pretrained(path, dtype), load_tokenizer(path), None
    folder, about = checkpoint.parent, read_config(checkpoint.parent)
    if about.get("task") != "classify":
        raise Error(f"{config.typed} is not a classifier: give a run of finetune --task classify")
    if not config.names_checkpoint:
        checkpoint = best_checkpoint(folder)
    return load_classifier(checkpoint, dtype), load_tokenizer(folder), about["train"]["max_length"]


def _lines(texts: list[str], labels: tuple[str, ...], found: np.ndarray, as_json: bool) -> list[str]:
    if as_json:
        return [
            json.dumps(
                {
                    "text": text,
                    "label": labels[row.argmax()],
                    "probabilities": dict(zip(labels, row.round(6).tolist())),
                },
                ensure_ascii=False,
            )
            for text, row in zip(texts, found)
        ]
    widths = [max(len(label), 6) for label in labels]
    first = max(map(len, labels))
    head = "  ".join(f"{label:>{width}}" for label, width in zip(labels, widths))
    lines = [f"{'class':{max(first, 5)}}  {head}  text"]
    for text, row in zip(texts, found):
        shares = "  ".join(f"{share:>{width}.1%}" for share, width in zip(row, widths))
        text = " ".join(text.split())
        text = text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
        lines.append(f"{labels[row.argmax()]:{max(first, 5)}}  {shares}  {text}")
    return lines
