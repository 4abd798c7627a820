"""Mistakes in linear layers, embeddings and LoRA."""

from support.mistakes.planting import Variants

LINEAR = Variants(
    "linear",
    "linear",
    (
        """
def linear(x, weight, bias):
    return x @ weight.T + bias
""",
        """
def linear(x, weight, bias):
    outputs, inputs = len(bias), x.shape[1]
    y = np.zeros((len(x), outputs))
    for n in range(len(x)):
        for o in range(outputs):
            for i in range(inputs):
                y[n, o] += x[n, i] * weight[o, i]
            y[n, o] += bias[o]
    return y
""",
        """
def linear(x, weight, bias):
    return np.einsum("ni,oi->no", x, weight) + bias[None, :]
""",
    ),
    {
        "weight not transposed": (
            ("weight.T", "weight"),
            ("weight[o, i]", "weight[i, o]"),
            ('"ni,oi->no"', '"ni,io->no"'),
        ),
        "no bias": (
            (" + bias", ""),
            ("            y[n, o] += bias[o]\n", ""),
            (" + bias[None, :]", ""),
        ),
        "bias subtracted": (
            ("+ bias", "- bias"),
            ("+= bias", "-= bias"),
            ("+ bias", "- bias"),
        ),
    },
)

LINEAR_GRADIENT = Variants(
    "linear",
    "linear_gradient",
    (
        """
def linear_gradient(grad, x, weight, bias):
    dx = grad @ weight
    dweight = grad.T @ x
    dbias = grad.sum(axis=0)
    return dx, dweight, dbias
""",
        """
def linear_gradient(grad, x, weight, bias):
    dx, dweight, dbias = np.zeros_like(x), np.zeros_like(weight), np.zeros_like(bias)
    for n, row in enumerate(grad):
        dx[n] = row @ weight
        dweight += np.outer(row, x[n])
        dbias += row
    return dx, dweight, dbias
""",
        """
def linear_gradient(grad, x, weight, bias):
    return (
        np.einsum("no,oi->ni", grad, weight),
        np.einsum("no,ni->oi", grad, x),
        np.einsum("no->o", grad),
    )
""",
    ),
    {
        "dweight transposed": (
            ("grad.T @ x", "x.T @ grad"),
            ("dweight += np.outer(row, x[n])", "dweight = dweight + np.outer(x[n], row)",
             "np.zeros_like(weight)", "np.zeros((x.shape[1], grad.shape[1]))"),
            ("no,ni->oi", "no,ni->io"),
        ),
        "weight transposed in dx": (
            ("grad @ weight", "grad @ weight.T"),
            ("row @ weight", "weight @ row"),
            ("no,oi->ni", "no,io->ni"),
        ),
        "dbias is the mean": (
            ("grad.sum(axis=0)", "grad.mean(axis=0)"),
            ("dbias += row", "dbias += row / len(grad)"),
            ('np.einsum("no->o", grad)', 'np.einsum("no->o", grad) / grad.shape[0]'),
        ),
        "dbias over the wrong axis": (
            ("grad.sum(axis=0)", "grad.sum(axis=-1)"),
            ("dbias += row", "dbias[n] = row.sum()"),
            ("no->o", "no->n"),
        ),
        "dweight divided by the rows": (
            ("grad.T @ x", "grad.T @ x / x.shape[0]"),
            ("np.outer(row, x[n])", "np.outer(row, x[n]) / len(x)"),
            ('np.einsum("no,ni->oi", grad, x)', "np.mean([np.outer(g, r) for g, r in zip(grad, x)], 0)"),
        ),
    },
)  # fmt: skip

EMBEDDING = Variants(
    "embedding",
    "embedding",
    (
        """
def embedding(ids, weight):
    return weight[ids]
""",
        """
def embedding(ids, weight):
    return np.array([weight[id, :] for id in ids])
""",
        """
def embedding(ids, weight):
    one_hot = np.zeros((len(ids), len(weight)))
    one_hot[np.arange(len(ids)), ids] = 1
    return one_hot @ weight
""",
    ),
    {
        "a column": (
            ("weight[ids]", "weight[:, ids].T"),
            ("weight[id, :]", "weight[:, id]"),
            ("len(weight)", "weight.shape[1]", "@ weight", "@ weight.T"),
        ),
        "columns side by side": (
            ("weight[ids]", "weight[:, ids]"),
            ("np.array([weight[id, :] for id in ids])", "np.stack([weight[:, id] for id in ids], 1)"),
            ("len(weight)", "weight.shape[1]", "one_hot @ weight", "weight @ one_hot.T"),
        ),
        "ids counted from 1": (
            ("weight[ids]", "weight[ids - 1]"),
            ("weight[id, :]", "weight[id - 1, :]"),
            (", ids] = 1", ", ids - 1] = 1"),
        ),
    },
)

