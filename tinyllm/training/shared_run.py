"""A run of several processes: the first one writes its folder, and all of them agree on what is done.

The options, the text, the weights and the versions of all processes are compared before the first step, the
batches at every step, and the weights again before every checkpoint.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np

from tinyllm.backend.distributed import MPI
from tinyllm.backend.threads import num_threads
from tinyllm.errors import Error
from tinyllm.nn import Module
from tinyllm.optim import AdamW
from tinyllm.training.begun import data_hashes
from tinyllm.training.checkpoint import hash_weights, verify
from tinyllm.training.data_parallel import Replicas, ShardedAdamW
from tinyllm.training.loop import CompletedStep
from tinyllm.training.output import say
from tinyllm.training.run_folder import RunFolder
from tinyllm.training.tasks.base import Task
from tinyllm.version import __version__
from tinyllm.weights.runs import checkpoint_folder

# Options in which the processes may differ: where the files are on each machine
OF_A_MACHINE = {"out", "resume", "text", "tokens", "data", "model", "start_from", "tokenizer", "log"}


def in_turn(processes: MPI, load: Callable[[], None]) -> None:
    """Call ``load`` on the first process, then on the first of every other host, then on the others.

    What the first call writes, such as a text's token ids, is found by the others on the same disk.
    """
    turn = 0 if processes.rank == 0 else 1 if processes.local_rank == 0 else 2
    for now in range(3):
        with processes.agreed():
            if turn == now:
                load()


class SharedRun(RunFolder):
    """The folder of a run of several processes. All of them make the same calls; the first one writes.

    Every process reads the checkpoint of a resumed run itself.
    """

    def __init__(self, task: Task, processes: MPI):
        super().__init__(task)
        self.processes, self.log.writes = processes, processes.rank == 0

    # The beginning

    def check_new(self) -> None:
        if self.leads:
            super().check_new()
        self._tell()

    def reopen(self) -> None:
        if self.leads:
            super().reopen()
        self._tell()

    def _tell(self) -> None:
        """Give all processes what the first one found in the folder."""
        log, found = self.log, (self.folder, self.log.history, self.about, self.state, self.step, self.tokens)
        found, *_ = self.processes.gather(found if self.leads else None)
        log.folder, log.history, self.about, self.state, self.step, self.tokens = found

    def start(self, model: Module, optimizer: AdamW) -> None:
        self._compare(self._what_it_trains() | _weights(model))
        with self.processes.agreed():
            super().start(model, optimizer)
        if self.state:
            self._compare(_weights(model))
        self.replicas = Replicas(self.processes, optimizer)
        for line in self._who():
            say(line)

    def _who(self) -> list[str]:
        """The processes of each host, by which to understand what the launcher says of one that died."""
        found, hosts = self.processes.gather((os.getpid(), num_threads())), {}
        for rank, ((pid, threads), host) in enumerate(zip(found, self.processes.hosts)):
            hosts.setdefault((host, threads), []).append(f"{rank} (PID {pid})")
        lines = (f"{', '.join(names)} on {host}, threads: {n}" for (host, n), names in hosts.items())
        return [f"{self.processes.size} processes:", *(f"  {line}" for line in lines)]

    def _begin(self) -> None:
        if self.leads:
            super()._begin()
        self._tell()  # its folder may have another number

    def _restore(self) -> None:
        if not self.leads and self.state:
            folder = checkpoint_folder(self.folder, self.step)
            if verify(folder) != self.state:
                raise Error(f"{folder} is not the checkpoint of process 0: give all processes the same disk")
        super()._restore()

    def _what_it_trains(self) -> dict:
        """What must be equal in all processes, by name."""
        options = self.config.to_json().items()
        here = {f"option {name}": value for name, value in options if name not in OF_A_MACHINE}
        here |= {f"{name} (SHA-256)": value for name, value in data_hashes(self.task.data()).items()}
        versions = {"tinyllm": __version__, "numpy": np.__version__, "python": platform.python_version()}
        return here | versions

    def _compare(self, here: dict) -> None:
        """Raise ``Error`` if one of these facts differs between the processes."""
        first, *others = self.processes.gather(here)
        for rank, there in enumerate(others, 1):
            for name in (*first, *there):
                if there.get(name) != first.get(name):
                    found = f"{name} is {there.get(name)} on {self.processes.name(rank)}"
                    raise Error(f"{found} and {first.get(name)} on process 0: make them equal")

    # Every step

    def not_finite(self, completed: CompletedStep) -> str:
        of_all = enumerate(self.replicas.losses_of)
        ranks = [rank for rank, losses in of_all if not all(map(math.isfinite, losses))]
        names = ", ".join(map(self.processes.name, ranks))
        try:
            with self.processes.agreed():
                return super().not_finite(completed) if self.leads else completed.what_is_not_finite()
        except FloatingPointError as error:
            named = f"{error}; not finite is the loss of {names}" if names else str(error)
            raise FloatingPointError(named) from error

    # Checkpoints

    def is_due(self) -> bool:
        return self.processes.gather(self.leads and super().is_due())[0]

    def save(self):
        folder = checkpoint_folder(self.folder, self.step)
        if self.processes.gather(self.leads and folder.exists())[0]:
            return folder
        self._compare(_weights(self.model))
        sharded = isinstance(self.optimizer, ShardedAdamW)
        with self.optimizer.gathered() if sharded else nullcontext(), self.processes.agreed():
            return super().save() if self.leads else folder


def _weights(model: Module) -> dict[str, str]:
    return {"weights (SHA-256)": hash_weights(model)}
