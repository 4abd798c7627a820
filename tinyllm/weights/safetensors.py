"""Folders in Hugging Face's layout: ``config.json`` and the weights in safetensors files, read and written.

The weights are one ``model.safetensors``, or several shards of it and ``model.safetensors.index.json``,
whose ``weight_map`` says which tensor lies in which shard. A safetensors file is a JSON header (each tensor's
name, dtype, shape, place) and then the numbers. We write it ourselves and leave reading to the safetensors
library.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath

import numpy as np

from tinyllm.backend.device import to_device
from tinyllm.errors import Error
from tinyllm.files import SAVING, check_is_file, read_json, sync, write_synced
from tinyllm.weights import StoredTensors

CONFIG, SINGLE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MODEL_FILES = (CONFIG, SINGLE_FILE, INDEX, "model-*-of-*.safetensors")

DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # in the order of a file
CODES = {name: code for code, name in DTYPES.items()}


def read_config(folder: str | Path) -> dict:
    """What ``config.json`` in a model's folder says, as it stands. Raises Error as `read_json` does."""
    return read_json(Path(folder) / CONFIG)


class Weights(StoredTensors):
    """The tensors of a model's folder.

    Making one reads headers only; ``dtypes`` has safetensors' codes, such as "F32". Every
    ``weights[name]`` is a new array in the dtype it is stored in and leaves no file open, so loading
    tensor by tensor never holds a second copy of a model. One file counts before an index, as in
    transformers. Raises Error if a file is missing, broken, at odds with the index or changed since its
    header was read, and if a tensor that is not float64/32/16 or bfloat16 (old GPT-2 files keep masks as
    bytes) is asked for.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.shapes, self.dtypes = {}, {}
        self._sources: dict[str, tuple[Path, int]] = {}  # file, and when it was last written
        if (folder / SINGLE_FILE).exists():
            self._read_header(folder / SINGLE_FILE)
        elif (folder / INDEX).exists():
            for shard, listed in _read_index(folder / INDEX).items():
                disputed = ", ".join(sorted(listed.symmetric_difference(self._read_header(shard))))
                if disputed:
                    raise Error(f"{shard} and {INDEX} disagree about {disputed}: copy both again")
        else:
            raise Error(
                f"{folder} holds neither {SINGLE_FILE} nor {INDEX} (a .bin or .pth file is a pickle, which "
                "can run code: if you trust its author, convert it with transformers' from_pretrained and "
                "save_pretrained)"
            )

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
                raise Error(f"{path}: {name!r} is not an array ({error}): copy the file again") from error


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
            raise Error(f"{path} puts {name!r} into {shard!r}, which is not a plain file name: correct it")
        shards.setdefault(path.parent / shard, set()).add(name)
    return shards


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
        with tempfile.TemporaryDirectory(prefix=SAVING, dir=folder) as temporary:
            new = Path(temporary)
            write_synced(new / CONFIG, _as_json(config))
            _write_weights(new, tensors, max_shard_bytes)
            _replace_model(folder, old, new)
    except OSError as error:
        raise Error(f"cannot write a model to {folder} ({error}): check the path and the disk") from error


def _as_json(value: dict) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _write_weights(folder: Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int) -> None:
    shards = _split_into_shards(tensors, max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE_FILE
        write_safetensors(folder / file, {name: tensors[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        metadata = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
        write_synced(folder / INDEX, _as_json({"metadata": metadata, "weight_map": weight_map}))


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
    """Put a new model in an old one's place.

    The config goes first and comes back last: a crash in between leaves a folder that is refused, never
    the config of one model beside the weights of another.
    """
    (folder / CONFIG).unlink(missing_ok=True)
    weights = {path.name for path in new.glob("model*")}
    for name in weights:
        os.replace(new / name, folder / name)
    for name in old - weights - {CONFIG}:
        (folder / name).unlink()
    os.replace(new / CONFIG, folder / CONFIG)
