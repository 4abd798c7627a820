"""Reading and writing Hugging Face folders: comparison with transformers and safetensors."""

import copy
import errno
import json
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinyllm import GPT2, GPT2Config
from tinyllm.errors import Error
from tinyllm.files import read_json
from tinyllm.weights.safetensors import Weights, read_config, save_folder, write_safetensors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from safetensors import safe_open  # noqa: E402
from safetensors.numpy import save as numpy_save  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402  (needs torch)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, n_positions=16, vocab_size=61, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def tensors_of(model):
    """The tensors of a checkpoint: the tied head is stored once, as wte."""
    return {name: t for name, t in model.state_dict().items() if name != "lm_head.weight"}


def as_bytes(tensor):
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


def arrays_of(model):
    return {name: t.detach().numpy().copy() for name, t in tensors_of(model).items()}


def simple_arrays():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal((5, 4)).astype(np.float32) for name in "abcd"}  # 80 bytes each


def message_of(call, *args, **kwargs):
    with pytest.raises(Error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


# ---------------------------------------------------------------------------- reading


@pytest.mark.parametrize("shard_size", ["1GB", "50KB", "8KB"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_weights_written_by_transformers_are_read_bit_exactly(model, tmp_path, dtype, shard_size):
    # A copy of the config: saving writes the dtype into it.
    stored = type(model)(copy.deepcopy(model.config)).to(getattr(torch, dtype))
    stored.load_state_dict(model.state_dict())
    stored.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size != "1GB")

    weights = Weights(tmp_path)

    reference = tensors_of(stored)
    assert set(weights) == set(reference) and len(weights) == len(reference) == 28
    for name, tensor in reference.items():
        array = weights[name]
        assert array.dtype == (ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype))
        assert array.shape == tuple(tensor.shape) == weights.shapes[name]
        assert array.tobytes() == as_bytes(tensor), name
    code = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    assert weights.dtypes == dict.fromkeys(reference, code)
    assert read_config(tmp_path)["n_embd"] == 32


def test_bfloat16_is_read_before_ml_dtypes_is_imported(tmp_path):
    save_file({"w": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    program = (
        "import sys; from tinyllm.weights.safetensors import Weights; assert 'ml_dtypes' not in sys.modules;"
        f"print(Weights({str(tmp_path)!r})['w'].astype('float32').tolist())"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[1.5, -2.0]", result.stderr


def test_module_imports_no_slow_library():
    program = (
        "import sys, tinyllm.weights.safetensors as _;"
        "slow = {'torch', 'transformers', 'huggingface_hub', 'safetensors', 'ml_dtypes'};"
        "print(sorted(slow & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_weights_are_a_read_only_mapping(tmp_path, monkeypatch):
    save_folder(tmp_path, {}, {**simple_arrays(), "scalar": np.float64(2.5).reshape(())})
    weights = Weights(tmp_path)
    monkeypatch.setattr(Weights, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    assert "a" in weights and "z" not in weights
    assert weights.shapes == {**dict.fromkeys("abcd", (5, 4)), "scalar": ()}
    assert weights.dtypes["scalar"] == "F64"
    monkeypatch.undo()
    with pytest.raises(KeyError):
        weights["z"]
    with pytest.raises(TypeError):
        weights["a"] = np.zeros((5, 4))


def test_each_read_returns_a_new_array(tmp_path):
    arrays = simple_arrays()
    save_folder(tmp_path, {}, arrays)
    weights = Weights(tmp_path)
    weights["a"][:] = 0  # the array may be modified
    np.testing.assert_array_equal(weights["a"], arrays["a"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="open files are counted in /proc")
def test_no_file_stays_open_or_mapped(tmp_path):
    save_folder(tmp_path, {}, simple_arrays(), max_shard_bytes=100)
    weights = Weights(tmp_path)
    first = weights["a"]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert not [path for path in opened if path.startswith(str(tmp_path))]
    assert first.shape == (5, 4)


def test_masks_of_unsupported_dtype_can_be_ignored(tmp_path):
    """Old GPT-2 files contain causal masks as bool or uint8: they are listed, and an error only if read."""
    tensors = {"w": torch.ones(2, 3), "mask": torch.ones(2, dtype=torch.bool)}
    save_file({**tensors, "small": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    weights = Weights(tmp_path)
    np.testing.assert_array_equal(weights["w"], np.ones((2, 3)))
    assert weights.shapes["mask"] == (2,) and weights.dtypes["mask"] == "BOOL"
    text = message_of(weights.__getitem__, "mask")
    assert "mask as BOOL" in text and "F32" in text
    assert "small as F8_E4M3" in message_of(weights.__getitem__, "small")


def test_single_file_takes_precedence_over_an_index(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    changed = {name: tensor + 1 for name, tensor in tensors_of(model).items()}
    save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    name = "transformer.wpe.weight"
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).state_dict()[name].numpy()
    np.testing.assert_array_equal(Weights(tmp_path)[name], theirs)
    np.testing.assert_array_equal(theirs, changed[name].numpy())


# ---------------------------------------------------------------------------- bad files


def test_folder_without_weights_is_rejected(tmp_path):
    assert "model.safetensors" in message_of(Weights, tmp_path)
    assert "model.safetensors" in message_of(Weights, tmp_path / "missing")


def test_pickle_is_never_opened_and_the_remedy_is_stated(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    text = message_of(Weights, tmp_path)
    assert "pickle" in text and "run code" in text and "save_pretrained" in text


def test_a_file_without_permission_is_not_said_to_be_incomplete(tmp_path, monkeypatch):
    save_folder(tmp_path, {}, simple_arrays())

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("tinyllm.weights.safetensors.open_regular", refuse)
    assert "model.safetensors cannot be read (Permission denied)" in message_of(Weights, tmp_path)


@pytest.mark.parametrize("cut", [0, 5, 30, -1])
@pytest.mark.parametrize("shard_bytes", [10**9, 100])
def test_truncated_file_is_rejected(tmp_path, cut, shard_bytes):
    save_folder(tmp_path, {}, simple_arrays(), max_shard_bytes=shard_bytes)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:cut])
    text = message_of(Weights, tmp_path)
    assert str(path) in text and "not a complete safetensors file" in text


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", b"PK\x03\x04" * 50]
)
def test_other_format_is_rejected(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert str(tmp_path / "model.safetensors") in message_of(Weights, tmp_path)


def test_folder_instead_of_a_file_is_rejected(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert str(tmp_path / "model.safetensors") in message_of(Weights, tmp_path)


def test_missing_shard_is_rejected(tmp_path):
    save_folder(tmp_path, {}, simple_arrays(), max_shard_bytes=100)
    (tmp_path / "model-00003-of-00004.safetensors").unlink()
    assert "model-00003-of-00004.safetensors" in message_of(Weights, tmp_path)


def change_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


OUTSIDE = ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "sub\\x.safetensors", "C:x.safetensors"]


@pytest.mark.parametrize("shard", [*OUTSIDE, "..", ".", "", 7, None, ["a"]])
def test_shard_outside_the_folder_is_rejected(tmp_path, shard):
    inside = tmp_path / "inside"
    save_folder(inside, {}, simple_arrays(), max_shard_bytes=100)
    # The target of each name exists and could be loaded.
    for target in ("x.safetensors", "inside/sub/x.safetensors", "inside/sub\\x.safetensors"):
        (tmp_path / target).parent.mkdir(exist_ok=True)
        save_file({"a": torch.zeros(5, 4)}, tmp_path / target)
    save_file({"a": torch.zeros(5, 4)}, inside / "C:x.safetensors") if os.name != "nt" else None
    change_index(inside, lambda index: index["weight_map"].update(a=shard))
    text = message_of(Weights, inside)
    assert str(inside) in text
    if shard not in ("", ".."):  # these two are folders
        assert repr(shard) in text and "plain file name" in text


def test_index_that_differs_from_a_shard_is_rejected(tmp_path):
    save_folder(tmp_path, {}, simple_arrays(), max_shard_bytes=200)
    first = "model-00001-of-00002.safetensors"

    change_index(tmp_path, lambda index: index["weight_map"].update(ghost=first, wraith=first))
    text = message_of(Weights, tmp_path)
    assert first in text and "differ in ghost, wraith:" in text

    change_index(tmp_path, lambda index: [index["weight_map"].pop(name) for name in ("ghost", "wraith", "b")])
    text = message_of(Weights, tmp_path)
    assert first in text and "differ in b:" in text


@pytest.mark.skipif(os.name != "posix", reason="links are for administrators on Windows")
def test_shards_may_be_links(tmp_path):
    """The hub's cache consists of links to ../../blobs; the names in an index are not trusted."""
    folder = tmp_path / "snapshot"
    save_folder(folder, {}, simple_arrays(), max_shard_bytes=100)
    (tmp_path / "blobs").mkdir()
    for path in [*folder.iterdir()]:
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    assert {name: array.shape for name, array in Weights(folder).items()} == dict.fromkeys("abcd", (5, 4))


@pytest.mark.skipif(os.name != "posix", reason="Windows has no pipes with names")
@pytest.mark.parametrize("shard_bytes", [10**9, 100])
def test_pipe_is_rejected(tmp_path, shard_bytes):
    save_folder(tmp_path, {}, simple_arrays(), max_shard_bytes=shard_bytes)
    path = next(path for path in tmp_path.iterdir() if path.suffix == ".safetensors")
    path.unlink()
    os.mkfifo(path)
    assert str(path) in message_of(Weights, tmp_path)


@pytest.mark.parametrize("shape", [[1] * 1000 + [2], [0] * 100, [0, 2**62]])
def test_array_that_numpy_cannot_represent_is_rejected(tmp_path, shape):
    size = 8 if 0 not in shape else 0
    header = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    try:
        array = Weights(tmp_path)["w"]
    except Error as error:
        assert str(tmp_path / "model.safetensors") in str(error)
    else:
        assert array.shape == tuple(shape)


def test_lone_surrogate_in_a_shards_name_is_rejected(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        r'{"weight_map": {"a": "\ud800"}}', encoding="utf-8"
    )
    assert "index.json is not JSON" in message_of(Weights, tmp_path)


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": None}])
def test_index_without_a_map_is_rejected(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(content))
    text = message_of(Weights, tmp_path)
    assert str(path) in text and "weight_map" in text


def test_index_that_is_not_json_is_rejected(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text('{"weight_map": {')
    assert str(path) in message_of(Weights, tmp_path)


def test_model_replaced_while_it_is_read_is_rejected(tmp_path):
    save_folder(tmp_path, {}, simple_arrays())
    weights = Weights(tmp_path)
    assert weights["a"].shape == (5, 4)
    save_folder(tmp_path, {}, simple_arrays(), overwrite=True)
    path = tmp_path / "model.safetensors"
    os.utime(path, ns=(0, 123_456_789_000_000_000))  # do not depend on the resolution of the clock
    assert "replaced" in message_of(weights.__getitem__, "b")
    path.unlink()
    assert str(path) in message_of(weights.__getitem__, "b")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"a": "\xff"}', "UTF-8"),
        (b"", "JSON"),
        (b'{"a": 1,}', "JSON"),
        (b"[" * 100_000, "JSON"),
        (b"[1, 2]", "list"),
        (b'"text"', "str"),
        (b"null", "NoneType"),
    ],
)
def test_read_json_rejects_malformed_files(tmp_path, content, problem):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    text = message_of(read_json, path)
    assert str(path) in text and problem in text
    assert text == message_of(read_config, tmp_path)


def test_read_json_rejects_a_missing_file(tmp_path):
    text = message_of(read_config, tmp_path)
    assert str(tmp_path / "config.json") in text and "No such file" in text
    assert str(tmp_path) in message_of(read_json, tmp_path)


def test_read_json_returns_the_object(tmp_path):
    (tmp_path / "config.json").write_bytes('{"name": "é", "n": 3}'.encode())
    assert read_config(str(tmp_path)) == {"name": "é", "n": 3}


# ---------------------------------------------------------------------------- writing


@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 50_000, 8_000])
def test_transformers_loads_saved_folders(model, tmp_path, shard_bytes):
    save_folder(tmp_path, model.config.to_dict(), arrays_of(model), max_shard_bytes=shard_bytes)
    loaded, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    ids = torch.arange(16)[None]
    # The weights are equal bit for bit; the rounding of MKL's products depends on where they are in memory.
    torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits, rtol=0, atol=1e-6)


def test_shards_are_split_and_named_as_in_transformers(model, tmp_path):
    """The same shards, for tensors in the order of transformers."""
    model.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    theirs = read_json(tmp_path / "theirs" / "model.safetensors.index.json")
    arrays = arrays_of(model)
    save_folder(tmp_path / "ours", {}, arrays, max_shard_bytes=50_000)
    ours = read_json(tmp_path / "ours" / "model.safetensors.index.json")
    assert ours["weight_map"] == theirs["weight_map"]
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    for path in (tmp_path / "ours").glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(path).values()) <= 50_000


def test_a_shard_may_be_full_to_the_last_byte(tmp_path):
    save_folder(tmp_path, {}, {name: np.zeros(2, np.float32) for name in "abc"}, max_shard_bytes=16)
    index = read_json(tmp_path / "model.safetensors.index.json")
    first, last = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    assert index == {"metadata": {"total_size": 24}, "weight_map": {"a": first, "b": first, "c": last}}


def test_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    sizes = {"first": 90, "a": 2, "big": 100, "c": 2, "d": 2}
    arrays = {name: np.full(size, float(size)) for name, size in sizes.items()}
    save_folder(tmp_path, {}, arrays, max_shard_bytes=64)
    weight_map = read_json(tmp_path / "model.safetensors.index.json")["weight_map"]
    assert list(weight_map) == list(sizes)
    assert list(weight_map.values()) == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4, 4)]
    for name, array in Weights(tmp_path).items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize("shard_bytes", [10**9, 100])
