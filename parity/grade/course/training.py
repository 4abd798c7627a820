"""Exercises on AdamW, clipping and the learning-rate schedule."""

import math

import numpy as np
import torch
from hypothesis import strategies as st

from parity.grade.exercise import Mistake, Part, arrays, exercise, sizes

# --------------------------------------------------------------------------------------- AdamW


@st.composite
def adamw_inputs(draw):
    size = draw(sizes())
    given = {name: draw(arrays(size)) for name in ("parameter", "grad", "m")}
    given |= {"v": draw(arrays(size)) ** 2, "step": draw(st.integers(1, 5))}
    return given | {
        "lr": draw(st.sampled_from([0.1, 1e-3])),
        "weight_decay": draw(st.sampled_from([0.5, 0.0])),
    }


def torch_adamw(parameter, grad, m, v, step, lr, weight_decay):
    """One step of torch.optim.AdamW from the given averages; ``step`` counts from 1."""
    p = torch.tensor(parameter, requires_grad=True)
    optimizer = torch.optim.AdamW([p], lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay)
    optimizer.state[p] = {
        "step": torch.tensor(float(step - 1)), "exp_avg": torch.tensor(m), "exp_avg_sq": torch.tensor(v)
    }  # fmt: skip
    p.grad = torch.tensor(grad)
    optimizer.step()
    state = optimizer.state[p]
    return p.detach().numpy(), state["exp_avg"].numpy(), state["exp_avg_sq"].numpy()


def adamw(
    parameter, grad, m, v, step, lr, weight_decay, correct_m=True, correct_v=True, first=1, coupled=False,
    decay_by_lr=True, eps_inside=False, betas=(0.9, 0.999),
):  # fmt: skip
    t, (b1, b2) = step - 1 + first, betas
    if coupled:
        grad = grad + weight_decay * parameter
    m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
    m_hat, v_hat = m / (1 - b1**t if correct_m else 1), v / (1 - b2**t if correct_v else 1)
    decay = 0.0 if coupled else (lr if decay_by_lr else 1.0) * weight_decay
    root = np.sqrt(v_hat + 1e-8) if eps_inside else np.sqrt(v_hat) + 1e-8
    return parameter * (1 - decay) - lr * m_hat / root, m, v


exercise(
    "adamw",
    Part(
        "adamw_step",
        ("parameter", "m", "v"),
        adamw_inputs(),
        torch_adamw,
        (
            Mistake(
                "no bias correction",
                "m and v start at 0: divide them by 1 - beta1^step and 1 - beta2^step before the update.",
                lambda **given: adamw(**given, correct_m=False, correct_v=False),
            ),
            Mistake(
                "no bias correction of v",
                "v starts at 0, too: divide it by 1 - beta2^step.",
                lambda **given: adamw(**given, correct_v=False),
            ),
            Mistake(
                "no bias correction of m",
                "m starts at 0, too: divide it by 1 - beta1^step.",
                lambda **given: adamw(**given, correct_m=False),
            ),
            Mistake(
                "steps counted from 0",
                "step counts from 1: the exponent of the bias corrections is step itself.",
                lambda **given: adamw(**given, first=2),
            ),
            Mistake(
                "decay in the gradient",
                "That is Adam with L2 regularization: AdamW subtracts lr · weight_decay · parameter itself, "
                "so that the decay is not divided by sqrt(v).",
                lambda **given: adamw(**given, coupled=True),
            ),
            Mistake(
                "decay not multiplied by lr",
                "The decay is multiplied by the learning rate, too: lr · weight_decay · parameter.",
                lambda **given: adamw(**given, decay_by_lr=False),
            ),
            Mistake(
                "no decay",
                "weight_decay does not affect your result: subtract lr · weight_decay · parameter.",
                lambda **given: adamw(**given | {"weight_decay": 0.0}),
            ),
            Mistake(
                "eps inside the root",
                "eps is added to the root: sqrt(v_hat) + eps.",
                lambda **given: adamw(**given, eps_inside=True),
            ),
            Mistake(
                "the betas exchanged",
                "beta1 = 0.9 is of the average of the gradients, beta2 = 0.999 of that of their squares.",
                lambda **given: adamw(**given, betas=(0.999, 0.9)),
            ),
        ),
    ),
)

# ------------------------------------------------------------------------------------ clipping


@st.composite
def gradient_lists(draw):
    grads = [draw(arrays(draw(sizes()))) for _ in range(draw(sizes(1, 3)))]
    return {"grads": grads, "max_norm": draw(st.sampled_from([1.0, 0.25, 100.0]))}


def torch_clip(grads, max_norm):
    leaves = [torch.zeros(g.shape, dtype=torch.float64, requires_grad=True) for g in grads]
    for leaf, g in zip(leaves, grads):
        leaf.grad = torch.tensor(g)
    norm = float(torch.nn.utils.clip_grad_norm_(leaves, max_norm))
    # torch adds 1e-6 to the norm; the formula of Pascanu et al. does not
    factor = min(1.0, max_norm / norm) if norm else 1.0
    return [g * factor for g in grads], norm


