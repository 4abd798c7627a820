"""How does an array remember where it came from, and get its gradient back?

Reverse-mode differentiation in one page. Every op computes its result with NumPy and leaves a
closure that answers one question: given dL/d(result), what is dL/d(each input)? That is the
vector-Jacobian product, "vjp". ``backward`` walks the recorded graph from the newest node to the
oldest and applies the chain rule. First the tape (Node, At, backward), then Tensor with the algebra
any array library has, each op's gradient beside it. The language model's own ops are in
``tinyllm.functional``.

Source: Baydin et al., "Automatic Differentiation in Machine Learning: a Survey" (arXiv 1502.05767), 3.2.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import threading

import einops
import numpy as np

from tinyllm.backend.cuda.launch import check_one_device
from tinyllm.backend.device import beside, scatter_add, to_device
from tinyllm.backend.dtypes import is_short, wide
from tinyllm.errors import Error

# --------------------------------------------------------------------------------- the tape


class Node:
    """One op in the graph: where its gradient goes, and how. A leaf has no vjp and keeps a ``grad``.

    Nodes point to nodes, never to Tensors: an intermediate array stays alive only if a closure
    needs it for its gradient, not because somebody computed it once.
    """

    __slots__ = ("age", "dtype", "grad", "parents", "shape", "vjp")
    _ages = itertools.count()

    def __init__(self, parents, vjp, shape, dtype):
        self.parents = parents  # tuple of Node | None (None: a constant); None once consumed
        self.vjp = vjp  # grad -> one gradient per parent: array, At, or None
        self.shape, self.dtype = shape, dtype
        self.age = next(Node._ages)  # a parent is always older than its children
        self.grad = None


class At:
    """A gradient that is zero except at ``index``: the engine adds it into the owner's buffer."""

    def __init__(self, index, array):
        self.index, self.array = index, array

    def add_into(self, buffer):
        parts = self.index if isinstance(self.index, tuple) else (self.index,)
        if all(part is None or part is Ellipsis or isinstance(part, (slice, int)) for part in parts):
            buffer[self.index] += self.array
        else:  # lists and integer arrays may name an element twice
            scatter_add(buffer, self.index, self.array)


def _oldest_first(root: Node) -> list[Node]:
    """Every node that ``root`` was computed from. A loop, not recursion: graphs are deep."""
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        if node.parents is None:
            raise Error(
                "backward() ran through this graph already and freed it; run the forward pass again "
                "(or add the losses and call backward() once)"
            )
        for parent in node.parents:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return sorted(seen, key=lambda node: node.age)


def _unbroadcast(grad, shape):
    """Sum ``grad`` over the axes along which NumPy repeated a parent of ``shape``."""
    if grad.shape == shape or np.broadcast_shapes(grad.shape, shape) != grad.shape:
        return grad
    extra = grad.ndim - len(shape)
    repeated = [extra + i for i, n in enumerate(shape) if n == 1 and grad.shape[extra + i] != 1]
    return grad.sum(axis=(*range(extra), *repeated), keepdims=True).reshape(shape)


def _accumulate(node, held, owned, grad, fresh):
    """held + grad, in place where the buffer is ours alone. Returns (buffer, is it ours?)."""
    if isinstance(grad, At):
        if held is None:
            held = np.zeros(node.shape, node.dtype, like=grad.array)
        elif not owned:
            held = held.copy()
        grad.add_into(held)
        return held, True
    if held is None:
        return grad, fresh
    if owned:
        held += grad
        return held, True
    if fresh:
        grad += held
        return grad, True
    return _as_array(held + grad), True


def _deposit(leaf, grad, fresh):
    """Add to a leaf's ``.grad``: a contiguous array that belongs to this leaf alone."""
    buffer, owned = _accumulate(leaf, leaf.grad, True, grad, fresh)
    leaf.grad = buffer if owned and buffer.flags.c_contiguous else buffer.copy()


