"""How does an array remember where it came from, and get its gradient back?

Reverse-mode differentiation in one page. Every op computes its result with NumPy and leaves a closure
that answers one question: given dL/d(result), what is dL/d(each input)? That is the vector-Jacobian
product, "vjp". With y = f(x) and z = g(y) the chain rule says dL/dx = dL/dz · g'(y) · f'(x). Multiplied
from the left, each product is a gradient, an array of the size of z, y or x; from the right it would be a
whole Jacobian. So ``_backward`` walks the graph from the newest node to the oldest. Where x went into
several ops, the gradients that come back from them add up.

First the chain rule, then Tensor and its arithmetic, then the bookkeeping of gradient buffers. Reductions,
layout and einsum are in ``tensor_ops.py``, a language model's ops in ``functional/``.

Source: Baydin et al., "Automatic Differentiation in Machine Learning: a Survey" (arXiv 1502.05767), 3.2.
"""

from __future__ import annotations

import contextlib
import itertools
import threading

import numpy as np

from tinyllm.backend.cuda.launch import check_one_device
from tinyllm.backend.dtypes import accumulation_dtype, is_floating
from tinyllm.errors import Error
from tinyllm.tensor_ops import ArrayAlgebra, At, as_array, as_rows, vector_matmul

# --------------------------------------------------------------------------- the chain rule


class Node:
    """One op in the graph: where its gradient goes, and how. A leaf has no vjp and keeps a ``grad``.

    Nodes point to nodes, never to Tensors: an intermediate array stays alive only if a closure needs it for
    its gradient, not because somebody computed it once.
    """

    __slots__ = ("age", "dtype", "grad", "parents", "shape", "vjp")
    _ages = itertools.count()

    def __init__(self, parents, vjp, shape, dtype):
        self.parents = parents  # tuple of Node | None (None: a constant); None once consumed
        self.vjp = vjp  # grad -> one gradient per parent: array, At, or None
        self.shape, self.dtype = shape, dtype
        self.age = next(Node._ages)  # a parent is always older than its children
        self.grad = None


def _backward(root: Node, seed, oldest_first: list[Node]) -> None:
    """The chain rule, newest node first: each node hands its gradient on to its parents."""
    gradients = Gradients()
    gradients.add((root,), (seed,), seed)
    while oldest_first:
        node = oldest_first.pop()  # everything that was computed from it has been dealt with
        grad = gradients.take(node)
        if grad is not None:
            results, parents = node.vjp(grad), node.parents
            node.vjp = node.parents = None  # frees what the closure held
            gradients.add(parents, results, grad)


def _oldest_first(root: Node) -> list[Node]:
    """Every node that ``root`` was computed from. A loop, not recursion: graphs are deep."""
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        if node.parents is None:
            raise Error("backward() ran through this graph already and freed it: run the forward pass again")
        for parent in node.parents:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return sorted(seen, key=lambda node: node.age)


class Mode(threading.local):  # what this thread's ops do besides computing
    recording = True  # leave a Node behind
    watch = None  # if set: watch(out, parents) after every op, watch(None, ()) after every backward pass


mode = Mode()


@contextlib.contextmanager
def no_grad():
    """Within this block, in this thread, no op is recorded and nothing is kept for a gradient."""
    before, mode.recording = mode.recording, False
    try:
        yield
    finally:
        mode.recording = before


