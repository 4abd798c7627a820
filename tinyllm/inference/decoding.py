"""Decoding steps that repeat the NumPy calls of recorded ones (``backend/recording.py``).

The model's first two steps are recorded, on a copy of it whose arrays record. In the third the plan made of
them must give the very logits that the model gives. From then on steps repeat the plan: the Python code of
layers and Tensors, half the time of a step of SmolLM2-135M, does not run. No architecture needs a second
forward pass, and a step's results are those of the model; where products were fused, up to rounding.

The model itself runs whenever something might differ: in modules that are not tinyllm's own, or of which a
method was replaced, because their Python code may do more than call NumPy; while somebody observes; with rows
of different lengths; on a GPU; after anything was replaced in the model or the cache was rolled back, cleared
or moved. A change of values in the parameters' arrays needs no such care: the plan reads these very arrays.
"""

from __future__ import annotations

import copy
import itertools
import operator
import threading
from collections.abc import Callable

import numpy as np

from tinyllm.backend.recording import NotRepeatable, Plan, offset, owner, recorded, recording
from tinyllm.backend.threads import FEW_ROWS, in_this_thread
from tinyllm.models.cache import Cache
from tinyllm.nn import Module, evaluating
from tinyllm.nn.hooks import is_observed
from tinyllm.tensor import Tensor, mode

FEW_STEPS = 16  # fewer steps do not pay for the recording
_joining = threading.Lock()  # held while parameters become neighbours in memory


class DecodingSteps:
    """``model(ids, last_only, cache)`` in eval mode, repeated for successive steps of one text, or of several
    in step.

    ``steps`` is how many there will be at most; with fewer than ``FEW_STEPS`` nothing is recorded.
    """

    def __init__(self, model, steps: int):
        self.model, self.enabled = model, steps >= FEW_STEPS
        self._forget()

    def _forget(self) -> None:
        self.plan, self.is_checked, self.columns, self.calls = None, False, [], []

    def __call__(self, ids: np.ndarray, cache: Cache | None, last_only: bool = True) -> Tensor:
        columns = self._columns(ids, cache) if self.enabled and last_only else None
        if columns is None:
            return self._run(ids, cache, last_only)
        step, positions = self._number(columns), cache.positions(1)
        if self.columns and (step is None or not self.unchanged(cache, ids, positions)):
            self._forget()
        if self.plan is None:
            return self._record(ids, positions, cache, columns)
        self.ids[...], self.positions[...] = ids, positions
        logits = self.plan(step).copy()
        if self.is_checked:
            cache.advance(ids)
            return Tensor(logits)
        expected = self._run(ids, cache)
        self.is_checked = self.enabled = np.array_equal(logits, expected.data)
        with _joining:
            if self.is_checked and self.unchanged(cache, ids, positions):  # by another thread
                self.plan.fuse_products(adjacent(self.model))
                self.unchanged = _unchanged(self.model, cache, ids, positions)
        return expected

    def _run(self, ids, cache: Cache | None, last_only: bool = True) -> Tensor:
        with evaluating(self.model):
            return self.model(ids, last_only=last_only, cache=cache)

    def _columns(self, ids, cache: Cache | None) -> list[tuple[int, int]] | None:
        """The first and last column of the keys that each layer reads; None if the model itself must run."""
        if cache is None or ids.shape[1] != 1 or len(ids) >= FEW_ROWS or is_observed() or mode.watch:
            return None
        places = {id(layer.place): layer.place for layer in cache.layers(*ids.shape)}.values()
        if any(place.mask is not None or place.stop > place.capacity for place in places):
            return None
        return [(place.first, place.stop) for place in places] or None

    def _number(self, columns) -> int | None:
        """The number of a step, 0 for the second that was recorded; None if its columns do not follow."""
        if len(self.columns) < 2:
            follows = self.columns and columns[0][1] == self.columns[0][0][1] + 1
            return 0 if follows else None
        first, second = self.columns
        step = columns[0][1] - second[0][1]
        expected = [tuple(y + step * (y - x) for x, y in zip(*pair)) for pair in zip(first, second)]
        return step if columns == expected else None

    def _record(self, ids, positions, cache: Cache, columns) -> Tensor:
        """Run and record a step; make the plan if it is the second."""
        try:
            if not self.columns:
                # First of all: what another thread replaces from now on is noticed.
                self.unchanged = _unchanged(self.model, cache, ids, positions)
                self.ids, self.positions = ids.copy(), positions.copy()
                self.recorded = _recorded_copy(self.model)
            self.ids[...], self.positions[...] = ids, positions
            calls, logits = self._recorded_step(cache)
        except NotRepeatable:
            self.enabled = False
            return self._run(ids, cache)
        self.columns.append(columns)
        self.calls.append(calls)
        if len(self.calls) == 2:
            try:
                self.plan = Plan(*self.calls, logits, cache.capacity - columns[0][1])
            except NotRepeatable:
                self.enabled = False
            self.calls, self.recorded = [], None
        return Tensor(logits.copy())  # the plan computes later ones in the same memory

    def _recorded_step(self, cache: Cache) -> tuple[list, np.ndarray]:
        """The calls of a step, and its logits."""
        same = copy.copy(cache)  # its texts are the cache's own
        same.keys, same.values = list(map(recorded, cache.keys)), list(map(recorded, cache.values))
        same.positions = lambda count: recorded(self.positions)
        with recording() as calls, in_this_thread():
            logits = self.recorded(recorded(self.ids), last_only=True, cache=same)
        return calls, logits.data.view(np.ndarray)


