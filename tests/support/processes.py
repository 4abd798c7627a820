"""Training in several processes: the programs that ``mpiexec`` starts, and their results.

As a program (``python -m support.processes FOLDER``) this is one of those processes.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from tinyllm import GPT2, GPT2Config, Llama, LlamaConfig
from tinyllm.backend import distributed
from tinyllm.backend.device import to_device
from tinyllm.backend.random import manual_seed
from tinyllm.optim import AdamW, NoLossScale, clip, warmup_cosine
from tinyllm.training import step as of_a_step
from tinyllm.training.checkpoint import hash_weights
from tinyllm.training.data_parallel import Replicas, ShardedAdamW
from tinyllm.training.loop import training_steps
from tinyllm.training.step import count_targets, language_model_loss
from tinyllm.training.workers import Workers

STEPS, ROWS, MICRO_BATCH, LENGTH, VOCABULARY, CLIP, SEED = 50, 12, 2, 8, 17, 0.7, 3
TIMEOUT = 180.0  # seconds, of programs that take a few

GPT2_CONFIG = GPT2Config(
    vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=12, n_layer=1, n_head=3,
    embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1,
)  # fmt: skip
LLAMA_CONFIG = LlamaConfig(
    vocab_size=VOCABULARY, hidden_size=12, intermediate_size=20, num_hidden_layers=1, num_attention_heads=3,
    num_key_value_heads=1, max_position_embeddings=LENGTH, attention_dropout=0.2,
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Fifty steps of a small model."""

    model: str = "gpt2"
    dtype: str = "float64"
    shard: bool = False
    dropout: bool = True
    fault: str | None = None
    steps: int = STEPS

    @property
    def name(self) -> str:
        return "-".join(f"{value}" for value in vars(self).values())


# ------------------------------------------------------------------------------ what is trained


def start(job: Job):
    """The model before the first step. Its parameters are perturbed: 0 and 1 would hide mistakes."""
    rng = np.random.default_rng(0)
    kind, config = (GPT2, GPT2_CONFIG) if job.model == "gpt2" else (Llama, LLAMA_CONFIG)
    if not job.dropout:
        off = {name: 0.0 for name in vars(config) if name.endswith(("pdrop", "attention_dropout"))}
        config = kind.config_class(**vars(config) | off)
    model = kind(config, rng=rng).astype(job.dtype).train()
    for parameter in model.parameters():
        parameter.replace((parameter.data + 0.2 * rng.standard_normal(parameter.shape)).astype(job.dtype))
    return model


def batch_at(step: int):
    """Ids and targets. Rows have different numbers of targets; every fifth batch is smaller."""
    rng = np.random.default_rng(step % 7)
    ids, targets = rng.integers(0, VOCABULARY, (2, 3 if step % 5 == 4 else ROWS, LENGTH))
    targets[rng.random(targets.shape) > rng.uniform(0.1, 1, (len(ids), 1))] = -100
    targets[0, 0] = 0
    return ids, targets


def trained(job: Job, processes=None, put=None, forked=1, micro_batch=MICRO_BATCH) -> dict[str, np.ndarray]:
    """Losses, gradient norms, the weights' SHA-256 after every step, and the last weights.

    ``put`` moves an array to the device on which to train; ``forked`` processes share every step.
    """
    model = start(job)
    for parameter in model.parameters() if put else ():
        parameter.replace(put(parameter.data))
    options = dict(lr=1e-2, weight_decay=0.1)
    optimizer = ShardedAdamW(processes, model, **options) if job.shard else AdamW(model, **options)
    replicas = Replicas(processes, optimizer) if processes else None
    data = (batch_at if job.fault != "a step behind" or processes.rank == 0 else a_step_behind), count_targets
    lr_at = warmup_cosine(1e-2, 1e-4, 1e-3, 5, STEPS)
    found = {"losses": [], "norms": [], "hashes": []}
    with planted(job.fault), ExitStack() as stack:
        if forked > 1:
            of_a_step = forked, model, optimizer, language_model_loss
            replicas = stack.enter_context(closing(Workers(*of_a_step)))
        for done in training_steps(
            model, optimizer, *data, language_model_loss, lr_at, range(job.steps), NoLossScale(),
            micro_batch=micro_batch, clip=CLIP, seed=SEED, replicas=replicas,
        ):  # fmt: skip
            found["losses"].append(done.loss)
            found["norms"].append(done.grad_norm)
            found["hashes"].append(hash_weights(model))
    found["averages"] = sum(state[1].size for state in optimizer.state.values())
    return {name: np.array(value) for name, value in found.items()} | {
        f"weight {name}": to_device(parameter.data, "cpu") for name, parameter in model.named_parameters()
    }


# ------------------------------------------------------------------------------------ comparing

BOUNDS = {"float64": 1e-12, "float32": 1e-4}

# A bias of the keys adds the same to all scores of a query, which softmax ignores: its gradient is a rounding
# error, which AdamW divides by its own size. So its sign moves a weight by a good part of the rate.
BOUNDS_OF_KEY_BIASES = {"float64": 1e-9, "float32": 0.1}


