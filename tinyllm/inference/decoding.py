"""Decoding steps that repeat the NumPy calls of recorded ones (``backend/recording.py``).

The model's first two steps are recorded, on a copy of it whose arrays record. In the third the plan made of
them must give the very logits that the model gives. From then on steps repeat the plan: the Python code of
layers and Tensors, half the time of a step of SmolLM2-135M, does not run. No architecture needs a second
forward pass, and a step's results are those of the model; where products were fused, up to rounding.

The model itself runs whenever something might differ: in modules and objects, such as ``Rope``, that are not
tinyllm's own, or of which a method was replaced, because their Python code may do more than call NumPy; while
somebody observes; on a GPU; after anything was replaced in the model, or if the columns of the cache that a
step reads do not follow those of the recorded steps. Rows of different lengths join and leave: what is
recorded writes where an array of indices says and hides what a mask says, and both are filled anew before
each step. A change of values in the parameters' arrays needs no such care: the plan reads these very arrays.
"""

from __future__ import annotations

import copy
import itertools
import operator
import threading
from collections.abc import Callable

import numpy as np

from tinyllm.backend.recording import NotRepeatable, Plan, offset, owner, recorded, recording
from tinyllm.backend.threads import FEW_ROWS, few_rows, in_this_thread
from tinyllm.models.cache import Cache, LayerCache, Place, RepeatedPlace
from tinyllm.nn import Module, evaluating
from tinyllm.nn.hooks import is_observed
from tinyllm.tensor import Tensor, mode

PLAIN = "builtins", "numpy"  # the modules of values that do nothing
FEW_STEPS = 16  # fewer steps do not pay for the recording
_joining = threading.Lock()  # held while parameters become neighbours in memory


class DecodingSteps:
    """``model(ids, last_only, cache)`` in eval mode, repeated for successive steps of the rows of a cache.

    ``steps`` is how many there will be at most; with fewer than ``FEW_STEPS`` nothing is recorded. Each
    recording belongs to one cache and, if its rows have different lengths, to the columns that layers with a
    window read. At most ``kept`` are kept, those used last, each begun after ``patience`` steps of its kind.
    """

    def __init__(self, model, steps: int, kept: int = 1, patience: int = 0):
        self.model, self.enabled, self.kept, self.patience = model, steps >= FEW_STEPS, kept, patience
        self.ignores_cache = False  # whether the model did, in a step or a prefill
        self.forget()

    def forget(self) -> None:
        """Free all recordings, and with them the caches to which they belong."""
        self.recordings: dict[tuple, _Recording] = {}

    def __call__(self, ids: np.ndarray, cache: Cache | None, last_only: bool = True) -> Tensor:
        places = self._places(ids, cache) if self.enabled and last_only else None
        recording = None if places is None else self._recording(cache, places)
        if recording is None:
            return self._run(ids, cache, last_only)
        positions = cache.lengths[:, None] if recording.places else cache.positions(1)
        if recording.columns and not recording.goes_on(cache, places, ids, positions):
            recording.forget()
        if recording.plan is None:
            return self._record(recording, ids, positions, cache, places)
        logits = recording.repeat(ids, positions, places).copy()
        if recording.is_checked:
            cache.advance(ids)
            return Tensor(logits)
        expected = self._run(ids, cache)
        recording.is_checked = self.enabled = np.array_equal(logits, expected.data)
        with _joining:
            if recording.is_checked and recording.unchanged(cache, ids, positions):  # by another thread
                recording.plan.fuse_products(adjacent(self.model))
                recording.plan.merge(few_rows.__wrapped__)
                recording.unchanged = _unchanged(self.model, cache, ids, positions)
        return expected

    def _run(self, ids, cache: Cache | None, last_only: bool = True) -> Tensor:
        with evaluating(self.model):
            logits = self.model(ids, last_only=last_only, cache=cache)
        self.ignores_cache |= cache is not None and cache.is_ignored
        return logits

    def _places(self, ids, cache: Cache | None) -> list[Place] | None:
        """Where the tokens go, in each kind of layer; None if the model itself must run."""
        if cache is None or ids.shape[1] != 1 or len(ids) >= FEW_ROWS or is_observed() or mode.watch:
            return None
        places = list(cache.places(*ids.shape).values())
        return places if places and all(place.stop <= place.capacity for place in places) else None

    def _recording(self, cache: Cache, places: list[Place]) -> _Recording | None:
        """That of steps like this one; None while there were too few of them."""
        masked = [place for place in places if place.mask is not None]
        key = cache, *((place.window, place.window and (place.first, place.end)) for place in masked)
        recording = self.recordings.pop(key, None)
        if recording is None:
            heads = cache.keys[0].shape[1]
            recording = _Recording({place.window: RepeatedPlace(place, heads) for place in masked})
        self.recordings[key] = recording  # the last one
        while len(self.recordings) > self.kept:
            del self.recordings[next(iter(self.recordings))]
        recording.seen += 1
        return recording if recording.seen > self.patience else None

    def _record(self, recording: _Recording, ids, positions, cache: Cache, places) -> Tensor:
        """Run and record a step; make the plan if it is the second."""
        try:
            if not recording.columns:
                # First of all: what another thread replaces from now on is noticed.
                recording.begin(_unchanged(self.model, cache, ids, positions), ids, positions)
                recording.model = _recorded_copy(self.model)
            calls, logits = recording.step(ids, positions, cache, places)
        except NotRepeatable:
            self.enabled = False
            return self._run(ids, cache)
        recording.columns.append(_columns(places))
        recording.calls.append(calls)
        if len(recording.calls) == 2:
            try:
                recording.plan = Plan(*recording.calls, logits, cache.capacity - places[0].stop)
            except NotRepeatable:
                self.enabled = False
            recording.calls, recording.model = [], None
        return Tensor(logits.copy())  # the plan computes later ones in the same memory


