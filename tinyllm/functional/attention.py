"""How does a position look at the others, without ever holding all (T, S) scores at once?

The plain version is in ``composed.py``. Here queries are taken in blocks: a block's scores are
computed, used and forgotten, and computed again in the backward pass from the log of their sum. For
causal attention, keys after the block's last query are never touched.

Dao et al., "FlashAttention" (arXiv 2205.14135), section 3.1 and appendix B.2 for the gradient.
"""

import math

import numpy as np

from tinyllm.device import dropout_mask, next_address, one_blas_thread, run_tasks
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
) -> Tensor:
    """softmax(Q Kᵀ · scale + mask) V for Q (B, H, T, D), K (B, H, S, D), V (B, H, S, E) -> (B, H, T, E).

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
    _check_shapes(q, k, v, attn_mask, dropout_p)
    (B, H, T, D), S = q.shape, k.shape[2]
    scale = 1 / math.sqrt(D) if scale is None else scale
    mask = None if attn_mask is None else np.broadcast_to(attn_mask, (B, H, T, S))
    address = next_address() if dropout_p else None
    tasks = _head_groups(B, H, T, S, like=q)

    def blocks(bh):
        """The blocks of a group of heads: (rows of queries, how many keys they see, mask, block number)."""
        for number, start in enumerate(range(0, T, QUERY_BLOCK)):
            rows = slice(start, min(start + QUERY_BLOCK, T))
            seen = max(0, rows.stop + S - T) if is_causal else S
            yield rows, seen, None if mask is None else mask[bh][:, :, rows, :seen], number

    def scores_of(bh, rows, seen, block_mask):
        """(Q · scale) and Q Kᵀ · scale + mask of one block, -inf where a key may not be seen."""
        q_scaled = q[bh][:, :, rows] * scale  # scaling (rows, D) is cheaper than (rows, S)
        scores = q_scaled @ k[bh][:, :, :seen].swapaxes(-1, -2)
        if is_causal:
            n = rows.stop - rows.start
            edge = min(n, seen)  # the block's last n keys make the triangle
            future = np.triu(np.full_like(q, -np.inf, shape=(n, n)), 1)
            scores[..., seen - edge :] += future[:, n - edge :]
        if block_mask is not None and block_mask.dtype == bool:
            scores = np.where(block_mask, scores, -np.inf)
        elif block_mask is not None:
            scores += block_mask
        return q_scaled, scores

    def dropped(bh, number, shape):
        """The dropout mask of one block; drawn head by head, so that it does not depend on the grouping."""
        heads = [b * H + h for b in range(B)[bh[0]] for h in range(H)[bh[1]]]
        ids = [head * -(-T // QUERY_BLOCK) + number for head in heads]
        masks = [dropout_mask(address, i, shape[2:], dropout_p, like=q) for i in ids]
        return np.stack(masks).reshape(shape)

    out = np.zeros((B, T, H, v.shape[3]), q.dtype, like=q).swapaxes(1, 2)  # merging the heads is free
    log_sum = np.zeros((B, H, T, 1), q.dtype, like=q)
    lowest = float(np.finfo(q.dtype).min)

    def forward(bh):
        for rows, seen, block_mask, number in blocks(bh):
            if seen == 0:
                continue
            _, p = scores_of(bh, rows, seen, block_mask)
            # A finite maximum even where every score is -inf: all weights are exp(-inf) = 0 then.
            peak = np.maximum(p.max(axis=-1, keepdims=True), lowest)
            p -= peak
            np.exp(p, out=p)
            # The largest weight is exp(0) = 1, so a sum below 1 is the 0 of a query that sees nothing.
            total = np.maximum(p.sum(axis=-1, keepdims=True), 1)
            log_sum[bh][:, :, rows] = peak + np.log(total)
            if dropout_p:
                p *= dropped(bh, number, p.shape)
            out[bh][:, :, rows] = (p @ v[bh][:, :, :seen]) / total

    with one_blas_thread():
        run_tasks(forward, tasks)

    def vjp(grad):
        # Memory in the order (B, T, H, D), as the projections before and after want it.
        dq, dk, dv = (
            np.zeros((B, a.shape[2], H, a.shape[3]), a.dtype, like=a).swapaxes(1, 2) for a in (q, k, v)
        )

        def backward(bh):
            delta = (grad[bh] * out[bh]).sum(axis=-1, keepdims=True)  # (b, h, T, 1)
            for rows, seen, block_mask, number in blocks(bh):
                if seen == 0:
                    continue
                q_scaled, p = scores_of(bh, rows, seen, block_mask)
                p -= log_sum[bh][:, :, rows]
                np.exp(p, out=p)
                g, k_seen = grad[bh][:, :, rows], k[bh][:, :, :seen]
                ds = g @ v[bh][:, :, :seen].swapaxes(-1, -2)
                if dropout_p:
                    kept = dropped(bh, number, p.shape)
                    dv[bh][:, :, :seen] += (p * kept).swapaxes(-1, -2) @ g
                    ds *= kept
                else:
                    dv[bh][:, :, :seen] += p.swapaxes(-1, -2) @ g
                ds -= delta[:, :, rows]
                ds *= p
                dq[bh][:, :, rows] = (ds @ k_seen) * scale
                dk[bh][:, :, :seen] += ds.swapaxes(-1, -2) @ q_scaled

        with one_blas_thread():
            run_tasks(backward, tasks)
        return dq, dk, dv

    return Tensor.from_op(out, (query, key, value), vjp)


def _check_shapes(q, k, v, mask, dropout_p):
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise Error(f"attention takes query, key and value (B, H, T, D), not {q.shape}, {k.shape}, {v.shape}")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3] or v.shape[:3] != k.shape[:3]:
        raise Error(f"attention: query {q.shape}, key {k.shape} and value {v.shape} do not fit together")
    if mask is not None and mask.dtype not in (bool, q.dtype):
        raise Error(f"attn_mask must be boolean or {q.dtype}, not {mask.dtype}")
    if not 0 <= dropout_p < 1:
        raise Error(f"dropout probability must be at least 0 and below 1, not {dropout_p}")


def _head_groups(B, H, T, S, like):
    """Indices (batch, heads) of the groups of heads whose blocks of scores fit the cache together."""
    if not isinstance(like, np.ndarray):  # a GPU wants everything in one call
        return [(slice(0, B), slice(0, H))]
    most = max(1, SCORES // max(1, min(T, QUERY_BLOCK) * S))
    size = -(-H // -(-H // most)) if H else 1  # groups of nearly the same size
    return [(slice(b, b + 1), slice(h, min(h + size, H))) for b in range(B) for h in range(0, H, size)]
