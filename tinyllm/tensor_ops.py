"""Array algebra: layout, indexing, and functions of several tensors.

``ArrayAlgebra`` is a base class of Tensor; the functions of several tensors are public in ``tinyllm``.
"""

from __future__ import annotations

import itertools
import math
import operator
import re

import einops
import numpy as np
from numpy.lib.array_utils import normalize_axis_tuple

from tinyllm.backend.device import scatter_add, to_device, to_device_of
from tinyllm.backend.dtypes import dtype_of, is_floating, is_half, mixed_dtypes
from tinyllm.checks import as_array, check_at_least
from tinyllm.errors import Error, names_shapes


class At:
    """A gradient that is zero except at ``index``: the engine adds it into the parent's buffer.

    ``index`` is any NumPy index of the parent, and ``array`` has the shape of ``parent.data[index]`` and the
    parent's dtype. If integer arrays select an element several times, its gradients add up.
    """

    def __init__(self, index, array):
        self.index, self.array = index, array

    def add_into(self, buffer):
        parts = self.index if isinstance(self.index, tuple) else (self.index,)
        if all(part is None or part is Ellipsis or isinstance(part, (slice, int)) for part in parts):
            buffer[self.index] += self.array
        else:  # lists and integer arrays may contain an index twice
            scatter_add(buffer, self.index, self.array)


def _comparison(compare):
    """The method of Tensor that compares its elements with a number's, an array's or another Tensor's."""

    @names_shapes
    def method(self, other):
        return NotImplemented if other is None else compare(self.data, array_of(other))

    return method


def _in_place(operate):
    """The method of Tensor for ``x -= y`` and its like: as ``x = x - y``, it returns a new tensor."""

    def method(self, other):
        if self.requires_grad and self.node.parents == ():
            raise Error("a leaf that requires a gradient is not changed in place: write w.data -= …")
        return operate(self, other)

    return method


