"""How does a gradient become a step?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from tinyllm.backend.cuda import launch
from tinyllm.backend.device import to_device, to_device_of
from tinyllm.backend.threads import each_block, one_blas_thread
from tinyllm.errors import Error
from tinyllm.nn import Module
from tinyllm.tensor import Tensor

Parameters = Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]]  # what optimizers and clipping take


def _named(parameters: Parameters) -> list[tuple[str, Tensor]]:
    """(name, parameter) of each; tensors without a name are called by their number."""
    if isinstance(parameters, Module):
        return list(parameters.named_parameters())
    if isinstance(parameters, Tensor):
        raise Error("parameters are given as a model or a list: put the tensor into a list")
    entries = [
        (str(number), entry) if isinstance(entry, Tensor) else entry
        for number, entry in enumerate(parameters)
    ]
    for entry in entries:
        match entry:
            case (str(), Tensor()):
                continue
        raise Error(f"parameters are Tensors or pairs (name, Tensor), and one is a {type(entry).__name__}")
    return entries


class AdamW:
    """Adam with decoupled weight decay. Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.

    At step t, for every parameter θ with gradient g:

        m = β₁ m + (1 - β₁) g          v = β₂ v + (1 - β₂) g²
        θ = θ - lr λ θ - lr (m / (1 - β₁ᵗ)) / (sqrt(v / (1 - β₂ᵗ)) + ε)

    ``parameters`` is a model, a list of Tensors or of pairs (name, Tensor), or a list of groups: dicts of
    "params" (any of those) and, if they differ from the optimizer's, "lr" and "weight_decay". Those that
    require no gradient are left out, and take no memory. ``lr`` may be changed between steps; a group whose
    rate is k times the optimizer's at first keeps that factor, so that one schedule serves all.

    λ is ``weight_decay`` for parameters of two or more axes and 0 for biases and norms; a group's own
    weight_decay is that of all its parameters.
    """

    def __init__(
        self,
        parameters: Parameters | Iterable[dict],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        numbers = (lr, eps, weight_decay)
        if not all(_is_rate(x) for x in numbers) or len(betas) != 2 or not all(0 <= b < 1 for b in betas):
            raise Error(
                f"AdamW needs lr, eps and weight_decay of at least 0 and two betas in [0, 1); got lr={lr!r}, "
                f"eps={eps!r}, weight_decay={weight_decay!r}, betas={betas}"
            )
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.parameters: list[tuple[str, Tensor]] = []
        self._options: dict[str, tuple[float, float]] = {}  # name -> (factor of lr, λ)
        groups = _groups(parameters)
        for number, group in enumerate(groups):
            self._add(group, prefix=f"{number}." if len(groups) > 1 else "")
        if not self.parameters:
            raise Error("no parameter requires a gradient: set requires_grad = True where you want to train")
        # name -> [t, m, v], made at a parameter's first step: m and v together are twice as large as the
        # model, and until then it may still be converted. They follow their parameter to another device.
        self.state: dict[str, list] = {}

    def _add(self, group: dict, prefix: str) -> None:
        """The parameters of a group; of several, names begin with the group's number, to tell them apart."""
        unknown = group.keys() - {"params", "lr", "weight_decay"}
        if unknown or "params" not in group:
            raise Error(
                f"a group of parameters has params, lr and weight_decay, and this one has {set(group)}"
            )
        lr, decay = group.get("lr", self.lr), group.get("weight_decay")
        if not (_is_rate(lr) and (decay is None or _is_rate(decay)) and (lr == self.lr or self.lr > 0)):
            raise Error(
                f"a group's lr {lr!r} and weight_decay {decay!r} must be at least 0, and AdamW's lr above 0"
            )
        for name, parameter in _named(group["params"]):
            if not parameter.requires_grad:
                continue
            if any(parameter is other for _, other in self.parameters):
                raise Error(f"the parameter {name} is given twice: give each once, tied ones in one group")
            name = prefix + name
            if name in self._options:
                raise Error(f"two parameters are called {name}: give pairs (name, Tensor) with other names")
            self.parameters.append((name, parameter))
            own = (self.weight_decay if parameter.ndim >= 2 else 0.0) if decay is None else decay
            self._options[name] = (1.0 if lr == self.lr else lr / self.lr, own)

    def reserve(self) -> None:
        """Make m and v now. From here on the parameters must stay in their dtype.

        They outlive all arrays of a step. Made at the end of the first one, they would take places between
        those, and the next step would need others: 2.18 GB instead of 2.24 for a Llama of 124M parameters.
        """
        for name, parameter in self.parameters:
            if name not in self.state:
                self.state[name] = _no_step_yet(parameter)

    def to(self, device: str) -> AdamW:
        """Move m and v to "cpu", "cuda", "cuda:1" …; without it they follow at the next step."""
        for state in self.state.values():
            state[1:] = (to_device(average, device) for average in state[1:])
        return self

    def zero_grad(self) -> None:
        for _, parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        """Update every parameter that has a gradient, in place; the others keep their t, too."""
        beta1, beta2 = self.betas
        if launch.fit_for_many(
            [a for _, p in self.parameters if p.grad is not None for a in (p.data, p.grad)]
        ):
            begun = [self._begin(name, p) for name, p in self.parameters if p.grad is not None]
            arrays, numbers = zip(*begun)
            launch.adamw(*zip(*arrays), numbers, self.betas)
            return
        for name, parameter in self.parameters:
            if parameter.grad is None:
                continue
            arrays, (step_size, eps, decay) = self._begin(name, parameter)

            def update(block, arrays=arrays, step_size=step_size, eps=eps, decay=decay):
                theta, g, m, v = (array[block] for array in arrays)
                scratch = g * (1 - beta1)
                m *= beta1
                m += scratch
                np.multiply(g, g, out=scratch)
                scratch *= 1 - beta2
                v *= beta2
                v += scratch
                np.sqrt(v, out=scratch)
                scratch += eps
                np.divide(m, scratch, out=scratch)
                scratch *= step_size
                theta *= decay
                theta -= scratch

            _each_block_of(arrays[0], update)

    def _begin(self, name: str, parameter: Tensor) -> tuple[list, tuple[float, float, float]]:
        """One more step of a parameter: its (θ, g, m, v), and (step size, ε, decay)."""
        if name not in self.state:
            self.state[name] = _no_step_yet(parameter)
        state, (beta1, beta2) = self.state[name], self.betas
        state[0] += 1
        state[1:] = (to_device_of(average, parameter.data) for average in state[1:])
        # Both bias corrections, folded into the step size and ε: one pass over memory.
        root = math.sqrt(1 - beta2 ** state[0])
        factor, weight_decay = self._options[name]
        lr = self.lr * factor
        step_size, eps, decay = lr * root / (1 - beta1 ** state[0]), self.eps * root, 1 - lr * weight_decay
        arrays = [_rows(array) for array in (parameter.data, parameter.grad, *state[1:])]
        return arrays, (step_size, eps, decay)

    def state_dict(self) -> dict[str, dict]:
        """What later steps need of earlier ones: "t", "m" and "v", each by the parameters' names.

        Parameters that had no step yet have none. The arrays are those in use, not copies.
        """
        return {
            key: {name: state[i] for name, state in self.state.items() if state[0] > 0}
            for i, key in enumerate(("t", "m", "v"))
        }

    def load_state_dict(self, state: Mapping[str, Mapping]) -> None:
        """Go on from what ``state_dict`` gave. The arrays are taken as they are, on their parameters' device.

        Raises ``Error``, and changes nothing, if a name is unknown or in one of the three only, or if an
        array has not its parameter's shape and dtype.
        """
        parameters = dict(self.parameters)
        if not parameters.keys() >= state["t"].keys() == state["m"].keys() == state["v"].keys():
            raise Error("the optimizer's state is not of these parameters: use the model it was saved with")
        restored = {}
        for name, t in state["t"].items():
            like = parameters[name].data
            for array in (state["m"][name], state["v"][name]):
                if array.shape != like.shape or array.dtype != like.dtype:
                    raise Error(
                        f"the optimizer's state of {name} is {array.dtype} {array.shape}, the parameter "
                        f"{like.dtype} {like.shape}: use the model it was saved with"
                    )
            restored[name] = [t, *(np.asarray(state[key][name], like=like) for key in ("m", "v"))]
        self.state = restored


