"""Mistakes in softmax, cross-entropy and DPO."""

from support.mistakes.planting import Variants

SOFTMAX = Variants(
    "softmax",
    "softmax",
    (
        """
def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)
""",
        """
def softmax(x):
    out = []
    for row in x:
        top = max(row)
        powers = [math.exp(value - top) for value in row]
        total = sum(powers)
        out.append([power / total for power in powers])
    return np.array(out)
""",
        """
def softmax(x):
    m = np.amax(x, 1)[:, None]
    log_total = m + np.log(np.einsum("ij->i", np.exp(x - m)))[:, None]
    return np.exp(x - log_total)
""",
    ),
    {
        "the maximum is not subtracted": (
            ("x - x.max(axis=-1, keepdims=True)", "x"),
            ("math.exp(value - top)", "math.exp(value)"),
            ("m = np.amax(x, 1)[:, None]", "m = 0"),
        ),
        "the maximum of the whole array": (
            ("x.max(axis=-1, keepdims=True)", "x.max()"),
            ("max(row)", "x.max()"),
            ("np.amax(x, 1)[:, None]", "np.amax(x)"),
        ),
        "the wrong axis": (
            ("axis=-1", "axis=0"),
            ("for row in x:", "for row in x.T:", "return np.array(out)", "return np.array(out).T"),
            ("np.amax(x, 1)[:, None]", "np.amax(x, 0)", '"ij->i", np.exp(x - m)))[:, None]',
             '"ij->j", np.exp(x - m)))'),
        ),
        "all axes": (
            ("x.max(axis=-1, keepdims=True)", "x.max()", "e.sum(axis=-1, keepdims=True)", "e.sum()"),
            ("max(row)", "x.max()", "sum(powers)", "np.exp(x - top).sum()"),
            ("np.amax(x, 1)[:, None]", "np.amax(x)", '"ij->i", np.exp(x - m)))[:, None]',
             '"ij->", np.exp(x - m)))'),
        ),
        "log-softmax": (
            ("e = np.exp(x - x.max(axis=-1, keepdims=True))", "x = x - x.max(axis=-1, keepdims=True)",
             "e / e.sum(axis=-1, keepdims=True)", "x - np.log(np.exp(x).sum(axis=-1, keepdims=True))"),
            ("[power / total for power in powers]", "[value - top - math.log(total) for value in row]"),
            ("return np.exp(x - log_total)", "return x - log_total"),
        ),
    },
)  # fmt: skip

SOFTMAX_GRADIENT = Variants(
    "softmax",
    "softmax_gradient",
    (
        """
def softmax_gradient(grad, x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    return p * (grad - (grad * p).sum(axis=-1, keepdims=True))
""",
        """
def softmax_gradient(grad, x):
    dx = np.zeros_like(x)
    for n, row in enumerate(x):
        p = np.exp(row - row.max())
        p = p / p.sum()
        jacobian = np.diag(p) - np.outer(p, p)
        dx[n] = jacobian @ grad[n]
    return dx
""",
        """
def softmax_gradient(grad, x):
    powers = np.exp(x - np.max(x, 1)[:, None])
    probs = powers / np.einsum("ij->i", powers)[:, None]
    inner = np.einsum("ij,ij->i", probs, grad)
    return np.einsum("ij,ij->ij", probs, grad) - probs * inner[:, None]
""",
    ),
    {
        "the diagonal only": (
            ("p * (grad - (grad * p).sum(axis=-1, keepdims=True))", "grad * p * (1 - p)"),
            ("np.diag(p) - np.outer(p, p)", "np.diag(p - p**2)"),
            ("- probs * inner[:, None]", "- probs**2 * grad"),
        ),
        "the sum's term missing": (
            ("(grad - (grad * p).sum(axis=-1, keepdims=True))", "grad"),
            (" - np.outer(p, p)", ""),
            (" - probs * inner[:, None]", ""),
        ),
        "the mean of g": (
            ("(grad * p).sum(axis=-1, keepdims=True)", "grad.mean(axis=-1, keepdims=True)"),
            ("jacobian @ grad[n]", "p * (grad[n] - np.mean(grad[n]))"),
            ('np.einsum("ij,ij->i", probs, grad)', "grad.sum(1) / grad.shape[1]"),
        ),
        "p missing in the sum": (
            ("(grad * p).sum", "grad.sum"),
            ("np.outer(p, p)", "np.outer(p, np.ones(len(p)))"),
            ('np.einsum("ij,ij->i", probs, grad)', 'np.einsum("ij->i", grad)'),
        ),
    },
)

