"""Mistakes in AdamW, clipping and the learning rate."""

from support.mistakes.planting import Variants

ADAMW_STEP = Variants(
    "adamw",
    "adamw_step",
    (
        """
def adamw_step(parameter, grad, m, v, step, lr, weight_decay):
    b1, b2 = 0.9, 0.999
    m = b1 * m + (1 - b1) * grad
    v = b2 * v + (1 - b2) * grad**2
    m_hat = m / (1 - b1**step)
    v_hat = v / (1 - b2**step)
    decay = lr * weight_decay * parameter
    parameter = parameter - lr * m_hat / (np.sqrt(v_hat) + 1e-8) - decay
    return parameter, m, v
""",
        """
def adamw_step(parameter, grad, m, v, step, lr, weight_decay):
    p, m, v = parameter.copy(), m.copy(), v.copy()
    for i in range(len(p)):
        g = grad[i]
        p[i] *= 1 - lr * weight_decay
        m[i] += (g - m[i]) * (1 - 0.9)
        v[i] += (g * g - v[i]) * (1 - 0.999)
        mean = m[i] / (1 - 0.9**step)
        square = v[i] / (1 - 0.999**step)
        p[i] -= lr * mean / (math.sqrt(square) + 1e-8)
    return p, m, v
""",
        """
def adamw_step(parameter, grad, m, v, step, lr, weight_decay):
    first = np.average([m, grad], axis=0, weights=[0.9, 0.1])
    second = np.average([v, np.square(grad)], axis=0, weights=[0.999, 0.001])
    c1 = 1 - 0.9**step
    c2 = 1 - 0.999**step
    size = lr / c1
    shrink = lr * weight_decay
    update = size * first / ((second / c2) ** 0.5 + 1e-8) + shrink * parameter
    return parameter - update, first, second
""",
    ),
    {
        "no bias correction": (
            (" / (1 - b1**step)", "", " / (1 - b2**step)", ""),
            (" / (1 - 0.9**step)", "", " / (1 - 0.999**step)", ""),
            ("lr / c1", "lr", "(second / c2)", "second"),
        ),
        "no bias correction of v": (
            (" / (1 - b2**step)", ""),
            (" / (1 - 0.999**step)", ""),
            ("(second / c2)", "second"),
        ),
        "no bias correction of m": (
            (" / (1 - b1**step)", ""),
            (" / (1 - 0.9**step)", ""),
            ("lr / c1", "lr"),
        ),
        "steps counted from 0": (
            ("step)", "(step + 1))"),
            ("    for", "    step += 1\n    for"),
            ("c1 = 1 - 0.9**step", "c1 = 1 - 0.9 * 0.9**step", "0.999**step", "0.999 ** (step + 1)"),
        ),
        "decay in the gradient": (
            ("    m = b1", "    grad = grad + weight_decay * parameter\n    m = b1", " - decay", ""),
            ("g = grad[i]", "g = grad[i] + weight_decay * p[i]",
             "        p[i] *= 1 - lr * weight_decay\n", ""),
            ("    first =", "    grad = grad + weight_decay * parameter\n    first =",
             " + shrink * parameter", ""),
        ),
        "decay not multiplied by lr": (
            ("decay = lr * weight_decay", "decay = weight_decay"),
            ("1 - lr * weight_decay", "1 - weight_decay"),
            ("shrink = lr * weight_decay", "shrink = weight_decay"),
        ),
        "no decay": (
            (" - decay", ""),
            ("        p[i] *= 1 - lr * weight_decay\n", ""),
            (" + shrink * parameter", ""),
        ),
        "eps inside the root": (
            ("(np.sqrt(v_hat) + 1e-8)", "np.sqrt(v_hat + 1e-8)"),
            ("(math.sqrt(square) + 1e-8)", "math.sqrt(square + 1e-8)"),
            ("((second / c2) ** 0.5 + 1e-8)", "(second / c2 + 1e-8) ** 0.5"),
        ),
        "the betas exchanged": (
            ("b1, b2 = 0.9, 0.999", "b1, b2 = 0.999, 0.9"),
            ("0.999", "B", "0.9", "0.999", "B", "0.9"),
            ("weights=[0.9, 0.1]", "weights=[B, 0.001]", "weights=[0.999, 0.001]", "weights=[0.9, 0.1]",
             "0.9**", "B**", "0.999**", "0.9**", "B", "0.999"),
        ),
    },
)  # fmt: skip

