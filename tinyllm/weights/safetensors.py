"""Reading and writing folders in Hugging Face's layout: ``config.json`` and weights in safetensors files.

The weights are in one file, ``model.safetensors``, or in several shards with a
``model.safetensors.index.json``, whose ``weight_map`` maps each tensor to its shard. A safetensors file is a
JSON header (name, dtype, shape and offsets of each tensor) followed by the data. Files are read by the
safetensors library and written here.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath

import numpy as np

from tinyllm.backend.device import to_device
from tinyllm.errors import Error
from tinyllm.files import SAVING, open_regular, read_json, sync, write_synced
from tinyllm.weights import StoredTensors

CONFIG, SINGLE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MODEL_FILES = (CONFIG, SINGLE_FILE, INDEX, "model-*-of-*.safetensors")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # in a file's order
CODES = {name: code for code, name in DTYPES.items()}


def read_config(folder: str | Path) -> dict:
    """The content of ``config.json`` in a model's folder. Raises ``Error`` as ``read_json`` does."""
    return read_json(Path(folder) / CONFIG)


def is_adapter(path: Path) -> bool:
    """Whether a folder has an adapter (see ``adapters.py``), and no whole model."""
    return (path / ADAPTER_CONFIG).is_file() and not any(path.glob("model*.safetensors"))


class Weights(StoredTensors):
    """The tensors of a model's folder, or of one .safetensors file, read-only.

    The constructor reads only headers; ``dtypes`` has safetensors' codes, such as "F32". ``weights[name]``
    reads a tensor as a new array in its stored dtype. No file stays open or memory-mapped, so a model can be
    loaded tensor by tensor without a second copy in memory. A single file takes precedence over an index, as
    in transformers. Raises ``Error`` if a file is missing, damaged or inconsistent with the index. Reading a
    tensor raises ``Error`` if its file has changed since the header was read, or if it is not float64/32/16
    or bfloat16 (old GPT-2 files contain masks of bytes).
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.shapes, self.dtypes = {}, {}
        self._sources: dict[str, tuple[Path, int]] = {}  # the file, and its modification time
        if folder.suffix == ".safetensors" and not folder.is_dir():
            self._read_header(folder)
        elif (folder / SINGLE_FILE).exists():
            self._read_header(folder / SINGLE_FILE)
        elif (folder / INDEX).exists():
            for shard, listed in _read_index(folder / INDEX).items():
                different = ", ".join(sorted(listed.symmetric_difference(self._read_header(shard))))
                if different:
                    raise Error(f"{shard} and {INDEX} differ in {different}: copy both again")
        else:
            raise Error(
                f"{folder} has neither {SINGLE_FILE} nor {INDEX}: give a folder with one of them (a .bin or "
                ".pth file is a pickle, which can run code: if you trust its author, convert it with "
                "transformers' from_pretrained and save_pretrained)"
            )

    def _read_header(self, path: Path) -> list[str]:
        with _open_safetensors(path) as file:
            names, written = list(file.keys()), path.stat().st_mtime_ns
            for name in names:
                header = file.get_slice(name)
                self.shapes[name] = tuple(header.get_shape())
                self.dtypes[name] = header.get_dtype()
                self._sources[name] = path, written
        return names

    def __getitem__(self, name: str) -> np.ndarray:
        import ml_dtypes  # noqa: F401  (registers the dtype "bfloat16" with NumPy, for safetensors)

        path, written = self._sources[name]
        if self.dtypes[name] not in DTYPES:
            raise Error(f"{path} stores {name} as {self.dtypes[name]}: convert it to {' or '.join(DTYPES)}")
        with _open_safetensors(path) as file:
            # Otherwise half of the old model and half of the new one would load without an error.
            if path.stat().st_mtime_ns != written:
                raise Error(f"{path} was replaced while it was being read: load the model again")
            try:
                return file.get_tensor(name)
            except ValueError as error:  # too many or too large dimensions for NumPy
                raise Error(f"{path}: {name!r} is not an array ({error}): copy the file again") from error


def _open_safetensors(path: Path):
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(path).close()  # the library takes every failure for a missing file
        return safe_open(path, framework="np")
    except OSError as error:
        raise Error(
            f"{path} cannot be read ({error.strerror or error}): check the path or copy it again"
        ) from error
    except (SafetensorError, ValueError) as error:  # ValueError: a zero byte in the path
        raise Error(f"{path} is not a complete safetensors file ({error}): copy it again") from error


def _read_index(path: Path) -> dict[Path, set[str]]:
    """The paths of the shards, each with the names of its tensors.

    A shard must be in the index's own folder. It may be a symbolic link, as in the hub's cache.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Error(f"{path} has no 'weight_map' from tensor names to shards: copy it again")
    shards: dict[Path, set[str]] = {}
    for name, shard in weight_map.items():
        # Windows' rules include every separator and drive letters: no name leads out of the folder.
        if not isinstance(shard, str) or PureWindowsPath(shard).name != shard:
            raise Error(f"{path} maps {name!r} to {shard!r}, which is not a plain file name: correct it")
        shards.setdefault(path.parent / shard, set()).add(name)
    return shards