def test_every_file_has_the_format_metadata(tmp_path, shard_bytes):
    save_folder(tmp_path, {}, simple_arrays(), max_shard_bytes=shard_bytes)
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            assert file.metadata() == {"format": "pt"}


LAYOUTS = {
    "transposed": lambda x: x.T,
    "reversed": lambda x: x[::-1],
    "every second column": lambda x: x[:, ::2],
    "rows of a larger buffer": lambda x: x[2:4],
    "broadcast": lambda x: np.broadcast_to(x[0], (3, x.shape[1])),
    "fortran": np.asfortranarray,
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype),
    "scalar": lambda x: x[0, 0].reshape(()),
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_memory_layout_is_written_correctly(tmp_path, layout, dtype):
    base = np.random.default_rng(1).standard_normal((6, 4)).astype(dtype)
    array = LAYOUTS[layout](base)
    before = array.tolist()

    save_folder(tmp_path, {}, {"w": array, "same": array})

    in_torch = load_file(tmp_path / "model.safetensors")
    for name in ("w", "same"):
        assert Weights(tmp_path)[name].shape == tuple(in_torch[name].shape) == array.shape
        assert Weights(tmp_path)[name].dtype == np.dtype(dtype)
        assert Weights(tmp_path)[name].tolist() == in_torch[name].tolist() == array.tolist() == before