CROSS_ENTROPY = Variants(
    "cross_entropy",
    "cross_entropy",
    (
        """
def cross_entropy(logits, targets):
    keep = targets != -100
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    picked = log_p[keep, targets[keep]]
    return -picked.sum() / keep.sum()
""",
        """
def cross_entropy(logits, targets):
    total, count = 0.0, 0
    for row, target in zip(logits, targets):
        if target == -100:
            continue
        top = max(row)
        total -= row[target] - top - math.log(sum(math.exp(v - top) for v in row))
        count += 1
    return total / count
""",
        """
def cross_entropy(logits, targets):
    valid = targets >= 0
    m = logits.max(1)
    lse = m + np.log(np.exp(logits - m[:, None]).sum(1))
    hot = np.eye(logits.shape[1])[np.where(valid, targets, 0)]
    each = lse - np.einsum("nc,nc->n", hot, logits)
    return np.average(each, weights=valid)
""",
    ),
    {
        "ignored targets counted": (
            ("picked.sum() / keep.sum()", "picked.sum() / len(targets)"),
            ("            continue", "            count += 1\n            continue"),
            ("np.average(each, weights=valid)", "np.mean(each * valid)"),
        ),
        "the sum": (
            ("picked.sum() / keep.sum()", "picked.sum()"),
            ("total / count", "total"),
            ("np.average(each, weights=valid)", "each @ valid"),
        ),
        "the sign": (
            ("return -picked", "return picked"),
            ("total -=", "total +="),
            ("each = lse - ", "each = -lse + "),
        ),
        "ignored targets as indices": (
            ("keep = targets != -100", "keep = np.arange(len(targets)) >= 0",
             "shifted = ", "targets = np.maximum(targets, 0)\n    shifted = "),
            ("            continue", "            target = 0"),
            ("weights=valid", "weights=None"),
        ),
        "log of softmax": (
            ("log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))",
             "log_p = np.log(np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True))"),
            ("row[target] - top - math.log(sum(math.exp(v - top) for v in row))",
             "math.log(math.exp(row[target] - top) / sum(math.exp(v - top) for v in row))"),
            ("    lse =", "    p = np.exp(logits - m[:, None])\n    p /= p.sum(1, keepdims=True)\n    lse =",
             'lse - np.einsum("nc,nc->n", hot, logits)', "-np.log((p * hot).sum(1))",
             "np.average(each, weights=valid)", "each[valid].mean()"),
        ),
    },
)  # fmt: skip

CROSS_ENTROPY_GRADIENT = Variants(
    "cross_entropy",
    "cross_entropy_gradient",
    (
        """
def cross_entropy_gradient(logits, targets):
    keep = targets != -100
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    rows = np.flatnonzero(keep)
    p[rows, targets[rows]] -= 1
    p[~keep] = 0
    return p / keep.sum()
""",
        """
def cross_entropy_gradient(logits, targets):
    d = np.zeros(logits.shape)
    count = sum(1 for target in targets if target != -100)
    for n, target in enumerate(targets):
        if target == -100:
            continue
        powers = np.exp(logits[n] - logits[n].max())
        d[n] = powers / powers.sum()
        d[n, target] -= 1
    return d / count
""",
        """
def cross_entropy_gradient(logits, targets):
    powers = np.exp(logits - logits.max(1)[:, None])
    p = np.einsum("nc,n->nc", powers, 1 / powers.sum(1))
    valid = (targets >= 0)[:, None]
    hot = targets[:, None] == np.arange(logits.shape[1])
    return np.where(valid, p - hot, 0) / valid.sum()
""",
    ),
    {
        "not divided by the number of targets": (
            (" / keep.sum()", ""),
            ("d / count", "d"),
            (" / valid.sum()", ""),
        ),
        "ignored targets counted": (
            ("keep.sum()", "len(logits)"),
            (" if target != -100)", ")"),
            ("valid.sum()", "valid.size"),
        ),
        "ignored rows have a gradient": (
            ("    p[~keep] = 0\n", ""),
            ("        if target == -100:\n            continue\n", "",
             "d[n, target] -= 1", "if target >= 0:\n            d[n, target] -= 1"),
            ("np.where(valid, p - hot, 0)", "(p - hot)"),
        ),
        "1 is not subtracted": (
            ("    p[rows, targets[rows]] -= 1\n", ""),
            ("        d[n, target] -= 1\n", ""),
            ("p - hot", "p"),
        ),
        "the sign": (
            ("return p /", "return -p /"),
            ("d[n] = powers / powers.sum()\n        d[n, target] -= 1",
             "d[n] = -powers / powers.sum()\n        d[n, target] += 1"),
            ("p - hot", "hot - p"),
        ),
    },
)  # fmt: skip

