"""How does an array know which ops computed it, and how does it get its gradient?

Reverse-mode differentiation on one page. Every op computes its result with NumPy and records a closure that
maps dL/d(result) to dL/d(each input): the vector-Jacobian product, "vjp". For y = f(x) and z = g(y) the chain
rule is dL/dx = dL/dz · g'(y) · f'(x). Evaluated from the left, every intermediate product is a gradient, an
array of the size of z, y or x; evaluated from the right, it would be a whole Jacobian. So ``_backward`` walks
the graph from the newest node to the oldest. If x is an input of several ops, their gradients add up.

First the chain rule, then Tensor and its arithmetic, then the ownership of gradient buffers. Reductions and
layout are in ``tensor_ops.py``, the ops of a language model in ``functional/``.

Source: Baydin et al., "Automatic Differentiation in Machine Learning: a Survey" (arXiv 1502.05767), 3.2.
"""

from __future__ import annotations

import contextlib
import itertools
import threading

import numpy as np

from tinyllm.backend.cuda.launch import check_one_device
from tinyllm.backend.dtypes import is_floating, is_half, mixed_dtypes, mixed_precision
from tinyllm.backend.memory import is_kept
from tinyllm.checks import as_array, check_gradient
from tinyllm.errors import Error, names_shapes
from tinyllm.tensor_einsum import vector_matmul
from tinyllm.tensor_ops import ArrayAlgebra, At, as_rows, constant, number_for

# --------------------------------------------------------------------------- the chain rule


class Node:
    """One op in the graph: its parents, and how to compute their gradients. A leaf has a ``grad`` and no vjp.

    Nodes point to nodes, never to Tensors: an intermediate array stays alive only if a closure needs it to
    compute a gradient.
    """

    __slots__ = ("age", "dtype", "grad", "parents", "retain", "shape", "vjp")
    _ages = itertools.count()

    def __init__(self, parents, vjp, shape, dtype):
        self.parents = parents  # tuple of Node | None (None: a constant); None once consumed
        self.vjp = vjp  # grad -> one gradient per parent: array, At, or None
        self.shape, self.dtype = shape, dtype
        self.age = next(Node._ages)  # a parent is always older than its children
        self.grad, self.retain = None, False  # retain: keep the gradient of a computed tensor, too

    def __getstate__(self):
        """For ``copy.deepcopy``, of leaves only, as in torch: a copied graph would lead to copied leaves."""
        if self.parents != ():
            raise Error("only a leaf can be copied, and this tensor was computed: use detach()")
        return super().__getstate__()


def _backward(root: Node, seed, oldest_first: list[Node]) -> None:
    """The chain rule, newest node first: each node's vjp computes the gradients of its parents."""
    gradients = Gradients()
    gradients.add((root,), (seed,), seed)
    while oldest_first:
        node = oldest_first.pop()  # every node computed from it has been processed
        grad = gradients.take(node)
        if grad is not None:
            if node.retain:
                node.grad = grad.copy()
            results, parents = node.vjp(grad), node.parents
            node.vjp = node.parents = None  # frees the arrays that the closure held
            gradients.add(parents, results, grad)


def _oldest_first(root: Node) -> list[Node]:
    """Every node that ``root`` was computed from. A loop, not recursion: graphs are deep."""
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        if node.parents is None:
            raise Error("backward() already ran on this graph and freed it: run the forward pass again")
        for parent in node.parents:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return sorted(seen, key=lambda node: node.age)


class Mode(threading.local):  # what ops do in this thread, besides computing
    recording = True  # record a Node
    watch = None  # if set: watch(out, parents) after every op, watch(None, ()) after every backward pass
    on_op = None  # if set: on_op(name, arguments, out) after every op of ``tinyllm.functional``


mode = Mode()


@contextlib.contextmanager
def no_grad():
    """Within this block, in this thread, no op is recorded and no array is kept for a gradient."""
    before, mode.recording = mode.recording, False
    try:
        yield
    finally:
        mode.recording = before


