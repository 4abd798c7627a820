"""Helpers of the tests of ops: small inputs, references in torch, and a fault planted in a gradient."""

import contextlib

import numpy as np
import pytest
import torch

from parity.ops.cases import check_torch
from tinyllm import Tensor
from tinyllm import functional as F
from tinyllm.backend import memory, threads
from tinyllm.errors import Error
from tinyllm.functional import attention, losses
from tinyllm.tensor_ops import At

# Members of Tensor and functions of ``tinyllm`` that compute nothing that has a gradient.
COMPARISONS = {f"__{name}__" for name in "eq ne lt le gt ge".split()}
NOT_OPS = {f"__{name}__" for name in "init repr bool float int format len iter array array_function".split()}
NOT_OPS |= {"from_op", "saved", "backward", "no_grad", "_operand"}  # bookkeeping of the graph
NOT_OPS |= {"replace", "detach", "item", "to", "retain_grad"}  # access to arrays, moving them to a device
NOT_OPS |= {"__hash__"} | COMPARISONS
NOT_OPS |= {f"__i{name}__" for name in "add sub mul truediv pow matmul".split()}  # the ops without the i

# -------------------------------------------------------------------- small inputs


def normal(*shape, seed=0):
    """Standard normal numbers from a seed."""
    return np.random.default_rng(seed).standard_normal(shape)


def leaf(*shape, dtype=np.float64):
    """A leaf of ones that requires a gradient."""
    return Tensor(np.ones(shape, dtype), requires_grad=True)


def attend(q=(1, 1, 2, 4), k=(1, 1, 3, 4), v=(1, 1, 3, 4), **options):
    """Attention on leaves of ones with these shapes."""
    return F.scaled_dot_product_attention(leaf(*q), leaf(*k), leaf(*v), **options)


# ------------------------------------------------------------ values and gradients

both_dtypes = pytest.mark.parametrize("dtype, close", [(np.float32, 1e-6), (np.float64, 1e-14)])


def value_and_gradient(function, x):
    """``function(x)`` and the gradient of its sum, both in the dtype of x."""
    leaf = Tensor(x, requires_grad=True)
    out = function(leaf)
    out.backward(np.ones_like(out.data))
    assert out.dtype == leaf.grad.dtype == x.dtype
    return out.data, leaf.grad


def torch_value_and_gradient(function, x):
    """The same with torch, in float64."""
    leaf = torch.tensor(x.astype(np.float64), requires_grad=True)
    out = function(leaf)
    out.sum().backward()
    return out.detach().numpy(), leaf.grad.numpy()


def place_of_error(call):
    """(file, line) of the ``raise`` that ``call`` ends in."""
    with pytest.raises(Error) as caught:
        call()
    return str(caught.traceback[-1].path), caught.traceback[-1].lineno


# ----------------------------------------------------------- a fault in a gradient


def scale_one_gradient(monkeypatch, position, factor):
    """From now on, multiply gradient number ``position`` of every op by ``factor``."""
    from_op = Tensor.from_op

    def wrong(data, parents, vjp, **options):
        def scaled(grad):
            results = list(vjp(grad))
            given = [i for i, result in enumerate(results) if result is not None]
            gradient = results[given[position]]
            if isinstance(gradient, At):
                results[given[position]] = At(gradient.index, np.asarray(gradient.array * factor))
            else:
                results[given[position]] = gradient * factor
            return results

        return from_op(data, parents, scaled, **options)

    monkeypatch.setattr(Tensor, "from_op", staticmethod(wrong))


def fails(case):
    """Whether the comparison with torch rejects this case."""
    try:
        check_torch(case)
    except AssertionError:
        return True
    return False


# ------------------------------------------------------------ blocks of a few rows


@contextlib.contextmanager
def small_blocks():
    """Block sizes of a few rows, heads and elements, so that small arrays make many blocks.

    Arrays of more than 30 elements are large, so that some ops keep what others compute again.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "QUERY_BLOCK", 3)
        patch.setattr(attention, "SCORES", 24)
        patch.setattr(losses, "CHUNK", 3)
        patch.setattr(losses, "LOGITS", 1)
        patch.setattr(losses, "COLUMNS", 2)
        patch.setattr(threads, "BLOCK", 8)
        patch.setattr(threads, "FEW_BLOCKS", 1)
        patch.setattr(memory, "SMALL_ARRAY", 30)
        yield


@contextlib.contextmanager
def keeping(everything: bool):
    """Ops keep all that they could compute again, or nothing of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "SMALL_ARRAY", 2**62 if everything else -1)
        patch.setattr(memory, "MANY_ROWS", 2**62)
        yield
