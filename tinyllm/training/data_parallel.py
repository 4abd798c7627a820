"""How do several processes take one step together?

Each of N processes has the whole model and computes the gradient of its rows of the batch (``deal``).
The sum of these gradients is that of the whole batch, since every process divides by the number of all
targets. All parameters in a row are one vector θ, which is cut into N shares of equal size; process r owns
the r-th:

    g_r = (Σ over processes of their gradients)_r     reduce-scatter
    ‖g‖ = sqrt(Σ over r of ‖g_r‖²)                    each process sends one number
    g_r = g_r · min(1, clip / ‖g‖)

Then either every process gets all of g and updates all of θ with it, or (ZeRO-1: Rajbhandari et al., arXiv
1910.02054, section 5.1) it updates its own share only, keeps AdamW's averages of that share only, and gets
the rest of θ:

    plain    all-gather g,  θ = AdamW(θ, g)
    ZeRO-1   θ_r = AdamW(θ_r, g_r),  all-gather θ

Both move the same number of bytes, and AdamW is elementwise, so their weights are equal to the last bit.
Arrays move in buckets, which bound the memory for them.
"""

from __future__ import annotations

import bisect
import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np

from tinyllm.backend.device import to_device
from tinyllm.backend.distributed import MPI
from tinyllm.errors import Error
from tinyllm.optim import AdamW, clip, sum_of_squares
from tinyllm.training.step import Alone, Check, MicroBatch, micro_batches

BUCKET = 2**22  # elements that a process sends at once: 16 MB in float32


class Replicas(Alone):
    """One of several processes, each of which has the whole model; see the top of this file."""

    def __init__(self, processes: MPI, optimizer: AdamW):
        self.processes = processes
        self.losses_of: list[list[float]] = []  # of the last step, by rank
        self._fingerprint: list[int] = []
        self._parameters = [parameter for _, parameter in optimizer.parameters]
        for parameter in self._parameters:
            if not parameter.data.flags.c_contiguous:  # a vector is a view of its memory
                parameter.replace(parameter.data.copy())
        self._cut = Shares([parameter.shape for parameter in self._parameters], processes.size)

    @contextmanager
    def dealt(self, batch: tuple, size: int, how: tuple) -> Iterator[list[MicroBatch]]:
        """The micro-batches are those of a single process; each process computes a run of them."""
        self._fingerprint = [zlib.crc32(np.ascontiguousarray(array)) for array in batch]
        yield runs(micro_batches(batch, size), self.processes.size)[self.processes.rank]

    def all_losses(self, losses: list[float]) -> list[float]:
        """Raises ``Error`` if a process has another batch than the first one."""
        here = [parameter.grad is not None for parameter in self._parameters]
        found = self.processes.gather((losses, self._fingerprint, here))
        for rank, (_, fingerprint, _) in enumerate(found):
            if fingerprint != found[0][1]:
                name = self.processes.name(rank)
                raise Error(f"{name} has another batch than process 0: give all processes the same data")
        for index, parameter in enumerate(self._parameters):
            if parameter.grad is None and any(there[index] for _, _, there in found):  # this one had no rows
                parameter.grad = np.zeros_like(parameter.data)
        self.losses_of = [theirs for theirs, _, _ in found]
        return list(itertools.chain(*self.losses_of))

    def clip_grad_norm(self, optimizer: AdamW, max_norm: float, check: Check) -> float:
        self.sum_gradients()
        check()  # before a message, which the others receive if this raises
        return self.clip(max_norm)

    def sum_gradients(self) -> None:
        """Reduce-scatter: this process's share of its gradients becomes that of the sum."""
        gradients, own = self._gradients(), self._cut.start(self.processes.rank)
        for bucket in self._cut.buckets():
            parts = (gradients.read(self._cut.start(owner), bucket) for owner in range(self.processes.size))
            addends = np.stack(list(parts))
            total = np.empty_like(addends[0])
            self.processes.reduce_scatter(addends, total)
            gradients.write(own + bucket.start, total)

    def clip(self, max_norm: float) -> float:
        """Clip this process's share of the summed gradients by the norm of all of them."""
        start = self._cut.start(self.processes.rank)
        own = [array for _, array in self._gradients().pieces(start, start + self._cut.size)]
        norm = math.sqrt(sum(self.processes.gather(sum_of_squares(own))))
        clip(own, norm, max_norm)
        return norm

    def update(self, optimizer: AdamW) -> None:
        for part in self.parts_of_update(optimizer).values():
            part()

    def parts_of_update(self, optimizer: AdamW) -> dict[str, Callable[[], None]]:
        """What ``update`` does, in order."""
        if isinstance(optimizer, ShardedAdamW):
            parameters = self._vector([parameter.data for parameter in self._parameters])
            return {"AdamW": optimizer.step, "all-gather": lambda: self.spread(parameters)}
        return {
            "all-gather": lambda: self.spread(self._gradients()),
            type(optimizer).__name__: optimizer.step,
        }

    def parts(self, optimizer: AdamW, max_norm: float) -> dict[str, Callable[[], object]]:
        """What follows the gradients in a step, in order, as functions to profile."""
        summing = {"reduce-scatter": self.sum_gradients, "clip_grad_norm": lambda: self.clip(max_norm)}
        return summing | self.parts_of_update(optimizer)

    def spread(self, vector: Vector) -> None:
        """All-gather: every process gets every other's share of the vector."""
        start = self._cut.start(self.processes.rank)
        for position, part in all_shares(
            self.processes, self._cut, lambda bucket: vector.read(start, bucket)
        ):
            vector.write(position, part)

    def _gradients(self) -> Vector:
        return self._vector([parameter.grad for parameter in self._parameters])

    def _vector(self, arrays: list) -> Vector:
        return Vector(arrays, self._cut, self._parameters[0].data)