@pytest.mark.parametrize("dtype", [">f8", ">f4", ">f2"])
def test_big_endian_arrays_are_written_correctly(tmp_path, dtype):
    array = np.random.default_rng(1).standard_normal((6, 4)).astype(dtype)
    save_folder(tmp_path, {}, {"w": array.T})
    np.testing.assert_array_equal(load_file(tmp_path / "model.safetensors")["w"].numpy(), array.T)


@settings(max_examples=200)
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=6).filter(lambda name: name != "__metadata__"),
        st.tuples(
            st.sampled_from([np.float64, np.float32, np.float16, ml_dtypes.bfloat16]),
            st.lists(st.integers(0, 3), max_size=3),
        ),
        max_size=7,
    )
)
@example({})  # the state of an optimizer before its first step
@example(
    {"b": (np.float16, [3]), "a": (ml_dtypes.bfloat16, [1]), "c": (np.float64, []), 'é\n"': (np.float32, [2])}
)
def test_files_are_identical_to_the_librarys(tensors):
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(dtype) for name, (dtype, shape) in tensors.items()}
    arrays = {
        name: np.asarray(array) for name, array in arrays.items()
    }  # NumPy turns 0-d arrays into scalars
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        write_safetensors(path, arrays)
        found = path.read_bytes()
    assert found == numpy_save(arrays, metadata={"format": "pt"})


