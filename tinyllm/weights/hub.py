"""Finding a model by what a user passes: a folder, a run, a .gguf file, a known name, or a hub id."""

import os
import re
import sys
from pathlib import Path

from tinyllm.checks import described
from tinyllm.errors import Error
from tinyllm.weights import StoredTensors
from tinyllm.weights.gguf import GGUFFile
from tinyllm.weights.pull import KNOWN_MODELS, SourceError, find_pulled, snapshot
from tinyllm.weights.runs import checkpoints, last_checkpoint
from tinyllm.weights.safetensors import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    MODEL_FILES,
    SINGLE_FILE,
    Weights,
    is_adapter,
    read_config,
)

TEXT_FILES = ("tokenizer*", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
HUB_FILES = [*MODEL_FILES, *TEXT_FILES, "chat_template.jinja", "generation_config.json"]
HUB_FILES += [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
HUB_ID = re.compile(
    r"(?P<id>\w[\w.-]*/\w[\w.-]*|gpt2(-medium|-large|-xl)?|distilgpt2)(@(?P<revision>\w[\w.-]*))?", re.ASCII
)
REVISIONS: dict[str, str] = {}  # hub id -> the revision that this process uses


def find_model(name: str | Path) -> Path:
    """The path of a model's folder or .gguf file.

    ``name`` is a model's folder, a run's folder (the newest checkpoint is the model) or a file that ends in
    .gguf; otherwise a name known to ``tinyllm pull``; otherwise a hub id, which is downloaded. ``gpt2`` is
    both: the pulled model if there is one, otherwise the hub id. Raises ``Error`` if there is no such file,
    if a known model has not been pulled, and as ``find_folder`` does.
    """
    if not isinstance(name, str | os.PathLike):
        raise Error(f"{described(name)} does not name a model: pass its folder, its .gguf file, or a hub id")
    name = os.fspath(name)
    path = os.path.expanduser(name)
    if name.lower().endswith(".gguf") and not os.path.isdir(path):
        if os.path.isfile(path):
            return Path(path)
        raise Error(f"no file {name!r}: check the path, or pass a model's folder or a hub id")
    if name in KNOWN_MODELS and not os.path.lexists(path):
        pulled = find_pulled(name)
        if pulled is not None:
            return pulled
        if not HUB_ID.fullmatch(name):
            raise Error(f"{name} is not on this machine: run `tinyllm pull {name}`, or pass a model's folder")
    folder = find_folder(name)
    is_run = checkpoints(folder) and not any(folder.glob("model.safetensors*"))
    return last_checkpoint(folder) if is_run else folder


def model_config(path: Path) -> dict:
    """The content of ``config.json``, or its equivalent for a GGUF file, at a path from ``find_model``.

    Raises ``Error`` as ``read_config`` and ``GGUFFile`` do, and for an adapter.
    """
    _check_whole(path)
    return read_config(path) if path.is_dir() else GGUFFile(path).config


def open_weights(path: Path) -> StoredTensors:
    """The tensors of the model at a path from ``find_model``, under the names of a Hugging Face folder.

    Raises ``Error`` as ``Weights`` and ``GGUFFile`` do, and for an adapter.
    """
    _check_whole(path)
    return Weights(path) if path.is_dir() else GGUFFile(path)


def _check_whole(path: Path) -> None:
    if is_adapter(path):
        raise Error(f"{path} is an adapter, not a whole model: make it one with `tinyllm merge`")


def find_folder(name: str | Path) -> Path:
    """The local folder of a model: ``name`` itself if it is a folder, otherwise a download from the hub.

    Only ``owner/name`` and the names of GPT-2, which have no owner, are tried as hub ids; a revision may
    follow (``gpt2@607a30d7…``). The revision is printed to stderr, and later calls in this process use the
    same one, so that a model and its tokenizer belong together. Raises ``Error`` if the path is a file or
    does not exist, and if the download fails.
    """
    name = os.fspath(name)
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path)
    if os.path.lexists(path):
        raise Error(
            f"{name!r} is not a folder: pass the folder with {CONFIG} and {SINGLE_FILE}, or a .gguf file"
        )
    if found := HUB_ID.fullmatch(name):
        revision = found["revision"] or REVISIONS.get(name)
        try:
            folder = snapshot(found["id"], revision=revision, allow_patterns=HUB_FILES)
        except SourceError as error:
            raise Error(
                f"no folder {name!r}, and {error}: check the name, the network and (for a gated model) "
                f"`hf auth login`, or download https://huggingface.co/{found['id']} by hand and pass its path"
            ) from error.__cause__
        if name not in REVISIONS:  # the folder's name in the hub's cache
            REVISIONS[name] = folder.name
            print(f"{found['id']} at revision {folder.name} of the hub: {folder}", file=sys.stderr)
        return folder
    raise Error(
        f"no folder {name!r}: pass a model's folder, a .gguf file, {', '.join(KNOWN_MODELS)}, or a hub id "
        "(owner/name, or gpt2)"
    )
