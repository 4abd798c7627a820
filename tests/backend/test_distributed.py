"""Processes that exchange messages and arrays: MPI, a fake NCCL, and the share of the cores."""

import inspect
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support import fake_nccl
from support.processes import Job, launched, trained

from tinyllm.backend import distributed, threads
from tinyllm.backend.distributed import OneProcess, opened
from tinyllm.errors import Error

PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from support.device_array import DeviceArray
from support import fake_nccl
from support.processes import Job, trained
from tinyllm import Error
from tinyllm.backend import device, distributed

gpus, out = int(sys.argv[1]), Path(sys.argv[2])
fake_nccl.install(gpus)
try:
    with distributed.opened("nccl") as processes:
        found = trained(Job("gpt2", "float32", steps=5), processes, DeviceArray.of)
        found["gpu"] = device.number_of("cuda")
        np.savez(out / f"{processes.rank}.npz", **found)
except Error as error:
    (out / f"{distributed.launched()[1]}.txt").write_text(str(error))
"""


def test_nccl_trains_as_one_process_does_each_on_its_own_gpu(tmp_path):
    """With arrays that refuse what CuPy refuses, and NCCL's calls on their addresses."""
    done = launched((2, ["-c", PROGRAM, "2", str(tmp_path)]))
    assert done.returncode == 0, done.stderr
    first, second = (dict(np.load(tmp_path / f"{rank}.npz")) for rank in range(2))
    assert (first["gpu"], second["gpu"]) == (0, 1)
    assert list(first["hashes"]) == list(second["hashes"])
    np.testing.assert_allclose(first["losses"], trained(Job("gpt2", "float32", steps=5))["losses"], rtol=1e-5)


def test_two_processes_on_one_gpu_are_refused_which_nccl_would_do_less_clearly(tmp_path):
    done = launched((2, ["-c", PROGRAM, "1", str(tmp_path)]))
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert "process 0 and process 1 have the same GPU" in said


@pytest.mark.gpu
def test_the_stand_in_has_the_signatures_of_cupys_nccl():
    """And NCCL itself sums and gathers, in one process with one GPU."""
    import cupy
    from cupy.cuda import nccl

    communicator = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    x, y = cupy.arange(5, dtype="float32"), cupy.zeros(5, "float32")
    stream = cupy.cuda.get_current_stream().ptr
    communicator.reduceScatter(x.data.ptr, y.data.ptr, 5, nccl.NCCL_FLOAT32, nccl.NCCL_SUM, stream)
    assert (x == y).all()
    communicator.allGather(y.data.ptr, x.data.ptr, 5, nccl.NCCL_FLOAT32, stream)
    for name in ("reduceScatter", "allGather"):
        names = list(inspect.signature(getattr(fake_nccl.NcclCommunicator, name)).parameters)[1:]
        written = getattr(nccl.NcclCommunicator, name).__doc__ or ""
        assert all(each in written for each in names if written)
    assert (nccl.NCCL_FLOAT32, nccl.NCCL_FLOAT64, nccl.NCCL_SUM) == (7, 8, 0)


def test_nothing_is_imported_without_distributed():
    code = "import sys, tinyllm.cli; print(sorted({'mpi4py', 'cupy'} & {*sys.modules}))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "[]\n"


def test_one_process_exchanges_with_itself():
    one, total, whole = OneProcess(), np.zeros(3), np.zeros((1, 3))
    one.reduce_scatter(np.arange(3.0)[None], total)
    one.all_gather(total, whole)
    assert one.gather(whole.tolist()) == [[[0, 1, 2]]]
    with opened(None) as processes:
        assert processes is distributed.current() is distributed.ALONE


