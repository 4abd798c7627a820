"""Several processes train exactly what one process does.

The processes are started by ``mpiexec``, all jobs of a number of processes at once, because starting takes
longer than training. Three and four processes are tested with ``-m processes``.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.device_array import DeviceArray
from support.ops import keeping
from support.processes import (
    FAULTS,
    MICRO_BATCH,
    STEPS,
    Job,
    batch_at,
    check_equal,
    largest_difference,
    launched,
    start,
    trained,
    trained_by,
)

from tinyllm.backend.distributed import OneProcess
from tinyllm.data.batches import Batches, Windows
from tinyllm.errors import Error
from tinyllm.optim import AdamW, NoLossScale, clip_grad_norm
from tinyllm.training.data_parallel import Replicas, ShardedAdamW, Shares, Vector
from tinyllm.training.step import accumulate_gradients, count_targets, language_model_loss, training_step

PLAIN = [Job(model, dtype) for model in ("gpt2", "llama") for dtype in ("float64", "float32")]
TO_SHARD = [Job("gpt2", "float32"), Job("llama", "float64")]
SHARDED = [Job(**vars(job) | {"shard": True}) for job in TO_SHARD]
FOR_TORCH = [Job(model, dropout=False) for model in ("gpt2", "llama")]
FAULTY = [Job(fault=fault, steps=8) for fault in FAULTS]
MANY = [pytest.param(number, marks=pytest.mark.processes) for number in (3, 4)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """number of processes -> job name -> the results of each process."""
    found = {}

    def of(number):
        if number not in found:
            folder = tmp_path_factory.mktemp(f"processes-{number}")
            found[number] = trained_by(number, PLAIN + SHARDED + FOR_TORCH + FAULTY, folder)
        return found[number]

    return of


@pytest.fixture(scope="module")
def alone():
    found = {}

    def of(job):
        if job.name not in found:
            found[job.name] = trained(job)
        return found[job.name]

    return of


def parts_of(replicas, batch, size):
    with replicas.dealt(batch, size, ()) as parts:
        return parts


@pytest.mark.parametrize("number", [2, *MANY])
@pytest.mark.parametrize("job", PLAIN, ids=lambda job: job.name)
def test_fifty_steps_of_several_processes_equal_those_of_one(results, alone, job, number):
    """Also where batches are smaller and a process has no row of them, and where targets are few."""
    theirs = alone(job)
    check_equal(job, results(number)[job.name][0], theirs)
    assert theirs["losses"][-7:].mean() < 0.95 * theirs["losses"][:7].mean()  # the batches repeat after seven
    assert 0 < (theirs["norms"] > 0.7).sum() < STEPS


@pytest.mark.parametrize("number", [2, *MANY])
@pytest.mark.parametrize("job", PLAIN + SHARDED, ids=lambda job: job.name)
def test_all_processes_have_the_same_weights_after_every_step(results, job, number):
    first, *others = results(number)[job.name]
    assert len(set(first["hashes"])) == STEPS
    for other in others:
        assert list(other["hashes"]) == list(first["hashes"])


@pytest.mark.parametrize("number", [2, *MANY])
@pytest.mark.parametrize("job", TO_SHARD, ids=lambda job: job.name)
def test_zero_1_equals_plain_to_the_last_bit_with_a_share_of_the_averages(results, job, number):
    plain = results(number)[job.name]
    sharded = results(number)[Job(**vars(job) | {"shard": True}).name]
    assert list(sharded[0]["hashes"]) == list(plain[0]["hashes"])
    assert list(sharded[0]["losses"]) == list(plain[0]["losses"])
    assert sum(process["averages"] for process in sharded) == plain[0]["averages"]
    assert max(process["averages"] for process in sharded) <= plain[0]["averages"] / number + 1


@pytest.fixture(scope="module")
def torchs(tmp_path_factory):
    """Model -> the results of two processes of PyTorch."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("torch")
    done = launched((2, ["-m", "support.torch_processes", str(folder)]))
    assert done.returncode == 0, done.stderr
    return {model: dict(np.load(folder / f"{model}.npz")) for model in ("gpt2", "llama")}


@pytest.mark.parametrize("job", FOR_TORCH, ids=lambda job: job.model)
def test_two_processes_equal_two_of_torch(results, torchs, job):
    assert largest_difference(results(2)[job.name][0], torchs[job.model]) <= 1e-9


@pytest.mark.fault
@pytest.mark.parametrize("job", FAULTY, ids=lambda job: job.fault)
def test_a_planted_fault_is_caught(results, alone, job):
    found = results(2)[job.name][0]
    if job.fault == "a step behind":
        assert "process 1 on" in str(found["error"])
        assert "another batch" in str(found["error"])
    else:
        whole = alone(Job())
        theirs = {name: whole[name][: job.steps] for name in ("losses", "norms")}
        assert largest_difference(found, theirs) > 1e-6