def _recorded_copy(model: Module) -> Module:
    """A copy of the model in eval mode. Its parameters are the same arrays, recorded; all else is shared.

    The model itself stays as it is, for other threads and whatever happens. Raises ``NotRepeatable`` unless
    it consists of tinyllm's own modules, with float32 or float64 parameters on a CPU.
    """
    values, modules = {}, list(model.modules())
    own = {kind for kind in set(map(type, modules)) if _is_own(kind)}
    for module in modules:
        kind = type(module)
        if kind not in own or any(callable(getattr(kind, name, None)) for name in vars(module)):
            raise NotRepeatable(f"{kind.__name__}, or a method set on it, may do more than call NumPy")
        values |= {id(value): value for _, value in module._attributes() if not isinstance(value, Module)}
    for parameter in model.parameters():
        if type(parameter.data) is not np.ndarray or parameter.dtype not in (np.float32, np.float64):
            raise NotRepeatable(f"a parameter is {parameter.dtype} in a {type(parameter.data).__name__}")
        values[id(parameter)] = Tensor(recorded(parameter.data))
    return copy.deepcopy(model, values).eval()


def _is_own(kind: type[Module]) -> bool:
    """Whether a class is one of tinyllm's, and none of its methods was replaced."""
    methods = [x for each in kind.__mro__[:-1] for x in vars(each).values() if callable(x)]
    return all(x.__module__.startswith("tinyllm.") for x in (kind, *methods))


def _unchanged(model: Module, cache: Cache, *inputs: np.ndarray) -> Callable[..., bool]:
    """A function that says whether these are still the cache, the inputs' shapes, and all parts of the model.

    It compares 2,000 references in a tenth of a millisecond, a fifth of the time of a walk over the modules.
    """
    modules, parameters = list(model.modules()), list(model.parameters())
    owners = [vars(module) for module in modules]
    holders = [owner for owner in owners for _ in owner]
    names = [name for owner in owners for name in owner]
    values = [value for owner in owners for value in owner.values()]
    lists = [value for value in values if isinstance(value, list)]
    items = list(itertools.chain(*lists))
    kinds = list(map(type, modules))
    classes = list({each for kind in kinds for each in kind.__mro__})
    methods, data = [dict(vars(each)) for each in classes], operator.attrgetter("data")
    arrays = list(map(data, parameters))
    shapes, keys = [x.shape for x in inputs], cache.keys

    def unchanged(other: Cache, *inputs: np.ndarray) -> bool:
        return (
            other is cache
            and other.keys is keys
            and [x.shape for x in inputs] == shapes
            and sum(map(len, owners)) == len(names)
            and sum(map(len, lists)) == len(items)
            and _same(map(dict.get, holders, names), values)
            and _same(itertools.chain(*lists), items)
            and _same(map(type, modules), kinds)
            and list(map(vars, classes)) == methods
            and _same(map(data, parameters), arrays)
        )

    return unchanged


def _same(objects, others) -> bool:
    return all(map(operator.is_, objects, others))


def adjacent(model: Module) -> Callable[[list[np.ndarray]], np.ndarray | None]:
    """A function that maps parameters' arrays to one matrix of all their rows, of which they become views.

    It copies nothing if they are neighbours in memory already. None if an array is not a parameter's, or if
    two parameters share its memory: as views of different copies they would not be changed together.
    """
    parameters = list(model.parameters())
    by_place = {_place(parameter.data): parameter for parameter in parameters}

    def joined(matrices: list[np.ndarray]) -> np.ndarray | None:
        found = [by_place.get(_place(matrix)) for matrix in matrices]
        if None in found or len({matrix.dtype for matrix in matrices}) > 1:
            return None
        shape, memory = (sum(map(len, matrices)), matrices[0].shape[1]), owner(matrices[0])
        starts = [offset(matrix) for matrix in matrices]
        ends = [start + matrix.nbytes for start, matrix in zip(starts, matrices)]
        if all(owner(matrix) is memory for matrix in matrices) and starts[1:] == ends[:-1]:
            return np.ndarray(shape, matrices[0].dtype, memory, starts[0])
        arrays = [*matrices, *(parameter.data for parameter in parameters)]
        if any(sum(np.may_share_memory(matrix, x) for x in arrays) > 2 for matrix in matrices):
            return None  # more than the matrix and its parameter
        together, start = np.concatenate(matrices), 0
        for parameter, matrix in zip(found, matrices):
            parameter.data = together[start : start + len(matrix)]
            start += len(matrix)
        return together

    return joined


def _place(array: np.ndarray) -> tuple:
    return array.__array_interface__["data"][0], array.shape