class ArrayAlgebra:
    """Tensor's methods for layout, indexing, comparison, functions, reductions, dtype and device."""

    __slots__ = ()

    # ---------------------------------------------------------------------------- layout

    @names_shapes
    def reshape(self, *shape):
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        before = self.shape
        return self.from_op(self.data.reshape(shape), (self,), lambda grad: (grad.reshape(before),))

    @names_shapes
    def transpose(self, *axes):
        axes = axes[0] if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes
        order = normalize_axis_tuple(axes, self.ndim) or tuple(reversed(range(self.ndim)))
        data = self.data.transpose(order)
        back = tuple(order.index(i) for i in range(self.ndim))
        return self.from_op(data, (self,), lambda grad: (grad.transpose(back),))

    @names_shapes
    def swapaxes(self, a, b):
        return self.from_op(self.data.swapaxes(a, b), (self,), lambda grad: (grad.swapaxes(a, b),))

    @names_shapes
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
                known |= {name: n // rest for name in names if name not in known}
            return (einops.rearrange(grad, f"{right}->{left}", **known),)

        try:
            out = einops.rearrange(self.data, pattern, **sizes)
        except einops.EinopsError as error:
            raise ValueError(" ".join(str(error).split())) from None
        except ZeroDivisionError:
            raise ValueError(f"a size of 0 in {sizes} leaves the rest of its group unknown") from None
        return self.from_op(out, (self,), vjp)

    @names_shapes
    def __getitem__(self, index):
        """Any NumPy index, with Tensors as arrays; an element selected twice gets both gradients."""
        index = tuple(map(array_of, index)) if isinstance(index, tuple) else array_of(index)
        return self.from_op(self.data[index], (self,), lambda grad: (At(index, grad),))

    @names_shapes
    def __len__(self):
        return self.shape[0]

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))

    # --------------------------------------------------------------------------- elementwise

    def exp(self):
        out = np.exp(self.data)
        return self.from_op(out, (self,), lambda grad: (grad * out,))

    def log(self):
        x = self.data
        return self.from_op(np.log(x), (self,), lambda grad: (grad / x,))

    def tanh(self):
        out = np.tanh(self.data)
        return self.from_op(out, (self,), lambda grad: (grad * (1 - out * out),))

    def sqrt(self):
        out = np.sqrt(self.data)
        return self.from_op(out, (self,), lambda grad: (grad / (2 * out),))

    # Comparisons give boolean arrays, for ``where`` and indexing. The hash is the identity's, as in torch.
    __eq__, __ne__ = _comparison(operator.eq), _comparison(operator.ne)
    __lt__, __le__ = _comparison(operator.lt), _comparison(operator.le)
    __gt__, __ge__ = _comparison(operator.gt), _comparison(operator.ge)
    __hash__ = object.__hash__

    __iadd__, __isub__ = _in_place(operator.add), _in_place(operator.sub)
    __imul__, __itruediv__ = _in_place(operator.mul), _in_place(operator.truediv)
    __ipow__, __imatmul__ = _in_place(operator.pow), _in_place(operator.matmul)

    # -------------------------------------------------------------------------- reductions

    @names_shapes
    def sum(self, axis=None, keepdims=False):
        if is_half(self.dtype):
            return in_float32(ArrayAlgebra.sum, self, axis, keepdims)
        shape, axis = self.shape, axes_of(axis, self.ndim)
        return self.from_op(
            self.data.sum(axis=axis, keepdims=keepdims),
            (self,),
            lambda grad: (spread(grad, shape, axis, keepdims),),
        )

    @names_shapes
    def mean(self, axis=None, keepdims=False):
        if is_half(self.dtype):
            return in_float32(ArrayAlgebra.mean, self, axis, keepdims)
        return self.sum(axis, keepdims) / count(self.shape, axes_of(axis, self.ndim))

    @names_shapes
    def max(self, axis=None, keepdims=False):
        """The largest element; equal maxima share the gradient equally, as in ``torch.amax``."""
        axis = axes_of(axis, self.ndim)
        x, out = self.data, self.data.max(axis=axis, keepdims=True)

        def vjp(grad):
            ties = x == out
            shares = ties / ties.sum(axis=axis, keepdims=True)
            return (spread(grad, x.shape, axis, keepdims) * shares.astype(x.dtype),)

        return self.from_op(x.max(axis=axis, keepdims=keepdims), (self,), vjp)

    @names_shapes
    def var(self, axis=None, ddof=0, keepdims=False):
        """Σ (x - mean)² / (N - ddof); nan or infinite if N ≤ ddof, as in torch."""
        if is_half(self.dtype):
            return in_float32(ArrayAlgebra.var, self, axis, ddof, keepdims)
        axis = axes_of(axis, self.ndim)
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
        """Convert to another dtype; the same Tensor if it has that dtype. Integers have no gradient."""
        before, dtype = self.dtype, dtype_of(dtype)
        if before == dtype:
            return self
        if not is_floating(dtype):  # rounding is constant between its steps, as in torch
            return type(self)(self.data.astype(dtype))
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

    @names_shapes
    def item(self) -> float:
        """The only element, as a Python number; so do ``float``, ``int``, ``bool`` and ``f"{loss:.3f}"``."""
        return self.data.item()

    def __float__(self):
        return float(self.item())

    def __int__(self):
        return int(self.item())

    def __format__(self, spec):
        return format(self.item(), spec) if spec else repr(self)

    def __bool__(self):
        if self.size != 1:
            raise Error(f"a Tensor of shape {self.shape} has no truth value: compare .data, or use .item()")
        return bool(self.item())

    def __repr__(self):
        """The values, abbreviated by NumPy if there are many, the shape and the dtype."""
        values = np.array2string(to_device(self.data, "cpu"), separator=", ", prefix="Tensor(")
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"Tensor({values}, shape={self.shape}, dtype={self.dtype}{grad})"

    def __array__(self, *args, **kwargs):
        raise Error("a Tensor is not converted to an array implicitly: use .data")

    def __array_function__(self, function, types, args, kwargs):
        if function in (np.shape, np.ndim, np.size):
            return function(self.data, *args[1:], **kwargs)
        raise Error(f"np.{function.__name__} takes no Tensor: use .data, or a function of tinyllm")


# ------------------------------------------------------------- functions of several tensors


@names_shapes
def concatenate(tensors, axis=0):
    """As ``np.concatenate``; the vjp splits the gradient."""
    check_tensors(tensors)
    arrays = [t.data for t in tensors]
    out = np.concatenate(arrays, axis=axis)
    ends = list(itertools.accumulate(a.shape[axis] for a in arrays))
    return tensors[0].from_op(out, tuple(tensors), lambda grad: np.split(grad, ends[:-1], axis=axis))


@names_shapes
def stack(tensors, axis=0):
    """As ``np.stack``."""
    check_tensors(tensors)
    out = np.stack([t.data for t in tensors], axis=axis)
    return tensors[0].from_op(
        out, tuple(tensors), lambda grad: tuple(np.take(grad, i, axis=axis) for i in range(len(tensors)))
    )