EMBEDDING_GRADIENT = Variants(
    "embedding",
    "embedding_gradient",
    (
        """
def embedding_gradient(grad, ids, weight):
    dweight = np.zeros_like(weight)
    np.add.at(dweight, ids, grad)
    return dweight
""",
        """
def embedding_gradient(grad, ids, weight):
    dweight = np.zeros(weight.shape)
    for n, id in enumerate(ids):
        dweight[id] += grad[n]
    return dweight
""",
        """
def embedding_gradient(grad, ids, weight):
    selected = ids[None, :] == np.arange(len(weight))[:, None]
    return selected.astype(float) @ grad
""",
    ),
    {
        "repeated ids overwrite": (
            ("np.add.at(dweight, ids, grad)", "dweight[ids] += grad"),
            ("dweight[id] += grad[n]", "dweight[id] = grad[n]"),
            ("    return", "    later = np.cumsum(selected[:, ::-1], axis=1)[:, ::-1]\n"
             "    selected = selected & (later == 1)\n    return"),
        ),
        "repeated ids averaged": (
            ("    return dweight", "    seen = np.unique(ids)\n"
             "    dweight[seen] /= np.bincount(ids)[seen][:, None]\n    return dweight"),
            ("+= grad[n]", "+= grad[n] / np.sum(ids == id)"),
            ("selected.astype(float)", "(selected / np.maximum(selected.sum(1, keepdims=True), 1))"),
        ),
    },
)  # fmt: skip

LORA = Variants(
    "lora",
    "lora",
    (
        """
def lora(x, weight, A, B, alpha):
    scale = alpha / len(A)
    return x @ weight.T + scale * (x @ A.T @ B.T)
""",
        """
def lora(x, weight, A, B, alpha):
    rows = []
    for row in x:
        frozen = weight @ row
        update = B @ (A @ row)
        rows.append(frozen + update * alpha / A.shape[0])
    return np.array(rows)
""",
        """
def lora(x, weight, A, B, alpha):
    r = B.shape[1]
    merged = weight + alpha / r * np.einsum("or,ri->oi", B, A)
    return np.einsum("ni,oi->no", x, merged)
""",
    ),
    {
        "alpha instead of alpha / r": (
            (" / len(A)", ""),
            (" / A.shape[0]", ""),
            ("alpha / r *", "alpha *"),
        ),
        "no scale": (
            ("scale * (x", "(x"),
            (" * alpha / A.shape[0]", ""),
            ("alpha / r * ", ""),
        ),
        "the update alone": (
            ("x @ weight.T + ", ""),
            ("frozen + ", ""),
            ("weight + ", ""),
        ),
        "the whole output scaled": (
            ("x @ weight.T + scale * (x @ A.T @ B.T)", "scale * (x @ weight.T + x @ A.T @ B.T)"),
            ("frozen + update * alpha", "(frozen + update) * alpha"),
            ("alpha / r * ", "", "x, merged)", "alpha / r * x, merged)"),
        ),
        "alpha / sqrt(r)": (
            ("len(A)", "np.sqrt(len(A))"),
            ("A.shape[0]", "A.shape[0] ** 0.5"),
            ("alpha / r *", "alpha * r**-0.5 *"),
        ),
    },
)

LORA_GRADIENT = Variants(
    "lora",
    "lora_gradient",
    (
        """
def lora_gradient(grad, x, weight, A, B, alpha):
    s = alpha / len(A)
    dx = grad @ weight + s * (grad @ B @ A)
    dA = s * (grad @ B).T @ x
    dB = s * grad.T @ (x @ A.T)
    return dx, dA, dB
""",
        """
def lora_gradient(grad, x, weight, A, B, alpha):
    dx, dA, dB = np.zeros_like(x), np.zeros_like(A), np.zeros_like(B)
    for n in range(len(x)):
        g = grad[n] * alpha / A.shape[0]
        dx[n] += weight.T @ grad[n]
        dx[n] += A.T @ (B.T @ g)
        dA += np.outer(B.T @ g, x[n])
        dB += np.outer(g, A @ x[n])
    return dx, dA, dB
""",
        """
def lora_gradient(grad, x, weight, A, B, alpha):
    rank = A.shape[0]
    merged = weight + alpha / rank * B @ A
    dmerged = np.einsum("no,ni->oi", grad, x)
    dA = alpha / rank * np.einsum("or,oi->ri", B, dmerged)
    dB = alpha / rank * np.einsum("oi,ri->or", dmerged, A)
    return grad @ merged, dA, dB
""",
    ),
    {
        "the frozen layer missing in dx": (
            ("grad @ weight + ", ""),
            ("        dx[n] += weight.T @ grad[n]\n", ""),
            ("weight + alpha", "alpha"),
        ),
        "no scale": (
            ("s * ", ""),
            (" * alpha / A.shape[0]", ""),
            ("alpha / rank * ", ""),
        ),
        "alpha instead of alpha / r": (
            (" / len(A)", ""),
            (" / A.shape[0]", ""),
            ("alpha / rank", "alpha"),
        ),
        "dA and dB exchanged": (
            ("return dx, dA, dB", "return dx, dB, dA"),
            ("    return dx, dA, dB", "    return dx, dB, dA"),
            ("grad @ merged, dA, dB", "grad @ merged, dB, dA"),
        ),
    },
)

VARIANTS = [LINEAR, LINEAR_GRADIENT, EMBEDDING, EMBEDDING_GRADIENT, LORA, LORA_GRADIENT]