def runs(parts: list, number: int) -> list[list]:
    """A list in ``number`` consecutive parts of nearly equal length."""
    ends = [len(parts) * rank // number for rank in range(number + 1)]
    return [parts[start:stop] for start, stop in itertools.pairwise(ends)]


def all_shares(
    processes: MPI, cut: Shares, own: Callable[[range], np.ndarray]
) -> Iterator[tuple[int, np.ndarray]]:
    """(position, elements) of the parts of a vector; ``own(bucket)`` reads this process's share of it."""
    for bucket in cut.buckets():
        part = own(bucket)
        whole = np.empty((processes.size, len(bucket)), part.dtype, like=part)
        processes.all_gather(part, whole)
        for owner in range(processes.size):
            yield cut.start(owner) + bucket.start, whole[owner]


class Shares:
    """How arrays of these shapes, in a row, are cut into equal shares; the last one is padded."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], number: int):
        self.sizes = [math.prod(shape) for shape in shapes]
        self.ends = list(itertools.accumulate(self.sizes))
        self.number, self.size = number, -(-self.ends[-1] // number)

    def start(self, owner: int) -> int:
        """Where a share begins in the vector."""
        return owner * self.size

    def buckets(self) -> Iterator[range]:
        """The ranges, within every share, that move in one call."""
        size = max(1, BUCKET // self.number)
        for first in range(0, self.size, size):
            yield range(first, min(first + size, self.size))

    def own(self, owner: int, index: int) -> slice:
        """The elements of the array of this index that are in the owner's share."""
        size = self.sizes[index]
        begin = self.start(owner) - (self.ends[index] - size)
        return slice(min(max(begin, 0), size), min(max(begin + self.size, 0), size))


class Vector:
    """Contiguous arrays in a row, of the sizes of ``cut``, read and written in ranges; None is zeros."""

    def __init__(self, arrays: Sequence, cut: Shares, like):
        self._flat = [None if array is None else array.reshape(-1) for array in arrays]
        self._ends, self._like = cut.ends, like

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """(position, view) of what the arrays have between two positions."""
        for index in range(bisect.bisect_right(self._ends, start), len(self._ends)):
            begin, end = self._ends[index - 1] if index else 0, min(stop, self._ends[index])
            if start >= stop:
                return
            if self._flat[index] is not None and start < end:
                yield start, self._flat[index][start - begin : end - begin]
            start = end

    def read(self, start: int, bucket: range) -> np.ndarray:
        """A copy of the elements of a bucket of the share that begins at ``start``; zeros beyond the end."""
        start += bucket.start
        out = np.zeros(len(bucket), self._like.dtype, like=self._like)
        for position, piece in self.pieces(start, start + out.size):
            out[position - start : position - start + piece.size] = piece
        return out

    def write(self, start: int, values) -> None:
        """Replace the elements from ``start`` on."""
        for position, piece in self.pieces(start, start + values.size):
            piece[:] = values[position - start : position - start + piece.size]


class ShardedAdamW(AdamW):
    """AdamW of one process's share of the parameters (ZeRO-1); its averages are vectors."""

    def __init__(self, processes: MPI, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._processes, self._whole = processes, None
        self._cut = Shares([parameter.shape for _, parameter in self.parameters], processes.size)
        self._place = {name: index for index, (name, _) in enumerate(self.parameters)}

    def _own(self, name: str, array):
        return array.reshape(-1)[self._cut.own(self._processes.rank, self._place[name])]

    def load_state_dict(self, state: Mapping[str, Mapping]) -> None:
        """Resume from the averages of whole parameters; this process's share of them is copied."""
        whole = AdamW(self.parameters)
        whole.load_state_dict(state)  # checks names, shapes and dtypes
        shares = {
            key: {name: self._own(name, array).copy() for name, array in whole.state_dict()[key].items()}
            for key in "mv"
        }
        super().load_state_dict({"t": whole.state_dict()["t"], **shares})

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within this block the first process's ``state_dict`` has the averages of whole parameters."""
        t = super().state_dict()["t"]
        self._whole = {"t": t} | {key: self._gather(i) for i, key in ((1, "m"), (2, "v"))}
        try:
            yield
        finally:
            self._whole = None

    def state_dict(self) -> dict[str, dict]:
        return super().state_dict() if self._whole is None else self._whole

    def _gather(self, which: int) -> dict[str, np.ndarray]:
        """m (1) or v (2) of the parameters that were updated; empty but on the first process."""
        cut, rank, like = self._cut, self._processes.rank, self.parameters[0][1].data
        own, begin = np.zeros(cut.size, like.dtype, like=like), cut.start(rank)
        whole = []
        for index, (name, parameter) in enumerate(self.parameters):
            state, part = self.state.get(name, [0]), cut.own(rank, index)
            if state[0] > 0:
                position = cut.ends[index] - cut.sizes[index] + part.start - begin
                own[position : position + state[which].size] = state[which]
            kept = state[0] > 0 and rank == 0
            whole.append(np.empty(parameter.shape, like.dtype) if kept else None)
        target = Vector(whole, cut, own)
        for start, part in all_shares(self._processes, cut, lambda bucket: own[bucket.start : bucket.stop]):
            target.write(start, to_device(part, "cpu"))
        return {name: array for (name, _), array in zip(self.parameters, whole) if array is not None}
