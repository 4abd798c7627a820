"""Mistakes in causal attention, heads, grouped queries, RoPE and the key-value cache."""

from support.mistakes.planting import Variants

CAUSAL_ATTENTION = Variants(
    "causal_attention",
    "causal_attention",
    (
        """
def causal_attention(q, k, v):
    T, D = q.shape
    scores = q @ k.T / np.sqrt(D)
    mask = np.tril(np.ones((T, T), dtype=bool))
    scores = np.where(mask, scores, -np.inf)
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    return p @ v
""",
        """
def causal_attention(q, k, v):
    y = np.zeros_like(v)
    for t in range(len(q)):
        seen = t + 1
        scores = [sum(q[t] * k[s]) / math.sqrt(q.shape[1]) for s in range(seen)]
        powers = [math.exp(score) for score in scores]
        for s in range(seen):
            y[t] += powers[s] / sum(powers) * v[s]
    return y
""",
        """
def causal_attention(q, k, v):
    T, D = q.shape
    scores = np.einsum("td,sd->ts", q * D**-0.5, k)
    scores[np.triu_indices(T, k=1)] = -np.inf
    powers = np.exp(scores)
    return np.einsum("ts,sd->td", powers / powers.sum(1)[:, None], v)
""",
    ),
    {
        "no scale": (
            (" / np.sqrt(D)", ""),
            (" / math.sqrt(q.shape[1])", ""),
            ("q * D**-0.5", "q"),
        ),
        "divided by D": (
            ("np.sqrt(D)", "D"),
            ("math.sqrt(q.shape[1])", "q.shape[1]"),
            ("D**-0.5", "D**-1.0"),
        ),
        "divided by the square root of T": (
            ("np.sqrt(D)", "np.sqrt(T)"),
            ("math.sqrt(q.shape[1])", "math.sqrt(len(k))"),
            ("T, D = q.shape", "D, _ = q.shape", "np.triu_indices(T", "np.triu_indices(D"),
        ),
        "no mask": (
            ("    scores = np.where(mask, scores, -np.inf)\n", ""),
            ("seen = t + 1", "seen = len(k)"),
            ("    scores[np.triu_indices(T, k=1)] = -np.inf\n", ""),
        ),
        "mask off by one: the next position seen": (
            ("np.ones((T, T), dtype=bool)", "np.ones((T, T), dtype=bool), k=1"),
            ("seen = t + 1", "seen = min(t + 2, len(k))"),
            ("k=1", "k=2"),
        ),
        "masked after the softmax": (
            ("    scores = np.where(mask, scores, -np.inf)\n", "", "return p @ v", "return (p * mask) @ v"),
            ("sum(q[t] * k[s]) / math.sqrt(q.shape[1]) for s in range(seen)",
             "sum(q[t] * k[s]) / math.sqrt(q.shape[1]) for s in range(len(k))"),
            ("    scores[np.triu_indices(T, k=1)] = -np.inf\n", "", "    return",
             "    p = powers / powers.sum(1)[:, None]\n    p[np.triu_indices(T, k=1)] = 0\n    return",
             "powers / powers.sum(1)[:, None], v", "p, v"),
        ),
        "masked with 0": (
            ("-np.inf", "0"),
            ("math.sqrt(q.shape[1]) for s in range(seen)",
             "math.sqrt(q.shape[1]) if s <= t else 0.0 for s in range(len(k))", "seen = t + 1",
             "seen = len(k)"),
            ("= -np.inf", "*= 0"),
        ),
        "softmax over the queries": (
            ("axis=-1", "axis=0"),
            ("    y = np.zeros_like(v)\n", "    y = np.zeros_like(v)\n"
             "    size = math.sqrt(q.shape[1])\n",
             "sum(powers) *", "sum(math.exp(q[r] @ k[s] / size) for r in range(s, len(q))) *"),
            ("powers.sum(1)[:, None]", "powers.sum(0)"),
        ),
    },
)  # fmt: skip