class _Recording:
    """The recorded steps of the rows of a cache, and their plan.

    ``places`` has those, by window, of the layers in which rows have different lengths.
    """

    def __init__(self, places: dict[int | None, RepeatedPlace]):
        self.places, self.seen = places, 0
        self.forget()

    def forget(self) -> None:
        self.plan, self.is_checked, self.columns, self.calls = None, False, [], []

    def begin(self, unchanged: Callable[..., bool], ids, positions) -> None:
        self.unchanged, self.ids, self.positions = unchanged, ids.copy(), positions.copy()

    def goes_on(self, cache: Cache, places: list[Place], ids, positions) -> bool:
        """Whether nothing changed but the tokens, and the columns follow those that were recorded."""
        return self._number(places) is not None and self.unchanged(cache, ids, positions)

    def _number(self, places: list[Place]) -> int | None:
        """The number of a step, 0 for the second that was recorded; None if its columns do not follow."""
        columns, first = _columns(places), self.columns[0]
        if len(self.columns) < 2:
            grow = [place.window not in self.places or place.window is None for place in places]
            follows = [now[1] - before[1] for before, now in zip(first, columns)] == grow
            return 0 if follows else None
        second = self.columns[1]
        grown = ((now[1] - y[1], y[1] - x[1]) for x, y, now in zip(first, second, columns))
        step = next((count for count, change in grown if change), 0)
        expected = [tuple(y + step * (y - x) for x, y in zip(*pair)) for pair in zip(first, second)]
        return step if columns == expected else None

    def repeat(self, ids, positions, places: list[Place]) -> np.ndarray:
        self._fill(ids, positions, places)
        return self.plan(self._number(places))

    def _fill(self, ids, positions, places: list[Place]) -> None:
        self.ids[...], self.positions[...] = ids, positions
        for place in places:
            if place.window in self.places:
                self.places[place.window].follow(place)

    def step(self, ids, positions, cache: Cache, places: list[Place]) -> tuple[list, np.ndarray]:
        """Record a step: its calls, and its logits."""
        self._fill(ids, positions, places)
        same = copy.copy(cache)  # its texts are the cache's own
        same.keys, same.values = list(map(recorded, cache.keys)), list(map(recorded, cache.values))
        same.positions = lambda count: recorded(self.positions)
        by_window = {place.window: place for place in places} | self.places
        parts = list(zip(same.keys, same.values, map(by_window.get, cache.windows)))
        same.layers = lambda rows, count: [LayerCache(*part) for part in parts]
        with recording() as calls, in_this_thread():
            logits = self.model(recorded(self.ids), last_only=True, cache=same)
        return calls, logits.data.view(np.ndarray)