CLIP_GRAD_NORM = Variants(
    "clipping",
    "clip_grad_norm",
    (
        """
def clip_grad_norm(grads, max_norm):
    norm = np.sqrt(sum((g**2).sum() for g in grads))
    if norm <= max_norm:
        return [g.copy() for g in grads], norm
    return [g * max_norm / norm for g in grads], norm
""",
        """
def clip_grad_norm(grads, max_norm):
    total = 0.0
    for g in grads:
        for element in g:
            total += element * element
    norm = math.sqrt(total)
    factor = min(1.0, max_norm / norm) if norm > 0 else 1.0
    clipped = [np.array([factor * element for element in g]) for g in grads]
    return clipped, norm
""",
        """
def clip_grad_norm(grads, max_norm):
    flat = np.concatenate(grads)
    norm = np.linalg.norm(flat)
    flat = flat / max(norm / max_norm, 1)
    ends = np.cumsum([len(g) for g in grads])
    return np.split(flat, ends[:-1]), norm
""",
    ),
    {
        "each array on its own": (
            ("    if norm <= max_norm:\n        return [g.copy() for g in grads], norm\n",
             "    each = [max(np.sqrt((g**2).sum()), max_norm) for g in grads]\n",
             "g * max_norm / norm for g in grads", "g * max_norm / n for g, n in zip(grads, each)"),
            ("    return clipped",
             "    clipped = []\n    for g in grads:\n        own = math.sqrt(sum(e * e for e in g))\n"
             "        clipped.append(g * max_norm / own if own > max_norm else g + 0)\n    return clipped"),
            ("np.split(flat, ends[:-1])", "[g / max(np.linalg.norm(g) / max_norm, 1) for g in grads]"),
        ),
        "small gradients enlarged": (
            ("norm <= max_norm", "norm == 0"),
            ("min(1.0, max_norm / norm)", "max_norm / norm"),
            ("max(norm / max_norm, 1)", "(norm / max_norm or 1)"),
        ),
        "elements clipped": (
            ("    if norm <= max_norm:\n        return [g.copy() for g in grads], norm\n", "",
             "g * max_norm / norm for", "np.clip(g, -max_norm, max_norm) for"),
            ("factor * element for", "max(-max_norm, min(max_norm, element)) for"),
            ("flat / max(norm / max_norm, 1)", "np.minimum(np.maximum(flat, -max_norm), max_norm)"),
        ),
        "the sum of the norms": (
            ("np.sqrt(sum((g**2).sum() for g in grads))", "sum(np.sqrt((g**2).sum()) for g in grads)"),
            ("        for element in g:\n            total += element * element\n    norm = math.sqrt(total)",
             "        total += math.sqrt(sum(e * e for e in g))\n    norm = total"),
            ("np.linalg.norm(flat)", "np.sum([np.linalg.norm(g) for g in grads])"),
        ),
        "the root forgotten": (
            ("np.sqrt(sum((g**2).sum() for g in grads))", "sum((g**2).sum() for g in grads)"),
            ("math.sqrt(total)", "total"),
            ("np.linalg.norm(flat)", "flat @ flat"),
        ),
        "the norm after clipping": (
            ("for g in grads], norm\n    return [g * max_norm / norm for g in grads], norm",
             "for g in grads], norm\n    return [g * max_norm / norm for g in grads], max_norm"),
            ("clipped, norm", "clipped, math.sqrt(sum(e * e for g in clipped for e in g))"),
            ("ends[:-1]), norm", "ends[:-1]), np.linalg.norm(flat)"),
        ),
    },
)  # fmt: skip

LEARNING_RATE = Variants(
    "schedule",
    "learning_rate",
    (
        """
def learning_rate(step, steps, warmup, lr, final_lr):
    if step < warmup:
        return lr * (step + 1) / warmup
    s = (step - warmup) / (steps - 1 - warmup)
    return final_lr + 0.5 * (lr - final_lr) * (1 + math.cos(math.pi * s))
""",
        """
def learning_rate(step, steps, warmup, lr, final_lr):
    rates = [lr / warmup * n for n in range(1, warmup + 1)]
    s = np.linspace(0, 1, steps - warmup)
    cosine = (1 + np.cos(np.pi * s)) / 2
    rates += list(lr * cosine + final_lr * (1 - cosine))
    return float(rates[step])
""",
        """
def learning_rate(step, steps, warmup, lr, final_lr):
    rising = (step + 1) / max(warmup, 1)
    last, start = steps - 1, warmup
    angle = np.pi * (step - start) / (last - start) / 2
    share = np.cos(angle) ** 2  # = (1 + cos 2a) / 2
    falling = share * lr + (1 - share) * final_lr
    return rising * lr if step < warmup else falling
""",
    ),
    {
        "the first step has rate 0": (
            ("(step + 1)", "step"),
            ("range(1, warmup + 1)", "range(warmup)"),
            ("(step + 1)", "step"),
        ),
        "final_lr not reached": (
            ("steps - 1 - warmup", "steps - warmup"),
            ("np.linspace(0, 1, steps - warmup)", "np.linspace(0, 1, steps - warmup, endpoint=False)"),
            ("last, start = steps - 1,", "last, start = steps,"),
        ),
        "no lr": (
            ("lr, final_lr):", "lr, final_lr):\n    lr = 1.0"),
            ("lr, final_lr):", "lr, final_lr):\n    lr = 1.0"),
            ("lr, final_lr):", "lr, final_lr):\n    lr = 1.0"),
        ),
        "no floor": (
            ("final_lr + 0.5 * (lr - final_lr)", "0.5 * lr"),
            (" + final_lr * (1 - cosine)", ""),
            (" + (1 - share) * final_lr", ""),
        ),
        "the half missing": (
            ("0.5 * ", ""),
            ("(1 + np.cos(np.pi * s)) / 2", "1 + np.cos(np.pi * s)"),
            ("np.cos(angle) ** 2", "1 + np.cos(2 * angle)"),
        ),
        "a line": (
            ("0.5 * (lr - final_lr) * (1 + math.cos(math.pi * s))", "(lr - final_lr) * (1 - s)"),
            ("(1 + np.cos(np.pi * s)) / 2", "1 - s"),
            ("np.cos(angle) ** 2", "(last - step) / (last - start)"),
        ),
        "warm-up counted in the cosine": (
            ("(step - warmup) / (steps - 1 - warmup)", "step / (steps - 1)"),
            ("np.linspace(0, 1, steps - warmup)", "np.linspace(0, 1, steps)[warmup:]"),
            ("start = steps - 1, warmup", "start = steps - 1, 0"),
        ),
    },
)

VARIANTS = [ADAMW_STEP, CLIP_GRAD_NORM, LEARNING_RATE]
