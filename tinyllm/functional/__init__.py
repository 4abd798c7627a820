"""The language model's own ops, fused, each with a gradient derived by hand.

Names and argument order are those of ``torch.nn.functional`` wherever it has the op. The same ops
written plainly are in ``tinyllm.functional.composed``: read those first.
"""

import functools
import inspect

from tinyllm.backend.cuda.launch import on_gpu
from tinyllm.backend.dtypes import is_half
from tinyllm.errors import Error
from tinyllm.functional import cuda
from tinyllm.functional.activations import dropout, gelu, silu, softmax, swiglu
from tinyllm.functional.attention import rope, scaled_dot_product_attention
from tinyllm.functional.linear import embedding, linear
from tinyllm.functional.losses import cross_entropy, linear_cross_entropy
from tinyllm.functional.norms import layer_norm, rms_norm
from tinyllm.tensor import Tensor
from tinyllm.tensor_ops import in_float32


def accelerated(op):
    """``op``, or the function of the same name in ``cuda.py`` where the arrays are on a GPU."""
    op_on_gpu = getattr(cuda, op.__name__)
    kinds = [parameter.annotation for parameter in inspect.signature(op).parameters.values()]

    @functools.wraps(op)
    def call(*args, **kwargs):
        for kind, x in zip(kinds, args):
            if kind is Tensor and not isinstance(x, Tensor):
                what = type(x).__name__
                raise Error(f"{op.__name__} takes Tensors, not {what}: wrap the array with Tensor(array)")
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        return (op_on_gpu if on_gpu(*tensors) else op)(*args, **kwargs)

    return call


def summed_in_float32(op):
    """``op``, and what it is of half-precision values on any device: see ``tensor_ops.in_float32``."""

    @functools.wraps(op)
    def call(input, *args, **kwargs):
        return in_float32(op, input, *args, **kwargs) if is_half(input.dtype) else op(input, *args, **kwargs)

    return call


linear = accelerated(linear)
embedding = accelerated(embedding)
layer_norm = accelerated(layer_norm)
rms_norm = accelerated(rms_norm)
gelu = accelerated(gelu)
silu = summed_in_float32(silu)
swiglu = accelerated(swiglu)
softmax = summed_in_float32(softmax)
rope = accelerated(rope)
scaled_dot_product_attention = accelerated(scaled_dot_product_attention)
cross_entropy = accelerated(cross_entropy)
linear_cross_entropy = accelerated(linear_cross_entropy)

__all__ = [
    "cross_entropy",
    "dropout",
    "embedding",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "rms_norm",
    "rope",
    "scaled_dot_product_attention",
    "silu",
    "softmax",
    "swiglu",
]
