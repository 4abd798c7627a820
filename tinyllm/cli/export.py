"""``tinyllm export``: write a model for llama.cpp and Ollama, or for ``transformers``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np

from tinyllm.cli.options import AdapterOptions, option
from tinyllm.errors import Error
from tinyllm.files import check_writable
from tinyllm.models import load_model
from tinyllm.nn import merge_lora
from tinyllm.tokenizers import load_tokenizer
from tinyllm.tools.export import export_folder, export_gguf
from tinyllm.training.tasks.classify import ClassifyOptions
from tinyllm.weights.safetensors import read_config


@dataclass(frozen=True, kw_only=True)
class ExportConfig(AdapterOptions):
    """Write a model for other programs: a GGUF file, or a Hugging Face folder.

    A GGUF file (--gguf) runs in llama.cpp and Ollama; a folder (--hf) loads with AutoModelForCausalLM and
    AutoTokenizer of transformers. Both hold the tokenizer and the chat template. An adapter is merged. What
    the other program would compute differently is refused, and nothing is overwritten.

    Example: tinyllm export --run runs/python-docs-1 --gguf model.gguf --type q8_0
    """

    gguf: Annotated[Path | None, option("FILE", "")] = None
    """GGUF file to write."""
    hf: Annotated[Path | None, option("DIR", "")] = None
    """Folder to write, in Hugging Face's layout."""
    type: Literal["f32", "f16", "bf16", "q8_0"] = "f32"
    """Type of the matrices: float32, float16, bfloat16, or (GGUF only) 8 bits in blocks of 32."""


def run(config: ExportConfig) -> None:
    if (config.gguf is None) == (config.hf is None):
        raise Error("choose the format with either --gguf FILE or --hf DIR")
    if config.hf is not None and config.type == "q8_0":
        raise Error("--type is q8_0, which only a GGUF file has: choose f32, f16 or bf16, or --gguf FILE")
    option, out = ("--gguf", config.gguf) if config.hf is None else ("--hf", config.hf)
    if os.path.lexists(out):
        raise Error(f"{out} exists: choose another {option}")
    if config.gguf is not None and out.suffix.lower() != ".gguf":
        raise Error(
            f"--gguf {out} must end in .gguf, the ending by which --model knows such a file: rename it"
        )
    check_writable(out.absolute().parent, option)
    checkpoint = config.find()
    if checkpoint is not None and read_config(checkpoint.parent).get("task") == ClassifyOptions.task:
        raise Error(f"{config.typed} is a classifier, which other programs cannot run as a language model")
    model = load_model(checkpoint or config.model, np.float32)
    config.put_adapter(model)
    merged = merge_lora(model)
    tokenizer = load_tokenizer(config.tokenizer_place(checkpoint))
    if checkpoint is not None:  # trained on texts without BOS, unless it began with a published model
        tokenizer.add_bos = tokenizer.add_bos and "start" in read_config(checkpoint.parent)
    with_layers = f", with LoRA of {len(merged)} layers merged" if merged else ""
    described = f"{out}: {model.num_parameters():,} parameters in {config.type}{with_layers}"
    if config.hf is not None:
        export_folder(model, tokenizer, out, config.type)
        print(described)
        return
    written = export_gguf(model, tokenizer, out, config.type, name=_name(config))
    print(described)
    if written.not_quantized:
        print(
            f"{written.not_quantized} of {written.tensors} tensors are float16: their rows do not divide by "
            "32"
        )


def _name(config: ExportConfig) -> str:
    """The model's name in a GGUF file: the last part of what the user named."""
    return Path(config.run or config.model).name.removesuffix(".gguf")
