"""``tinyllm info``: the cost of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tinyllm.cli.options import ModelOptions, check_model_name, find_checkpoint, option
from tinyllm.cli.train import preset
from tinyllm.errors import Error
from tinyllm.models import ARCHITECTURES, LanguageModel, empty_model
from tinyllm.optim import OPTIMIZERS, AdamW
from tinyllm.tokenizers.bpe import parse_bpe
from tinyllm.tools.info import describe
from tinyllm.training.begun import read_about
from tinyllm.training.config import PRESETS
from tinyllm.training.metrics import METRICS
from tinyllm.weights.pull import KNOWN_MODELS

SIZES = [size for architecture in ARCHITECTURES.values() for size in architecture.config_class.sizes]


@dataclass(frozen=True, kw_only=True)
class InfoConfig(ModelOptions):
    """Show what a model costs: parameters, memory and arithmetic.

    Nothing is downloaded or trained for a preset or a published size, and its weights take no memory.

    Example: tinyllm info --model 124M --batch 4 --context 256
    """

    model: Annotated[
        str | None,
        option(
            "NAME",
            "",
            f"A size ({', '.join(SIZES)}), {', '.join(KNOWN_MODELS)}, a folder, a .gguf file, or a hub id.",
        ),
    ] = None
    preset: Annotated[
        str | None, option("NAME", "", f"Instead: a preset of `tinyllm train` ({', '.join(PRESETS)}).")
    ] = None
    batch: Annotated[int | None, option("N", "the preset's, or 1")] = None
    """Sequences in a batch."""
    context: Annotated[int | None, option("N", "the model's context")] = None
    """Tokens in each sequence."""
    dtype: Literal["float32", "float64"] = "float32"
    """Type of the weights and activations."""


def run(config: InfoConfig) -> None:
    if [config.preset, config.run, config.model].count(None) != 2:
        raise Error("choose a model with one of --model NAME, --run DIR and --preset NAME")
    batch, optimizer = 1, AdamW
    if config.preset is not None:
        asked = preset(config.preset)
        vocab_size = 50257 if asked.tokenizer == "gpt2" else parse_bpe(asked.tokenizer)
        model, batch = asked.model(vocab_size, rng=None), asked.at_once
        optimizer = OPTIMIZERS[asked.optimizer]
    else:
        checkpoint = find_checkpoint(config.run, config.model)
        model, optimizer = _model(checkpoint, config.model), _optimizer(checkpoint)
    batch = batch if config.batch is None else config.batch
    context = model.context if config.context is None else config.context
    print(describe(model, batch, context, config.dtype, optimizer))


def _model(checkpoint: Path | None, name: str | None) -> LanguageModel:
    if checkpoint is None:
        check_model_name(name, [*SIZES, *KNOWN_MODELS])
    return empty_model(checkpoint or name)


def _optimizer(checkpoint: Path | None) -> type[AdamW]:
    """That of the run which a checkpoint belongs to, else AdamW."""
    if checkpoint is None or not (checkpoint.parent / METRICS).exists():
        return AdamW
    return OPTIMIZERS[read_about(checkpoint.parent, None)["train"].get("optimizer", "adamw")]
