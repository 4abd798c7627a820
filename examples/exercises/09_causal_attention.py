"""Exercise 9: causal attention, of one head.

Each position asks with a query which earlier positions matter to it, and takes a weighted mean of their
values:

    S_ts = q_t · k_s / sqrt(D) for s ≤ t, and -inf for s > t,   P = softmax(S) over s,   y_t = Σ_s P_ts v_s.

Position t sees itself. Backwards, with grad = dL/dy: y = P v gives dv = Pᵀ grad and dP = grad vᵀ; the softmax
gives dS_ts = P_ts (dP_ts - Σ_r P_tr dP_tr); and the scores give dq = dS k / sqrt(D), dk = dSᵀ q / sqrt(D).

Vaswani et al., "Attention Is All You Need" (arXiv 1706.03762), section 3.2.1.

When you are done, compare with ``tinyllm/functional/composed.py``.
Grade it: python -m parity grade examples/exercises/09_causal_attention.py
"""


def causal_attention(q, k, v):
    """y (T, D) for queries, keys and values (T, D)."""
    raise NotImplementedError


def causal_attention_gradient(grad, q, k, v):
    """(dq, dk, dv) for grad = dL/dy."""
    raise NotImplementedError