def save_folder(
    folder: str | Path,
    config: dict,
    tensors: Mapping[str, np.ndarray],
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> None:
    """Write a model as transformers does: ``config.json`` and safetensors, in shards if large.

    Files are written and flushed to disk under temporary names in ``folder``, then renamed: a full disk or a
    crash while writing leaves an older model untouched. A new shard begins when the next tensor would exceed
    ``max_shard_bytes``. Raises ``Error`` if the folder already contains a model and ``overwrite`` is False,
    for dtypes other than float64/32/16 and bfloat16, and if the folder cannot be written.
    """
    folder = Path(folder)
    old = {path.name for pattern in MODEL_FILES for path in folder.glob(pattern)}
    if old and not overwrite:
        raise Error(f"{folder} already contains a model: choose another folder or pass overwrite=True")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SAVING, dir=folder) as temporary:
            new = Path(temporary)
            write_synced(new / CONFIG, _as_json(config))
            _write_weights(new, tensors, max_shard_bytes)
            _replace_model(folder, old, new)
    except OSError as error:
        raise Error(f"cannot write a model to {folder} ({error}): check the path and disk space") from error


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
    """Write float64/32/16 or bfloat16 arrays to a safetensors file, and flush it to disk.

    Format: the length of the header (8 bytes, little-endian); the header, JSON padded with spaces to a
    multiple of 8 bytes, with the dtype, shape, begin and end of each tensor; the data, row-major and
    little-endian. Tensors are sorted by element size, largest first, so that all are aligned, then by name.
    The file is identical to the safetensors library's, but it is written tensor by tensor, without a second
    copy of the model in memory. Raises OSError.
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
    """The bytes of an array in row-major, little-endian order; a copy only if it has another layout."""
    array = np.asarray(array if isinstance(array, np.generic) else to_device(array, "cpu"))
    little_endian = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
    return little_endian.reshape(-1).view(np.uint8)


def _split_into_shards(tensors: Mapping[str, np.ndarray], max_shard_bytes: int) -> list[list[str]]:
    """The tensors' names in order; a new shard whenever the next tensor would not fit."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if tensor.dtype.name not in DTYPES.values():
            raise Error(f"{name} has dtype {tensor.dtype}: convert it to {' or '.join(DTYPES.values())}")
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _replace_model(folder: Path, old: set[str], new: Path) -> None:
    """Replace the files of an old model.

    The config is removed first and written last: a crash in between leaves a folder that cannot be loaded,
    never the config of one model with the weights of another.
    """
    (folder / CONFIG).unlink(missing_ok=True)
    weights = {path.name for path in new.glob("model*")}
    for name in weights:
        os.replace(new / name, folder / name)
    for name in old - weights - {CONFIG}:
        (folder / name).unlink()
    os.replace(new / CONFIG, folder / CONFIG)
