"""How does a position attend to the others, without ever holding all (T, S) scores at once?

The plain version is in ``composed.py``. Here queries are processed in blocks: the scores of a block are
computed, used and freed, and the backward pass recomputes them. In causal attention, keys after the block's
last query are never read, and in a window neither are those before the window of its first.

Dao et al., "FlashAttention" (arXiv 2205.14135), section 3.1 and appendix B.2 for the gradient.
"""

import math

import numpy as np

from tinyllm.backend.memory import is_kept
from tinyllm.backend.random import dropout_mask, next_address
from tinyllm.backend.threads import one_blas_thread, run_tasks, sum_last_axis, threads_for
from tinyllm.checks import is_integer
from tinyllm.errors import Error
from tinyllm.functional.activations import check_probability, check_softcap
from tinyllm.tensor import Tensor
from tinyllm.tensor_ops import array_of

QUERY_BLOCK = 128  # rows of scores at a time

KEPT_KEYS = 256  # of a query, at most, if its weights are kept: all weights together grow with T · T

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
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(Q Kᵀ · scale + mask) V for Q (B, H, T, D), K (B, H, S, D), V (B, H, S, E) -> (B, H, T, E).

    Inputs (B, T, D) are one head. ``scale`` defaults to 1/sqrt(D): the product q · k of D independent
    components of mean 0 and variance 1 has variance D, and at large scores the softmax saturates and its
    gradient vanishes. ``attn_mask`` broadcasts to (B, H, T, S): boolean (True: may be attended to), or
    numbers that are added to the scores, such as position biases; a Tensor of them gets the gradient dS, a
    whole (B, H, T, S) array until the engine sums it over the axes that were broadcast. With ``is_causal``
    query t attends to the keys up to t; if T ≠ S the *last* query is aligned with the *last* key, as a KV
    cache needs (torch aligns the first with the first). A query without a visible key gets zeros. With a
    ``window`` W too, it attends to the last W of these keys only, t - W < s ≤ t (Jiang et al., "Mistral 7B",
    arXiv 2310.06825, section 2), and time grows with T · W instead of T · T.
    ``dropout_p`` drops weights as ``dropout`` does; pass 0 outside training. With ``enable_gqa`` K and V may
    have G heads, G a divisor of H: query heads 0 to H/G - 1 share the first, and so on (Ainslie et al.,
    "GQA", arXiv 2305.13245). K and V are not repeated: the queries of a group are stacked in one product,
    whose gradient sums over the group. ``softcap`` c replaces Q Kᵀ · scale by c tanh(Q Kᵀ · scale / c), which
    stays between -c and c (Gemma team, "Gemma 2", arXiv 2408.00118, section 2).

    Per head, S = Q Kᵀ · scale + mask, P_ts = exp(S_ts) / Σ_k exp(S_tk), and O_te = Σ_s P_ts V_se. With
    g = dL/dO the last sum gives dV_se = Σ_t P_ts g_te and dP_ts = Σ_e g_te V_se: dV = Pᵀ g, dP = g Vᵀ. Row t
    of P is a softmax, ∂P_ts/∂S_tk = P_ts ([s = k] - P_tk), so dS_tk = Σ_s dP_ts ∂P_ts/∂S_tk becomes

        dS_tk = P_tk (dP_tk - δ_t),   δ_t = Σ_s P_ts dP_ts = Σ_e g_te Σ_s P_ts V_se = Σ_e g_te O_te.

    δ needs only the output, not the row of P. S = Q Kᵀ · scale gives dQ = dS K · scale, dK = dSᵀ Q · scale.
    With S = c tanh(Z / c) + mask, Z = Q Kᵀ · scale, these become dQ = dZ K · scale and dK = dZᵀ Q · scale,
    where dZ = dS (1 - tanh²(Z / c)), since d tanh x = (1 - tanh² x) dx; the mask's gradient is still dS.
    If dropout multiplies P by a mask M, dV = (P M)ᵀ g and dP = M (g Vᵀ), and δ_t is still Σ_e g_te O_te.

    The forward pass keeps two numbers per query instead of the row P_t: the peak m_t = max_k S_tk and the sum
    Σ_t of all E_ts = exp(S_ts - m_t), so that P_ts = E_ts / Σ_t. (FlashAttention-2, arXiv 2307.08691, keeps
    m_t + log Σ_t, which loses Σ_t if a mask adds -1e9 to all scores of a query.) The backward pass computes S
    and E again, one block at a time; where memory allows it (see ``is_kept``) the blocks of E are kept. Since
    every gradient above is linear in P and g, it is cheaper to divide the rows of g by Σ_t than those of E.

    Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, section 3.2.1.
    """
    if query.ndim == 3:
        options = attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap
        return of_one_head(scaled_dot_product_attention, query, key, value, *options)
    q, k, v = query.data, key.data, value.data
    bias = learned_bias(attn_mask)
    needs_bias = bias is not None
    attn_mask = check_attention(q, k, v, attn_mask, dropout_p, enable_gqa)
    check_window(window, is_causal, softcap)
    (B, H, T, D), (G, S) = q.shape, k.shape[1:3]
    R = H // G if G else 1  # query heads per key-value head
    scale = 1 / math.sqrt(max(D, 1)) if scale is None else float(scale)  # 1 / np.sqrt(D) would widen float32
    mask = None if attn_mask is None else np.broadcast_to(attn_mask, (B, H, T, S))
    needs_grad = any(x is not None and x.needs_grad for x in (query, key, value, bias))
    if T == 1 and S and G and not (dropout_p or needs_grad):
        seen = keys_of(slice(0, 1), 1, S, is_causal, window)
        mask = None if mask is None else mask[..., seen]
        one = _of_one_query(q, k[:, :, seen], v[:, :, seen], mask, scale, softcap)
        return Tensor.from_op(one, (query, key, value), None)  # without a graph, but of one dtype
    address = next_address() if dropout_p else None
    step = max(1, QUERY_BLOCK // R)  # a block stacks the rows of R heads
    widest = S if window is None else min(S, window + step - 1)
    num_scores = B * H * T * widest

    def grouped(x):
        """(B, H, T, D) -> (B, G, R, T, D), a view: head h is number h % R of group h // R."""
        return x.reshape(B, G, R, *x.shape[2:])

    def stacked(x):
        """(b, g, R, rows, D) -> (b, g, R · rows, D): all queries of a key-value head, for one product."""
        return x.reshape(*x.shape[:2], R * x.shape[3], x.shape[4])

    def unstacked(x):
        return x.reshape(*x.shape[:2], R, x.shape[2] // R, x.shape[3])

    def new_grouped(channels):
        """(B, G, R, T, channels), in memory (B, T, H, channels): the order of the projections around it.

        Zeros where a query may see no key, and so belong to no block.
        """
        new = np.empty if S > 0 and (T <= S or not is_causal) else np.zeros
        return new((B, T, G, R, channels), q.dtype, like=q).transpose(0, 2, 3, 1, 4)

    q, mask = grouped(q), None if mask is None else grouped(mask)

    blocks = []  # (rows of queries, the keys they see, number)
    for number, start in enumerate(range(0, T, step)):
        rows = slice(start, min(start + step, T))
        keys = keys_of(rows, T, S, is_causal, window)
        if keys.stop:
            blocks.append((rows, keys, number))

    def scores_of(bg, rows, keys):
        """(Q · scale) and Q Kᵀ · scale, capped, of one block."""
        q_scaled = stacked(q[bg][..., rows, :] * scale)  # scaling (rows, D) is cheaper than (rows, S)
        scores = unstacked(q_scaled @ k[bg][:, :, keys].swapaxes(-1, -2))  # (b, g, R, rows, keys)
        if softcap is not None:
            scores = _capped(scores, softcap)
        return q_scaled, scores

    future = np.triu(np.full_like(q, -np.inf, shape=(min(step, T),) * 2), 1) if is_causal else None

    def masked(scores, bg, rows, keys):
        """The scores of one block + mask, -inf where a key is masked."""
        if is_causal:
            _hide(scores, future, rows.start + S - T, keys, window)
        if mask is None:
            return scores
        block_mask = mask[bg][..., rows, keys]
        if mask.dtype == bool:
            return np.where(block_mask, scores, -np.inf)
        scores += block_mask
        return scores

    def dropped(bg, number, shape):
        """The dropout mask of one block, generated head by head: it does not depend on the grouping."""
        heads = [b * H + g * R + r for b in range(B)[bg[0]] for g in range(G)[bg[1]] for r in range(R)]
        parts = [part_number(address, H, head, -(-T // step), number) for head in heads]
        masks = [dropout_mask(address, shape[3:], dropout_p, q, part) for part in parts]
        return np.stack(masks).reshape(shape)

    out = new_grouped(v.shape[3])
    peaks, sums = (np.ones_like(q, shape=(B, G, R, T, 1)) for _ in range(2))  # m and Σ of every query
    lowest = float(np.finfo(q.dtype).min)
    keeps = needs_grad and softcap is None and weights_are_kept(B, H, T, widest, q)

    def place(bg, number):
        return bg[0].start, bg[1].start, number

    def new_block(bg, rows, keys):
        heads = [part.stop - part.start for part in (*bg, rows, keys)]
        return np.empty((*heads[:2], R, *heads[2:]), q.dtype, like=q)

    # In the backward pass threads share groups of heads. In the forward pass they share the blocks of all
    # groups, which are as large as the cache allows, unless weights are kept for the backward pass's groups.
    per_block = R * min(T, step) * widest  # scores of one key-value head
    groups = _head_groups(B, G, per_block, threads_for(num_scores))
    forward_groups = groups if keeps else _head_groups(B, G, per_block, 1)
    every = [(bg, *block) for bg in forward_groups for block in reversed(blocks)]  # the longest first
    # place -> E of its block
    kept = {place(bg, i): new_block(bg, rows, keys) for bg, rows, keys, i in every if keeps}

    def forward(task):
        bg, rows, keys, number = task
        p = masked(scores_of(bg, rows, keys)[1], bg, rows, keys)
        # A finite maximum even where every score is -inf: all weights are exp(-inf) = 0 then.
        peak = np.maximum(p.max(axis=-1, keepdims=True), lowest)
        p -= peak
        p = np.exp(p, out=kept[place(bg, number)] if keeps else p)
        # The largest weight is exp(0) = 1, so a sum below 1 is 0: the query has no visible key.
        total = np.maximum(sum_last_axis(p), 1)
        peaks[bg][..., rows, :], sums[bg][..., rows, :] = peak, total
        if dropout_p:
            p = p * dropped(bg, number, p.shape)
        out[bg][..., rows, :] = unstacked(stacked(p) @ v[bg][:, :, keys]) / total

    with one_blas_thread():  # blocks are independent here, so that one text is processed by all threads
        run_tasks(forward, every, num_scores)

    def weights_of(bg, rows, keys, number):
        """E of one block, Q · scale, and the slope of the cap."""
        if keeps:
            return kept.pop(place(bg, number)), stacked(q[bg][..., rows, :] * scale), None
        q_scaled, scores = scores_of(bg, rows, keys)
        slope = None if softcap is None else 1 - (scores / softcap) ** 2  # 1 - tanh²
        p = masked(scores, bg, rows, keys)
        p -= peaks[bg][..., rows, :]
        return np.exp(p, out=p), q_scaled, slope

    def vjp(grad):
        dq, grad = new_grouped(D), grouped(grad)
        dk, dv = (np.zeros((B, S, G, a.shape[3]), a.dtype, like=a).swapaxes(1, 2) for a in (k, v))
        dbias = np.zeros((B, G, R, T, S), q.dtype, like=q) if needs_bias else None

        def backward(bg):
            for rows, keys, number in blocks:
                p, q_scaled, slope = weights_of(bg, rows, keys, number)
                g = grad[bg][..., rows, :] / sums[bg][..., rows, :]
                delta = np.einsum("...e,...e->...", g, out[bg][..., rows, :])[..., None]  # (b, g, R, rows, 1)
                g = stacked(g)
                ds = unstacked(g @ v[bg][:, :, keys].swapaxes(-1, -2))
                if dropout_p:
                    mask = dropped(bg, number, p.shape)
                    dv[bg][:, :, keys] += stacked(p * mask).swapaxes(-1, -2) @ g
                    ds *= mask
                else:
                    dv[bg][:, :, keys] += stacked(p).swapaxes(-1, -2) @ g
                ds -= delta
                ds *= p
                if dbias is not None:
                    dbias[bg][..., rows, keys] = ds
                if slope is not None:
                    ds *= slope
                ds = stacked(ds)
                dq[bg][..., rows, :] = unstacked(ds @ k[bg][:, :, keys]) * scale
                dk[bg][:, :, keys] += ds.swapaxes(-1, -2) @ q_scaled

        with one_blas_thread():
            run_tasks(backward, groups, num_scores)
        return dq.reshape(B, H, T, D), dk, dv, None if dbias is None else dbias.reshape(B, H, T, S)

    return Tensor.from_op(out.reshape(B, H, T, v.shape[3]), (query, key, value, bias), vjp)


def weights_are_kept(B: int, H: int, T: int, widest: int, like) -> bool:
    """Whether the weights of all queries are kept for the backward pass, of at most ``widest`` keys each."""
    return widest <= KEPT_KEYS and is_kept((B * T, H * widest), like)


def of_one_head(attention, query, key, value, attn_mask, *options):
    """``attention`` of inputs (B, T, D), with an axis for one head while it is computed."""
    if key.ndim == value.ndim == 3:
        key, value = (x.reshape(x.shape[0], 1, *x.shape[1:]) for x in (key, value))
    attn_mask = attn_mask[:, None] if getattr(attn_mask, "ndim", 0) == 3 else attn_mask
    B, T, D = query.shape
    out = attention(query.reshape(B, 1, T, D), key, value, attn_mask, *options)
    return out.reshape(B, T, out.shape[3])


def learned_bias(attn_mask) -> Tensor | None:
    """``attn_mask`` if it is a Tensor that requires a gradient."""
    return attn_mask if isinstance(attn_mask, Tensor) and attn_mask.requires_grad else None


def keys_of(rows: slice, T: int, S: int, is_causal: bool, window: int | None) -> slice:
    """The keys from the first to the last that these queries see; query t is at position t + S - T."""
    if not is_causal:
        return slice(0, S)
    first = 0 if window is None else rows.start + S - T + 1 - window
    return slice(max(0, first), max(0, rows.stop + S - T))


def _hide(scores, future, position, keys, window):
    """Add -inf to the scores (..., n, keys) of future keys and of those before the window.

    ``position`` is that of the first of the n queries, and ``future`` (at least n, n) is -inf above the
    diagonal. Both parts are triangles at an edge of the block.
    """
    n, seen = scores.shape[-2:]
    if n == 1:  # a block has only keys that its first or its last query sees
        return
    last = min(n, seen)
    scores[..., seen - last :] += future[:n, n - last : n]
    if window is not None:
        hidden = position - window - keys.start  # query i does not see the keys up to number i + hidden
        first = max(0, n + hidden)
        scores[..., :first] += np.tril(np.full_like(future, -np.inf), hidden)[:n, :first]


def _capped(scores, softcap):
    """c tanh(scores / c), in place."""
    scores /= softcap
    np.tanh(scores, out=scores)
    scores *= softcap
    return scores


def _of_one_query(q, k, v, mask, scale, softcap):
    """The same for one query that sees every key, without a gradient: one step of decoding."""
    (B, H, _, D), G, E = q.shape, k.shape[1], v.shape[3]
    p = (q * scale).reshape(B, G, H // G, D) @ k.swapaxes(-1, -2)  # (B, G, R, S)
    p = p if softcap is None else _capped(p, softcap)
    if mask is not None:
        mask = mask.reshape(p.shape)
        p = np.where(mask, p, -np.inf) if mask.dtype == bool else p + mask
    peak = p.max(axis=-1, keepdims=True)
    p -= peak if mask is None else np.maximum(peak, float(np.finfo(p.dtype).min))
    np.exp(p, out=p)
    out = p @ v  # (B, G, R, E)
    total = p.sum(axis=-1, keepdims=True)
    out /= total if mask is None else np.maximum(total, 1)
    return out.reshape(B, H, 1, E)


def check_attention(q, k, v, mask, dropout_p, enable_gqa):
    """Raise Error unless the arguments fit together; return the mask as an array, or None."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise Error(
            f"attention needs query, key and value (B, H, T, D), or all (B, T, D), not {q.shape}, {k.shape}, "
            f"{v.shape}"
        )
    H, G = q.shape[1], k.shape[1]
    heads_fit = H == G or (enable_gqa and G > 0 and H % G == 0)
    others_fit = (k.shape[0], k.shape[3]) == (q.shape[0], q.shape[3]) and v.shape[:3] == k.shape[:3]
    if not (heads_fit and others_fit):
        shared = (
            "; pass enable_gqa=True to share heads"
            if others_fit and not enable_gqa and G and H % G == 0
            else ""
        )
        raise Error(
            f"attention: query {q.shape}, key {k.shape} and value {v.shape} do not fit together{shared}"
        )
    check_probability(dropout_p)
    return None if mask is None else _check_mask(mask, (*q.shape[:3], k.shape[2]), like=q)


def check_window(window, is_causal, softcap):
    """Raise Error unless a window is a number of keys of causal attention, and a cap a positive number."""
    if window is not None and (not is_integer(window) or window < 1):
        raise Error(f"attention: window is {window!r}: choose a whole number of at least 1, or None")
    if window is not None and not is_causal:
        raise Error(f"attention: a window ({window}) ends at the query's own key: pass is_causal=True too")
    if softcap is not None:
        check_softcap(softcap)


def _check_mask(mask, scores_shape, like):
    """attn_mask as an array that broadcasts to the scores; lists and numbers get the scores' dtype."""
    mask = array_of(mask)
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
        raise Error(f"attn_mask of shape {mask.shape} does not broadcast to the scores' shape {scores_shape}")
    return mask


def part_number(address, num_heads: int, head: int, num_blocks: int, block: int) -> int:
    """Index of one head's block of weights within the global batch, for ``dropout_mask``."""
    return (address[2] * num_heads + head) * num_blocks + block


def _head_groups(B, G, scores, threads):
    """Slices (batch, key-value heads) whose blocks, of ``scores`` elements per head, fit the cache.

    They are at least as many as the threads that share them, if there are so many heads.
    """
    most = max(1, min(SCORES // max(1, scores), B * G // threads))
    rows = max(1, most // max(1, G))  # of the batch, if all heads of one are fewer than fit

    def slices(length, size):
        """``range(length)`` in slices of nearly the same size, ``size`` or less."""
        size = max(1, -(-length // max(1, -(-length // size))))
        return [slice(start, min(start + size, length)) for start in range(0, length, size)]

    return [(b, g) for b in slices(B, rows) for g in slices(G, most)]
