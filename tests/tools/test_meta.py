"""Meta arrays have the shapes, the layout and the bytes that NumPy's arrays would have."""

import gc

import numpy as np
import pytest

from tinyllm.tools.meta import MetaArray, Tally

OPS = {
    "add": lambda x, y: x[:, :1] + y[0],
    "a transposed one": lambda x, y: x.swapaxes(0, 1) * 2.0,
    "compare": lambda x, y: x > 0,
    "widen": lambda x, y: x + np.ones(4),
    "product": lambda x, y: x @ y.T,
    "sum": lambda x, y: x.sum(axis=-1, keepdims=True),
    "mean": lambda x, y: x.mean(axis=(0, 2)),
    "everything": lambda x, y: x.max(),
    "slice": lambda x, y: x[:, ::2],
    "a NumPy scalar": lambda x, y: x * np.float64(2),
    "a list": lambda x, y: y * [1, 2, 3, 4],
    "truths": lambda x, y: (x > 0) * 2,
    "rows": lambda x, y: x[np.array([[0, 1], [1, 1]])],
    "rows of a transposed one": lambda x, y: x.T[np.array([2, 0])],
    "rows and a slice": lambda x, y: x[np.array([1, 0]), :, 1:],
    "a mask": lambda x, y: x[np.eye(2, 3, dtype=bool)],
    "a new axis": lambda x, y: x[..., None, 1],
    "reshape": lambda x, y: x.reshape(6, 4),
    "reshape that copies": lambda x, y: x.transpose(2, 0, 1).reshape(-1),
    "copy": lambda x, y: x.T.copy(),
    "astype": lambda x, y: x.T.astype(np.float64),
    "where": lambda x, y: np.where(x > 0, x, -np.inf),
    "zeros_like": lambda x, y: np.zeros_like(x.T),
    "like": lambda x, y: np.zeros((2, 2), np.float32, like=x),
    "stack": lambda x, y: np.stack([y, y]),
    "triu": lambda x, y: np.triu(np.full_like(x, -np.inf, shape=(3, 3)), 1),
    "broadcast": lambda x, y: np.broadcast_to(y, (7, 5, 4)),
    "einsum": lambda x, y: np.einsum("btc,vc->btv", x, y),
}


@pytest.mark.parametrize("op", OPS)
def test_results_have_the_shape_dtype_layout_and_bytes_of_numpy(op):
    real, meta = ((make((2, 3, 4)), make((5, 4))) for make in (_ones, _meta))
    expected = OPS[op](*real)
    gc.collect()
    before = Tally.restart()
    found = OPS[op](*meta)
    assert type(found) is MetaArray
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.ndim < 2 or found.flags.c_contiguous == expected.flags.c_contiguous
    assert (found.base is None) == (getattr(expected, "base", None) is None)
    shares = any(np.may_share_memory(expected, array) for array in real)
    assert Tally.held - before == (0 if shares else expected.nbytes)


def _ones(shape):
    return np.ones(shape, np.float32)


def _meta(shape):
    return MetaArray(shape, np.float32)


def test_bytes_are_counted_while_a_view_is_alive():
    before = Tally.restart()
    array = _meta((1000, 1000))
    row = array[3]
    del array
    assert Tally.held - before == 4_000_000
    del row
    assert Tally.held == before and Tally.peak - before == 4_000_000


def test_writes_have_no_effect():
    array = _meta((3, 3))
    array[0] = 5
    array += 2
    np.add(array, 1, out=array)
    np.add.at(array, [0, 0], 1.0)
    np.put_along_axis(array, np.zeros((3, 1), int), 7.0, axis=1)
    assert not np.asarray(array.view(np.ndarray)).any()


def test_huge_arrays_take_no_memory():
    assert (_meta((200_000, 100_000)) @ _meta((100_000, 3))).shape == (200_000, 3)
