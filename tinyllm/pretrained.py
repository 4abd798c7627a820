"""How does a model that others trained become named NumPy arrays, and back?

`find_model` says where it is, `model_config` and `open_weights` what it holds. Models travel as GGUF
files (``gguf_file.py``) or as a folder in Hugging Face's layout, which is also what we write: ``config.json``
and one ``model.safetensors``, or several shards of it and ``model.safetensors.index.json``, whose
``weight_map`` says which tensor lies in which shard. A safetensors file is a JSON header (each tensor's
name, dtype, shape, place) and then the numbers, which we write ourselves and leave to the safetensors library
to read.
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path, PureWindowsPath

import numpy as np

from tinyllm.device import to_device
from tinyllm.errors import Error
from tinyllm.files import sync
from tinyllm.gguf_file import GGUFFile
from tinyllm.pull import KNOWN_MODELS, find_pulled
from tinyllm.reading import check_is_file, read_json

CONFIG, SINGLE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MODEL_FILES = (CONFIG, SINGLE_FILE, INDEX, "model-*-of-*.safetensors")
TEXT_FILES = ("tokenizer*", "vocab.json", "merges.txt", "special_tokens_map.json", "chat_template.jinja")
HUB_FILES = [*MODEL_FILES, *TEXT_FILES, "generation_config.json"]
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # in the order of a file

# Far above any model's. Of these two, even a model without weights takes memory.
MAX_LAYERS, MAX_WIDTH, MAX_SIZE = 2**12, 2**20, 2**31 - 1
FIELD_TYPES = {
    "int": int,
    "int | None": int | None,
    "float": int | float,
    "bool": bool,
    "str": str,
    "dict": Mapping,
}

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


def read_config(folder: str | Path) -> dict:
    """What ``config.json`` in a model's folder says, as it stands. Raises Error as `read_json` does."""
    return read_json(Path(folder) / CONFIG)


class Weights(Mapping[str, np.ndarray]):
    """The tensors of a model's folder by name, read-only; each is read from disk when it is asked for.

    Making one reads headers only: ``shapes`` (name to tuple) and ``dtypes`` (name to safetensors'
    code, such as "F32"). Every ``weights[name]`` is a new array in the dtype it is stored in and
    leaves no file open, so loading tensor by tensor never holds a second copy of a model. One file
    counts before an index, as in transformers. Raises Error if a file is missing, broken, at odds
    with the index or changed since its header was read, and if a tensor that is not float64/32/16
    or bfloat16 (old GPT-2 files keep masks as bytes) is asked for.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._sources: dict[str, tuple[Path, int]] = {}  # file, and when it was last written
        if (folder / SINGLE_FILE).exists():
            self._read_header(folder / SINGLE_FILE)
        elif (folder / INDEX).exists():
            for shard, listed in _read_index(folder / INDEX).items():
                disputed = ", ".join(sorted(listed.symmetric_difference(self._read_header(shard))))
                if disputed:
                    raise Error(f"{shard} and {INDEX} disagree about {disputed}: copy both again")
        else:
            pickles = "a .bin or .pth file is a pickle, which can run code: if you trust its author,"
            convert = "convert it with transformers' from_pretrained and save_pretrained"
            raise Error(f"{folder} holds neither {SINGLE_FILE} nor {INDEX} ({pickles} {convert})")

    def _read_header(self, path: Path) -> list[str]:
        with _open_safetensors(path) as file:
            names = list(file.keys())
            for name in names:
                header = file.get_slice(name)
                self.shapes[name] = tuple(header.get_shape())
                self.dtypes[name] = header.get_dtype()
                self._sources[name] = path, path.stat().st_mtime_ns
        return names

    def __getitem__(self, name: str) -> np.ndarray:
        import ml_dtypes  # noqa: F401  (teaches NumPy the name "bfloat16", which safetensors asks it for)

        path, written = self._sources[name]
        if self.dtypes[name] not in DTYPES:
            raise Error(f"{path} stores {name} as {self.dtypes[name]}: convert it to {' or '.join(DTYPES)}")
        with _open_safetensors(path) as file:
            # Half of one model and half of the next would load without a complaint.
            if path.stat().st_mtime_ns != written:
                raise Error(f"{path} was replaced while it was being read: load the model again")
            try:
                return file.get_tensor(name)
            except ValueError as error:  # more dimensions or a larger one than NumPy has
                raise Error(f"{path}: {name!r} is no array ({error}): copy the file again") from error

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # Mapping's own would read the tensor to find out

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _open_safetensors(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        check_is_file(path)
        return safe_open(path, framework="np")
    except (SafetensorError, OSError, ValueError) as error:  # ValueError: no system has such a name
        raise Error(f"{path} is not a complete safetensors file ({error}): copy it again") from error


def _read_index(path: Path) -> dict[Path, set[str]]:
    """Each shard, inside the folder, with the names of its tensors.

    A shard there may be a link to anywhere, as in the hub's cache; its name leads nowhere else.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Error(f"{path} has no 'weight_map' from tensor names to shards: copy it again")
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        # Windows' rules know every separator and drive letter, so no system is led out of the folder.
        if not isinstance(shard, str) or PureWindowsPath(shard).name != shard:
            raise Error(f"{path} puts {name!r} into {shard!r}, which is no plain file name: correct it")
        shards.setdefault(path.parent / shard, set()).add(name)
    return shards