def test_config_is_written_unchanged(tmp_path):
    config = {"z": 1, "a": [1.5, None, True], "name": "é"}
    save_folder(tmp_path / "new" / "deep", config, simple_arrays())
    text = (tmp_path / "new" / "deep" / "config.json").read_bytes().decode("utf-8")
    assert text == json.dumps(config, indent=2) + "\n"
    assert list(read_config(tmp_path / "new" / "deep")) == ["z", "a", "name"]


def test_no_temporary_files_are_left(tmp_path):
    save_folder(tmp_path, {}, simple_arrays())
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="file modes are POSIX")
def test_weights_have_the_permissions_of_the_config(tmp_path):
    old = os.umask(0o027)
    try:
        save_folder(tmp_path, {}, simple_arrays(), max_shard_bytes=100)
    finally:
        os.umask(old)
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.iterdir()}
    assert len(modes) == 6 and set(modes.values()) == {"0o640"}, modes


@pytest.mark.parametrize("present", ["config.json", "model.safetensors", "model-00001-of-00002.safetensors"])
def test_existing_model_is_not_overwritten(tmp_path, present):
    (tmp_path / present).write_bytes(b"precious")
    text = message_of(save_folder, tmp_path, {}, simple_arrays())
    assert str(tmp_path) in text and "overwrite" in text
    assert os.listdir(tmp_path) == [present] and (tmp_path / present).read_bytes() == b"precious"


