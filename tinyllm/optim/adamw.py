"""How does a gradient become a step?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from tinyllm.backend.cuda import launch
from tinyllm.backend.device import to_device, to_device_of
from tinyllm.checks import check_at_least
from tinyllm.errors import Error
from tinyllm.nn import loaded
from tinyllm.nn.module import check_leaf, zero_grad
from tinyllm.optim.parameters import Parameters, each_block_of, groups_of, is_rate, named, rows
from tinyllm.tensor import Tensor


class AdamW:
    """Adam with decoupled weight decay. Loshchilov and Hutter, arXiv 1711.05101, algorithm 2.

    At step t = 1, 2, … every parameter θ with gradient g, starting from m = v = 0, is updated by

        m = β₁ m + (1 - β₁) g          v = β₂ v + (1 - β₂) g²
        θ = θ - lr λ θ - lr (m / (1 - β₁ᵗ)) / (sqrt(v / (1 - β₂ᵗ)) + ε)

    Bias correction: unrolled, m = (1 - β₁) Σᵢ β₁^(t-i) gᵢ over i = 1..t. The weights sum to the geometric
    series (1 - β₁)(1 + β₁ + … + β₁^(t-1)) = 1 - β₁ᵗ, not to 1, because m started at 0. If every gᵢ has the
    expectation E[g], then E[m] = (1 - β₁ᵗ) E[g], so m / (1 - β₁ᵗ) is unbiased; likewise v and E[g²].

    Decoupled decay: an L2 penalty ½ λ θ² would add λ θ to g, and Adam would divide it by sqrt(v) like the
    rest, so parameters with large gradients would hardly decay. Subtracted from θ directly, lr λ θ shrinks
    every parameter by the same factor 1 - lr λ.

    ``parameters`` is a model, an iterable of Tensors or (name, Tensor) pairs, or a list of groups: dicts with
    "params" (any of these) and optionally "lr" and "weight_decay". Parameters that do not require a gradient
    are skipped and take no memory. ``lr`` may be changed between steps; a group's rate keeps its initial
    ratio to ``lr``, so that one schedule serves all groups.

    λ is ``weight_decay`` for parameters of two or more axes and 0 for biases and norms, unless the
    parameter's group has a weight_decay of its own. The paper decays every parameter; the exception is common
    practice since BERT's code: decay limits a matrix's gain, but a norm's neutral scale is 1 and not 0.

    For another rule define ``step`` in a subclass. It updates ``parameters``, pairs of a name and a Tensor,
    where there is a ``grad``, by ``options[name]``: the factor of ``lr``, and λ. Of what it keeps between
    steps ``state_dict`` has only ``state[name]``, a list of t and the arrays m and v.
    """

    group_options = "lr", "weight_decay"

    def __init__(
        self,
        parameters: Parameters | Iterable[dict],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        pair = isinstance(betas, Sequence) and len(betas) == 2 and all(is_rate(b) and b < 1 for b in betas)
        if not (pair and all(is_rate(x) for x in (lr, eps, weight_decay))):
            raise Error(
                f"{type(self).__name__} needs lr, eps and weight_decay of at least 0 and two betas in [0, 1)"
                f"; got lr={lr!r}, eps={eps!r}, weight_decay={weight_decay!r}, betas={betas!r}"
            )
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.parameters: list[tuple[str, Tensor]] = []
        self.options: dict[str, tuple[float, float]] = {}  # name -> (factor of lr, λ)
        groups = groups_of(parameters)
        for number, group in enumerate(groups):
            self._add(group, prefix=f"{number}." if len(groups) > 1 else "")
        if not self.parameters:
            raise Error("there is no parameter to train: set requires_grad = True on those to be trained")
        # name -> [t, m, v], created at a parameter's first step: together m and v take twice the memory of
        # the model, and until then its dtype may still change. They follow their parameter to another device.
        self.state: dict[str, list] = {}

    def _add(self, group: dict, prefix: str) -> None:
        """Add a group's parameters. ``prefix``, the group's number, distinguishes names of several groups."""
        if "params" not in group or group.keys() - {"params", *self.group_options}:
            options = ", ".join(self.group_options)
            raise Error(f"a parameter group needs params and may have {options}; this one has {list(group)}")
        lr, decay = group.get("lr", self.lr), group.get("weight_decay")
        if not (is_rate(lr) and (decay is None or is_rate(decay)) and (lr == self.lr or self.lr > 0)):
            raise Error(
                f"a group's lr {lr!r} and weight_decay {decay!r} must be at least 0, and the optimizer's lr "
                "above 0"
            )
        for name, parameter in named(group["params"]):
            if not parameter.requires_grad:
                continue
            check_leaf(name, parameter)
            if any(parameter is other for _, other in self.parameters):
                raise Error(f"parameter {name} is given twice: list each once, a tied one in one group only")
            name = prefix + name
            if name in self.options:
                raise Error(f"two parameters are named {name}: give (name, Tensor) pairs with distinct names")
            self.parameters.append((name, parameter))
            own = (self.weight_decay if parameter.ndim >= 2 else 0.0) if decay is None else decay
            self.options[name] = (1.0 if lr == self.lr else lr / self.lr, own)

    def reserve(self) -> None:
        """Allocate the averages now. The parameters' dtypes must not change afterwards.

        They outlive a step's other arrays. Allocated during the first step they would fragment the memory
        which later steps reuse: the peak for a 124M Llama is 2.18 GB with ``reserve()`` and 2.24 GB without.
        """
        for name, parameter in self.parameters:
            self._state_of(name, parameter)

    def _state_of(self, name: str, parameter: Tensor) -> list:
        like = self._own(name, parameter.data)
        if name not in self.state:
            loaded(parameter, f"parameter {name}")
            self.state[name] = [0, *(np.zeros_like(like) for _ in self._averages(name))]
        if (m := self.state[name][1]).shape != like.shape or m.dtype != like.dtype:
            raise Error(
                f"parameter {name} was replaced by {like.dtype} {like.shape}, but its averages are {m.dtype} "
                f"{m.shape}: create the optimizer anew"
            )
        return self.state[name]

    def _averages(self, name: str) -> str:
        """The averages kept for a parameter: m and v, in this order, or only m."""
        return "mv"

    @property
    def averages_nbytes(self) -> int:
        """The bytes of the averages of whole parameters, allocated or not."""
        return sum(len(self._averages(name)) * parameter.data.nbytes for name, parameter in self.parameters)

    def _own(self, name: str, array):
        """The elements of a parameter, or of its gradient, that this optimizer updates: all of them."""
        return array

    def to(self, device: str) -> AdamW:
        """Move m and v to "cpu", "cuda", "cuda:1" … now, instead of at the next step."""
        for state in self.state.values():
            state[1:] = (to_device(average, device) for average in state[1:])
        return self

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop every gradient or, with ``set_to_none=False``, fill it with zeros."""
        for _, parameter in self.parameters:
            zero_grad(parameter, set_to_none)

    def step(self) -> None:
        """Update every parameter that has a gradient, in place. The others keep their value and their t."""
        every = [(name, p) for name, p in self._elementwise() if p.grad is not None]
        together = launch.fit_for_many([array for _, p in every for array in (p.data, p.grad)])
        begun = [self._begin(name, parameter) for name, parameter in every]
        if together:
            arrays, numbers = zip(*begun)
            launch.adamw(*zip(*arrays), numbers, self.betas)
            return
        beta1, beta2 = self.betas

        def update(i, block):
            arrays, (step_size, eps, decay) = begun[i]
            theta, g, m, v = (array[block] for array in arrays)
            scratch = g * (1 - beta1)
            m *= beta1
            m += scratch
            np.multiply(g, 1 - beta2, out=scratch)  # before the square, which may overflow in float32
            scratch *= g
            v *= beta2
            v += scratch
            np.sqrt(v, out=scratch)
            scratch += eps
            np.divide(m, scratch, out=scratch)
            scratch *= step_size
            theta *= decay
            theta -= scratch

        each_block_of([arrays[0] for arrays, _ in begun], update)

    def _elementwise(self) -> list[tuple[str, Tensor]]:
        """The parameters that the formula above updates: all."""
        return self.parameters

    def _begin(self, name: str, parameter: Tensor) -> tuple[list, tuple[float, float, float]]:
        """Increment a parameter's t; returns its arrays (θ, g, m, v) and numbers (step size, ε, decay)."""
        t, arrays, lr, decay = self._advance(name, parameter)
        # Both bias corrections are folded into the step size and ε, which saves passes over memory.
        beta1, beta2 = self.betas
        root = math.sqrt(1 - beta2**t)
        return arrays, (lr * root / (1 - beta1**t), self.eps * root, decay)

    def _advance(self, name: str, parameter: Tensor) -> tuple[int, list, float, float]:
        """Increment a parameter's t; returns it, [θ, g, averages …], the rate, and the factor 1 - lr λ."""
        state, (factor, weight_decay) = self._state_of(name, parameter), self.options[name]
        state[0] += 1
        state[1:] = (to_device_of(average, parameter.data) for average in state[1:])
        own, lr = (self._own(name, parameter.data), self._own(name, parameter.grad)), self.lr * factor
        return state[0], [rows(array) for array in (*own, *state[1:])], lr, 1 - lr * weight_decay

    def state_dict(self) -> dict[str, dict]:
        """The state to resume from: "t", "m" and "v", each a dict by parameter name.

        Parameters that were never updated are absent. The arrays are those in use, not copies.
        """
        return {
            key: {name: state[i] for name, state in self.state.items() if state[0] > 0 and i < len(state)}
            for i, key in enumerate("tmv")
        }

    def load_state_dict(self, state: Mapping[str, Mapping]) -> None:
        """Resume from the result of ``state_dict``. Arrays are not copied unless their device must change.

        Raises ``Error``, and changes nothing, if a name is unknown or missing from one of the three dicts, or
        if a t is not a number of steps, or if the shape or dtype of an array differs from its parameter's.
        """
        parameters = dict(self.parameters)
        whole = isinstance(state, Mapping) and state.keys() >= {"t", "m", "v"}
        if not (whole and all(isinstance(state[key], Mapping) for key in "tmv")):
            raise Error('the optimizer state must be a dict with "t", "m" and "v": pass that of state_dict()')
        kept = {key: {name for name in state["t"] if key in self._averages(name)} for key in "mv"}
        if not parameters.keys() >= state["t"].keys() or any(state[key].keys() != kept[key] for key in "mv"):
            raise Error(
                "the optimizer state belongs to other parameters or to another optimizer: use the model and "
                "the optimizer it was saved with"
            )
        restored = {}
        for name, t in state["t"].items():
            like = self._own(name, parameters[name].data)
            averages = [state[key][name] for key in self._averages(name)]
            check_at_least(t, 0, f"the optimizer state's t of {name}")
            for array in averages:
                if not hasattr(array, "dtype"):
                    raise Error(f"the optimizer state of {name} is a {type(array).__name__}: give an array")
                if array.shape != like.shape or array.dtype != like.dtype:
                    raise Error(
                        f"the optimizer state of {name} is {array.dtype} {array.shape}, but the parameter is "
                        f"{like.dtype} {like.shape}: use the model it was saved with"
                    )
            restored[name] = [t, *(np.asarray(array, like=like) for array in averages)]
        self.state = restored