CAUSAL_ATTENTION_GRADIENT = Variants(
    "causal_attention",
    "causal_attention_gradient",
    (
        """
def causal_attention_gradient(grad, q, k, v):
    T, D = q.shape
    scores = np.where(np.tri(T, dtype=bool), q @ k.T / np.sqrt(D), -np.inf)
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    dv = p.T @ grad
    dp = grad @ v.T
    ds = p * (dp - (p * dp).sum(axis=-1, keepdims=True))
    dq = ds @ k / np.sqrt(D)
    dk = ds.T @ q / np.sqrt(D)
    return dq, dk, dv
""",
        """
def causal_attention_gradient(grad, q, k, v):
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    root = math.sqrt(q.shape[1])
    for t in range(len(q)):
        e = np.exp(k[: t + 1] @ q[t] / root)
        p = e / e.sum()
        dp = v[: t + 1] @ grad[t]
        ds = (np.diag(p) - np.outer(p, p)) @ dp
        for s in range(t + 1):
            dq[t] += ds[s] * k[s] / root
            dk[s] += ds[s] * q[t] / root
            dv[s] += p[s] * grad[t]
    return dq, dk, dv
""",
        """
def causal_attention_gradient(grad, q, k, v):
    c = q.shape[1] ** -0.5
    powers = np.tril(np.exp(np.einsum("td,sd->ts", q, k) * c))
    p = powers / powers.sum(1)[:, None]
    y = p @ v
    row = np.einsum("td,td->t", grad, y)[:, None]  # = the sum over s of P dP
    ds = p * (grad @ v.T - row)
    return (
        c * np.einsum("ts,sd->td", ds, k),
        c * np.einsum("ts,td->sd", ds, q),
        np.einsum("ts,td->sd", p, grad),
    )
""",
    ),
    {
        "no scale in dq and dk": (
            ("ds @ k / np.sqrt(D)", "ds @ k", "ds.T @ q / np.sqrt(D)", "ds.T @ q"),
            ("k[s] / root", "k[s]", "ds[s] * q[t] / root", "ds[s] * q[t]"),
            ("c * np", "np"),
        ),
        "the softmax's sum missing": (
            (" - (p * dp).sum(axis=-1, keepdims=True)", ""),
            (" - np.outer(p, p)", ""),
            (" - row)", ")"),
        ),
        "dv with P not transposed": (
            ("p.T @ grad", "p @ grad"),
            ("dv[s] += p[s] * grad[t]", "dv[t] += p[s] * grad[s]"),
            ('"ts,td->sd", p, grad', '"ts,sd->td", p, grad'),
        ),
        "dq and dk exchanged": (
            ("return dq, dk, dv", "return dk, dq, dv"),
            ("dq[t] += ds[s] * k[s]", "dk[t] += ds[s] * k[s]",
             "dk[s] += ds[s] * q[t]", "dq[s] += ds[s] * q[t]"),
            ('"ts,sd->td", ds, k', '"ts,td->sd", ds, q_', '"ts,td->sd", ds, q)', '"ts,sd->td", ds, k)',
             "q_", "q"),
        ),
    },
)  # fmt: skip

SPLIT_HEADS = Variants(
    "heads",
    "split_heads",
    (
        """
def split_heads(x, heads):
    T, C = x.shape
    return x.reshape(T, heads, C // heads).transpose(1, 0, 2)
""",
        """
def split_heads(x, heads):
    size = x.shape[1] // heads
    return np.stack([x[:, h * size : (h + 1) * size] for h in range(heads)])
""",
        """
def split_heads(x, heads):
    parts = np.split(x, heads, axis=1)
    return np.concatenate([part[None] for part in parts], axis=0)
""",
    ),
    {
        "no transposition": (
            ("x.reshape(T, heads, C // heads).transpose(1, 0, 2)", "x.reshape(heads, T, C // heads)"),
            ("    return", "    flat = x.ravel()\n    n = len(x) * size\n    return",
             "x[:, h * size : (h + 1) * size]", "flat[h * n : (h + 1) * n].reshape(-1, size)"),
            ("np.split(x, heads, axis=1)", "np.split(x.reshape(heads * len(x), -1), heads)"),
        ),
        "channels interleaved": (
            ("x.reshape(T, heads, C // heads).transpose(1, 0, 2)",
             "x.reshape(T, C // heads, heads).transpose(2, 0, 1)"),
            ("x[:, h * size : (h + 1) * size]", "x[:, h::heads]"),
            ("np.split(x, heads, axis=1)",
             "[x[:, [c for c in range(x.shape[1]) if c % heads == h]] for h in range(heads)]"),
        ),
        "heads not in front": (
            (".transpose(1, 0, 2)", ""),
            ("for h in range(heads)])", "for h in range(heads)], axis=1)"),
            ("part[None]", "part[:, None]", "axis=0", "axis=1"),
        ),
    },
)  # fmt: skip

