"""How does a query know how far away a key is? Both are rotated by their positions."""

import numpy as np

from tinyllm.backend.threads import each_block
from tinyllm.errors import Error
from tinyllm.tensor import Tensor


def rope(input: Tensor, cos, sin) -> Tensor:
    """Rotate pairs of channels of queries or keys (B, H, T, D) by angles proportional to the position.

    Channels i and i + D/2 form a point (a, b) in a plane (Hugging Face's pairing; Meta pairs 2i and 2i + 1):

        y = R(θ) (a, b)ᵀ = (a cos θ - b sin θ, b cos θ + a sin θ),   R(θ) = [[cos θ, -sin θ], [sin θ, cos θ]].

    As R(α)ᵀ R(β) = R(β - α), a product q · k depends on the positions only through their distance. R is the
    Jacobian of y, so with g = dL/dy, split into halves g₁ and g₂, the gradient is R(θ)ᵀ g = R(-θ) g:

        da = g₁ cos θ + g₂ sin θ,   db = g₂ cos θ - g₁ sin θ.

    ``cos`` and ``sin`` are arrays (T, D/2) of the input's dtype, or (B, 1, T, D/2) if each row of the batch
    has positions of its own. Su et al., "RoFormer", arXiv 2104.09864, section 3.4.2.
    """
    check_rope(input, cos, sin, input.dtype)
    return Tensor.from_op(_rotate(input.data, cos, sin), (input,), lambda grad: (_rotate(grad, cos, -sin),))


def check_rope(input: Tensor, cos, sin, angles_dtype) -> None:
    if input.ndim != 4 or input.shape[3] % 2:
        raise Error(f"rope needs an input (B, H, T, D) with an even D, not {input.shape}")
    B, _, T, D = input.shape
    if cos.shape != sin.shape or cos.shape not in ((T, D // 2), (B, 1, T, D // 2)):
        raise Error(
            f"rope of {input.shape} needs cos and sin of shape {(T, D // 2)} or {(B, 1, T, D // 2)}, "
            f"not {cos.shape} and {sin.shape}"
        )
    if cos.dtype != angles_dtype or sin.dtype != angles_dtype:
        raise Error(
            f"rope of {input.dtype} needs cos and sin in {angles_dtype}, not in {cos.dtype} and {sin.dtype}"
        )


def _rotate(x, cos, sin):
    """Rotate every pair (a, b) of x (B, H, T, D), one block of positions at a time."""
    B, H, T, D = x.shape
    y, halves = np.empty_like(x), (B, H, T, 2, D // 2)
    x_halves, y_halves = x.reshape(halves), y.reshape(halves)  # views: an axis of its own for a and b

    def rotate(t):
        c, s = cos[..., t, None, :], sin[..., t, None, :]
        np.multiply(x_halves[:, :, t], c, out=y_halves[:, :, t])
        sines = x_halves[:, :, t] * s
        y_a, y_b = y_halves[:, :, t, 0], y_halves[:, :, t, 1]
        y_a -= sines[..., 1, :]
        y_b += sines[..., 0, :]

    each_block(rotate, T, B * H * D, like=x)
    return y