@pytest.mark.parametrize("old_bytes", [10**9, 100, 200])
@pytest.mark.parametrize("new_bytes", [10**9, 100, 200])
def test_overwriting_removes_the_older_model(tmp_path, old_bytes, new_bytes):
    (tmp_path / "notes.txt").write_text("mine")
    save_folder(tmp_path, {"age": "old"}, simple_arrays(), max_shard_bytes=old_bytes)
    new = {name: array + 1 for name, array in simple_arrays().items() if name != "d"}
    save_folder(tmp_path, {"age": "new"}, new, max_shard_bytes=new_bytes, overwrite=True)

    fresh = tmp_path / "fresh"
    save_folder(fresh, {"age": "new"}, new, max_shard_bytes=new_bytes)
    for path in fresh.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == sorted([*os.listdir(fresh), "fresh", "notes.txt"])
    assert set(Weights(tmp_path)) == {"a", "b", "c"}


def test_folder_can_be_overwritten_with_its_own_weights(tmp_path):
    arrays = simple_arrays()
    save_folder(tmp_path, {"n": 1}, arrays)
    save_folder(tmp_path, {"n": 1}, Weights(tmp_path), max_shard_bytes=100, overwrite=True)
    for name, array in Weights(tmp_path).items():
        np.testing.assert_array_equal(array, arrays[name])
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_full_disk_leaves_the_older_model_unchanged(tmp_path, monkeypatch):
    save_folder(tmp_path, {"age": "old"}, simple_arrays(), max_shard_bytes=100)
    before = folder_bytes(tmp_path)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    text = message_of(save_folder, tmp_path, {"age": "new"}, simple_arrays(), overwrite=True)
    assert str(tmp_path) in text and "No space left on device" in text
    assert folder_bytes(tmp_path) == before