def check_fields(config, layers: tuple[str, ...], widths: tuple[str, ...]) -> None:
    """Raise Error unless a config's fields have their types, its numbers are finite and its sizes sane.

    True is no number here, though it is one in Python. ``layers`` and ``widths`` name the sizes for which
    building a model takes time and memory, before its weights are looked at.
    """
    limits = dict.fromkeys(layers, MAX_LAYERS) | dict.fromkeys(widths, MAX_WIDTH)
    for field in fields(config):
        name, value = field.name, getattr(config, field.name)
        truth = isinstance(value, bool)
        if not isinstance(value, FIELD_TYPES[field.type]) or truth != (field.type == "bool"):
            kind = "a whole number of at least 1" if field.type.startswith("int") else f"a {field.type}"
            raise Error(f"{name} must be {kind}, not {value!r}")
        if isinstance(value, int | float) and not abs(value) <= limits.get(name, MAX_SIZE):
            raise Error(f"{name} must be at most {limits.get(name, MAX_SIZE):,}, not {value!r}")


def check_names_and_shapes(expected: dict[str, tuple], found: dict[str, tuple], source: str) -> None:
    """Raise one Error that lists every missing, unexpected and misshaped tensor; else do nothing.

    ``expected`` is what the model has and ``found`` what ``source`` (a folder, say) offers: name to shape.
    """
    both = [name for name in expected if name in found]
    kinds = {
        "Missing": [name for name in expected if name not in found],
        "Unexpected": [name for name in found if name not in expected],
        "Wrong shape": [f"{n} is {found[n]}, not {expected[n]}" for n in both if found[n] != expected[n]],
    }
    problems = [f"{kind} ({len(names)}): {', '.join(names)}" for kind, names in kinds.items() if names]
    if problems:
        listed = "; ".join(problems)
        raise Error(f"{source} does not fit the model: use the config it was made with ({listed})")


def save_folder(
    folder: str | Path,
    config: dict,
    tensors: Mapping[str, np.ndarray],
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Write a model as transformers does: ``config.json`` and safetensors, sharded if large.

    All is written and flushed to disk inside ``folder`` first, then renamed: a full disk or a crash
    while writing leaves an older model untouched. Raises Error if a model is there and ``overwrite``
    is False, for dtypes other than float64/32/16 and bfloat16, and if the folder cannot be written.
    """
    folder = Path(folder)
    old = {path.name for pattern in MODEL_FILES for path in folder.glob(pattern)}
    if old and not overwrite:
        raise Error(f"{folder} already holds a model: choose another folder or pass overwrite=True")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
            new = Path(temporary)
            _write_json(new / CONFIG, config)
            _write_weights(new, tensors, max_shard_bytes)
            _replace_model(folder, old, new)
    except OSError as error:
        raise Error(f"cannot write a model to {folder} ({error}): check the path and the disk") from error


def _write_json(path: Path, value: dict) -> None:
    with open(path, "wb") as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")
        sync(file)


def _write_weights(folder: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int) -> None:
    shards = _split_into_shards(tensors, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE_FILE
        write_safetensors(folder / file, {name: tensors[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        metadata = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        _write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write float64/32/16 or bfloat16 arrays into a safetensors file, and flush it to the disk.

    The file: the length of the header (8 bytes, little-endian), the header (JSON, filled up with spaces to
    a multiple of 8 bytes) with the dtype, shape, begin and end of each tensor, then the numbers, row by row,
    little-endian. Longer numbers come first, so that all are aligned, then names decide: byte for byte what
    the safetensors library writes. But tensor by tensor: never a second copy of a model in memory. Raises
    OSError.
    """
    order = sorted(tensors, key=lambda name: (list(CODES).index(tensors[name].dtype.name), name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        code, shape = CODES[tensors[name].dtype.name], list(tensors[name].shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in order:
            file.write(_stored(tensors[name]))
        sync(file)


def _stored(array) -> np.ndarray:
    """The bytes of an array as a file holds them; a copy only if they do not lie like that already."""
    array = np.asarray(array if isinstance(array, np.generic) else to_device(array, "cpu"))
    little_endian = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return little_endian.reshape(-1).view(np.uint8)


def _split_into_shards(tensors: Mapping[str, np.ndarray], max_shard_bytes: int) -> list[list[str]]:
    """The tensors' names in order; a new shard whenever the next tensor would not fit."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if tensor.dtype.name not in DTYPES.values():
            raise Error(f"{name} is {tensor.dtype}: convert it to one of {', '.join(DTYPES.values())}")
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _replace_model(folder: Path, old: set[str], new: Path) -> None:
    # The config goes first and comes back last: a crash in between leaves a folder that is refused,
    # never the config of one model beside the weights of another.
    (folder / CONFIG).unlink(missing_ok=True)
    weights = {path.name for path in new.glob("model*")}
    for name in weights:
        os.replace(new / name, folder / name)
    for name in old - weights - {CONFIG}:
        (folder / name).unlink()
    os.replace(new / CONFIG, folder / CONFIG)
