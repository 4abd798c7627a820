"""Experts stored as one array are presented one by one, and each array is read once."""

import numpy as np
import pytest

from tinyllm.errors import Error
from tinyllm.weights import StoredTensors
from tinyllm.weights.fused import per_expert

NAMES = "block_sparse_moe", ("w1", "w3", "w2")
E, INNER, C = 3, 2, 4


class File(StoredTensors):
    """Tensors that count how often each was read."""

    def __init__(self, arrays):
        self.arrays, self.shapes, self.reads = arrays, {k: v.shape for k, v in arrays.items()}, []

    def __getitem__(self, name):
        self.reads.append(name)
        return self.arrays[name]


def fused_file():
    rng = np.random.default_rng(0)
    arrays = {"lm_head.weight": rng.standard_normal((5, C))}
    for layer in ("model.layers.0", "model.layers.1"):
        arrays[f"{layer}.mlp.gate.weight"] = rng.standard_normal((E, C))
        arrays[f"{layer}.mlp.experts.gate_up_proj"] = rng.standard_normal((E, 2 * INNER, C))
        arrays[f"{layer}.mlp.experts.down_proj"] = rng.standard_normal((E, C, INNER))
    return File(arrays)


def test_each_expert_has_its_rows_under_the_published_names():
    file = fused_file()
    found = per_expert(file, *NAMES)
    both = file.arrays["model.layers.1.mlp.experts.gate_up_proj"]
    block = "model.layers.1.block_sparse_moe"
    assert np.array_equal(found[f"{block}.experts.2.w1.weight"], both[2, :INNER])
    assert np.array_equal(found[f"{block}.experts.2.w3.weight"], both[2, INNER:])
    down = file.arrays["model.layers.1.mlp.experts.down_proj"]
    assert np.array_equal(found[f"{block}.experts.0.w2.weight"], down[0])
    assert np.array_equal(found[f"{block}.gate.weight"], file.arrays["model.layers.1.mlp.gate.weight"])
    assert np.array_equal(found["lm_head.weight"], file.arrays["lm_head.weight"])
    assert len(found) == 1 + 2 * (1 + 3 * E)
    assert all(found.shapes[name] == array.shape for name, array in found.items())


def test_shapes_are_known_without_reading_and_an_array_is_read_once():
    file = fused_file()
    found = per_expert(file, *NAMES)
    assert len(found.shapes) == len(found) and file.reads == []
    for layer in (0, 1):  # in the order in which a model reads its parameters
        for e in range(E):
            for part in ("w1", "w2", "w3"):
                found[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{part}.weight"]
    assert len(file.reads) == 4 and len(set(file.reads)) == 4


def test_arrays_of_separate_experts_stay_as_they_are():
    arrays = {"layers.0.block_sparse_moe.experts.0.w1.weight": np.ones((2, 3))}
    assert per_expert(arrays, *NAMES) is arrays
    assert per_expert("no mapping", *NAMES) == "no mapping"


@pytest.mark.parametrize("shape", [(E, 2 * INNER + 1, C), (E,), (E, 2 * INNER)])
def test_an_array_of_another_shape_is_not_divided(shape):
    """One of gate and up would lack a row, say: the array keeps its name, which no model has."""
    found = per_expert({"mlp.experts.gate_up_proj": np.ones(shape)}, *NAMES)
    assert dict(found.shapes) == {"mlp.experts.gate_up_proj": shape}


def test_the_same_matrix_twice_is_an_error():
    file = fused_file()
    file.shapes["model.layers.0.block_sparse_moe.experts.1.w2.weight"] = (C, INNER)
    with pytest.raises(Error, match=r"experts\.1\.w2\.weight.*same parameter"):
        per_expert(file, *NAMES)
