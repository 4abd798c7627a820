"""How does a position look at the others, without ever holding all (T, S) scores at once?

The plain version is in ``composed.py``. Here queries are taken in blocks: a block's scores are
computed, used and forgotten, and computed again in the backward pass from the log of their sum. For
causal attention, keys after the block's last query are never touched.

Dao et al., "FlashAttention" (arXiv 2205.14135), section 3.1 and appendix B.2 for the gradient.
"""

import math

import numpy as np

from tinyllm.backend.random import dropout_mask, next_address
from tinyllm.backend.threads import each_block, one_blas_thread, run_tasks
from tinyllm.errors import Error
from tinyllm.tensor import Tensor

QUERY_BLOCK = 128  # rows of scores at a time

SCORES = 2**18  # heads x rows x keys at a time: a block of scores stays in the cache


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask=None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(Q Kᵀ · scale + mask) V for Q (B, H, T, D), K (B, H, S, D), V (B, H, S, E) -> (B, H, T, E).

    With ``enable_gqa`` K and V may have fewer heads G, a divisor of H: query heads 0 to H/G - 1 share the
    first, and so on (Ainslie et al., "GQA", arXiv 2305.13245). K and V are not repeated: the queries of a
    group lie below each other in one product, so K and V are read once for all of them, and the same
    product backwards adds up dK and dV over the group.

    ``scale`` is 1/sqrt(D) unless given. ``attn_mask`` is an array that broadcasts to (B, H, T, S):
    boolean (True: may be attended to) or a number added to the scores. ``is_causal`` lets query t see
    the keys up to t; with T ≠ S the *last* query is aligned with the *last* key, as a KV cache needs
    (torch aligns the first with the first; for T = S they agree). A query that may see nothing
    gets zeros. ``dropout_p`` zeroes weights as ``dropout`` does; pass 0 outside training.

    Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, section 3.2.1. With P the weights,
    g = dL/dO and δ = Σ_e g O (a number per query):

        dV = Pᵀ g,   dP = g Vᵀ,   dS = P (dP - δ),   dQ = dS K · scale,   dK = dSᵀ Q · scale
    """
    q, k, v = query.data, key.data, value.data
    attn_mask = check_attention(q, k, v, attn_mask, dropout_p, enable_gqa)
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    R = H // G if G else 1  # query heads to each key-value head
    scale = 1 / math.sqrt(D) if scale is None else scale
    mask = None if attn_mask is None else np.broadcast_to(attn_mask, (B, H, T, S))
    if T == 1 and S and G and not (dropout_p or query.wants_grad or key.wants_grad or value.wants_grad):
        return Tensor(_of_one_query(q, k, v, mask, scale))
    address = next_address() if dropout_p else None
    step = max(1, QUERY_BLOCK // R)  # the rows of R heads make one block
    tasks = _head_groups(B, G, R * min(T, step) * S, like=q)

    def grouped(x):
        """(B, H, T, D) -> (B, G, R, T, D), a view: head h is number h % R of group h // R."""
        return x.reshape(B, G, R, *x.shape[2:])

    def stacked(x):
        """(b, g, R, rows, D) -> (b, g, R · rows, D): what a key-value head meets in one product."""
        return x.reshape(*x.shape[:2], R * x.shape[3], x.shape[4])

    def unstacked(x):
        return x.reshape(*x.shape[:2], R, x.shape[2] // R, x.shape[3])

    def zeros_grouped(channels):
        """(B, G, R, T, channels), in memory (B, T, H, channels), as the projections around us want it."""
        return np.zeros((B, T, G, R, channels), q.dtype, like=q).transpose(0, 2, 3, 1, 4)

    q, mask = grouped(q), None if mask is None else grouped(mask)

    def blocks(bg):
        """The blocks of some key-value heads: (rows of queries, how many keys they see, mask, number)."""
        for number, start in enumerate(range(0, T, step)):
            rows = slice(start, min(start + step, T))
            seen = max(0, rows.stop + S - T) if is_causal else S
            yield rows, seen, None if mask is None else mask[bg][..., rows, :seen], number

    def scores_of(bg, rows, seen, block_mask):
        """(Q · scale) and Q Kᵀ · scale + mask of one block, -inf where a key may not be seen."""
        q_scaled = stacked(q[bg][..., rows, :] * scale)  # scaling (rows, D) is cheaper than (rows, S)
        scores = unstacked(q_scaled @ k[bg][:, :, :seen].swapaxes(-1, -2))  # (b, g, R, rows, seen)
        n = rows.stop - rows.start
        if is_causal and n > 1:
            edge = min(n, seen)  # the block's last n keys make the triangle
            future = np.triu(np.full_like(q, -np.inf, shape=(n, n)), 1)
            scores[..., seen - edge :] += future[:, n - edge :]
        if block_mask is not None and block_mask.dtype == bool:
            scores = np.where(block_mask, scores, -np.inf)
        elif block_mask is not None:
            scores += block_mask
        return q_scaled, scores

    def dropped(bg, number, shape):
        """The dropout mask of one block; drawn head by head, so that it does not depend on the grouping."""
        heads = [b * H + g * R + r for b in range(B)[bg[0]] for g in range(G)[bg[1]] for r in range(R)]
        parts = [part_number(address, H, head, -(-T // step), number) for head in heads]
        masks = [dropout_mask(address, shape[3:], dropout_p, q, part) for part in parts]
        return np.stack(masks).reshape(shape)

    out = zeros_grouped(v.shape[3])
    log_sum = np.zeros((B, G, R, T, 1), q.dtype, like=q)
    lowest = float(np.finfo(q.dtype).min)

    def forward(bg):
        for rows, seen, block_mask, number in blocks(bg):
            if seen == 0:
                continue
            _, p = scores_of(bg, rows, seen, block_mask)
            # A finite maximum even where every score is -inf: all weights are exp(-inf) = 0 then.
            peak = np.maximum(p.max(axis=-1, keepdims=True), lowest)
            p -= peak
            np.exp(p, out=p)
            # The largest weight is exp(0) = 1, so a sum below 1 is the 0 of a query that sees nothing.
            total = np.maximum(p.sum(axis=-1, keepdims=True), 1)
            log_sum[bg][..., rows, :] = peak + np.log(total)
            if dropout_p:
                p *= dropped(bg, number, p.shape)
            out[bg][..., rows, :] = unstacked(stacked(p) @ v[bg][:, :, :seen]) / total

    with one_blas_thread():
        run_tasks(forward, tasks)

    def vjp(grad):
        dq, grad = zeros_grouped(D), grouped(grad)
        dk, dv = (np.zeros((B, S, G, a.shape[3]), a.dtype, like=a).swapaxes(1, 2) for a in (k, v))

        def backward(bg):
            delta = (grad[bg] * out[bg]).sum(axis=-1, keepdims=True)  # (b, g, R, T, 1)
            for rows, seen, block_mask, number in blocks(bg):
                if seen == 0:
                    continue
                q_scaled, p = scores_of(bg, rows, seen, block_mask)
                p -= log_sum[bg][..., rows, :]
                np.exp(p, out=p)
                g, k_seen = stacked(grad[bg][..., rows, :]), k[bg][:, :, :seen]
                ds = unstacked(g @ v[bg][:, :, :seen].swapaxes(-1, -2))
                if dropout_p:
                    kept = dropped(bg, number, p.shape)
                    dv[bg][:, :, :seen] += stacked(p * kept).swapaxes(-1, -2) @ g
                    ds *= kept
                else:
                    dv[bg][:, :, :seen] += stacked(p).swapaxes(-1, -2) @ g
                ds -= delta[..., rows, :]
                ds *= p
                ds = stacked(ds)
                dq[bg][..., rows, :] = unstacked(ds @ k_seen) * scale
                dk[bg][:, :, :seen] += ds.swapaxes(-1, -2) @ q_scaled

        with one_blas_thread():
            run_tasks(backward, tasks)
        return dq.reshape(B, H, T, D), dk, dv

    return Tensor.from_op(out.reshape(B, H, T, v.shape[3]), (query, key, value), vjp)


def _of_one_query(q, k, v, mask, scale):
    """The same for one query that sees every key, without a gradient: a step of writing token by token."""
    (B, H, _, D), G, E = q.shape, k.shape[1], v.shape[3]
    p = (q * scale).reshape(B, G, H // G, D) @ k.swapaxes(-1, -2)  # (B, G, R, S)
    if mask is not None:
        mask = mask.reshape(p.shape)
        p = np.where(mask, p, -np.inf) if mask.dtype == bool else p + mask
    peak = p.max(axis=-1, keepdims=True)
    p -= peak if mask is None else np.maximum(peak, float(np.finfo(p.dtype).min))
    np.exp(p, out=p)
    out = p @ v  # (B, G, R, E)
    out /= np.maximum(p.sum(axis=-1, keepdims=True), 1)
    return out.reshape(B, H, 1, E)


def check_attention(q, k, v, mask, dropout_p, enable_gqa):
    """``Error`` unless the arguments fit together; returns the mask as an array, or None."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise Error(f"attention takes query, key and value (B, H, T, D), not {q.shape}, {k.shape}, {v.shape}")
    H, G = q.shape[1], k.shape[1]
    heads_fit = H == G or (enable_gqa and G > 0 and H % G == 0)
    if not heads_fit or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or v.shape[:3] != k.shape[:3]:
        shared = "; heads may be shared with enable_gqa=True" if not enable_gqa and G and H % G == 0 else ""
        raise Error(
            f"attention: query {q.shape}, key {k.shape} and value {v.shape} do not fit together{shared}"
        )
    if not 0 <= dropout_p < 1:
        raise Error(f"dropout probability must be at least 0 and below 1, not {dropout_p}")
    return None if mask is None else _check_mask(mask, (*q.shape[:3], k.shape[2]), like=q)


def _check_mask(mask, scores_shape, like):
    """attn_mask as an array that broadcasts to the scores; Python's lists take the scores' dtype."""
    if isinstance(mask, Tensor):
        raise Error("attn_mask is a Tensor, which would get no gradient: pass its .data")
    if isinstance(mask, (bool, int, float, list, tuple)):
        mask = np.asarray(mask, like=like)
        mask = mask if mask.dtype == bool else mask.astype(like.dtype)
    if mask.dtype not in (bool, like.dtype):
        raise Error(f"attn_mask must be boolean or {like.dtype}, not {mask.dtype}")
    try:
        fits = np.broadcast_shapes(mask.shape, scores_shape) == scores_shape
    except ValueError:
        fits = False
    if not fits:
        raise Error(f"attn_mask of shape {mask.shape} does not broadcast to the scores' {scores_shape}")
    return mask


def part_number(address, num_heads: int, head: int, num_blocks: int, block: int) -> int:
    """The number of a block of one head's weights among those of the global batch, for ``dropout_mask``."""
    return (address[2] * num_heads + head) * num_blocks + block


def _head_groups(B, G, scores, like):
    """Indices (batch, key-value heads) of those whose blocks, of ``scores`` each, fit the cache together."""
    if not isinstance(like, np.ndarray):  # one large call is faster there than many
        return [(slice(0, B), slice(0, G))]
    most = max(1, SCORES // max(1, scores))
    size = -(-G // -(-G // most)) if G else 1  # groups of nearly the same size
    return [(slice(b, b + 1), slice(g, min(g + size, G))) for b in range(B) for g in range(0, G, size)]


def rope(input: Tensor, cos, sin) -> Tensor:
    """Turn queries or keys (B, H, T, D) by angles that grow with the position; q · k sees the distance only.

    Channels i and i + D/2 are the two coordinates of a point in a plane (as Hugging Face pairs them; Meta
    pairs 2i and 2i + 1). With (a, b) the halves of a head:

        y = (a cos - b sin, b cos + a sin)

    The gradient is turned back: da = g₁ cos + g₂ sin, db = g₂ cos - g₁ sin. ``cos`` and ``sin`` are arrays
    (T, D/2) of the input's dtype, or (B, 1, T, D/2) where every row has positions of its own.

    Su et al., "RoFormer", arXiv 2104.09864, section 3.4.2.
    """
    check_rope(input, cos, sin, input.dtype)
    return Tensor.from_op(_turn(input.data, cos, sin), (input,), lambda grad: (_turn(grad, cos, -sin),))


def check_rope(input: Tensor, cos, sin, angles_dtype) -> None:
    if input.ndim != 4 or input.shape[3] % 2:
        raise Error(f"rope takes (B, H, T, D) with an even D, not {input.shape}")
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


def _turn(x, cos, sin):
    """Every pair (a, b) of x (B, H, T, D) turned; a block of positions at a time."""
    B, H, T, D = x.shape
    y = np.empty_like(x)

    def turn(t):
        c, s, x_t, y_t = cos[..., t, :], sin[..., t, :], x[:, :, t], y[:, :, t]
        a, b, y_a, y_b = x_t[..., : D // 2], x_t[..., D // 2 :], y_t[..., : D // 2], y_t[..., D // 2 :]
        np.multiply(a, c, out=y_a)
        y_a -= b * s
        np.multiply(b, c, out=y_b)
        y_b += a * s

    each_block(turn, T, B * H * D, like=x)
    return y