def _is_rate(x) -> bool:
    return isinstance(x, int | float | np.number) and 0 <= x < math.inf


def _groups(parameters) -> list[dict]:
    """The groups given, or one of all parameters."""
    if isinstance(parameters, (Module, Tensor)):
        return [{"params": parameters}]
    parameters = list(parameters)
    if parameters and all(isinstance(entry, dict) for entry in parameters):
        return parameters
    return [{"params": parameters}]


def _no_step_yet(parameter: Tensor) -> list:
    return [0, np.zeros_like(parameter.data), np.zeros_like(parameter.data)]


def _rows(array):
    """The array itself, or a view of its one element: something whose first axis can be cut into blocks."""
    return array if array.ndim else array.reshape(1)


def _each_block_of(array, function) -> None:
    each_block(function, array.shape[0], math.prod(array.shape[1:]), like=array)


def clip_grad_norm(parameters: Parameters, max_norm: float) -> float:
    """Scale all gradients, in place, so that their joint L2 norm is at most ``max_norm``.

    Returns the norm before. Pascanu, Mikolov and Bengio, arXiv 1211.5063, algorithm 1. As in torch,
    the factor is max_norm / (norm + 1e-6), and nothing changes where that is 1 or more.
    """
    if not max_norm > 0:
        raise Error(f"max_norm must be positive, not {max_norm}")
    grads = _grads(parameters)
    if launch.fit_for_many(grads):
        norm = math.sqrt(launch.sum_of_squares(grads))
    else:
        norm = math.sqrt(sum(map(_sum_of_squares, grads)))
    factor = max_norm / (norm + 1e-6)
    if factor < 1:
        scale(grads, factor)
    return norm


