"""Decoding steps that repeat the NumPy calls of recorded ones (``backend/recording.py``).

The model runs its first two steps as always, while its NumPy calls are recorded. In the third step the plan
made of them must give the very logits that the model gives. From then on steps repeat the plan: the Python
code of layers and Tensors, half the time of a step of SmolLM2-135M, does not run. No architecture needs a
second forward pass, and a step's results are those of the model, bit for bit.

The model itself runs whenever something might differ: in modules that are not tinyllm's own, because their
Python code may do more than call NumPy; while somebody observes; with rows of different lengths; on a GPU;
after anything was replaced in the model or the cache was rolled back, cleared or moved.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from tinyllm.backend.recording import NotRepeatable, Plan, offset, owner, recorded, recording
from tinyllm.backend.threads import FEW_ROWS, in_this_thread
from tinyllm.models.cache import Cache
from tinyllm.nn.hooks import is_observed
from tinyllm.tensor import Tensor, mode

FEW_STEPS = 16  # fewer steps do not pay for the recording


class DecodingSteps:
    """``model(ids, last_only, cache)``, repeated for successive steps of one text, or of several in step.

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
            return self.model(ids, last_only=last_only, cache=cache)
        step = self._number(columns)
        if self.columns and (step is None or not self.unchanged(cache, ids)):
            self._forget()
        if self.plan is None:
            return self._record(ids, cache, columns)
        self.ids[...], self.positions[...] = ids, cache.positions(1)
        logits = self.plan(step).copy()
        if self.is_checked:
            cache.advance(ids)
            return Tensor(logits)
        expected = self._run(ids, cache)
        self.is_checked = self.enabled = np.array_equal(logits, expected.data)
        if self.is_checked:
            self.plan.fuse_products(adjacent(self.model))
            self.unchanged = _unchanged(self.model, cache, ids)
        return expected

    def _run(self, ids, cache) -> Tensor:
        return self.model(ids, last_only=True, cache=cache)

    def _columns(self, ids, cache: Cache | None) -> list[tuple[int, int]] | None:
        """The first and last column of the keys that each layer reads; None if the model itself must run."""
        if cache is None or ids.shape[1] != 1 or len(ids) >= FEW_ROWS or is_observed() or mode.watch:
            return None
        places = {id(layer.place): layer.place for layer in cache.layers(*ids.shape)}.values()
        if any(place.mask is not None or place.stop > place.capacity for place in places):
            return None
        return [(place.first, place.stop) for place in places]

    def _number(self, columns) -> int | None:
        """The number of a step, 0 for the second that was recorded; None if its columns do not follow."""
        if len(self.columns) < 2:
            follows = self.columns and columns[0][1] == self.columns[0][0][1] + 1
            return 0 if follows else None
        first, second = self.columns
        step = columns[0][1] - second[0][1]
        expected = [tuple(y + step * (y - x) for x, y in zip(*pair)) for pair in zip(first, second)]
        return step if columns == expected else None

    def _record(self, ids, cache, columns) -> Tensor:
        """Run and record a step; make the plan if it is the second."""
        if not self.columns:
            self.unchanged = _unchanged(self.model, cache, ids)
            self.ids, self.positions = ids.copy(), cache.positions(1)
        self.ids[...], self.positions[...] = ids, cache.positions(1)
        try:
            if not is_repeatable(self.model):
                raise NotRepeatable("a module is not tinyllm's own, or a parameter is on a GPU")
            calls, logits = self._recorded(cache)
            self.columns.append(columns)
            self.calls.append(calls)
        except NotRepeatable:
            self.enabled = False
            return self._run(ids, cache)
        if len(self.calls) == 2:
            try:
                self.plan = Plan(*self.calls, logits, cache.capacity - columns[0][1])
            except NotRepeatable:
                self.enabled = False
            self.calls = []
        return Tensor(logits.copy())  # the plan computes later ones in the same memory

    def _recorded(self, cache: Cache) -> tuple[list, np.ndarray]:
        """Run a step on recorded arrays: the calls, and the logits."""
        parameters, keys, values = list(self.model.parameters()), cache.keys, cache.values
        arrays = [parameter.data for parameter in parameters]
        cache.keys, cache.values = list(map(recorded, keys)), list(map(recorded, values))
        cache.positions = lambda count: recorded(self.positions)
        try:
            for parameter, array in zip(parameters, arrays):
                parameter.data = recorded(array)
            with recording() as calls, in_this_thread():
                logits = self._run(recorded(self.ids), cache)
        finally:
            for parameter, array in zip(parameters, arrays):
                parameter.data = array
            cache.keys, cache.values = keys, values
            del cache.positions
        return calls, logits.data.view(np.ndarray)


def is_repeatable(model) -> bool:
    """Whether a model consists of tinyllm's own modules, with float32 or float64 parameters on a CPU."""
    own = all(
        type(module).__module__.startswith("tinyllm.") and not {"forward", "__call__"} & vars(module).keys()
        for module in model.modules()
    )
    return own and all(
        type(parameter.data) is np.ndarray and parameter.dtype in (np.float32, np.float64)
        for parameter in model.parameters()
    )


def _unchanged(model, cache, ids) -> Callable[[Cache, np.ndarray], bool]:
    """A function that says whether these are still the cache, the shape, and all parts of the model.

    It compares 1,500 references in a tenth of a millisecond, where a walk over the modules takes several.
    """
    modules = list(model.modules())
    owners = [vars(module) for module in modules]
    holders = [owner for owner in owners for _ in owner]
    names = [name for owner in owners for name in owner]
    values = [value for owner in owners for value in owner.values()]
    containers = [(value, value.copy()) for value in values if isinstance(value, list | dict)]
    parameters = list(model.parameters())
    arrays, data = [parameter.data for parameter in parameters], operator.attrgetter("data")
    shape, keys = ids.shape, cache.keys

    def unchanged(other: Cache, ids: np.ndarray) -> bool:
        return (
            other is cache
            and other.keys is keys
            and ids.shape == shape
            and sum(map(len, owners)) == len(names)
            and all(map(operator.is_, map(dict.get, holders, names), values))
            and all(now == before for now, before in containers)
            and all(map(operator.is_, map(data, parameters), arrays))
        )

    return unchanged


def adjacent(model) -> Callable[[list[np.ndarray]], np.ndarray | None]:
    """A function that maps parameters' arrays to one matrix of all their rows, of which they become views.

    It copies nothing if they are neighbours in memory already; None if an array is not a parameter's.
    """
    parameters = {_place(parameter.data): parameter for parameter in model.parameters()}

    def joined(matrices: list[np.ndarray]) -> np.ndarray | None:
        found = [parameters.get(_place(matrix)) for matrix in matrices]
        if None in found or len({matrix.dtype for matrix in matrices}) > 1:
            return None
        shape, memory = (sum(map(len, matrices)), matrices[0].shape[1]), owner(matrices[0])
        starts = [offset(matrix) for matrix in matrices]
        ends = [start + matrix.nbytes for start, matrix in zip(starts, matrices)]
        if all(owner(matrix) is memory for matrix in matrices) and starts[1:] == ends[:-1]:
            return np.ndarray(shape, matrices[0].dtype, memory, starts[0])
        together, start = np.concatenate(matrices), 0
        for parameter, matrix in zip(found, matrices):
            parameter.data = together[start : start + len(matrix)]
            start += len(matrix)
        return together

    return joined


def _place(array: np.ndarray) -> tuple:
    return array.__array_interface__["data"][0], array.shape