MESSAGES = """
import json, sys
from pathlib import Path
from tinyllm import Error
from tinyllm.backend import distributed

out, found = Path(sys.argv[1]), []

class Bug(Exception):
    pass

def run(function):
    try:
        with processes.agreed():
            function()
    except BaseException as error:
        found.append(f"{type(error).__name__}: {error}")
    else:
        found.append("done")

def fail(error, *ranks):
    def work():
        if processes.rank in ranks:
            raise error
        for _ in range(3):
            processes.gather()
    return work

def handled():
    try:
        with processes.agreed():
            fail(Error("a"), 1)()
    except Error as error:
        raise MemoryError("b") from error

with distributed.opened("mpi") as processes:
    run(lambda: found.append(processes.gather(10 * processes.rank)))
    run(fail(Error("wrong"), 1))
    run(fail(Error("wrong"), 0))
    run(fail(OSError(28, "full"), 0, 1))
    run(fail(KeyboardInterrupt(15, "said"), 1))
    run(fail(Bug("bug"), 1))
    run(handled)
    run(lambda: processes.gather())
(out / f"{processes.rank}.json").write_text(json.dumps(found))
"""


def test_what_one_process_raises_all_raise(tmp_path):
    done = launched((2, ["-c", MESSAGES, str(tmp_path)]))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first[:2] == second[:2] == [[0, 10], "done"]
    host = first[2].split("process 1 on ")[1].split(":")[0]
    named = f"process 1 on {host}: "
    assert first[2:] == [
        f"Error: {named}wrong",
        "Error: wrong",
        "OSError: [Errno 28] full",
        "KeyboardInterrupt: (15, 'said')",
        "SystemExit: 1",
        "MemoryError: b",
        "done",
    ]
    assert second[2:5] == ["Error: wrong", "Error: wrong", "OSError: [Errno 28] full"]
    assert second[5:] == ["KeyboardInterrupt: (15, 'said')", "Bug: bug", "MemoryError: b", "done"]


def test_a_launcher_of_another_mpi_and_no_mpi_at_all_are_named(monkeypatch):
    monkeypatch.setattr(distributed, "_import_mpi", lambda kind: Mpi)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    with pytest.raises(Error, match=r"started 4 processes, and mpi4py sees 1: .*Paper MPI"), opened("mpi"):
        pass
    monkeypatch.undo()
    broken = type(sys)("mpi4py")
    broken.rc, broken.__getattr__ = type(sys)("rc"), no_library
    monkeypatch.setitem(sys.modules, "mpi4py", broken)
    with pytest.raises(Error, match=r"finds no MPI .cannot load MPI library"), opened("mpi"):
        pass


class Mpi:
    class COMM_WORLD:
        size = 1

    Get_library_version = staticmethod(lambda: "Paper MPI 1.0\n")


def no_library(name):
    raise RuntimeError("cannot load MPI library")


class Local(OneProcess):
    """A process whose host has others, with these cores."""

    def __init__(self, *cores):
        self.cores, self.host = cores, "here"

    def gather(self, value=None):
        return [("here", list(cores)) for cores in self.cores]


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        ([range(8)] * 2, 4),  # unbound: they share all cores
        ([range(8)] * 3, 2),
        ([range(2)] * 4, 1),
        ([range(4), range(4, 8)], 4),  # bound by the launcher: each has its own
        ([range(1)], 1),
    ],
)
def test_each_process_takes_its_share_of_the_cores(monkeypatch, cores, expected):
    taken = []
    monkeypatch.setattr(distributed, "use_threads", taken.append)
    for name in threads.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    distributed._share_cores(Local(*cores))
    assert taken == [expected]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    distributed._share_cores(Local(*cores))
    assert taken == [expected]


def test_threads_are_changed_while_the_program_runs(monkeypatch):
    from threadpoolctl import threadpool_info, threadpool_limits

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with threadpool_limits(limits=None):
        threads.use_threads(2)
        assert threads.num_threads() == 2
        found = [blas["num_threads"] for blas in threadpool_info() if blas["user_api"] == "blas"]
        assert set(found) <= {1, 2}
        done = []
        threads.run_tasks(done.append, [1, 2, 3])
        assert sorted(done) == [1, 2, 3]