class Tensor(ArrayAlgebra):
    """An array, and if somebody needs its gradient, the node that knows where it came from.

    ``Tensor(array, requires_grad=True)`` makes a leaf: after ``loss.backward()`` its ``.grad`` is an
    array of its own, of its shape and dtype; further calls add to it. Lists become arrays as NumPy
    makes them. Data changes only between ``backward()`` and the next forward pass. float32 and float64 never
    mix: an op between them raises Error. Python numbers, integers and booleans take the array's dtype.
    """

    __slots__ = ("data", "node", "recompute")
    __array_ufunc__ = None  # ndarray * Tensor is ours: NumPy hands it to __rmul__

    def __init__(self, data, requires_grad: bool = False):
        if isinstance(data, Tensor):
            raise Error("Tensor(tensor) is ambiguous; use tensor.detach(), or Tensor(tensor.data)")
        self.data = as_array(data) if hasattr(data, "dtype") else np.asarray(data)
        self.node = self.recompute = None
        if requires_grad:
            self.requires_grad = True

    @staticmethod
    def from_op(data, parents, vjp, recompute=None) -> Tensor:
        """The result of an op: ``vjp(grad)`` returns one gradient per parent.

        Each is a new array (the engine may keep it and add into it), ``grad`` itself or a view of it, an
        ``At``, or None where ``parent.requires_grad`` is false. The engine undoes broadcasting. A closure
        holds arrays, never Tensors. A parent may be None: an optional input that was not given.

        ``recompute()``, if given, makes the data once more, to the last bit, from what the vjp holds, so that
        the ops that read it need not keep it (``saved``): activation checkpointing for a single op.
        Chen et al., "Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174.
        """
        out = Tensor(data)
        dtypes = [parent.data.dtype for parent in parents if parent is not None]
        if dtypes.count(dtypes[0]) < len(dtypes) and not _mixed_precision(dtypes):
            raise Error(f"an op got {', '.join(map(str, dtypes))}: convert them to one dtype with astype()")
        if mode.recording:
            nodes = tuple(None if parent is None else parent.node for parent in parents)
            if any(node is not None for node in nodes):
                out.node = Node(nodes, vjp, out.data.shape, out.data.dtype)
                out.recompute = recompute
        if mode.watch is not None:
            mode.watch(out, parents)
        return out

    def saved(self):
        """() -> this array, for a closure to hold: kept, unless the op that made it can recompute it."""
        data = self.data
        return self.recompute or (lambda: data)

    def backward(self, grad=None) -> None:
        """Add dL/d(leaf) to ``.grad`` of every leaf this tensor was computed from.

        ``grad`` is dL/d(self), an array of this shape and dtype; a scalar needs none (it is 1). The
        graph is freed on the way; a second call raises Error. If an op fails half-way, the ``.grad``
        of every leaf involved is cleared, so that no half-written gradient looks like a result.
        """
        if self.node is None:
            raise Error(
                "backward() on a tensor that requires no gradient: nothing it was computed from has "
                "requires_grad=True, or that was under no_grad()"
            )
        if grad is None:
            if self.size != 1:
                raise Error(f"backward() of shape {self.shape} needs grad=, an array of that shape")
            grad = np.ones_like(self.data)
        if getattr(grad, "shape", None) != self.shape or grad.dtype != self.dtype:
            got = f"{grad.dtype} {grad.shape}" if hasattr(grad, "dtype") else type(grad).__name__
            raise Error(f"grad must be an array of shape {self.shape} and dtype {self.dtype}, not {got}")
        nodes = _oldest_first(self.node)
        leaves = [node for node in nodes if node.vjp is None]
        try:
            _backward(self.node, grad, nodes)
        except BaseException as error:
            for leaf in leaves:
                leaf.grad = None
            error.add_note(
                "backward() stopped half-way and cleared every .grad it could reach: redo the step"
            )
            raise
        if mode.watch is not None:
            mode.watch(None, ())

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    # What an op asks before it prepares a gradient: under no_grad nobody will come for it.
    wants_grad = property(lambda self: self.node is not None and mode.recording)

    @property
    def requires_grad(self) -> bool:
        """Whether ``backward()`` brings a gradient here. Set on a leaf, False freezes a parameter."""
        return self.node is not None

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if self.node is not None and self.node.vjp is not None:
            raise Error("this tensor was computed, and requires_grad is set on leaves: use detach()")
        if wanted and not is_floating(self.data.dtype):
            raise Error(f"only floating-point tensors have gradients, and this is {self.data.dtype}")
        if wanted != self.requires_grad:
            self.node = Node((), None, self.data.shape, self.data.dtype) if wanted else None

    @property
    def grad(self):
        """dL/d(self) of a leaf as an array, or None before ``backward()``."""
        return None if self.node is None else self.node.grad

    @grad.setter
    def grad(self, value):
        if self.node is None and value is None:
            return  # a frozen parameter has none to drop
        if self.node is None or self.node.vjp is not None:
            raise Error("only a leaf made with requires_grad=True has a .grad to set")
        self.node.grad = value

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
        """x + y; of half precision and float32 the result is float32, so that a residual stream stays it."""
        if (
            isinstance(other, Tensor)
            and self.dtype != other.dtype
            and _mixed_precision((self.dtype, other.dtype))
        ):
            return self.astype(np.float32) + other.astype(np.float32)
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
        if self.ndim == 1 or other.ndim == 1:
            return vector_matmul(self, other)
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


def _is_number(x) -> bool:
    return isinstance(x, (int, float, np.number, np.bool_))


def _mixed_precision(dtypes) -> bool:
    """Whether the types are float32 and one half-precision type: a GPU's product converts its weights."""
    return len(set(dtypes)) == 2 and {accumulation_dtype(dtype) for dtype in dtypes} == {np.dtype(np.float32)}


# ---------------------------------------------------------------- whose is a gradient's buffer?


class Gradients:
    """The gradients on their way back: each node's sum so far, and whether the buffer is ours to add into.

    A leaf's goes into its ``.grad`` at once, a contiguous array that belongs to this leaf alone.
    """

    def __init__(self):
        self.held = {}  # node -> (gradient so far, may we write into it?)

    def take(self, node: Node):
        """The complete gradient of a node; None if none reached it, or if it is a leaf."""
        return self.held.pop(node, (None, False))[0]

    def add(self, parents, results, grad) -> None:
        """What a vjp, given ``grad``, returned for its parents: one of them each."""
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
                result = _unbroadcast(as_array(result), parent.shape)
                shape, dtype = result.shape, result.dtype
            if shape != parent.shape or dtype != parent.dtype:
                raise AssertionError(
                    f"an op's vjp returned {dtype} {shape} for an input that is {parent.dtype} {parent.shape}"
                )
            if parent.vjp is None:
                buffer, owned = _sum(parent, parent.grad, True, result, fresh)
                parent.grad = buffer if owned and buffer.flags.c_contiguous else buffer.copy()
            else:
                self.held[parent] = _sum(parent, *self.held.get(parent, (None, False)), result, fresh)


def _sum(node: Node, held, owned: bool, grad, fresh: bool):
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
    return as_array(held + grad), True


def _unbroadcast(grad, shape):
    """Sum ``grad`` over the axes along which NumPy repeated a parent of ``shape``."""
    if grad.shape == shape or np.broadcast_shapes(grad.shape, shape) != grad.shape:
        return grad
    extra = grad.ndim - len(shape)
    repeated = [extra + i for i, n in enumerate(shape) if n == 1 and grad.shape[extra + i] != 1]
    return grad.sum(axis=(*range(extra), *repeated), keepdims=True).reshape(shape)
