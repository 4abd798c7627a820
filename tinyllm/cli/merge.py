"""``tinyllm merge``: add a LoRA adapter to the weights of its base model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from tinyllm.cli.options import AdapterOptions, option
from tinyllm.errors import Error
from tinyllm.files import check_writable
from tinyllm.models import load_model
from tinyllm.models.saving import check_weights
from tinyllm.nn import merge_lora
from tinyllm.tokenizers import load_tokenizer
from tinyllm.training.metrics import best_checkpoint
from tinyllm.training.start import save_tokenizer
from tinyllm.training.tasks.classify import ClassifyOptions, load_classifier
from tinyllm.weights.safetensors import read_config


@dataclass(frozen=True, kw_only=True)
class MergeConfig(AdapterOptions):
    """Add a LoRA adapter to its base model's weights, and save a plain model or classifier.

    The result is a folder in Hugging Face's layout, with the tokenizer's files. It needs neither the base
    model nor the adapter, and runs as fast as the base model.

    Example: tinyllm merge --run runs/instruct-1 --out merged
    """

    out: Annotated[Path, option("DIR")]
    """Folder to write."""
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = "float32"
    """Type of the saved weights; the sums are computed in float32 or float64 and rounded once."""


def run(config: MergeConfig) -> None:
    check_writable(config.out, "--out")
    if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
        raise Error(f"{config.out} exists and is not an empty folder: choose another --out")
    checkpoint = config.find()
    dtype = np.float64 if config.dtype == "float64" else np.float32
    if checkpoint is not None and read_config(checkpoint.parent).get("task") == ClassifyOptions.task:
        if config.adapter is not None:
            raise Error(f"{config.typed} is a classifier: omit --adapter")
        best = checkpoint if config.names_checkpoint else best_checkpoint(checkpoint.parent)
        model = load_classifier(best, dtype)
    else:
        model = load_model(checkpoint or config.model, dtype)
        config.put_adapter(model)
    merged = merge_lora(model)
    if not merged:
        raise Error(f"{config.typed} has no adapter to merge: it is a whole model already")
    place = config.tokenizer_place(checkpoint)
    tokenizer = load_tokenizer(place)
    check_weights(model, config.dtype, "bfloat16" if config.dtype == "float16" else "float32")
    model.astype(config.dtype).save_pretrained(config.out)
    save_tokenizer(tokenizer, place, config.out)
    print(
        f"{config.out}: {model.num_parameters():,} parameters in {config.dtype}, with LoRA of {len(merged)} "
        "layers merged"
    )
