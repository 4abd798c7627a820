"""The ops of a language model, fused, each with a hand-derived gradient.

Names and argument order are those of ``torch.nn.functional`` wherever it has the op. The same ops in plain
form are in ``tinyllm.functional.composed``: read those first. README.md shows how to add one.
"""

import functools
import inspect
from collections.abc import Callable
from typing import TypeVar

import tinyllm.functional.linear as projections
import tinyllm.functional.rope as rotations
from tinyllm.backend.cuda.launch import on_gpu
from tinyllm.backend.dtypes import is_floating, is_half
from tinyllm.errors import Error, names_shapes
from tinyllm.functional import activations, attention, cuda, cuda_losses, losses, norms
from tinyllm.tensor import Tensor, mode
from tinyllm.tensor_ops import in_float32

Op = TypeVar("Op", bound=Callable[..., Tensor])


def checked(op: Op) -> Op:
    """``op``, with an ``Error`` for an array in the place of a Tensor, for integers, and for wrong shapes.

    Each call is reported to ``nn.observe``.
    """
    signature = inspect.signature(op)
    kinds = {name: parameter.annotation for name, parameter in signature.parameters.items()}

    @names_shapes
    @functools.wraps(op)
    def call(*args, **kwargs):
        for name, x in (*zip(kinds, args), *kwargs.items()):
            if kinds.get(name) is Tensor and not isinstance(x, Tensor):
                what = type(x).__name__
                raise Error(f"{op.__name__} takes Tensors, not {what}: wrap the array with Tensor(array)")
        try:
            out = op(*args, **kwargs)
        except TypeError:  # NumPy refuses to write fractions into integers
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            dtypes = [x.dtype for x in tensors if not is_floating(x.dtype)]
            if not dtypes:
                raise
            raise Error(f"{op.__name__} of {dtypes[0]}: convert it to floats with astype()") from None
        if mode.on_op is not None:
            mode.on_op(op.__name__, signature.bind(*args, **kwargs).arguments, out)
        return out

    return call


def accelerated(op: Op) -> Op:
    """``op``, or its namesake in ``cuda.py`` or ``cuda_losses.py`` if the arrays are on a GPU."""
    op_on_gpu = getattr(cuda_losses if op.__module__ == losses.__name__ else cuda, op.__name__)

    @functools.wraps(op)
    def call(*args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        return (op_on_gpu if on_gpu(*tensors) else op)(*args, **kwargs)

    return checked(call)


def computed_in_float32(op: Op) -> Op:
    """``op``, computed in float32 if the input is half precision: see ``tensor_ops.in_float32``."""

    @functools.wraps(op)
    def call(input, *args, **kwargs):
        return in_float32(op, input, *args, **kwargs) if is_half(input.dtype) else op(input, *args, **kwargs)

    return checked(call)


# One line for each public op: ``accelerated`` if cuda.py has it, ``computed_in_float32`` if half
# precision is computed in float32, else ``checked``.
linear = accelerated(projections.linear)
embedding = accelerated(projections.embedding)
layer_norm = accelerated(norms.layer_norm)
rms_norm = accelerated(norms.rms_norm)
gelu = accelerated(activations.gelu)
relu = computed_in_float32(activations.relu)
silu = computed_in_float32(activations.silu)
swiglu = accelerated(activations.swiglu)
geglu = accelerated(activations.geglu)
softcap = computed_in_float32(activations.softcap)
softmax = computed_in_float32(activations.softmax)
dropout = checked(activations.dropout)
rope = accelerated(rotations.rope)
scaled_dot_product_attention = accelerated(attention.scaled_dot_product_attention)
cross_entropy = accelerated(losses.cross_entropy)
linear_cross_entropy = accelerated(losses.linear_cross_entropy)

# The names of these lines: functions that a file of this folder defines (``wraps`` keeps their __module__).
__all__ = [name for name, op in globals().items() if getattr(op, "__module__", "").startswith(f"{__name__}.")]