def in_parts(found, key_biases):
    """The biases of the keys alone, or all else."""
    names = [name for name in found if name.endswith("c_attn.bias")]
    biases = {name: np.split(found[name], 3) for name in names}
    if key_biases:
        return {name: key for name, (_, key, _) in biases.items()}
    return found | {name: np.concatenate([query, value]) for name, (query, _, value) in biases.items()}


def largest_difference(ours, theirs):
    """Of losses, norms and weights, relative to the largest element of each."""
    names = [name for name in theirs if name not in ("hashes", "averages")]
    return max(
        np.abs(ours[name][: len(theirs[name])] - theirs[name]).max() / np.abs(theirs[name]).max()
        for name in names
    )


def check_equal(job: Job, ours, theirs):
    """Two results of ``trained`` differ by rounding only."""
    assert largest_difference(in_parts(ours, False), in_parts(theirs, False)) <= BOUNDS[job.dtype]
    if job.model == "gpt2":
        keys = in_parts(ours, True), in_parts(theirs, True)
        assert largest_difference(*keys) <= BOUNDS_OF_KEY_BIASES[job.dtype]
    rtol = 1e-12 if job.dtype == "float64" else 1e-3
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=rtol)


# --------------------------------------------------------------------------------------- faults


def a_step_behind(step: int):
    return batch_at(max(0, step - 1))


def averaged_twice(replicas: Replicas) -> None:
    SUM_GRADIENTS(replicas)
    for parameter in replicas._parameters:
        if parameter.grad is not None:
            parameter.grad /= replicas.processes.size


def mean_of_means(model, *rows, num_targets):
    """Each micro-batch divides by its own targets."""
    processes = distributed.current()
    return LOSS(model, *rows, num_targets=max(1, count_targets(rows)) * processes.size)


def local_rows(seed, step, first_row):
    """The rows of each process counted from 0."""
    per_process = ROWS // distributed.current().size
    manual_seed(seed, step, first_row % per_process)


def local_norm(replicas: Replicas, max_norm: float) -> float:
    start = replicas._cut.start(replicas.processes.rank)
    own = [array for _, array in replicas._gradients().pieces(start, start + replicas._cut.size)]
    replicas.processes.gather()
    norm = float(np.sqrt(sum(float((array**2).sum()) for array in own)))
    clip(own, norm, max_norm)
    return norm


SUM_GRADIENTS, LOSS = Replicas.sum_gradients, language_model_loss

FAULTS = {
    "gradients averaged twice": (Replicas, "sum_gradients", averaged_twice),
    "mean of means": (sys.modules[__name__], "language_model_loss", mean_of_means),
    "dropout keyed by the local row": (of_a_step, "manual_seed", local_rows),
    "clipped by the local norm": (Replicas, "clip", local_norm),
    "a step behind": None,
}


@contextmanager
def planted(fault: str | None):
    if fault is None or FAULTS[fault] is None:
        yield
        return
    with mock.patch.object(*FAULTS[fault]):
        yield


# ------------------------------------------------------------------------------------ mpiexec


def mpiexec() -> str:
    """The launcher; the test is skipped without it or mpi4py."""
    beside = Path(sys.executable).with_name("mpiexec")
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if importlib.util.find_spec("mpi4py") is None or found is None:
        pytest.skip("mpi4py or mpiexec is not installed: pip install mpi4py mpich")
    return found


def environment() -> dict[str, str]:
    """The environment of the processes: they import this checkout, and find this folder as ``support``."""
    folders = [
        str(Path(__file__).parents[2]),
        str(Path(__file__).parents[1]),
        os.environ.get("PYTHONPATH", ""),
    ]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders)), "OMP_NUM_THREADS": "1"}


def launched(*programs: tuple[int, list[str]], **options) -> subprocess.CompletedProcess:
    """Run programs, each on so many processes, as one job of mpiexec, and wait for it."""
    command = [mpiexec()]
    for number, arguments in programs:
        command += [":"] * (len(command) > 1) + ["-n", str(number), sys.executable, "-P", *arguments]
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.run(command, env=environment(), timeout=TIMEOUT, **streams, **options)


def tinyllm(number: int, *arguments, **options) -> subprocess.CompletedProcess:
    """Run ``tinyllm … --distributed mpi`` on so many processes."""
    return launched((number, ["-m", "tinyllm", *map(str, arguments), "--distributed", "mpi"]), **options)


def trained_by(number: int, jobs: list[Job], folder: Path) -> dict[str, list[dict]]:
    """Job name -> the results of ``trained`` of every process, in one job of mpiexec."""
    (folder / "jobs.json").write_text(json.dumps([vars(job) for job in jobs]), encoding="utf-8")
    done = launched((number, ["-m", "support.processes", str(folder)]))
    assert done.returncode == 0, done.stderr
    return {
        job.name: [dict(np.load(folder / f"{job.name}-{rank}.npz")) for rank in range(number)] for job in jobs
    }


def main(folder: Path) -> None:
    with distributed.opened("mpi") as processes:
        for options in json.loads((folder / "jobs.json").read_text(encoding="utf-8")):
            job = Job(**options)
            try:
                with processes.agreed():
                    found = trained(job, processes)
            except Exception as error:
                if job.fault is None:
                    raise
                found = {"error": np.array(str(error))}
            np.savez(folder / f"{job.name}-{processes.rank}.npz", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
