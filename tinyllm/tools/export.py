"""Writing a model and its tokenizer for other programs: llama.cpp's GGUF file, Hugging Face's folder."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import fields
from pathlib import Path

from tinyllm.errors import Error
from tinyllm.files import SAVING, read_json, write_whole
from tinyllm.models import LanguageModel
from tinyllm.models.base import ModelConfig
from tinyllm.models.saving import check_weights, is_plain
from tinyllm.tokenizers.base import Tokenizer, check_fits
from tinyllm.tokenizers.configs import GENERATION_CONFIG
from tinyllm.tokenizers.export import library_tokenizer, save_for_transformers
from tinyllm.tokenizers.gguf_writer import tokenizer_keys
from tinyllm.weights.gguf_writer import Written, write_gguf
from tinyllm.weights.safetensors import CONFIG

DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def export_gguf(
    model: LanguageModel, tokenizer: Tokenizer, path: str | Path, type: str = "f32", name: str | None = None
) -> Written:
    """Write a model and its tokenizer as a GGUF file, which llama.cpp, Ollama and ``load_model`` read.

    ``type`` is that of the matrices: "f32", "f16", "bf16" or "q8_0", see ``write_gguf``; ``name`` is the
    model's name in the file. Merge LoRA layers first (``nn.merge_lora``). Raises ``Error``, naming what is in
    the way, if llama.cpp would compute something else than this model, and as ``write_gguf`` does.
    """
    config = _plain_config(model, tokenizer)
    about = {"general.name": name or Path(path).stem} | tokenizer_keys(tokenizer, model.config.vocab_size)
    tensors = {
        key if key.startswith("lm_head.") else model.prefix + key: array
        for key, array in model.state_dict().items()
    }
    return write_gguf(path, config.to_dict() | {"model_type": config.model_type}, tensors, type, about)


def export_folder(model: LanguageModel, tokenizer: Tokenizer, folder: str | Path, type: str = "f32") -> None:
    """Write a model and its tokenizer as a folder for ``AutoModelForCausalLM`` and ``AutoTokenizer``.

    The folder appears when it is complete. ``type`` is that of the weights, "f32", "f16" or "bf16", and the
    model itself is converted to it. Raises ``Error`` if the folder exists, if a weight is not finite or too
    large for the type, if ``transformers`` would compute something else than this model, or if the tokenizer
    has no form for it.
    """
    folder = Path(folder)
    if type not in DTYPES:
        raise Error(f"type {type!r} is not one of {', '.join(DTYPES)}: choose one of them")
    if os.path.lexists(folder):
        raise Error(f"{folder} exists already: choose another name")
    config = _plain_config(model, tokenizer)
    if not config.is_standard:
        raise Error(_not_standard(config))
    library_tokenizer(tokenizer)  # raises Error before anything is written
    check_weights(model, DTYPES[type], "bf16 or f32")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SAVING, dir=folder.parent) as temporary:
            new = Path(temporary) / folder.name
            model.astype(DTYPES[type]).save_pretrained(new)
            save_for_transformers(tokenizer, new, model.context)
            _name_the_ends(new)
            os.rename(new, folder)
    except (OSError, Error) as error:
        cause = error.__cause__ if isinstance(error, Error) else error
        if not isinstance(cause, OSError):
            raise
        reason = cause.strerror or cause
        raise OSError(f"{folder} cannot be written ({reason}): check the path and disk space") from error


def _not_standard(config: ModelConfig) -> str:
    """Why ``transformers`` has no such model, and what to do instead."""
    defaults = {each.name: each.default for each in fields(config) if each.name.endswith("_bias")}
    found = {name: getattr(config, name) for name in defaults if getattr(config, name) != defaults[name]}
    named = ", ".join(f"{name}={value}" for name, value in found.items())
    instead = "only tinyllm can run it" if found.get("lm_head_bias") else "export a GGUF file instead"
    return f"{config.hub_class} of transformers has no model with {named}: {instead}"


def _name_the_ends(folder: Path) -> None:
    """Add the ids that begin and end a text to ``config.json``: without them the class has ids of its own."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id")) | read_json(folder / GENERATION_CONFIG)
    if ids["eos_token_id"] is not None and len(ids["eos_token_id"]) == 1:
        ids["eos_token_id"] = ids["eos_token_id"][0]
    config = read_json(folder / CONFIG) | ids
    write_whole(folder / CONFIG, json.dumps(config, indent=2).encode() + b"\n")


def _plain_config(model: LanguageModel, tokenizer: Tokenizer):
    """The config of a model that it describes completely. Raises ``Error`` otherwise, naming the layers."""
    if not isinstance(model, LanguageModel):
        raise Error(f"a {model.__class__.__name__} cannot be exported, only a language model")
    config = model.current_config()
    original = type(model)(config, rng=None)
    if not is_plain(model, original):
        names = {name for name, _ in model.named_parameters()} ^ {n for n, _ in original.named_parameters()}
        layers = sorted({name.rpartition(".")[0] for name in names}) or ["with other shapes"]
        raise Error(
            f"the model has replaced layers, {', '.join(layers)}, for which other programs have no place: "
            "merge LoRA layers, and export the plain model"
        )
    check_fits(tokenizer, model, padded=True)
    return config
