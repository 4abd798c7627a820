"""Array algebra: layout, indexing, einsum, and functions of several tensors.

``ArrayAlgebra`` is a base class of Tensor; the functions of several tensors are public in ``tinyllm``.
"""

from __future__ import annotations

import itertools
import math
import re

import einops
import numpy as np

from tinyllm.backend.device import scatter_add, to_device, to_device_of
from tinyllm.backend.dtypes import is_half
from tinyllm.errors import Error


class At:
    """A gradient that is zero except at ``index``: the engine adds it into the parent's buffer."""

    def __init__(self, index, array):
        self.index, self.array = index, array

    def add_into(self, buffer):
        parts = self.index if isinstance(self.index, tuple) else (self.index,)
        if all(part is None or part is Ellipsis or isinstance(part, (slice, int)) for part in parts):
            buffer[self.index] += self.array
        else:  # lists and integer arrays may contain an index twice
            scatter_add(buffer, self.index, self.array)


class ArrayAlgebra:
    """Tensor's methods for layout, indexing, dtype, device and the rarer reductions."""

    __slots__ = ()

    # ---------------------------------------------------------------------------- layout

    def reshape(self, *shape):
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        before = self.shape
        return self.from_op(self.data.reshape(shape), (self,), lambda grad: (grad.reshape(before),))

    def transpose(self, *axes):
        axes = axes[0] if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes
        order = tuple(a % self.ndim for a in axes) or tuple(reversed(range(self.ndim)))
        back = tuple(order.index(i) for i in range(self.ndim))
        return self.from_op(self.data.transpose(order), (self,), lambda grad: (grad.transpose(back),))

    def swapaxes(self, a, b):
        return self.from_op(self.data.swapaxes(a, b), (self,), lambda grad: (grad.swapaxes(a, b),))

    def rearrange(self, pattern: str, **sizes: int):
        """einops notation: ``x.rearrange("b t (h d) -> b h t d", h=12)``; the vjp reverses the pattern."""
        left, arrow, right = pattern.partition("->")
        if not arrow or "..." in pattern:
            raise Error(
                f"pattern {pattern!r} must have the form 'a b -> b a', with every axis named (no '...')"
            )
        shape = self.shape

        def vjp(grad):
            known = dict(sizes)  # every axis: the reversed pattern splits the axes that the pattern merged
            for n, group in zip(shape, re.findall(r"\(.*?\)|\S+", left)):
                names = [name for name in group.strip("()").split() if not name.isdigit()]
                rest = math.prod(known.get(name, 1) for name in names)
                known |= {name: n // max(rest, 1) for name in names if name not in known}
            return (einops.rearrange(grad, f"{right}->{left}", **known),)

        return self.from_op(einops.rearrange(self.data, pattern, **sizes), (self,), vjp)

    def __getitem__(self, index):
        """Any NumPy index; an element that an integer array selects twice gets both gradients."""
        return self.from_op(self.data[index], (self,), lambda grad: (At(index, grad),))

    # -------------------------------------------------------------------------- reductions

    def sum(self, axis=None, keepdims=False):
        if is_half(self.dtype):
            return in_float32(ArrayAlgebra.sum, self, axis, keepdims)
        shape = self.shape
        return self.from_op(
            self.data.sum(axis=axis, keepdims=keepdims),
            (self,),
            lambda grad: (spread(grad, shape, axis, keepdims),),
        )

    def mean(self, axis=None, keepdims=False):
        if is_half(self.dtype):
            return in_float32(ArrayAlgebra.mean, self, axis, keepdims)
        return self.sum(axis, keepdims) / count(self.shape, axis)

    def max(self, axis=None, keepdims=False):
        """The largest element; equal maxima share the gradient equally, as in ``torch.amax``."""
        x, out = self.data, self.data.max(axis=axis, keepdims=True)

        def vjp(grad):
            ties = (x == out).astype(x.dtype)
            return (spread(grad, x.shape, axis, keepdims) * (ties / ties.sum(axis=axis, keepdims=True)),)

        return self.from_op(x.max(axis=axis, keepdims=keepdims), (self,), vjp)

    def var(self, axis=None, ddof=0, keepdims=False):
        """Σ (x - mean)² / (N - ddof); nan or infinite if N ≤ ddof, as in torch."""
        if is_half(self.dtype):
            return in_float32(ArrayAlgebra.var, self, axis, ddof, keepdims)
        x, n = self.data, count(self.shape, axis) - ddof
        centred = x - x.mean(axis=axis, keepdims=True)
        slope = 2 / n if n > 0 else math.inf

        def vjp(grad):
            with np.errstate(invalid="ignore"):  # 0 · inf
                return (spread(grad, x.shape, axis, keepdims) * (centred * slope),)

        with np.errstate(invalid="ignore", divide="ignore"):
            out = (centred * centred).sum(axis=axis, keepdims=keepdims) / max(n, 0)
        return self.from_op(out, (self,), vjp)

    # -------------------------------------------------------------------- dtype, device, Python

    def astype(self, dtype):
        """Convert to another dtype; the same Tensor if it already has that dtype."""
        before = self.dtype
        if before == dtype:
            return self
        return self.from_op(self.data.astype(dtype), (self,), lambda grad: (grad.astype(before),))

    def to(self, device: str):
        """Copy to "cpu", "cuda", "cuda:1" …; the same Tensor if it is already there."""
        data, here = to_device(self.data, device), self.data[:0] if self.ndim else self.data
        if data is self.data:
            return self
        return self.from_op(data, (self,), lambda grad: (to_device_of(grad, here),))

    def replace(self, data) -> None:
        """Replace a leaf's data, by any shape, dtype or device; its gradient is dropped."""
        fresh = type(self)(data, requires_grad=self.requires_grad)
        self.data, self.node = fresh.data, fresh.node

    def detach(self):
        """A Tensor of the same array without its graph."""
        return type(self)(self.data)

    def item(self) -> float:
        """The only element, as a Python number."""
        return self.data.item()

    def __repr__(self):
        return f"Tensor({self.data!r}{', requires_grad=True' if self.requires_grad else ''})"

    def __bool__(self):
        raise Error("a Tensor has no truth value: compare .data, or use .item()")

    def __array__(self, *args, **kwargs):
        raise Error("a Tensor is not converted to an array implicitly: use .data")


# ------------------------------------------------------------- functions of several tensors


def vector_matmul(a, b):
    """``a @ b`` where a, b or both are vectors: a row on the left, a column on the right."""
    if a.ndim == b.ndim == 1:
        return (a * b).sum()
    if a.ndim == 1:
        out = a.reshape(1, -1) @ b
        return out.reshape(out.shape[:-2] + out.shape[-1:])
    out = a @ b.reshape(-1, 1)
    return out.reshape(out.shape[:-1])


def concatenate(tensors, axis=0):
    """As ``np.concatenate``; the vjp splits the gradient."""
    arrays = [t.data for t in tensors]
    ends = list(itertools.accumulate(a.shape[axis] for a in arrays))
    return tensors[0].from_op(
        np.concatenate(arrays, axis=axis), tuple(tensors), lambda grad: np.split(grad, ends[:-1], axis=axis)
    )


def stack(tensors, axis=0):
    """As ``np.stack``."""
    return tensors[0].from_op(
        np.stack([t.data for t in tensors], axis=axis),
        tuple(tensors),
        lambda grad: tuple(np.take(grad, i, axis=axis) for i in range(len(tensors))),
    )


def split(tensor, sections: int, axis=0) -> list:
    """Equal parts along ``axis``, as views; the gradients of the parts are added into one buffer."""
    size, remainder = divmod(tensor.shape[axis], sections) if sections > 0 else (0, 1)
    if remainder:
        raise Error(f"cannot split an axis of length {tensor.shape[axis]} into {sections} equal parts")
    before = (slice(None),) * (axis % tensor.ndim)
    return [tensor[(*before, slice(i * size, (i + 1) * size))] for i in range(sections)]


def where(condition, a, b):
    """``a`` where ``condition``, a boolean array, is true, else ``b``; one of them may be a number."""
    like = a if isinstance(a, ArrayAlgebra) else b
    if not isinstance(like, ArrayAlgebra):
        raise Error(f"where({a!r}, {b!r}) needs at least one Tensor: use np.where for numbers")
    tensor = type(like)
    a, b = (x if isinstance(x, tensor) else tensor(np.asarray(x, like.dtype, like=like.data)) for x in (a, b))
    return like.from_op(
        np.where(condition, a.data, like._operand(b).data),
        (a, b),
        lambda grad: (np.where(condition, grad, 0), np.where(condition, 0, grad)),
    )


def einsum(subscripts: str, *tensors):
    """``np.einsum`` with an explicit ``->``, each letter at most once per operand, no ellipsis.

    The gradient of an operand is an einsum of the result's gradient and the other operands, whose output has
    the operand's letters: for "ij,jk->ik", dA = einsum("ik,jk->ij", dC, B). As in NumPy, axes of length 1
    broadcast; the engine sums the gradient over them.
    """
    inputs, _, output = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if "->" not in subscripts or "." in subscripts or len(terms) != len(tensors):
        raise Error(f"einsum {subscripts!r} needs an explicit '->', no '...', and one term per tensor")
    if any(len(set(term)) < len(term) for term in terms):
        raise Error(f"einsum {subscripts!r} repeats a letter within one term: index the diagonal instead")
    arrays, needed = [t.data for t in tensors], [t.requires_grad for t in tensors]

    def gradient_of(k, grad):
        other_terms = terms[:k] + terms[k + 1 :]
        reachable = "".join(c for c in terms[k] if any(c in term for term in [output, *other_terms]))
        result = np.einsum(
            ",".join([output, *other_terms]) + "->" + reachable,
            *[grad, *arrays[:k], *arrays[k + 1 :]],
            optimize=True,
        )
        # A letter of this operand alone was summed over: the gradient is constant along its axis.
        sizes = dict(zip(reachable, result.shape))
        result = result.reshape([sizes.get(c, 1) for c in terms[k]])
        return np.broadcast_to(result, np.broadcast_shapes(result.shape, arrays[k].shape))

    return tensors[0].from_op(
        np.einsum(subscripts, *arrays, optimize=True),
        tuple(tensors),
        lambda grad: [gradient_of(k, grad) if needed[k] else None for k in range(len(arrays))],
    )


# ------------------------------------------------------------------------- helpers for arrays


def in_float32(op, x, *args, **kwargs):
    """``op(x, …)`` of half precision, computed in float32 and rounded once: see ``accumulation_dtype``."""
    return op(x.astype(np.float32), *args, **kwargs).astype(x.dtype)


def as_array(x):
    """``x``, or a NumPy scalar (the result of a full reduction) as an array without axes."""
    return np.asarray(x) if isinstance(x, np.generic) else x


def to_memory_of(array, like):
    """``array`` in the memory that holds ``like``, copied if necessary."""
    return to_device_of(array, like)


def as_rows(x):
    """An array (..., C) as a matrix (N, C), a view if the layout allows it."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def spread(grad, shape, axis, keepdims):
    """The gradient of a sum over ``axis``: each element of ``shape`` gets the gradient of its total."""
    if axis is not None and not keepdims:
        axes = axis if isinstance(axis, tuple) else (axis,)
        kept = {a % len(shape) for a in axes}
        grad = grad.reshape([1 if i in kept else n for i, n in enumerate(shape)])
    return np.broadcast_to(grad, shape)


def count(shape, axis) -> int:
    """The number of elements that a reduction over ``axis`` combines into each result."""
    if axis is None:
        return math.prod(shape)
    axes = axis if isinstance(axis, tuple) else (axis,)
    return math.prod(shape[a] for a in axes)
