"""The language model's own ops, fused, each with a gradient derived by hand.

Names and argument order are those of ``torch.nn.functional`` wherever it has the op. The same ops
written plainly are in ``tinyllm.functional.composed``: read those first.
"""

from tinyllm.functional.activations import dropout, gelu, silu, softmax, swiglu
from tinyllm.functional.attention import rope, scaled_dot_product_attention
from tinyllm.functional.linear import embedding, linear
from tinyllm.functional.losses import cross_entropy, linear_cross_entropy
from tinyllm.functional.norms import layer_norm, rms_norm

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