class Tensor(ArrayAlgebra):
    """An array, and if its gradient is needed, the graph node that recorded how it was computed.

    ``Tensor(array, requires_grad=True)`` is a leaf: after ``loss.backward()`` its ``.grad`` is an array of
    its shape and dtype, to which further calls add. Lists are converted by ``np.asarray``. Change ``.data``
    only between ``backward()`` and the next forward pass. float32 and float64 never mix: an op between them
    raises Error, as does what is not numbers. Numbers, integers and booleans get the array's dtype.
    """

    __slots__ = ("data", "node", "recompute")
    __array_ufunc__ = None  # for ndarray * Tensor, NumPy calls __rmul__

    def __init__(self, data, requires_grad: bool = False):
        if isinstance(data, Tensor):
            raise Error("Tensor(tensor) is ambiguous; use tensor.detach(), or Tensor(tensor.data)")
        self.data = as_array(data)
        self.node = self.recompute = None
        if requires_grad:
            self.requires_grad = True

    @staticmethod
    def from_op(data, parents, vjp, recompute=None) -> Tensor:
        """The result of an op: ``vjp(grad)`` returns one gradient per parent.

        A gradient is a new array (the engine may keep it and add into it), ``grad`` itself or a view of it,
        an ``At``, or None where ``parent.requires_grad`` is false. The engine undoes broadcasting. A closure
        holds arrays, never Tensors. A parent may be None: an optional input that was omitted.

        ``recompute()``, if given, returns bitwise identical data from the arrays that the vjp holds, so that
        consumers need not keep large data (``saved``): checkpointing, Chen et al., arXiv 1604.06174.
        """
        out = Tensor(data)
        dtypes = [parent.data.dtype for parent in parents if parent is not None]
        if dtypes.count(dtypes[0]) < len(dtypes) and not mixed_precision(dtypes):
            raise Error(mixed_dtypes(*dtypes))
        if mode.recording:
            nodes = tuple(None if parent is None else parent.node for parent in parents)
            if any(node is not None for node in nodes):
                out.node = Node(nodes, vjp, out.data.shape, out.data.dtype)
                out.recompute = None if is_kept(out.data.shape, out.data) else recompute
        if mode.watch is not None:
            mode.watch(out, parents)
        return out

    def saved(self):
        """A function () -> this array, for a closure: keeps the array unless its op can recompute it."""
        data = self.data
        return self.recompute or (lambda: data)

    def backward(self, grad=None) -> None:
        """Add dL/d(leaf) to ``.grad`` of every leaf this tensor was computed from.

        ``grad`` is dL/d(self), an array of this shape and dtype; for a scalar it defaults to 1. The graph is
        freed as it is processed; a second call raises Error. If an op raises, the ``.grad`` of every leaf
        involved is cleared, so that a partial sum is not mistaken for a gradient.
        """
        if self.node is None:
            raise Error(
                "backward() needs a tensor computed outside no_grad() from one with requires_grad=True"
            )
        if grad is None:
            if self.size != 1:
                raise Error(f"backward() of shape {self.shape} needs grad=, an array of that shape")
            grad = np.ones_like(self.data)
        check_gradient(grad, self.shape, self.dtype)
        nodes = _oldest_first(self.node)
        kept = [node for node in nodes if node.vjp is None or node.retain]
        try:
            _backward(self.node, grad, nodes)
        except BaseException as error:
            for node in kept:
                node.grad = None
            error.add_note("backward() failed and cleared every .grad it could reach: repeat the step")
            raise
        if mode.watch is not None:
            mode.watch(None, ())

    shape = property(lambda self: self.data.shape)
    dtype = property(lambda self: self.data.dtype)
    ndim = property(lambda self: self.data.ndim)
    size = property(lambda self: self.data.size)
    # For ops that compute gradients in the forward pass: under no_grad they are not needed.
    needs_grad = property(lambda self: self.node is not None and mode.recording)

    @property
    def requires_grad(self) -> bool:
        """Whether ``backward()`` computes a gradient for it. Set on a leaf, False freezes a parameter."""
        return self.node is not None

    @requires_grad.setter
    def requires_grad(self, wanted: bool) -> None:
        if self.node is not None and self.node.vjp is not None:
            raise Error("requires_grad can be set only on a leaf, and this tensor was computed: use detach()")
        if wanted and not is_floating(self.data.dtype):
            raise Error(f"only floating-point tensors have gradients, not {self.data.dtype}: use astype()")
        if wanted != self.requires_grad:
            self.node = Node((), None, self.data.shape, self.data.dtype) if wanted else None

    @property
    def grad(self):
        """dL/d(self) as an array, of a leaf or after ``retain_grad()``; None before ``backward()``."""
        return None if self.node is None else self.node.grad

    @grad.setter
    def grad(self, value):
        if self.node is None and value is None:
            return  # a frozen parameter has no gradient to clear
        if self.node is None or self.node.vjp is not None:
            raise Error("only a leaf with requires_grad=True has a .grad that can be set")
        check_gradient(value, self.shape, self.dtype)
        self.node.grad = value

    def retain_grad(self) -> None:
        """Keep dL/d(self) in ``.grad`` although this tensor was computed, to inspect it after backward()."""
        if self.node is None:
            raise Error("retain_grad() on a tensor that does not require a gradient: set requires_grad=True")
        self.node.retain = self.node.vjp is not None

    def _operand(self, other):
        """``other`` as a Python number or a Tensor of this dtype, so that the result has it too."""
        if _is_number(other):
            return number_for(self, other)
        other = constant(other, self)
        if type(self.data) is not np.ndarray or type(other.data) is not np.ndarray:
            check_one_device(self, other)
        if other.dtype != self.dtype:
            raise Error(mixed_dtypes(self.dtype, other.dtype))
        return other

    # ------------------------------------------------------------------------ arithmetic

    @names_shapes
    def __add__(self, other):
        """x + y; half precision + float32 is float32, so that a residual stream stays float32."""
        if isinstance(other, Tensor) and mixed_precision((self.dtype, other.dtype)):
            return self.astype(np.float32) + other.astype(np.float32)
        other = self._operand(other)
        if _is_number(other):
            return Tensor.from_op(self.data + other, (self,), lambda grad: (grad,))
        return Tensor.from_op(self.data + other.data, (self, other), lambda grad: (grad, grad))

    def __neg__(self):
        return Tensor.from_op(-self.data, (self,), lambda grad: (-grad,))

    @names_shapes
    def __sub__(self, other):
        other = self._operand(other)
        if _is_number(other):
            return Tensor.from_op(self.data - other, (self,), lambda grad: (grad,))
        return Tensor.from_op(self.data - other.data, (self, other), lambda grad: (grad, -grad))

    @names_shapes
    def __mul__(self, other):
        other = self._operand(other)
        if _is_number(other):
            return Tensor.from_op(self.data * other, (self,), lambda grad: (grad * other,))
        a, b = self.data, other.data
        return Tensor.from_op(a * b, (self, other), lambda grad: (grad * b, grad * a))

    @names_shapes
    def __truediv__(self, other):
        other = self._operand(other)
        if _is_number(other):
            return Tensor.from_op(self.data / other, (self,), lambda grad: (grad / other,))
        a, b = self.data, other.data
        return Tensor.from_op(a / b, (self, other), lambda grad: (grad / b, -grad * a / (b * b)))

    @names_shapes
    def __pow__(self, exponent):
        """x^n: d/dx = n x^(n-1), 0 if n = 0. x^n = exp(n ln x), so d/dn = x^n ln x, 0 if x = 0 and n ≥ 0."""
        x, n = self.data, self._operand(exponent)
        if _is_number(n):
            return Tensor.from_op(x**n, (self,), lambda grad: (grad * (n * x ** (n - 1)) if n else grad * 0,))
        parents, n, y = (self, n), n.data, x**n.data
        needs = [parent.requires_grad for parent in parents]

        def vjp(grad):
            with np.errstate(divide="ignore", invalid="ignore"):  # ln of x ≤ 0
                dx = np.where(n == 0, 0, grad * (n * x ** (n - 1))) if needs[0] else None
                dn = np.where((x == 0) & (n >= 0), 0, grad * (y * np.log(x))) if needs[1] else None
            return dx, dn

        return Tensor.from_op(y, parents, vjp)

    @names_shapes
    def __rpow__(self, base):
        return constant(self._operand(base), self) ** self

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other):
        return -self + other

    def __rtruediv__(self, other):
        return self**-1 * other

    @names_shapes
    def __matmul__(self, other):
        """(..., M, K) @ (..., K, N) -> (..., M, N): dA = dC Bᵀ, dB = Aᵀ dC. Vectors as in NumPy."""
        other = self._operand(other)
        if _is_number(other) or not self.ndim or not other.ndim:
            raise Error("@ needs arrays of at least one dimension on both sides; use * for numbers")
        if is_half(self.dtype):  # NumPy gives float32 for bfloat16, and takes long for float16
            return (self.astype(np.float32) @ other.astype(np.float32)).astype(self.dtype)
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
        return constant(other, self) @ self