@names_shapes
def split(tensor, sections, axis=0) -> list:
    """``sections`` equal parts along ``axis``, or parts of the sizes in a list, as in torch. They are views.

    The gradients of the parts are added into one buffer.
    """
    (axis,) = normalize_axis_tuple(axis, tensor.ndim)
    length, by_sizes = tensor.shape[axis], isinstance(sections, (list, tuple))
    if not by_sizes:
        check_at_least(sections, 1, f"the number of parts of an axis of length {length}")
    sizes = list(sections) if by_sizes else [length // sections] * sections
    if sum(sizes) != length or min(sizes, default=-1) < 0:
        parts = f"parts of sizes {sizes}" if by_sizes else f"{sections} equal parts"
        raise Error(f"cannot split an axis of length {length} into {parts}")
    before = (slice(None),) * axis
    ends = itertools.accumulate(sizes)
    return [tensor[(*before, slice(end - size, end))] for size, end in zip(sizes, ends)]


@names_shapes
def chunk(tensor, chunks: int, axis=0) -> list:
    """At most ``chunks`` parts along ``axis``, as ``torch.chunk``: all of one size but the last."""
    length = tensor.shape[axis]
    size = max(1, -(-length // check_at_least(chunks, 1, "chunks")))
    sizes = [min(size, length - start) for start in range(0, length, size)]
    return split(tensor, sizes or [0] * chunks, axis)


@names_shapes
def where(condition, a, b):
    """``a`` where ``condition``, a boolean array, is true, else ``b``. One may be a number or an array."""
    condition = array_of(condition)
    like = a if isinstance(a, ArrayAlgebra) else b
    if not isinstance(like, ArrayAlgebra):
        raise Error(f"where({a!r}, {b!r}) needs at least one Tensor: use np.where for numbers")
    a, b = constant(like._operand(a), like), constant(like._operand(b), like)
    return like.from_op(
        np.where(condition, a.data, b.data),
        (a, b),
        lambda grad: (np.where(condition, grad, 0), np.where(condition, 0, grad)),
    )


# ------------------------------------------------------------------------- helpers for arrays


def check_tensors(tensors) -> None:
    """Raise Error unless all are Tensors of one dtype, to which their gradients belong."""
    wrong = [type(x).__name__ for x in tensors if not isinstance(x, ArrayAlgebra)]
    if wrong:
        raise Error(f"the tensors include a value of type {wrong[0]}: wrap an array with Tensor(array)")
    if len({x.dtype for x in tensors}) > 1:
        raise Error(mixed_dtypes(*(x.dtype for x in tensors)))


def constant(x, like):
    """``x`` as a Tensor; numbers and integers get the dtype of ``like``, which must have such a number."""
    if isinstance(x, ArrayAlgebra):
        return x
    data = as_array(x) if hasattr(x, "dtype") else np.asarray(as_array(x), like=like.data)
    if isinstance(x, int | float) or data.dtype.kind in "iub":
        with np.errstate(invalid="ignore"):  # nan and inf as integers
            exact, data = data, data.astype(like.dtype)
        if not is_floating(data.dtype) and (data != exact).any():
            wrong = exact[data != exact][0]
            raise Error(f"{wrong} is not a number of {data.dtype}: convert the Tensor with astype() first")
    return type(like)(data)


def number_for(tensor, x):
    """A number as a Python number, or for bfloat16, which with a float would become float32, as a Tensor."""
    x = x.item() if isinstance(x, np.generic) else x
    if isinstance(x, float) and is_half(tensor.dtype) and tensor.dtype != np.float16:
        return constant(x, tensor)
    return x


def array_of(x):
    """The array of a Tensor; anything else as it is."""
    return x.data if isinstance(x, ArrayAlgebra) else x


def axes_of(axis, ndim: int):
    """The axes of a reduction, each once and from 0; None for all. As in torch, a scalar has an axis 0."""
    if axis in (None, (), []):
        return None
    axes = normalize_axis_tuple(axis, max(ndim, 1))
    return axes if ndim else None


def in_float32(op, x, *args, **kwargs):
    """``op(x, …)`` of half precision, computed in float32 and rounded once: see ``accumulation_dtype``."""
    return op(x.astype(np.float32), *args, **kwargs).astype(x.dtype)


to_memory_of = to_device_of  # for the ops that a learner reads, which do not speak of devices


def as_rows(x):
    """An array (..., C) as a matrix (N, C), a view if the layout allows it."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def spread(grad, shape, axis, keepdims):
    """The gradient of a sum over ``axis``: each element of ``shape`` gets the gradient of its total."""
    if axis is not None and not keepdims:
        grad = grad.reshape([1 if i in axis else n for i, n in enumerate(shape)])
    return np.broadcast_to(grad, shape)


def count(shape, axis) -> int:
    """The number of elements that a reduction over ``axis`` combines into each result."""
    return math.prod(shape if axis is None else [shape[a] for a in axis])
