"""Mistakes in LayerNorm and RMSNorm."""

from support.mistakes.planting import Variants

LAYER_NORM = Variants(
    "layer_norm",
    "layer_norm",
    (
        """
def layer_norm(x, weight, bias, eps):
    mean = x.mean(axis=-1, keepdims=True)
    var = x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(var + eps) * weight + bias
""",
        """
def layer_norm(x, weight, bias, eps):
    out = np.empty_like(x)
    for n in range(x.shape[0]):
        row = x[n]
        mu = row.mean()
        sigma2 = np.mean((row - mu) ** 2)
        out[n] = weight * (row - mu) / (sigma2 + eps) ** 0.5 + bias
    return out
""",
        """
def layer_norm(x, weight, bias, eps):
    N, C = x.shape
    centred = x - np.einsum("nc->n", x)[:, None] / C
    variance = np.einsum("nc,nc->n", centred, centred)[:, None] / C
    x_hat = centred * (variance + eps) ** -0.5
    return x_hat * weight + bias
""",
    ),
    {
        "eps outside the root": (
            ("np.sqrt(var + eps)", "(x.std(axis=-1, keepdims=True) + eps)"),
            ("(sigma2 + eps) ** 0.5", "(sigma2 ** 0.5 + eps)"),
            ("centred * (variance + eps) ** -0.5", "np.divide(centred, np.sqrt(variance) + eps)"),
        ),
        "no eps": (
            ("np.sqrt(var + eps)", "x.std(axis=-1, keepdims=True)"),
            ("(sigma2 + eps)", "sigma2"),
            ("(variance + eps) ** -0.5", "variance ** -0.5"),
        ),
        "N - 1": (
            ("x.var(axis=-1,", "x.var(axis=-1, ddof=1,"),
            ("np.mean((row - mu) ** 2)", "np.sum((row - mu) ** 2) / (len(row) - 1)"),
            ("centred)[:, None] / C", "centred)[:, None] / (C - 1)"),
        ),
        "the wrong axis": (
            ("axis=-1", "axis=0"),
            (
                "range(x.shape[0])", "range(x.shape[1])",
                "row = x[n]", "row = x[:, n]",
                "out[n] = weight *", "out[:, n] = weight[n] *",
                "+ bias", "+ bias[n]",
            ),
            (
                'np.einsum("nc->n", x)[:, None] / C', 'np.einsum("nc->c", x) / N',
                'np.einsum("nc,nc->n", centred, centred)[:, None] / C',
                'np.einsum("nc,nc->c", centred, centred) / N',
            ),
        ),
        "all axes": (
            ("axis=-1, keepdims=True", ""),
            ("row.mean()", "x.mean()", "np.mean((row - mu) ** 2)", "np.mean((x - mu) ** 2)"),
            ('"nc->n", x)[:, None] / C', '"nc->", x) / x.size',
             'np.einsum("nc,nc->n", centred, centred)[:, None] / C', "np.sum(centred**2) / (N * C)"),
        ),
        "divided by the variance": (
            ("np.sqrt(var + eps)", "(var + eps)"),
            (" ** 0.5", ""),
            ("** -0.5", "** -1"),
        ),
        "not centred": (
            ("(x - mean) /", "x /"),
            ("weight * (row - mu) /", "weight * row /"),
            ("x_hat = centred *", "x_hat = x *"),
        ),
        "weight and bias exchanged": (
            ("* weight + bias", "* bias + weight"),
            ("weight *", "bias *", "+ bias", "+ weight"),
            ("x_hat * weight + bias", "np.add(np.multiply(x_hat, bias), weight)"),
        ),
    },
)  # fmt: skip