def clipped(grads, max_norm, norm, always=False):
    factor = max_norm / norm if norm and (always or norm > max_norm) else 1.0
    return [g * factor for g in grads], float(norm)


def norm_of(grads):
    return math.sqrt(sum(float((g**2).sum()) for g in grads))


exercise(
    "clipping",
    Part(
        "clip_grad_norm",
        ("clipped", "norm"),
        gradient_lists(),
        torch_clip,
        (
            Mistake(
                "each array on its own",
                "There is one norm, of all gradients together: clipping each array changes the direction.",
                lambda grads, max_norm: (
                    [clipped([g], max_norm, norm_of([g]))[0][0] for g in grads], norm_of(grads)
                ),
            ),
            Mistake(
                "small gradients enlarged",
                "Gradients whose norm is below max_norm stay as they are: the factor is at most 1.",
                lambda grads, max_norm: clipped(grads, max_norm, norm_of(grads), always=True),
            ),
            Mistake(
                "elements clipped",
                "That limits every element, which changes the direction; all are multiplied by one factor.",
                lambda grads, max_norm: ([np.clip(g, -max_norm, max_norm) for g in grads], norm_of(grads)),
            ),
            Mistake(
                "the sum of the norms",
                "The norm of all gradients is the root of the sum of all squares, not the sum of the norms.",
                lambda grads, max_norm: clipped(grads, max_norm, sum(norm_of([g]) for g in grads)),
            ),
            Mistake(
                "the root forgotten",
                "The norm is the square root of the sum of squares.",
                lambda grads, max_norm: clipped(grads, max_norm, norm_of(grads) ** 2),
            ),
            Mistake(
                "the norm after clipping",
                "Return the norm before clipping: it is what one wants to see in a log.",
                lambda grads, max_norm: (
                    clipped(grads, max_norm, norm_of(grads))[0], min(norm_of(grads), max_norm)
                ),
            ),
        ),
    ),
)  # fmt: skip

# ------------------------------------------------------------------------------------ schedule


@st.composite
def schedule_inputs(draw):
    warmup, more = draw(st.integers(0, 5)), draw(st.integers(2, 10))
    step = draw(st.integers(0, warmup + more - 1))
    lr, final_lr = draw(st.sampled_from([1.0, 0.5])), draw(st.sampled_from([0.0, 0.1]))
    return {"step": step, "steps": warmup + more, "warmup": warmup, "lr": lr, "final_lr": final_lr}


def schedule(step, steps, warmup, lr, final_lr, first=1, last=1, half=0.5, floor=True, linear=False):
    if step < warmup:
        return lr * (step + first) / warmup
    done = (step - warmup) / (steps - last - warmup)
    low = final_lr if floor else 0.0
    share = 1 - done if linear else half * (1 + math.cos(math.pi * done))
    return low + (lr - low) * share


def torch_schedule(step, steps, warmup, lr, final_lr):
    """The same from torch's own schedulers."""
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=lr)
    rates = []
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - 1 - warmup, eta_min=final_lr)
    for _ in range(steps - warmup):
        rates.append(cosine.get_last_lr()[0])
        optimizer.step()
        cosine.step()
    return lr * (step + 1) / warmup if step < warmup else float(rates[step - warmup])


exercise(
    "schedule",
    Part(
        "learning_rate",
        ("rate",),
        schedule_inputs(),
        torch_schedule,
        (
            Mistake(
                "the first step has rate 0",
                "Step 0 is the first of the warm-up and must learn, too: lr (step + 1) / warmup.",
                lambda **given: schedule(**given, first=0),
            ),
            Mistake(
                "final_lr not reached",
                "The last step is steps - 1: there the cosine must have reached final_lr.",
                lambda **given: schedule(**given, last=0),
            ),
            Mistake(
                "no lr",
                "lr does not affect your result: the warm-up rises to it, and the cosine falls from it.",
                lambda **given: schedule(**given | {"lr": 1.0}),
            ),
            Mistake(
                "no floor",
                "The cosine falls from lr to final_lr, not to 0.",
                lambda **given: schedule(**given, floor=False),
            ),
            Mistake(
                "the half missing",
                "1 + cos is 2 at its start: multiply by 1/2.",
                lambda **given: schedule(**given, half=1.0),
            ),
            Mistake(
                "a line",
                "The rate falls along half a cosine, not along a line.",
                lambda **given: schedule(**given, linear=True),
            ),
            Mistake(
                "warm-up counted in the cosine",
                "The cosine begins when the warm-up ends: count its steps from there.",
                lambda step, steps, warmup, lr, final_lr: (
                    schedule(step, steps, warmup, lr, final_lr)
                    if step < warmup
                    else schedule(step, steps, 0, lr, final_lr)
                ),
            ),
        ),
    ),
)
