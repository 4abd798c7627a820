"""Mistakes in RoPE and in the key-value cache."""

from support.mistakes.planting import Variants

ROPE = Variants(
    "rope",
    "rope",
    (
        """
def rope(x, start, theta):
    T, D = x.shape
    half = D // 2
    freqs = theta ** (-2 * np.arange(half) / D)
    angles = np.outer(np.arange(start, start + T), freqs)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = x[:, :half], x[:, half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)
""",
        """
def rope(x, start, theta):
    y = np.zeros_like(x)
    T, D = x.shape
    for t in range(T):
        for i in range(D // 2):
            angle = (start + t) / theta ** (2 * i / D)
            first, second = i, i + D // 2
            a, b = x[t, first], x[t, second]
            y[t, first] = a * math.cos(angle) - b * math.sin(angle)
            y[t, second] = b * math.cos(angle) + a * math.sin(angle)
    return y
""",
        """
def rope(x, start, theta):
    T, D = x.shape
    z = x[:, : D // 2] + 1j * x[:, D // 2 :]
    m = start + np.arange(T)
    omega = np.exp(-np.log(theta) * np.arange(0, D, 2) / D)
    z = z * np.exp(1j * m[:, None] * omega)
    return np.hstack([z.real, z.imag])
""",
    ),
    {
        "neighbouring channels paired": (
            ("x[:, :half], x[:, half:]", "x[:, 0::2], x[:, 1::2]",
             "return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)",
             "y = np.empty_like(x)\n    y[:, 0::2] = a * cos - b * sin\n    y[:, 1::2] = b * cos + a * sin\n"
             "    return y"),
            ("first, second = i, i + D // 2", "first, second = 2 * i, 2 * i + 1"),
            ("x[:, : D // 2] + 1j * x[:, D // 2 :]", "x.copy().view(complex)",
             "np.hstack([z.real, z.imag])", "z.view(float)"),
        ),
        "rotated backwards": (
            ("a * cos - b * sin, b * cos + a * sin", "a * cos + b * sin, b * cos - a * sin"),
            ("angle = (start + t)", "angle = -(start + t)"),
            ("1j * m", "-1j * m"),
        ),
        "the start ignored": (
            ("np.arange(start, start + T)", "np.arange(T)"),
            ("(start + t)", "t"),
            ("start + np.arange(T)", "np.arange(T)"),
        ),
        "positions counted from 1": (
            ("np.arange(start, start + T)", "np.arange(start + 1, start + T + 1)"),
            ("(start + t)", "(start + t + 1)"),
            ("start + np.arange(T)", "start + np.cumsum(np.ones(T))"),
        ),
        "the exponent halved": (
            ("-2 * np.arange(half)", "-np.arange(half)"),
            ("2 * i / D", "i / D"),
            ("np.arange(0, D, 2) / D", "np.arange(D // 2) / D"),
        ),
    },
)  # fmt: skip

CACHED_ATTENTION = Variants(
    "kv_cache",
    "cached_attention",
    (
        """
def cached_attention(q, k, v, cached_k, cached_v):
    keys = np.concatenate([cached_k, k])
    values = np.concatenate([cached_v, v])
    held, T = len(cached_k), len(q)
    scores = q @ keys.T / np.sqrt(q.shape[1])
    visible = np.arange(len(keys))[None, :] <= held + np.arange(T)[:, None]
    scores = np.where(visible, scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    y = p / p.sum(-1, keepdims=True) @ values
    return y, keys, values
""",
        """
def cached_attention(q, k, v, cached_k, cached_v):
    keys, values, rows = [*cached_k], [*cached_v], []
    for query, key, value in zip(q, k, v):
        keys.append(key)
        values.append(value)
        powers = [math.exp(query @ each / math.sqrt(len(query))) for each in keys]
        rows.append(sum(p * each for p, each in zip(powers, values)) / sum(powers))
    return np.array(rows), np.array(keys), np.array(values)
""",
        """
def cached_attention(q, k, v, cached_k, cached_v):
    keys, values = np.vstack((cached_k, k)), np.vstack((cached_v, v))
    powers = np.exp(np.einsum("td,sd->ts", q, keys) * q.shape[1] ** -0.5)
    powers = np.tril(powers, len(keys) - len(q))
    y = np.einsum("ts,sd->td", powers, values) / powers.sum(1)[:, None]
    return y, keys, values
""",
    ),
    {
        "mask aligned with the first key": (
            ("held + np.arange(T)", "np.arange(T)"),
            ("for each in keys]", "for each in np.array([*cached_k, *k])[: len(rows) + 1]]"),
            (", len(keys) - len(q))", ")"),
        ),
        "no mask": (
            ("    scores = np.where(visible, scores, -np.inf)\n", ""),
            ("[*cached_k], [*cached_v], []", "[*cached_k, *k], [*cached_v, *v], []",
             "        keys.append(key)\n        values.append(value)\n", ""),
            ("    powers = np.tril(powers, len(keys) - len(q))\n", ""),
        ),
        "the new keys first": (
            ("[cached_k, k]", "[k, cached_k]", "[cached_v, v]", "[v, cached_v]"),
            ("[*cached_k], [*cached_v], []", "[*k, *cached_k], [*v, *cached_v], []",
             "        keys.append(key)\n        values.append(value)\n",
             "        end = len(cached_k) + len(rows) + 1\n", "for each in keys]", "for each in keys[:end]]"),
            ("(cached_k, k)", "(k, cached_k)", "(cached_v, v)", "(v, cached_v)"),
        ),
        "the cache ignored": (
            ("q @ keys.T", "q @ k.T", "np.arange(len(keys))[None, :] <= held + ",
             "np.arange(T)[None, :] <= ", "@ values", "@ v"),
            ("for each in keys]", "for each in k[: len(rows) + 1]]", "zip(powers, values)", "zip(powers, v)"),
            ("q, keys) *", "q, k) *", ", len(keys) - len(q))", ")", "powers, values)", "powers, v)"),
        ),
        "no scale": (
            (" / np.sqrt(q.shape[1])", ""),
            (" / math.sqrt(len(query))", ""),
            (" * q.shape[1] ** -0.5", ""),
        ),
        "the new tokens alone returned": (
            ("return y, keys, values", "return y, k, v"),
            ("np.array(keys), np.array(values)", "np.array(keys[-len(k) :]), np.array(values[-len(v) :])"),
            ("return y, keys, values", "return y, keys[len(cached_k) :], values[len(cached_v) :]"),
        ),
    },
)  # fmt: skip

VARIANTS = [ROPE, CACHED_ATTENTION]
