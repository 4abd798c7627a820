"""How does a step move all directions of a matrix equally?"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from tinyllm.backend.threads import each_block, one_blas_thread, run_tasks
from tinyllm.errors import Error
from tinyllm.nn import Embedding, Module
from tinyllm.optim.adamw import AdamW
from tinyllm.optim.parameters import Parameters
from tinyllm.tensor import Tensor

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a, b and c of Newton-Schulz
NORM_EPS = 1e-7  # the least norm that is divided by

SCALES = {
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
}


class Muon(AdamW):
    """Muon for hidden matrices, AdamW for all other parameters. Jordan et al., "Muon" (2024).

    A matrix W (A, B) with gradient G, starting from M = 0, is updated by

        M = μ M + (1 - μ) G            N = μ M + (1 - μ) G     (Nesterov; otherwise N = M)
        W = W - lr λ W - lr s O        O = U Vᵀ, where N = U S Vᵀ is the singular value decomposition

    Why U Vᵀ: to first order, a step D changes the loss by ⟨G, D⟩ = Σᵢ sᵢ uᵢᵀ D vᵢ, if G = U S Vᵀ. A matrix
    acts on inputs, so measure D by the most it can stretch one, its largest singular value ‖D‖. Since
    |uᵢᵀ D vᵢ| ≤ ‖D‖, the largest decrease among all D with ‖D‖ = 1 is Σᵢ sᵢ, and D = -U Vᵀ attains it. A step
    along G itself moves by sᵢ in direction i. The sᵢ of a gradient differ by orders of magnitude, so a few
    directions would take up the step. U Vᵀ moves all of them by 1, those of rare tokens too.

    Newton-Schulz approximates U Vᵀ with matrix products alone. For X = U S Vᵀ, the product (X Xᵀ)ᵏ X is
    U S²ᵏ⁺¹ Vᵀ, so an odd polynomial in X is that polynomial of its singular values:

        X = N / ‖N‖_F, then five times    X = a X + b (X Xᵀ) X + c (X Xᵀ)² X = U (a S + b S³ + c S⁵) Vᵀ

    The sum of all squared sᵢ, ‖N‖_F², bounds each, so they begin in [0, 1]. The slope at 0 is a, and five
    steps enlarge a small s by up to a⁵ = 485. Jordan chose the largest a for which no s leaves the
    neighbourhood of 1, not a polynomial that converges: from 0.002 on, s ends between 0.68 and 1.21, and
    training does not notice. If A > B, Xᵀ is iterated, since X Xᵀ is then (B, B), the smaller square.

    Scale: the A B elements of U Vᵀ have min(A, B) squares in all, a root mean square of 1 / sqrt(max(A, B)).
    With s = 0.2 sqrt(max(A, B)), "match_rms_adamw", a step has that of a typical step of AdamW, 0.2 lr, so
    one lr and one λ serve both (Liu et al., arXiv 2502.16982, section 2.2). Jordan's "original" is
    s = sqrt(max(1, A/B)); with it, give the matrices a group with a larger lr.

    ``parameters``, ``lr``, ``betas``, ``eps`` and ``weight_decay`` are those of ``AdamW``. Hidden matrices
    are all parameters with two axes; if a model is given, without embeddings, of which a step sees few rows,
    and without the output layer (``lm_head``), whose rows are tokens. A group with "muon": False has none.
    """

    group_options = "lr", "weight_decay", "muon"

    def __init__(
        self,
        parameters: Parameters | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        adjust_lr_fn: str = "match_rms_adamw",
        ns_steps: int = 5,
    ):
        number = isinstance(momentum, int | float) and isinstance(ns_steps, int)
        if not (number and 0 <= momentum < 1 and 0 < ns_steps < 100 and adjust_lr_fn in [*SCALES]):
            raise Error(
                f"Muon needs a momentum in [0, 1), 1 to 99 ns_steps and adjust_lr_fn {' or '.join(SCALES)}; "
                f"got momentum={momentum!r}, ns_steps={ns_steps!r}, adjust_lr_fn={adjust_lr_fn!r}"
            )
        self.momentum, self.nesterov, self.ns_steps = momentum, nesterov, ns_steps
        self.adjust_lr_fn = adjust_lr_fn
        self.hidden: set[str] = set()  # the names of the matrices
        super().__init__(parameters, lr, betas, eps, weight_decay)

    def _add(self, group: dict, prefix: str) -> None:
        if not isinstance(group.get("muon", True), bool):
            raise Error(f"a group's muon is {group['muon']!r}: give True or False")
        before, given, other = len(self.parameters), group.get("params"), set()
        super()._add(group, prefix)
        if isinstance(given, Module):
            heads = [getattr(module, "lm_head", None) for module in given.modules()]
            outside = [module for module in given.modules() if isinstance(module, Embedding)]
            outside += [head for head in heads if isinstance(head, Module)]
            other = {id(parameter) for module in outside for parameter in module.parameters()}
        if group.get("muon", True):
            added = self.parameters[before:]
            self.hidden |= {name for name, p in added if p.ndim == 2 and id(p) not in other}

    def _averages(self, name: str) -> str:
        return "m" if name in self.hidden else super()._averages(name)

    def _elementwise(self) -> list[tuple[str, Tensor]]:
        return [pair for pair in self.parameters if pair[0] not in self.hidden]

    def step(self) -> None:
        super().step()
        given = [pair for pair in self.parameters if pair[0] in self.hidden and pair[1].grad is not None]
        matrices = [self._advance(*pair) for pair in given]
        if not all(isinstance(arrays[0], np.ndarray) for _, arrays, _, _ in matrices):
            for matrix in matrices:
                self._update_matrix(matrix)
            return
        matrices.sort(key=lambda matrix: -matrix[1][0].size)  # so that no thread ends with the largest
        with one_blas_thread():  # each thread takes whole matrices
            run_tasks(self._update_matrix, matrices)

    def _update_matrix(self, matrix: tuple) -> None:
        _, (w, g, m), lr, decay = matrix
        update = np.empty(w.shape, w.dtype, like=w)

        def average(block):
            np.multiply(g[block], 1 - self.momentum, out=update[block])
            m[block] *= self.momentum
            m[block] += update[block]
            if self.nesterov:
                update[block] += self.momentum * m[block]
            else:
                update[block] = m[block]

        each_block(average, *w.shape, like=w)
        update = orthogonalize(update, self.ns_steps)
        lr *= SCALES[self.adjust_lr_fn](*w.shape)

        def move(block):
            w[block] *= decay
            update[block] *= lr
            w[block] -= update[block]

        each_block(move, *w.shape, like=w)


def orthogonalize(x, steps: int = 5):
    """U Vᵀ, approximately, of a matrix x (A, B), by Newton-Schulz (see ``Muon``). x is overwritten."""
    a, b, c = COEFFICIENTS
    tall = x.shape[0] > x.shape[1]
    x /= np.maximum(np.sqrt(np.vdot(x, x)), NORM_EPS)
    other = np.empty_like(x)
    for _ in range(steps):
        gram = x.T @ x if tall else x @ x.T  # symmetric: BLAS computes one half
        polynomial = gram @ gram.T
        polynomial *= c
        gram *= b
        polynomial += gram
        polynomial.reshape(-1)[:: len(gram) + 1] += a  # the diagonal
        np.matmul(*((x, polynomial) if tall else (polynomial, x)), out=other)
        x, other = other, x
    return x