LAYER_NORM_GRADIENT = Variants(
    "layer_norm",
    "layer_norm_gradient",
    (
        """
def layer_norm_gradient(grad, x, weight, bias, eps):
    std = np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    x_hat = (x - x.mean(axis=-1, keepdims=True)) / std
    g = grad * weight
    dx = (g - g.mean(axis=-1, keepdims=True) - x_hat * (g * x_hat).mean(axis=-1, keepdims=True)) / std
    dweight = (grad * x_hat).sum(axis=0)
    dbias = grad.sum(axis=0)
    return dx, dweight, dbias
""",
        """
def layer_norm_gradient(grad, x, weight, bias, eps):
    dx, dweight, dbias = np.zeros(x.shape), np.zeros(weight.shape), np.zeros(bias.shape)
    for n, row in enumerate(x):
        centred = row - row.mean()
        r = 1 / math.sqrt((centred**2).mean() + eps)
        h = centred * r
        g = grad[n] * weight
        dx[n] = r * (g - g.mean() - h * (g * h).mean())
        dweight += grad[n] * h
        dbias += grad[n]
    return dx, dweight, dbias
""",
        """
def layer_norm_gradient(grad, x, weight, bias, eps):
    C = x.shape[1]
    c = x - x.mean(1)[:, None]
    variance = (c * c).sum(1, keepdims=True) / C
    s = np.sqrt(variance + eps)
    dhat = np.einsum("nc,c->nc", grad, weight)
    dvar = (dhat * c).sum(1, keepdims=True) * -0.5 * s**-3
    dmean = -dhat.sum(1, keepdims=True) / s
    dx = dhat / s + dvar * 2 * c / C + dmean / C
    return dx, np.einsum("nc,nc->c", grad, c / s), np.ones(len(x)) @ grad
""",
    ),
    {
        "eps outside the root": (
            ("np.sqrt(x.var(axis=-1, keepdims=True) + eps)", "x.std(axis=-1, keepdims=True) + eps"),
            ("math.sqrt((centred**2).mean() + eps)", "(math.sqrt((centred**2).mean()) + eps)"),
            ("np.sqrt(variance + eps)", "np.sqrt(variance) + eps"),
        ),
        "mean and variance taken for constants": (
            ("(g - g.mean(axis=-1, keepdims=True) - x_hat * (g * x_hat).mean(axis=-1, keepdims=True))", "g"),
            ("(g - g.mean() - h * (g * h).mean())", "g"),
            (" + dvar * 2 * c / C + dmean / C", ""),
        ),
        "the mean's term missing": (
            ("g - g.mean(axis=-1, keepdims=True) -", "g -"),
            (" - g.mean()", ""),
            (" + dmean / C", ""),
        ),
        "the variance's term missing": (
            (" - x_hat * (g * x_hat).mean(axis=-1, keepdims=True)", ""),
            (" - h * (g * h).mean()", ""),
            ("dvar * 2 * c / C + ", ""),
        ),
        "weight missing in dx": (
            ("g = grad * weight", "g = grad"),
            ("grad[n] * weight", "grad[n]"),
            ('np.einsum("nc,c->nc", grad, weight)', "grad"),
        ),
        "x for x_hat in dweight": (
            ("(grad * x_hat).sum(axis=0)", "(grad * x).sum(axis=0)"),
            ("grad[n] * h\n", "grad[n] * row\n"),
            ("grad, c / s)", "grad, x)"),
        ),
    },
)