def _grads(parameters) -> list:
    return [_rows(parameter.grad) for _, parameter in _named(parameters) if parameter.grad is not None]


def scale(arrays: Sequence, factor: float) -> None:
    """Every array times ``factor``, in place."""
    if launch.fit_for_many(arrays):
        launch.scale(arrays, factor)
        return
    for x in arrays:

        def multiply(block, x=x):
            x[block] *= factor

        _each_block_of(x, multiply)


def _sum_of_squares(g) -> float:
    """Block by block in g's dtype, and the blocks in float64: millions of float32 squares would drown."""
    parts = {}

    def add(block):
        parts[block.start] = np.vdot(g[block], g[block]).item()

    with one_blas_thread():
        _each_block_of(g, add)
    return math.fsum(parts.values())  # exact, so it does not depend on which block was first


class NoLossScale:
    """The loss scale of types that need none: the methods of ``LossScale``, and nothing changes."""

    scale = 1.0

    def seed(self, loss: Tensor) -> None:
        """What ``loss.backward`` takes."""

    def unscale(self, parameters: Parameters) -> None:
        """The gradients are what they should be."""

    def update(self, finite: bool) -> None:
        """The next step's scale is 1, too."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: Mapping) -> None:
        """There is nothing to restore."""


class LossScale(NoLossScale):
    """Keeps small gradients from becoming zero in float16. Micikevicius et al., arXiv 1710.03740, 3.2.

    float16 has nothing between 0 and 6e-8, where many gradients lie. The loss is multiplied by S, and by the
    chain rule so is every gradient; before the update they are divided by S. As large an S as possible is
    found by trying, like torch's GradScaler: a step with a gradient that is not finite is left out and S
    halved; after 2,000 steps in a row without one S is doubled.
    """

    GROWTH_STEPS = 2000

    def __init__(self, scale: float = 65536.0):
        self.load_state_dict({"scale": scale, "good_steps": 0})

    def seed(self, loss: Tensor):
        """S, as the array that ``loss.backward`` takes: every gradient is S times what it is."""
        return np.full_like(loss.data, self.scale)

    def unscale(self, parameters: Parameters) -> None:
        """Divide all gradients, in place, by S."""
        scale(_grads(parameters), 1 / self.scale)  # a power of two, like S: exact

    def update(self, finite: bool) -> None:
        """Choose the next step's S, by whether this one's gradients were all finite."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.scale /= 2
        elif self.good_steps == self.GROWTH_STEPS:
            self.scale, self.good_steps = 2 * self.scale, 0

    def state_dict(self) -> dict[str, float | int]:
        """S and the number of good steps since it changed, as plain numbers."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Go on from what ``state_dict`` gave. Raises ``Error`` if S is not above 0 and finite."""
        if not 0 < state["scale"] < math.inf:
            raise Error(f"a loss scale must be above 0 and finite, not {state['scale']}")
        self.scale, self.good_steps = float(state["scale"]), state["good_steps"]


def warmup_cosine(
    peak_lr: float, initial_lr: float, min_lr: float, warmup: int, steps: int
) -> Callable[[int], float]:
    """step (from 0) -> learning rate: linear from ``initial_lr`` to ``peak_lr``, then a cosine to ``min_lr``.

    The rate rises by (peak - initial)/warmup a step and stands at the peak at step ``warmup``; then it is
    min + (peak - min) ½ (1 + cos(π x)) with x from 0 there to 1 at step ``steps``. Loshchilov and
    Hutter, "SGDR", arXiv 1608.03983, equation 5, without restarts.
    """
    if not 0 <= warmup < max(steps, 1):
        raise Error(f"warmup ({warmup} steps) must be shorter than the run ({steps} steps)")

    def lr_at(step: int) -> float:
        if step < warmup:
            return initial_lr + (peak_lr - initial_lr) * step / warmup
        progress = min(1.0, (step - warmup) / (steps - warmup))
        return min_lr + (peak_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    return lr_at