DPO_LOSS = Variants(
    "dpo_loss",
    "dpo_loss",
    (
        """
def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    reward_chosen = beta * (chosen - reference_chosen)
    reward_rejected = beta * (rejected - reference_rejected)
    return np.logaddexp(0, -(reward_chosen - reward_rejected)).mean()
""",
        """
def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    losses = []
    for c, r, rc, rr in zip(chosen, rejected, reference_chosen, reference_rejected):
        x = beta * ((c - rc) - (r - rr))
        losses.append(math.log1p(math.exp(-abs(x))) + max(-x, 0.0))
    return sum(losses) / len(losses)
""",
        """
def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    policy = chosen - rejected
    reference = reference_chosen - reference_rejected
    x = beta * (policy - reference)
    loss = np.where(x < 0, x - np.log1p(np.exp(x)), -np.log1p(np.exp(-x)))
    return -np.mean(loss)
""",
    ),
    {
        "no reference": (
            ("chosen - reference_chosen", "chosen", "rejected - reference_rejected", "rejected"),
            ("(c - rc) - (r - rr)", "c - r"),
            ("policy - reference)", "policy)"),
        ),
        "the reference added": (
            ("chosen - reference_chosen", "chosen + reference_chosen",
             "rejected - reference_rejected", "rejected + reference_rejected"),
            ("(c - rc) - (r - rr)", "(c + rc) - (r + rr)"),
            ("policy - reference)", "policy + reference)"),
        ),
        "chosen and rejected exchanged": (
            ("(reward_chosen - reward_rejected)", "(reward_rejected - reward_chosen)"),
            ("zip(chosen, rejected, reference_chosen, reference_rejected)",
             "zip(rejected, chosen, reference_rejected, reference_chosen)"),
            ("policy - reference)", "reference - policy)"),
        ),
        "no beta": (
            ("beta * ", ""),
            ("beta * ", ""),
            ("beta * (policy - reference)", "policy - reference"),
        ),
        "the sum": (
            (".mean()", ".sum()"),
            (" / len(losses)", ""),
            ("-np.mean(loss)", "-loss.sum()"),
        ),
        "beta outside the logarithm": (
            ("beta * (", "(", "return np", "return beta * np"),
            ("x = beta * (", "x = (", "return sum", "return beta * sum"),
            ("x = beta * (", "x = (", "loss = np", "loss = beta * np"),
        ),
        "overflow": (
            ("np.logaddexp(0, -(reward_chosen - reward_rejected))",
             "np.log(1 + np.exp(-(reward_chosen - reward_rejected)))"),
            ("math.log1p(math.exp(-abs(x))) + max(-x, 0.0)", "math.log(1 + math.exp(-x))"),
            ("np.where(x < 0, x - np.log1p(np.exp(x)), -np.log1p(np.exp(-x)))",
             "np.log(1 / (1 + np.exp(-x)))"),
        ),
    },
)  # fmt: skip

VARIANTS = [
    SOFTMAX,
    SOFTMAX_GRADIENT,
    CROSS_ENTROPY,
    CROSS_ENTROPY_GRADIENT,
    DPO_LOSS,
]
