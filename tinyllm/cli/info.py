"""``tinyllm info``: what a model costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tinyllm.cli.train import preset
from tinyllm.errors import Error
from tinyllm.models import empty_model
from tinyllm.tokenizers.bpe import parse_bpe
from tinyllm.tools.info import describe
from tinyllm.weights.runs import last_checkpoint


@dataclass(frozen=True)
class InfoConfig:
    """What a model costs: parameters, memory, arithmetic, and what this machine could do at best."""

    preset: str | None = None
    """A preset of `tinyllm train`."""
    run: Path | None = None
    """Instead of --preset: a run's folder."""
    model: str | None = None
    """Instead of --preset: a model's folder or hub id, or a published size such as 124M."""
    batch: int | None = None
    """Sequences at a time; if not given, the preset's, or 1."""
    context: int | None = None
    """Tokens of each; if not given, the model's context."""
    dtype: str = "float32"
    """float32 or float64."""


def run(config: InfoConfig) -> None:
    if [config.preset, config.run, config.model].count(None) != 2:
        raise Error("say which model: one of --preset NAME, --run DIR and --model FOLDER")
    batch = 1
    if config.preset is not None:
        asked = preset(config.preset)
        vocab_size = 50257 if asked.tokenizer == "gpt2" else parse_bpe(asked.tokenizer)
        model, batch = asked.model(vocab_size, rng=None), asked.at_once
    else:
        model = empty_model(config.model if config.run is None else last_checkpoint(config.run))
    batch = batch if config.batch is None else config.batch
    context = model.context if config.context is None else config.context
    print(describe(model, batch, context, config.dtype))