def _checked(results, grad, parents):
    """What a vjp returned, as (parent, gradient, fresh?) for the parents that get one."""
    for parent, result in zip(parents, results, strict=True):
        if parent is None or result is None:
            continue
        if isinstance(result, At):
            shape, dtype, fresh = parent.shape, result.array.dtype, True
        else:
            # What a closure returns is new, unless it is the gradient it was given, a view, or the same
            # array for two parents: then somebody else reads it too.
            shared = sum(other is result for other in results) > 1
            fresh = result is not grad and not shared and result.base is None
            result = _unbroadcast(_as_array(result), parent.shape)
            shape, dtype = result.shape, result.dtype
        if shape != parent.shape or dtype != parent.dtype:
            raise AssertionError(
                f"an op's vjp returned {dtype} {shape} for an input that is {parent.dtype} {parent.shape}"
            )
        yield parent, result, fresh


def _run_backward(root: Node, seed) -> None:
    order = _oldest_first(root)
    leaves = [node for node in order if node.vjp is None]
    running = {root: (seed, False)}  # node -> (gradient so far, may we write into it?)
    try:
        while order:
            node = order.pop()  # the newest: everything computed from it has been dealt with
            if node not in running:  # no gradient ever reached it
                continue
            grad, _ = running.pop(node)
            if node.vjp is None:  # only if the root itself is a leaf
                _deposit(node, grad, fresh=False)
                continue
            results, parents = node.vjp(grad), node.parents
            node.vjp = node.parents = None  # frees what the closure held
            for parent, result, fresh in _checked(results, grad, parents):
                if parent.vjp is None:
                    _deposit(parent, result, fresh)
                else:
                    held, owned = running.get(parent, (None, False))
                    running[parent] = _accumulate(parent, held, owned, result, fresh)
    except BaseException as error:
        for leaf in leaves:
            leaf.grad = None
        error.add_note("backward() stopped half-way: every .grad it could reach was cleared; redo the step.")
        raise


class _Mode(threading.local):
    recording = True


_mode = _Mode()


@contextlib.contextmanager
def no_grad():
    """Within this block, in this thread, no op is recorded and nothing is kept for a gradient."""
    before, _mode.recording = _mode.recording, False
    try:
        yield
    finally:
        _mode.recording = before


# ------------------------------------------------------------------------------- the Tensor


def _as_array(x):
    """NumPy's full reductions return scalars; a Tensor holds arrays."""
    return np.asarray(x) if isinstance(x, np.generic) else x


def _meet_in_a_product(dtypes) -> bool:
    """Whether the types are float32 and one short one: a GPU converts parameters for a product."""
    return len(set(dtypes)) == 2 and {wide(dtype) for dtype in dtypes} == {np.dtype(np.float32)}


def _is_number(x) -> bool:
    return isinstance(x, (int, float, np.number, np.bool_))


def as_rows(x):
    """An array (..., C) as a matrix (N, C), without a copy where the layout allows it."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _spread(grad, shape, axis, keepdims):
    """The gradient of a sum: every element of ``shape`` that went into a total gets that total's."""
    if axis is not None and not keepdims:
        axes = axis if isinstance(axis, tuple) else (axis,)
        kept = {a % len(shape) for a in axes}
        grad = grad.reshape([1 if i in kept else n for i, n in enumerate(shape)])
    return np.broadcast_to(grad, shape)


def _count(shape, axis) -> int:
    """How many elements a reduction over ``axis`` puts into each result."""
    if axis is None:
        return math.prod(shape)
    axes = axis if isinstance(axis, tuple) else (axis,)
    return math.prod(shape[a] for a in axes)