JOIN_HEADS = Variants(
    "heads",
    "join_heads",
    (
        """
def join_heads(x):
    H, T, D = x.shape
    return x.transpose(1, 0, 2).reshape(T, H * D)
""",
        """
def join_heads(x):
    return np.hstack([head for head in x])
""",
        """
def join_heads(x):
    H, T, D = x.shape
    out = np.empty((T, H * D))
    for h in range(H):
        for d in range(D):
            out[:, h * D + d] = x[h, :, d]
    return out
""",
    ),
    {
        "no transposition": (
            (".transpose(1, 0, 2)", ""),
            ("np.hstack([head for head in x])", "np.vstack([head for head in x]).reshape(x.shape[1], -1)"),
            (
                "out[:, h * D + d] = x[h, :, d]",
                "for t in range(T):\n                out.flat[h * T * D + t * D + d] = x[h, t, d]",
            ),
        ),
        "channels interleaved": (
            ("transpose(1, 0, 2)", "transpose(1, 2, 0)"),
            ("np.hstack([head for head in x])", "np.stack([*x], axis=-1).reshape(x.shape[1], -1)"),
            ("h * D + d", "d * H + h"),
        ),
    },
)

GROUPED_QUERY_ATTENTION = Variants(
    "grouped_query_attention",
    "grouped_query_attention",
    (
        """
def grouped_query_attention(q, k, v):
    group = q.shape[0] // k.shape[0]
    k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
    future = np.triu(np.ones(scores.shape[1:], dtype=bool), 1)
    scores[:, future] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return p @ v
""",
        """
def grouped_query_attention(q, k, v):
    H, T, D = q.shape
    G = len(k)
    y = np.zeros(q.shape)
    for h in range(H):
        g = h // (H // G)
        for t in range(T):
            seen = t + 1
            powers = np.exp(k[g, :seen] @ q[h, t] / math.sqrt(D))
            y[h, t] = powers @ v[g, :seen] / powers.sum()
    return y
""",
        """
def grouped_query_attention(q, k, v):
    H, T, D = q.shape
    grouped = q.reshape(len(k), -1, T, D)
    powers = np.tril(np.exp(np.einsum("gntd,gsd->gnts", grouped, k) / D**0.5))
    y = np.einsum("gnts,gsd->gntd", powers / powers.sum(3, keepdims=True), v)
    return y.reshape(H, T, D)
""",
    ),
    {
        "heads interleaved": (
            ("np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)",
             "np.tile(k, (group, 1, 1)), np.tile(v, (group, 1, 1))"),
            ("h // (H // G)", "h % G"),
            ("reshape(len(k), -1, T, D)", "reshape(-1, len(k), T, D).swapaxes(0, 1)",
             "y.reshape", "y.swapaxes(0, 1).reshape"),
        ),
        "the first key head for all": (
            ("k, v = np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)", "k, v = k[:1], v[:1]"),
            ("g = h // (H // G)", "g = 0"),
            ("gsd->gnts", "sd->gnts", "grouped, k)", "grouped, k[0])",
             "gsd->gntd", "sd->gntd", "keepdims=True), v)", "keepdims=True), v[0])"),
        ),
        "the wrong divisor": (
            ("np.repeat(k, group, axis=0), np.repeat(v, group, axis=0)",
             "(x[[h // len(x) for h in range(len(q))]] for x in (k, v))"),
            ("h // (H // G)", "h // G"),
            ("    grouped = q.reshape(len(k), -1, T, D)\n",
             "    which = np.arange(H) // len(k)\n    k, v = k[which], v[which]\n"
             "    grouped = q[:, None]\n"),
        ),
        "no mask": (
            ("    scores[:, future] = -np.inf\n", ""),
            ("seen = t + 1", "seen = T"),
            ("np.tril(np.exp(np", "(np.exp(np"),
        ),
    },
)  # fmt: skip

VARIANTS = [
    *(CAUSAL_ATTENTION, CAUSAL_ATTENTION_GRADIENT, SPLIT_HEADS, JOIN_HEADS, GROUPED_QUERY_ATTENTION),
]