def test_files_are_flushed_before_they_are_renamed(tmp_path, monkeypatch):
    save_folder(tmp_path, {"age": "old"}, simple_arrays())
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(Path(b).name), replace(a, b)))
    save_folder(tmp_path, {"age": "new"}, simple_arrays(), max_shard_bytes=200, overwrite=True)
    assert calls[:4] == ["fsync"] * 4  # two shards, the index, the config
    assert len(calls) == 8 and calls[-1] == "config.json"


def test_crash_between_renames_never_mixes_two_models(tmp_path, monkeypatch):
    save_folder(tmp_path, {"age": "old"}, simple_arrays(), max_shard_bytes=100)
    replace = os.replace
    for survived in range(4):

        def crash(a, b, done=[], survived=survived):  # noqa: B006  (counts the calls of one round)
            if len(done) == survived:
                raise OSError(5, "power is gone")
            done.append(b)
            replace(a, b)

        monkeypatch.setattr(os, "replace", crash)
        message_of(save_folder, tmp_path, {"age": "new"}, simple_arrays(), 200, overwrite=True)
        assert "config.json" in message_of(read_config, tmp_path)
    monkeypatch.undo()
    save_folder(tmp_path, {"age": "new"}, simple_arrays(), overwrite=True)
    assert read_config(tmp_path) == {"age": "new"} and set(Weights(tmp_path)) == set("abcd")


@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.complex64, object])
def test_unsupported_dtypes_are_rejected_before_any_change(tmp_path, dtype):
    save_folder(tmp_path, {"age": "old"}, simple_arrays())
    before = folder_bytes(tmp_path)
    arrays = {**simple_arrays(), "odd": np.ones(3, dtype)}
    text = message_of(save_folder, tmp_path, {"age": "new"}, arrays, overwrite=True)
    assert f"odd has dtype {np.dtype(dtype)}" in text and "float32" in text
    assert folder_bytes(tmp_path) == before


def test_config_that_is_not_json_changes_nothing(tmp_path):
    save_folder(tmp_path, {"age": "old"}, simple_arrays())
    before = folder_bytes(tmp_path)
    with pytest.raises(TypeError):
        save_folder(tmp_path, {"age": object()}, simple_arrays(), overwrite=True)
    assert folder_bytes(tmp_path) == before


def test_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        assert str(folder) in message_of(save_folder, folder, {}, simple_arrays())
    assert (tmp_path / "file").read_text() == "in the way"


# ---------------------------------------------------------------------------- memory

PEAK = """
import sys
from pathlib import Path
from tinyllm import GPT2

def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])

GPT2.from_pretrained(sys.argv[2])  # imports and other one-time costs
Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
before = kilobytes("VmHWM")
model = GPT2.from_pretrained(sys.argv[1])
size = sum(parameter.data.nbytes for _, parameter in model.named_parameters())
print(size, (kilobytes("VmHWM") - before) * 1024 / size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("shard_bytes", [10**9, 9 * 10**6])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_loading_needs_little_more_memory_than_the_weights(tmp_path, dtype, shard_bytes):
    large = dict(n_layer=6, n_embd=512, vocab_size=2000)
    for folder, sizes in {"large": large, "tiny": dict(n_layer=1, n_embd=16, vocab_size=20)}.items():
        model = GPT2(GPT2Config(n_head=4, n_positions=64, tie_word_embeddings=False, **sizes), rng=None)
        tensors = {name: array.astype(dtype) for name, array in model.state_dict().items()}
        save_folder(tmp_path / folder, model.config.to_dict(), tensors, max_shard_bytes=shard_bytes)
    result = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "large", tmp_path / "tiny"],
        capture_output=True,
        text=True,
        check=False,
    )
    size, ratio = (result.stdout or "0 nan").split()
    assert int(size) > 80 * 10**6 and 0.95 < float(ratio) < 1.15, result.stdout + result.stderr
