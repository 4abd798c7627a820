"""Find a model: a folder, a .gguf file, a known name, or a download from the Hugging Face hub."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tinyllm.errors import Error
from tinyllm.weights.gguf import GGUFFile
from tinyllm.weights.pull import KNOWN_MODELS, find_pulled
from tinyllm.weights.safetensors import CONFIG, MODEL_FILES, SINGLE_FILE, Weights, read_config

TEXT_FILES = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "chat_template.jinja")

HUB_FILES = [*MODEL_FILES, *TEXT_FILES, "generation_config.json"]

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*|gpt2(-medium|-large|-xl)?|distilgpt2", re.ASCII)


def find_model(name: str | Path) -> Path:
    """Where a model is, as a user names it: the path of its folder or of its .gguf file.

    ``name`` is a folder or a file that ends in .gguf, else a name that ``tinyllm pull`` knows, else a
    hub id. Raises Error if there is no such file, if a known model was not pulled, and as `find_folder`.
    """
    name = os.fspath(name)
    path = os.path.expanduser(name)
    if name.lower().endswith(".gguf") and not os.path.isdir(path):
        if os.path.isfile(path):
            return Path(path)
        raise Error(f"there is no file {name!r}: check the path, or pass a model's folder or a hub id")
    if name in KNOWN_MODELS and not os.path.lexists(path):
        pulled = find_pulled(name)
        if pulled is None:
            raise Error(
                f"{name} is not on this machine yet: run `tinyllm pull {name}`, or pass a model's folder"
            )
        return pulled
    return find_folder(name)


def model_config(path: Path) -> dict:
    """What a ``config.json`` says, or would say, of the model at a path that `find_model` gave.

    Raises Error as `read_config` and `GGUFFile` do.
    """
    return read_config(path) if path.is_dir() else GGUFFile(path).config


def open_weights(path: Path) -> Mapping[str, np.ndarray]:
    """The tensors there, by the names of a Hugging Face folder; each is read when it is asked for.

    Raises Error as `Weights` and `GGUFFile` do.
    """
    return Weights(path) if path.is_dir() else GGUFFile(path)


def find_folder(name: str | Path) -> Path:
    """The local folder of a model: ``name`` itself if it is a folder, else a download from the hub.

    Only ``owner/name`` and GPT-2's own names without an owner are looked for on the Hugging Face hub.
    Raises Error for a file, for any other path that does not exist, and for a download that fails.
    """
    name = os.fspath(name)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path)
    if os.path.lexists(path):
        either = f"the folder that holds {CONFIG} and {SINGLE_FILE}, or a .gguf file"
        raise Error(f"{name!r} is not a folder: pass {either}")
    if HUB_ID.fullmatch(name):
        return _download(name)
    raise Error(
        f"there is no folder {name!r}: pass a model's folder, a .gguf file, {', '.join(KNOWN_MODELS)}, or "
        "a hub id (owner/name, or gpt2)"
    )


def _download(repo_id: str) -> Path:
    problem = f"there is no folder {repo_id!r}, and the Hugging Face hub"
    by_hand = f"download https://huggingface.co/{repo_id} by hand and pass the folder's path"
    try:
        import huggingface_hub
    except ImportError as error:
        raise Error(f"{problem} needs `pip install huggingface_hub`: install it, or {by_hand}") from error
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client lets its HTTP library's own errors through
        reason = f"{type(error).__name__}: " + str(error).partition("\n")[0]
        check = "check the name, the network and, for a gated model, `hf auth login`"
        raise Error(f"{problem} did not deliver it ({reason}): {check}, or {by_hand}") from error