RMS_NORM = Variants(
    "rms_norm",
    "rms_norm",
    (
        """
def rms_norm(x, weight, eps):
    rms = np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    return x / rms * weight
""",
        """
def rms_norm(x, weight, eps):
    rows = []
    for row in x:
        square = sum(c * c for c in row) / len(row)
        rows.append([w * c / math.sqrt(square + eps) for w, c in zip(weight, row)])
    return np.array(rows)
""",
        """
def rms_norm(x, weight, eps):
    N, C = x.shape
    square = np.einsum("nc,nc->n", x, x) / C
    return np.einsum("nc,n,c->nc", x, (square + eps) ** -0.5, weight)
""",
    ),
    {
        "centred": (
            ("    rms =", "    x = x - x.mean(axis=-1, keepdims=True)\n    rms ="),
            ("        square", "        row = row - row.mean()\n        square"),
            ("    square =", '    x = x - np.einsum("nc->n", x)[:, None] / C\n    square ='),
        ),
        "eps outside the root": (
            ("keepdims=True) + eps)", "keepdims=True)) + eps"),
            ("math.sqrt(square + eps)", "(math.sqrt(square) + eps)"),
            ("(square + eps) ** -0.5", "1 / (square**0.5 + eps)"),
        ),
        "no eps": (
            ("keepdims=True) + eps)", "keepdims=True))"),
            ("square + eps", "square"),
            ("square + eps", "square"),
        ),
        "the sum of squares": (
            ("np.mean(x**2", "np.sum(x**2"),
            (" / len(row)", ""),
            (" / C", ""),
        ),
        "no root": (
            ("np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)",
             "np.mean(x**2, axis=-1, keepdims=True) + eps"),
            ("math.sqrt(square + eps)", "(square + eps)"),
            ("** -0.5", "** -1"),
        ),
        "the wrong axis": (
            ("axis=-1", "axis=0"),
            ("    for row in x:", "    for row in x.T:",
             "[w * c / math.sqrt(square + eps) for w, c in zip(weight, row)]",
             "[c / math.sqrt(square + eps) for c in row]",
             "np.array(rows)", "np.array(rows).T * weight"),
            ('"nc,nc->n", x, x) / C', '"nc,nc->c", x, x) / N', '"nc,n,c->nc"', '"nc,c,c->nc"'),
        ),
    },
)  # fmt: skip

RMS_NORM_GRADIENT = Variants(
    "rms_norm",
    "rms_norm_gradient",
    (
        """
def rms_norm_gradient(grad, x, weight, eps):
    rms = np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    x_hat = x / rms
    g = grad * weight
    dx = (g - x_hat * (g * x_hat).mean(-1, keepdims=True)) / rms
    return dx, (grad * x_hat).sum(0)
""",
        """
def rms_norm_gradient(grad, x, weight, eps):
    C = x.shape[1]
    dx, dweight = np.empty_like(x), np.zeros_like(weight)
    for n in range(len(x)):
        r = math.sqrt(x[n] @ x[n] / C + eps)
        g = weight * grad[n]
        dx[n] = g / r - x[n] * (g @ x[n]) / (C * r**3)
        dweight += grad[n] * x[n] / r
    return dx, dweight
""",
        """
def rms_norm_gradient(grad, x, weight, eps):
    r = 1 / np.sqrt(np.einsum("nc,nc->n", x, x)[:, None] / x.shape[1] + eps)
    g = np.einsum("nc,c->nc", grad, weight)
    dr = (g * x).sum(1, keepdims=True)
    through_r = dr * -(r**3) * x / x.shape[1]
    return g * r + through_r, np.einsum("nc,nc->c", grad, x * r)
""",
    ),
    {
        "the root taken for a constant": (
            ("(g - x_hat * (g * x_hat).mean(-1, keepdims=True))", "g"),
            (" - x[n] * (g @ x[n]) / (C * r**3)", ""),
            (" + through_r", ""),
        ),
        "weight missing in dx": (
            ("g = grad * weight", "g = grad"),
            ("weight * grad[n]", "grad[n]"),
            ('np.einsum("nc,c->nc", grad, weight)', "grad.copy()"),
        ),
        "x for x_hat in dweight": (
            ("(grad * x_hat).sum(0)", "(grad * x).sum(0)"),
            ("x[n] / r\n", "x[n]\n"),
            ("grad, x * r)", "grad, x)"),
        ),
    },
)

VARIANTS = [LAYER_NORM, LAYER_NORM_GRADIENT, RMS_NORM, RMS_NORM_GRADIENT]