def _is_number(x) -> bool:
    return isinstance(x, (int, float, np.number, np.bool_))


# --------------------------------------------------------- the ownership of gradient buffers


class Gradients:
    """The gradients of a backward pass: each node's sum so far, and whether its buffer may be written to.

    The gradient of a leaf is added to its ``.grad`` at once, a contiguous array that no other object shares.
    """

    def __init__(self):
        self.held = {}  # node -> (gradient so far, whether its buffer may be written to)

    def take(self, node: Node):
        """Remove and return the complete gradient of a node; None if it has none or is a leaf."""
        return self.held.pop(node, (None, False))[0]

    def add(self, parents, results, grad) -> None:
        """Add the ``results`` of a vjp that was called with ``grad`` to the parents' gradients."""
        for parent, result in zip(parents, results, strict=True):
            if parent is None or result is None:
                continue
            if isinstance(result, At):
                shape, dtype, fresh = parent.shape, result.array.dtype, True
            else:
                # The result is a new array unless it is ``grad`` itself, a view, or returned for two parents:
                # such an array has other readers and must not be written to.
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
    """held + grad, in place in an ``owned`` or ``fresh`` buffer. Returns (buffer, whether it is owned)."""
    if isinstance(grad, At):
        if held is None:
            held = np.zeros(node.shape, node.dtype, like=grad.array)
        elif not (owned and held.flags.c_contiguous):  # as scatter_add needs it
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
    repeated = [extra + i for i, n in enumerate(shape) if n == 1]
    return grad.sum(axis=(*range(extra), *repeated), keepdims=True).reshape(shape)