class Tensor:
    """An array, and if somebody needs its gradient, the node that knows where it came from.

    ``Tensor(array, requires_grad=True)`` makes a leaf: after ``loss.backward()`` its ``.grad`` is an
    array of its own, of its shape and dtype; further calls add to it. Lists become arrays as NumPy
    makes them. Data changes only between ``backward()`` and the next forward pass.

    float32 and float64 never mix: an op between them raises Error. Python numbers take the array's
    dtype; integer and boolean arrays are converted to it. bfloat16 and float16 are for products on a GPU
    (``functional/gpu.py``), whose weights may be float32; elsewhere they do not mix with it either.
    """

    __slots__ = ("again", "data", "node")
    __array_ufunc__ = None  # ndarray * Tensor is ours: NumPy hands it to __rmul__

    def __init__(self, data, requires_grad: bool = False):
        if isinstance(data, Tensor):
            raise Error("Tensor(tensor) is ambiguous; use tensor.detach(), or Tensor(tensor.data)")
        self.data = _as_array(data) if hasattr(data, "dtype") else np.asarray(data)
        self.node = self.again = None
        if requires_grad:
            if self.data.dtype.kind != "f" and self.data.dtype.name != "bfloat16":
                raise Error(f"only floating-point tensors have gradients, and this is {self.data.dtype}")
            self.node = Node((), None, self.data.shape, self.data.dtype)

    @staticmethod
    def from_op(data, parents, vjp) -> Tensor:
        """The result of an op: ``vjp(grad)`` returns one gradient per parent.

        Each is a new array (the engine may keep it and add into it), the very ``grad`` it was given
        or a view of it, an ``At``, or None where ``parent.requires_grad`` is false. Broadcasting is
        summed back by the engine. A closure holds arrays, never Tensors. A parent may be None: an
        optional input that was not given.
        """
        out = Tensor(data)
        dtypes = [parent.data.dtype for parent in parents if parent is not None]
        if dtypes.count(dtypes[0]) < len(dtypes) and not _meet_in_a_product(dtypes):
            names = ", ".join(map(str, dtypes))
            raise Error(f"an op got inputs of {names}: convert them to one dtype with astype()")
        if _mode.recording:
            nodes = tuple(None if parent is None else parent.node for parent in parents)
            if any(node is not None for node in nodes):
                out.node = Node(nodes, vjp, out.data.shape, out.data.dtype)
        return out

    def with_again(self, again) -> Tensor:
        """This result, which ``again()`` can make once more, to the last bit, from what its vjp holds.

        So whoever needs it for a gradient need not keep it: time is given for memory.
        """
        if self.node is not None:
            self.again = again
        return self

    def remembered(self):
        """() -> the array, for a closure to hold: it is kept, unless the op it is from can make it again."""
        data = self.data
        return self.again or (lambda: data)

    def backward(self, grad=None) -> None:
        """Add dL/d(leaf) to ``.grad`` of every leaf this tensor was computed from.

        ``grad`` is dL/d(self), an array of this shape and dtype; a scalar needs none (it is 1). The
        graph is freed on the way; a second call raises Error. If an op fails half-way, the ``.grad``
        of every leaf involved is cleared, so that no half-written gradient looks like a result.
        """
        if self.node is None:
            raise Error(
                "backward() on a tensor that depends on nothing with requires_grad=True "
                "(or was computed under no_grad)"
            )
        if grad is None:
            if self.data.size != 1:
                raise Error(f"backward() of shape {self.shape} needs grad=, an array of that shape")
            grad = np.ones_like(self.data)
        if getattr(grad, "shape", None) != self.shape or grad.dtype != self.dtype:
            got = f"{grad.dtype} {grad.shape}" if hasattr(grad, "dtype") else type(grad).__name__
            raise Error(f"grad must be an array of shape {self.shape} and dtype {self.dtype}, not {got}")
        _run_backward(self.node, grad)

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    requires_grad = property(lambda self: self.node is not None)
    # What an op asks before it prepares a gradient: under no_grad nobody will come for it.
    wants_grad = property(lambda self: self.node is not None and _mode.recording)

    @property
    def grad(self):
        """dL/d(self) of a leaf as an array, or None before ``backward()``."""
        return None if self.node is None else self.node.grad

    @grad.setter
    def grad(self, value):
        if self.node is None or self.node.vjp is not None:
            raise Error("only a leaf made with requires_grad=True has a .grad to set")
        self.node.grad = value

    def replace(self, data) -> None:
        """Give a leaf new data, of any shape, dtype or device; its old gradient is dropped."""
        fresh = Tensor(data, requires_grad=self.requires_grad)
        self.data, self.node = fresh.data, fresh.node

    def detach(self) -> Tensor:
        """The same array, without a past."""
        return Tensor(self.data)

    def item(self) -> float:
        """The one element as a Python number."""
        return self.data.item()

    def __repr__(self):
        return f"Tensor({self.data!r}{', requires_grad=True' if self.requires_grad else ''})"

    def __bool__(self):
        raise Error("a Tensor has no truth value; compare .data, or take .item()")

    def __array__(self, *args, **kwargs):
        raise Error("a Tensor is not converted to an array silently; use .data")

    def _operand(self, other):
        """``other`` in a form that cannot widen our dtype: a Python number or a Tensor like us."""
        if _is_number(other):
            return other.item() if isinstance(other, np.generic) else other
        if not isinstance(other, Tensor):
            other = Tensor(np.asarray(other, like=self.data) if isinstance(other, (list, tuple)) else other)
            if other.dtype.kind in "iub":
                other.data = other.data.astype(self.dtype)
        if type(self.data) is not np.ndarray or type(other.data) is not np.ndarray:
            check_one_device(self, other)
        if other.dtype != self.dtype:
            raise Error(f"cannot mix {self.dtype} and {other.dtype}; convert one with astype()")
        return other

    # ------------------------------------------------------------------------ arithmetic

    def __add__(self, other):
        other = self._operand(other)
        if _is_number(other):
            return Tensor.from_op(self.data + other, (self,), lambda grad: (grad,))
        return Tensor.from_op(self.data + other.data, (self, other), lambda grad: (grad, grad))

    def __neg__(self):
        return Tensor.from_op(-self.data, (self,), lambda grad: (-grad,))

    def __sub__(self, other):
        other = self._operand(other)
        if _is_number(other):
            return self + -other
        return Tensor.from_op(self.data - other.data, (self, other), lambda grad: (grad, -grad))

    def __mul__(self, other):
        other = self._operand(other)
        if _is_number(other):
            return Tensor.from_op(self.data * other, (self,), lambda grad: (grad * other,))
        a, b = self.data, other.data
        return Tensor.from_op(a * b, (self, other), lambda grad: (grad * b, grad * a))

    def __truediv__(self, other):
        other = self._operand(other)
        if _is_number(other):
            return Tensor.from_op(self.data / other, (self,), lambda grad: (grad / other,))
        a, b = self.data, other.data
        return Tensor.from_op(a / b, (self, other), lambda grad: (grad / b, -grad * a / (b * b)))

    def __pow__(self, exponent):
        """x^n for a Python number n; d/dx = n x^(n-1)."""
        if not _is_number(exponent):
            raise Error(f"the exponent of ** must be a number, not a {type(exponent).__name__}")
        x, n = self.data, self._operand(exponent)
        return Tensor.from_op(x**n, (self,), lambda grad: (grad * (n * x ** (n - 1)) if n else grad * 0,))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other):
        return -self + other

    def __rtruediv__(self, other):
        return self**-1 * other

    def __matmul__(self, other):
        """(..., M, K) @ (..., K, N) -> (..., M, N): dA = dC Bᵀ, dB = Aᵀ dC. Vectors as in NumPy."""
        other = self._operand(other)
        if _is_number(other) or not self.ndim or not other.ndim:
            raise Error("@ needs arrays of at least one dimension on both sides; use * for numbers")
        if self.ndim == 1 and other.ndim == 1:
            return (self * other).sum()
        if self.ndim == 1:
            out = self.reshape(1, -1) @ other
            return out.reshape(out.shape[:-2] + out.shape[-1:])
        if other.ndim == 1:
            out = self @ other.reshape(-1, 1)
            return out.reshape(out.shape[:-1])
        a, b = self.data, other.data
        if b.ndim == 2:  # one product over all rows, forward and backward, instead of one per batch
            rows, shape = as_rows(a), a.shape

            def vjp(grad):
                grad = as_rows(grad)  # (N, M) for b (K, M)
                return (grad @ b.T).reshape(shape), rows.T @ grad

            return Tensor.from_op((rows @ b).reshape(*shape[:-1], b.shape[1]), (self, other), vjp)
        return Tensor.from_op(
            a @ b, (self, other), lambda grad: (grad @ b.swapaxes(-1, -2), a.swapaxes(-1, -2) @ grad)
        )

    def __rmatmul__(self, other):
        if _is_number(other):
            return self @ other  # raises, as it does from the left
        return self._operand(other) @ self

    # --------------------------------------------------------------------------- functions

    def exp(self):
        out = np.exp(self.data)
        return Tensor.from_op(out, (self,), lambda grad: (grad * out,))

    def log(self):
        x = self.data
        return Tensor.from_op(np.log(x), (self,), lambda grad: (grad / x,))

    def tanh(self):
        out = np.tanh(self.data)
        return Tensor.from_op(out, (self,), lambda grad: (grad * (1 - out * out),))

    def sqrt(self):
        out = np.sqrt(self.data)
        return Tensor.from_op(out, (self,), lambda grad: (grad / (2 * out),))

    # -------------------------------------------------------------------------- reductions

    # Ten thousand ones are 256 in bfloat16, which has no 257: short types are added up in float32.

    def sum(self, axis=None, keepdims=False):
        if is_short(self.dtype):
            return self.astype(np.float32).sum(axis, keepdims).astype(self.dtype)
        shape = self.shape
        return Tensor.from_op(
            self.data.sum(axis=axis, keepdims=keepdims),
            (self,),
            lambda grad: (_spread(grad, shape, axis, keepdims),),
        )

    def mean(self, axis=None, keepdims=False):
        if is_short(self.dtype):
            return self.astype(np.float32).mean(axis, keepdims).astype(self.dtype)
        return self.sum(axis, keepdims) / _count(self.shape, axis)

    def max(self, axis=None, keepdims=False):
        """The largest element. Where several tie, they share the gradient equally (as torch.amax)."""
        x, out = self.data, self.data.max(axis=axis, keepdims=True)

        def vjp(grad):
            ties = (x == out).astype(x.dtype)
            return (_spread(grad, x.shape, axis, keepdims) * (ties / ties.sum(axis=axis, keepdims=True)),)

        return Tensor.from_op(x.max(axis=axis, keepdims=keepdims), (self,), vjp)

    def var(self, axis=None, ddof=0, keepdims=False):
        """Σ (x - mean)² / (N - ddof)."""
        if is_short(self.dtype):
            return self.astype(np.float32).var(axis, ddof, keepdims).astype(self.dtype)
        x, n = self.data, _count(self.shape, axis) - ddof
        centred = x - x.mean(axis=axis, keepdims=True)
        out = (centred * centred).sum(axis=axis, keepdims=keepdims) / n
        return Tensor.from_op(
            out, (self,), lambda grad: (_spread(grad, x.shape, axis, keepdims) * (centred * (2 / n)),)
        )

    # ------------------------------------------------------------------------------ layout

    def reshape(self, *shape):
        shape = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        before = self.shape
        return Tensor.from_op(self.data.reshape(shape), (self,), lambda grad: (grad.reshape(before),))

    def transpose(self, *axes):
        axes = axes[0] if len(axes) == 1 and isinstance(axes[0], (tuple, list)) else axes
        order = tuple(a % self.ndim for a in axes) or tuple(reversed(range(self.ndim)))
        back = tuple(order.index(i) for i in range(self.ndim))
        return Tensor.from_op(self.data.transpose(order), (self,), lambda grad: (grad.transpose(back),))

    def swapaxes(self, a, b):
        return Tensor.from_op(self.data.swapaxes(a, b), (self,), lambda grad: (grad.swapaxes(a, b),))

    def rearrange(self, pattern: str, **sizes: int):
        """einops notation: ``x.rearrange("b t (h d) -> b h t d", h=12)``; backwards, the pattern reversed."""
        left, arrow, right = pattern.partition("->")
        if not arrow or "..." in pattern:
            raise Error(
                f"pattern {pattern!r} must have the form 'a b -> b a', with every axis named (no '...')"
            )
        shape = self.shape

        def vjp(grad):
            known = dict(sizes)  # of every axis: reversed, the pattern splits what it merged
            for n, group in zip(shape, re.findall(r"\(.*?\)|\S+", left)):
                names = [name for name in group.strip("()").split() if not name.isdigit()]
                rest = math.prod(known.get(name, 1) for name in names)
                known |= {name: n // max(rest, 1) for name in names if name not in known}
            return (einops.rearrange(grad, f"{right}->{left}", **known),)

        return Tensor.from_op(einops.rearrange(self.data, pattern, **sizes), (self,), vjp)

    def astype(self, dtype):
        """In another dtype; the same Tensor if it is in that one."""
        before = self.dtype
        if before == dtype:
            return self
        return Tensor.from_op(self.data.astype(dtype), (self,), lambda grad: (grad.astype(before),))

    def to(self, device: str):
        """On "cpu", "cuda", "cuda:1" …; the same Tensor if it is there. The gradient goes the way back."""
        data, here = to_device(self.data, device), self.data[:0] if self.ndim else self.data
        if data is self.data:
            return self
        return Tensor.from_op(data, (self,), lambda grad: (beside(grad, here),))

    def __getitem__(self, index):
        """Any NumPy index; an element named twice by an integer array gets both gradients."""
        return Tensor.from_op(self.data[index], (self,), lambda grad: (At(index, grad),))


# ------------------------------------------------------------- functions of several tensors


def concatenate(tensors, axis=0) -> Tensor:
    """As ``np.concatenate``; the gradient is cut apart again."""
    arrays = [t.data for t in tensors]
    ends = list(itertools.accumulate(a.shape[axis] for a in arrays))
    return Tensor.from_op(
        np.concatenate(arrays, axis=axis), tuple(tensors), lambda grad: np.split(grad, ends[:-1], axis=axis)
    )


def stack(tensors, axis=0) -> Tensor:
    """As ``np.stack``."""
    return Tensor.from_op(
        np.stack([t.data for t in tensors], axis=axis),
        tuple(tensors),
        lambda grad: tuple(np.take(grad, i, axis=axis) for i in range(len(tensors))),
    )


def split(tensor, sections: int, axis=0) -> list[Tensor]:
    """Equal parts along ``axis``, as views; each part's gradient lands in its place in one buffer."""
    size, remainder = divmod(tensor.shape[axis], sections) if sections > 0 else (0, 1)
    if remainder:
        raise Error(f"cannot split an axis of length {tensor.shape[axis]} into {sections} equal parts")
    before = (slice(None),) * (axis % tensor.ndim)
    return [tensor[(*before, slice(i * size, (i + 1) * size))] for i in range(sections)]


def where(condition, a, b) -> Tensor:
    """``a`` where ``condition`` (a boolean array) holds, else ``b``; either may be a number."""
    like = a if isinstance(a, Tensor) else b
    if not isinstance(like, Tensor):
        raise Error(f"where({a!r}, {b!r}) needs a Tensor on at least one side; use np.where for numbers")
    a, b = (x if isinstance(x, Tensor) else Tensor(np.asarray(x, like.dtype, like=like.data)) for x in (a, b))
    return Tensor.from_op(
        np.where(condition, a.data, like._operand(b).data),
        (a, b),
        lambda grad: (np.where(condition, grad, 0), np.where(condition, 0, grad)),
    )


def einsum(subscripts: str, *tensors: Tensor) -> Tensor:
    """``np.einsum`` with an explicit ``->``, each letter at most once per operand, no ellipsis.

    The gradient of an operand is the einsum of the result's gradient with the other operands onto
    its own letters: for "ij,jk->ik", dA = einsum("ik,jk->ij", dC, B).
    """
    inputs, _, output = subscripts.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if "->" not in subscripts or "." in subscripts or len(terms) != len(tensors):
        raise Error(f"einsum {subscripts!r} needs an explicit '->', no '...', and one term per tensor")
    if any(len(set(term)) < len(term) for term in terms):
        raise Error(f"einsum {subscripts!r} repeats a letter within one term, which has no gradient here")
    arrays, needed = [t.data for t in tensors], [t.requires_grad for t in tensors]

    def gradient_of(k, grad):
        other_terms = terms[:k] + terms[k + 1 :]
        reachable = "".join(c for c in terms[k] if any(c in term for term in [output, *other_terms]))
        result = np.einsum(
            ",".join([output, *other_terms]) + "->" + reachable,
            *[grad, *arrays[:k], *arrays[k + 1 :]],
            optimize=True,
        )
        # A letter found nowhere else was summed over alone: its gradient is the same all along it.
        full = [n if c in reachable else 1 for c, n in zip(terms[k], arrays[k].shape)]
        return np.broadcast_to(result.reshape(full), arrays[k].shape)

    return Tensor.from_op(
        np.einsum(subscripts, *arrays, optimize=True),
        tuple(tensors),
        lambda grad: [gradient_of(k, grad) if needed[k] else None for k in range(len(arrays))],
    )