def _columns(places: list[Place]) -> list[tuple[int, int]]:
    """The first and last column of the keys that each kind of layer reads."""
    return [(place.first, place.end) for place in places]


def _recorded_copy(model: Module) -> Module:
    """A copy of the model in eval mode. Its parameters are the same arrays, recorded; all else is shared.

    The model itself stays as it is, for other threads and whatever happens. Raises ``NotRepeatable`` unless
    it consists of tinyllm's own modules and objects, with float32 or float64 parameters on a CPU.
    """
    values, parts = {}, _parts(model)
    own = {kind for kind in set(map(type, parts)) if _is_own(kind)}
    for part in parts:
        kind = type(part)
        if kind not in own or any(callable(getattr(kind, name, None)) for name in vars(part)):
            raise NotRepeatable(f"{kind.__name__}, or a method set on it, may do more than call NumPy")
    for module in model.modules():
        values |= {id(value): value for _, value in module._attributes() if not isinstance(value, Module)}
    for parameter in model.parameters():
        if type(parameter.data) is not np.ndarray or parameter.dtype not in (np.float32, np.float64):
            raise NotRepeatable(f"a parameter is {parameter.dtype} in a {type(parameter.data).__name__}")
        values[id(parameter)] = Tensor(recorded(parameter.data))
    return copy.deepcopy(model, values).eval()


def _parts(model: Module) -> list:
    """The modules of a model, and the objects that they hold, such as ``Rope`` and the config."""
    found, left = {}, [model]
    while left:
        part = left.pop()
        if isinstance(part, list | tuple | dict):
            left += part.values() if isinstance(part, dict) else part
        elif not (id(part) in found or isinstance(part, Tensor) or type(part).__module__ in PLAIN):
            found[id(part)] = part
            left += getattr(part, "__dict__", {}).values()
    return list(found.values())


def _is_own(kind: type) -> bool:
    """Whether a class is one of tinyllm's, and none of its methods was replaced."""
    methods = [x for each in kind.__mro__[:-1] for x in vars(each).values() if callable(x)]
    return all(x.__module__.startswith("tinyllm.") for x in (kind, *methods))


def _unchanged(model: Module, cache: Cache, *inputs: np.ndarray) -> Callable[..., bool]:
    """A function that says whether these are still the cache, the inputs' shapes, and all parts of the model.

    It compares 2,000 references in a tenth of a millisecond, a fifth of the time of a walk over the modules.
    """
    parts, parameters = _parts(model), list(model.parameters())
    tables = [vars(part) for part in parts if hasattr(part, "__dict__")]
    for table in tables:  # also those that are appended here
        tables += [value for value in table.values() if isinstance(value, dict)]
    holders = [table for table in tables for _ in table]
    names = [name for table in tables for name in table]
    values = [value for table in tables for value in table.values()]
    lists = [value for value in values if isinstance(value, list)]
    items = list(itertools.chain(*lists))
    kinds = list(map(type, parts))
    classes = list({each for kind in kinds for each in kind.__mro__})
    methods, data = [dict(vars(each)) for each in classes], operator.attrgetter("data")
    arrays = list(map(data, parameters))
    shapes, keys = [x.shape for x in inputs], cache.keys

    def unchanged(other: Cache, *inputs: np.ndarray) -> bool:
        return (
            other is cache
            and other.keys is keys
            and [x.shape for x in inputs] == shapes
            and sum(map(len, tables)) == len(names)
            and sum(map(len, lists)) == len(items)
            and _same(map(dict.get, holders, names), values)
            and _same(itertools.chain(*lists), items)
            and _same(map(type, parts), kinds)
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