# ---------------------------------------------------------------------- in a single process


class Rank(OneProcess):
    """One of several processes that are not there: enough to ask what it would compute."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_the_micro_batches_of_all_processes_are_those_of_one(rows, size, number):
    model = start(Job())
    ids = np.arange(rows)[:, None]
    dealt = [parts_of(Replicas(Rank(rank, number), AdamW(model)), (ids,), size) for rank in range(number)]
    firsts = [first for of_one in dealt for first, _ in of_one]
    assert firsts == list(range(0, rows, size))
    assert [row for of_one in dealt for _, (part,) in of_one for row in part[:, 0]] == list(range(rows))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_each_window_is_used_once_per_epoch_by_one_of_the_processes(number):
    windows = Windows(np.arange(500), 8)
    batches = Batches(windows, 12, seed=5)
    replicas = [Replicas(Rank(rank, number), AdamW(start(Job()))) for rank in range(number)]
    for epoch in range(2):
        used = []
        for step in range(epoch * batches.steps_per_epoch, (epoch + 1) * batches.steps_per_epoch):
            for each in replicas:
                used += [row[0] for _, (ids, _) in parts_of(each, batches.at(step), 2) for row in ids]
        assert sorted(used) == [8 * i for i in range(len(windows))]


@given(
    st.lists(st.lists(st.integers(0, 4), max_size=3), min_size=1, max_size=6), st.integers(1, 7), st.data()
)
def test_a_vector_of_arrays_is_read_and_written_as_their_concatenation(shapes, number, data):
    if not sum(np.prod(shape, dtype=int) for shape in shapes):
        shapes = [*shapes, (3,)]
    arrays = [np.random.default_rng(i).standard_normal(shape) for i, shape in enumerate(shapes)]
    missing = data.draw(st.sets(st.integers(0, len(arrays) - 1)))
    cut = Shares([array.shape for array in arrays], number)
    whole = [np.zeros_like(array) if i in missing else array for i, array in enumerate(arrays)]
    flat = np.concatenate([*(array.reshape(-1) for array in whole), np.zeros(cut.size * number)])
    vector = Vector([None if i in missing else array for i, array in enumerate(arrays)], cut, arrays[0])
    for owner in range(number):
        read = [vector.read(cut.start(owner), bucket) for bucket in cut.buckets()]
        assert np.array_equal(np.concatenate(read), flat[cut.start(owner) :][: cut.size])
        owned = [array.reshape(-1)[cut.own(owner, i)] for i, array in enumerate(whole)]
        assert np.array_equal(np.concatenate(owned), flat[: cut.ends[-1]][cut.start(owner) :][: cut.size])
    vector.write(cut.start(0), np.arange(cut.size) + 1.0)
    after = np.concatenate([array.reshape(-1) for array in arrays])[: cut.size]
    kept = np.concatenate([np.full(array.size, i not in missing) for i, array in enumerate(arrays)])[
        : cut.size
    ]
    assert np.array_equal(after[kept], (np.arange(cut.size) + 1.0)[: len(after)][kept])


def test_buckets_change_nothing(monkeypatch):
    monkeypatch.setattr("tinyllm.training.data_parallel.BUCKET", 7)
    assert [len(bucket) for bucket in Shares([(5, 5), (3,)], 2).buckets()] == [3, 3, 3, 3, 2]
    model = start(Job())
    optimizer = AdamW(model)
    how = count_targets(batch_at(0)), language_model_loss, MICRO_BATCH
    one, other = start(Job()), start(Job())
    for model, replicas in ((one, None), (other, Replicas(OneProcess(), AdamW(other)))):
        optimizer = AdamW(model) if replicas is None else ShardedAdamW(OneProcess(), model)
        for step in range(3):
            training_step(model, optimizer, batch_at(0), *how, step=step, replicas=replicas)
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters()):
        np.testing.assert_allclose(mine.data, theirs.data, rtol=1e-13, err_msg=name)


class Beside(OneProcess):
    """The first of two processes; ``other`` makes what the second one gathers of what this one does."""

    size = 2

    def gather(self, value=None):
        return [value, self.other(value)]

    def name(self, rank):
        return f"process {rank}"


def test_a_process_without_rows_has_no_gradient_where_no_process_has_one():
    model, processes = start(Job()), Beside()
    first, *rest = model.parameters()
    replicas = Replicas(processes, AdamW(model))
    parts_of(replicas, batch_at(0), MICRO_BATCH)
    processes.other = lambda here: ([2.0], here[1], [True, *[False] * len(rest)])
    assert replicas.all_losses([1.0]) == [1.0, 2.0]
    assert replicas.losses_of == [[1.0], [2.0]]
    assert not first.grad.any() and all(parameter.grad is None for parameter in rest)


def test_every_array_of_a_batch_is_compared():
    model, processes, said = start(Job()), Beside(), []
    replicas = Replicas(processes, AdamW(model))
    processes.other = lambda here: said.append(here) or said[0]
    for changed in range(len(batch_at(0))):
        said.clear()
        parts_of(replicas, batch_at(0), MICRO_BATCH)
        assert replicas.all_losses([1.0]) == [1.0, 1.0]
        parts_of(replicas, tuple(array + (i == changed) for i, array in enumerate(batch_at(0))), MICRO_BATCH)
        with pytest.raises(Error, match="process 1 has another batch than process 0"):
            replicas.all_losses([1.0])


def test_parameters_become_contiguous_and_keep_their_values():
    model, expected = start(Job()), start(Job())
    for parameter in model.parameters():
        parameter.replace(np.asfortranarray(parameter.data))
    Replicas(OneProcess(), AdamW(model))
    for parameter, other in zip(model.parameters(), expected.parameters()):
        assert parameter.data.flags.c_contiguous and np.array_equal(parameter.data, other.data)


def test_a_step_that_was_stopped_sends_no_message():
    def stopped():
        raise KeyboardInterrupt

    model, processes = start(Job()), Beside()
    optimizer = AdamW(model)
    replicas = Replicas(processes, optimizer)
    with pytest.raises(KeyboardInterrupt):  # and not AttributeError: it has no ``other`` to ask
        replicas.clip_grad_norm(optimizer, 1.0, stopped)


@pytest.mark.parametrize("sharded", [False, True])
def test_the_parts_to_profile_are_a_step(sharded):
    one, other = start(Job()), start(Job())
    for model, in_parts in ((one, False), (other, True)):
        optimizer = ShardedAdamW(OneProcess(), model) if sharded else AdamW(model)
        replicas, batch = Replicas(OneProcess(), optimizer), batch_at(0)
        if in_parts:
            how = count_targets(batch), language_model_loss, MICRO_BATCH, NoLossScale(), 0, 0
            accumulate_gradients(model, batch, *how, replicas=replicas)
            parts = replicas.parts(optimizer, 1.0)
            updating = ["AdamW", "all-gather"] if sharded else ["all-gather", "AdamW"]
            assert [*parts] == ["reduce-scatter", "clip_grad_norm", *updating]
            for part in parts.values():
                part()
        else:
            how = count_targets(batch), language_model_loss, MICRO_BATCH
            training_step(model, optimizer, batch, *how, replicas=replicas)
    for mine, theirs in zip(one.parameters(), other.parameters()):
        assert np.array_equal(mine.data, theirs.data)


def test_on_a_device_the_arrays_stay_there():
    """The strict array refuses every call that CuPy does not have."""
    here, there = start(Job(dtype="float32", dropout=False)), start(Job(dtype="float32", dropout=False))
    for parameter in there.parameters():
        parameter.replace(DeviceArray.of(parameter.data))
    for model, replicas in ((here, None), (there, Replicas(OneProcess(), AdamW(there)))):
        optimizer = AdamW(model)
        with keeping(everything=False):  # as on a GPU
            training_step(
                model, optimizer, batch_at(0), count_targets(batch_at(0)), replicas=replicas, clip=0.1
            )
    for (name, mine), theirs in zip(here.named_parameters(), there.parameters()):
        assert isinstance(theirs.data, DeviceArray)
        np.testing.assert_allclose(theirs.data.get(), mine.data, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("reserved", [False, True])
def test_averages_are_gathered_and_loaded_again(reserved):
    model, whole = start(Job()), start(Job())
    sharded, plain = ShardedAdamW(OneProcess(), model), AdamW(whole)
    for each, optimizer in ((model, sharded), (whole, plain)):
        accumulate_gradients(each, batch_at(0), 10, language_model_loss, 3, NoLossScale(), 0, 0)
        clip_grad_norm(each, 1.0)
        dict(each.named_parameters())["ln_f.bias"].grad = None  # never updated: it has no averages
        if reserved:
            optimizer.reserve()
        optimizer.step()
    assert sharded.state["wte.weight"][1].ndim == 1
    with sharded.gathered():
        saved = sharded.state_dict()
    assert sharded.state_dict()["m"]["wte.weight"].ndim == 1  # its share again
    for key in "mv":
        assert saved[key].keys() == plain.state_dict()[key].keys() == saved["t"].keys()
        for name, array in plain.state_dict()[key].items():
            assert np.array_equal(saved[key][name], array)
    again = ShardedAdamW(OneProcess(), start(Job()))
    again.load_state_dict(saved)
    assert np.array_equal(again.state["wte.weight"][2], sharded.state["wte.weight"][2])
    saved["m"]["wte.weight"] = saved["m"]["wte.weight"].T
    with pytest.raises(Error, match=r"wte\.weight"):
        again.load_state_dict(saved)
