"""The profile of a step names every op and its module, sums to the step, and leaves no side effects."""

import math
import threading
import tracemalloc

import numpy as np
import pytest
from support.device_array import DeviceArray

from tinyllm import GPT2, Error, GPT2Config, Llama, LlamaConfig, Tensor, manual_seed, nn, no_grad
from tinyllm import functional as F
from tinyllm import tensor as engine
from tinyllm.optim import AdamW, clip_grad_norm
from tinyllm.tensor_einsum import einsum
from tinyllm.tensor_ops import At
from tinyllm.tools import info
from tinyllm.tools import profile as module
from tinyllm.tools.profile import Profile, Row, profile

MODELS = {
    "gpt2": GPT2Config(60, 64, 32, 2, 4, embd_pdrop=0.1, attn_pdrop=0.1, resid_pdrop=0.1),
    "gpt2, no dropout": GPT2Config(60, 64, 32, 2, 4, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0),
    "llama": LlamaConfig(
        60,
        32,
        80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    ),
}


class Training:
    """A model, its optimizer and the parts of its step, as in ``tinyllm train``."""

    def __init__(self, name: str, batch: int = 3, micro_batches: int = 1):
        config, rng = MODELS[name], np.random.default_rng(0)
        self.model = (GPT2 if isinstance(config, GPT2Config) else Llama)(config, rng).train()
        self.optimizer, self.losses = AdamW(self.model, lr=1e-2), []
        self.ids = rng.integers(0, 60, (micro_batches, batch, 64))
        self.parts = {
            "gradients": self.gradients,
            "clip_grad_norm": lambda: clip_grad_norm(self.model, 0.1),
            "AdamW": self.optimizer.step,
            "zero_grad": self.optimizer.zero_grad,
        }

    def gradients(self):
        for number, ids in enumerate(self.ids):
            manual_seed(0, len(self.losses), number)
            loss = self.model.loss(ids, ids, num_targets=self.ids.size)
            loss.backward()
            self.losses.append(loss.item())

    def arrays(self) -> dict[str, bytes]:
        state = self.optimizer.state
        moments = {name: (t, m.tobytes(), v.tobytes()) for name, (t, m, v) in state.items()}
        return {"": moments} | {name: p.data.tobytes() for name, p in self.model.named_parameters()}


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    yield
    assert engine.mode.watch is None
    assert not tracemalloc.is_tracing()
    assert module._Timed.products == []


# ------------------------------------------------------------------------ names and modules


def calls(rows) -> dict[str, int]:
    return {f"{row.place} {row.op}".strip(): row.calls for row in rows}


PARTS = {"gradients outside its ops": 1, "clip_grad_norm": 1, "AdamW": 1, "zero_grad": 1}


def test_every_op_of_gpt2_has_its_name_and_module():
    training = Training("gpt2")
    assert calls(profile(training.model, training.parts, warmup=1, steps=2).rows) == PARTS | {
        "wte embedding": 1,
        "wpe embedding": 1,
        "GPT2 add": 1,
        "drop dropout": 1,
        "h.*.ln_1 layer_norm": 2,
        "h.*.attn.c_attn linear": 2,
        "h.*.attn split": 6,
        "h.*.attn rearrange": 8,
        "h.*.attn scaled_dot_product_attention": 2,
        "h.*.attn.c_proj linear": 2,
        "h.*.attn.resid_dropout dropout": 2,
        "h.* add": 4,
        "h.*.ln_2 layer_norm": 2,
        "h.*.mlp.c_fc linear": 2,
        "h.*.mlp gelu": 2,
        "h.*.mlp.c_proj linear": 2,
        "h.*.mlp.dropout dropout": 2,
        "ln_f layer_norm": 1,
        "GPT2 linear_cross_entropy": 1,
    }


def test_every_op_of_llama_has_its_name_and_module():
    training = Training("llama")
    assert calls(profile(training.model, training.parts, warmup=1, steps=1).rows) == PARTS | {
        "embed_tokens embedding": 1,
        "layers.*.input_layernorm rms_norm": 2,
        "layers.*.self_attn.q_proj linear": 2,
        "layers.*.self_attn.k_proj linear": 2,
        "layers.*.self_attn.v_proj linear": 2,
        "layers.*.self_attn rearrange": 8,
        "layers.*.self_attn rope": 4,
        "layers.*.self_attn scaled_dot_product_attention": 2,
        "layers.*.self_attn.o_proj linear": 2,
        "layers.* add": 4,
        "layers.*.post_attention_layernorm rms_norm": 2,
        "layers.*.mlp.gate_proj linear": 2,
        "layers.*.mlp.up_proj linear": 2,
        "layers.*.mlp swiglu": 2,
        "layers.*.mlp.down_proj linear": 2,
        "norm rms_norm": 1,
        "Llama linear_cross_entropy": 1,
    }


def test_an_op_is_named_after_the_function_that_was_called():
    """Not after its helpers or the ops it calls; ops outside the model have no module."""
    x = Tensor(np.ones((2, 3), np.float32), requires_grad=True)

    def step():
        F.silu(x.mean(axis=0) - 1.0).var()

    rows = profile(nn.LayerNorm(3), {"ops": step}).rows
    assert calls(rows) == {"ops outside its ops": 1, "mean": 2, "sub": 1, "silu": 1, "var": 1}


def test_ops_of_other_threads_are_not_recorded():
    layer, x = nn.LayerNorm(3), Tensor(np.ones((2, 3), np.float32))

    def in_another_thread():
        thread = threading.Thread(target=lambda: layer(x).sum().backward())
        thread.start()
        thread.join()

    assert calls(profile(layer, {"waiting": in_another_thread}).rows) == {"waiting": 1}


# ------------------------------------------------------------------------------------ times


class Layer(nn.Module):
    """An op whose passes take the given times."""

    def __init__(self, clock, forward, backward):
        self.clock, self.times = clock, (forward, backward)
        self.weight = Tensor(np.ones(1, np.float32), requires_grad=True)

    def forward(self, x):
        self.clock.now += self.times[0]

        def vjp(grad):
            self.clock.now += self.times[1]
            return grad, None

        return Tensor.from_op(x.data, (x, self.weight), vjp)


class Model(nn.Module):
    def __init__(self, *layers):
        self.h = list(layers)

    def forward(self, x):
        for layer in self.h:
            x = layer(x)
        return x


class Clock:
    now = 0


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(module.time, "perf_counter_ns", lambda: Clock.now)
    return Clock


def test_time_is_attributed_to_the_op_that_ends_it(clock):
    model = Model(Layer(clock, 5, 70), Layer(clock, 10, 200), Layer(clock, 0, 0))
    x = Tensor(np.ones(1, np.float32), requires_grad=True)

    def gradients():
        clock.now += 1000
        loss = model(x)
        clock.now += 3000
        loss.backward()
        clock.now += 9000

    def update():
        clock.now += 20_000

    result = profile(model, {"gradients": gradients, "update": update}, steps=2)
    rows = {f"{row.place} {row.op}".strip(): row for row in result.rows}
    # The 1000 before the first op count for that op, and the other 12,000 for no op.
    expected = {"h.* forward": (1015, 270, 0), "gradients outside its ops": (0, 0, 12_000)}
    expected["update"] = (0, 0, 20_000)
    assert rows.keys() == expected.keys()
    for name, row in rows.items():
        assert (row.forward, row.backward, row.other) == pytest.approx([ns / 1e9 for ns in expected[name]])
    assert result.seconds == pytest.approx(33_285 / 1e9)
    assert [row.place for row in result.rows] == ["update", "gradients", "h.*"]


class SlowAt(At):
    def add_into(self, buffer):
        Clock.now += 40
        super().add_into(buffer)


class Gather(nn.Module):
    """An op whose gradient takes time to accumulate."""

    def forward(self, x):
        return Tensor.from_op(x.data[:1], (x,), lambda grad: (SlowAt(slice(0, 1), grad),))


def test_accumulating_a_gradient_counts_for_its_op(clock):
    """Also that of the last op, before the next micro-batch."""
    model, x = Model(Gather()), Tensor(np.ones(3, np.float32), requires_grad=True)

    def step():
        for _ in range(2):
            model(x).backward()

    result = profile(model, {"step": step}, steps=1)
    row = next(row for row in result.rows if row.place == "h.*")
    assert (row.forward, row.backward) == (0, pytest.approx(80 / 1e9))


@pytest.mark.parametrize("name", MODELS)
def test_the_rows_sum_to_the_step(name):
    training = Training(name)
    result = profile(training.model, training.parts, warmup=1)
    assert sum(row.seconds for row in result.rows) == pytest.approx(result.seconds, rel=1e-9)
    assert sum(row.products for row in result.rows) == pytest.approx(result.products, rel=1e-9)
    assert all(0 <= row.products <= row.seconds for row in result.rows)
    assert [row.seconds for row in result.rows] == sorted((row.seconds for row in result.rows), reverse=True)
    assert (result.steps, result.threads) == (3, 1)
    by_kind = [(row.forward > 0, row.backward > 0, row.other > 0) for row in result.rows]
    is_part = [row.place in training.parts for row in result.rows]
    assert by_kind == [(not part, not part, part) for part in is_part]


def products_of(training) -> dict[str, float]:
    with module._timed_products(training.model):
        account = module._watched(training.model, training.parts, 1)
    rows = account.rows.values()
    return {f"{row.place} {row.op}": round(1e9 * row.products) for row in rows if row.products}


def test_products_are_the_matrix_products(monkeypatch):
    """All products, forward and backward, and nothing else: the clock ticks once per product."""
    ticks = iter(range(10**9))
    monkeypatch.setattr(module.time, "perf_counter_ns", lambda: next(ticks))
    # In each of 2 layers, for 4 heads of 3 sequences at once and one block of queries: 2 forward, 4 backward.
    assert products_of(Training("gpt2")) == {
        "h.*.attn.c_attn linear": 6,
        "h.*.attn scaled_dot_product_attention": 12,
        "h.*.attn.c_proj linear": 6,
        "h.*.mlp.c_fc linear": 6,
        "h.*.mlp.c_proj linear": 6,
        "GPT2 linear_cross_entropy": 3,
    }


def test_products_in_the_thread_pool_count_by_their_share_of_the_threads(monkeypatch):
    account = module._Account(nn.LayerNorm(3), bytes_too=False)
    account.begin()
    row = account.row("", "linear")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    module._Timed.products += [(False, 100), (True, 60), (True, 20)]
    account.settle(row, "forward")
    assert row.products == pytest.approx((100 + (60 + 20) / 4) / 1e9)
    account.settle(row, "forward")
    assert row.products == pytest.approx(120e-9)


def test_products_are_scaled_to_the_timed_steps():
    row = Row("h.*", "linear", forward=300e-9, backward=500e-9)
    busier = Row("h.*", "linear", forward=1e-6, backward=1e-6, products=1.5e-6)  # under load
    module._finish(row, Row("", ""), busier, steps=2)
    assert row.seconds == pytest.approx(400e-9) and row.products == pytest.approx(300e-9)


# ----------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("name", MODELS)
def test_kept_memory_is_that_predicted_by_info(name, monkeypatch):
    """test_info.py compares that with measurements. Ids are kept as well."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    training = Training(name, batch=64)
    result, costs = profile(training.model, training.parts), info.memory(training.model, 64, 64)
    kept = sum(row.keeps for row in result.rows)
    assert kept == pytest.approx(costs.activations, rel=0.01)
    assert result.peak == pytest.approx(costs.peak - costs.weights - costs.optimizer, rel=0.05)


def test_memory_of_single_ops():
    training = Training("gpt2, no dropout", batch=16)
    rows = {f"{r.place} {r.op}": r for r in profile(training.model, training.parts).rows}
    a = 4 * 16 * 64 * 32  # bytes of one residual stream
    assert rows["h.*.mlp gelu"].keeps == 2 * 4 * a  # its slope, in two layers
    assert rows["h.*.mlp.c_proj linear"].keeps == 2 * 4 * a  # GELU's output
    assert rows["h.*.attn.c_proj linear"].keeps == 0  # attention's output, kept by attention
    assert 4 * a <= rows["h.*.mlp.c_fc linear"].needs < 4.5 * a  # one call's output, and NumPy's own buffers
    scratch = 4 * 128 * 32  # for the largest matrix
    views = 300 * len(list(training.model.parameters()))  # of each parameter, its gradient and averages
    assert scratch <= rows["AdamW "].needs < scratch + views
    assert rows["GPT2 add"].keeps == 0 and a <= rows["GPT2 add"].needs < 1.5 * a


def test_arrays_in_a_list_count_as_kept():
    a, b = (Tensor(np.ones(shape, np.float32), requires_grad=True) for shape in ((2, 3), (3, 50)))
    rows = profile(nn.LayerNorm(3), {"step": lambda: einsum("ij,jk->ik", a, b).sum().backward()}).rows
    assert {row.op: row.keeps for row in rows if row.keeps} == {"einsum": 4 * (6 + 150)}


def test_micro_batches_keep_the_memory_of_one():
    one, two = Training("gpt2", batch=8), Training("gpt2", batch=8, micro_batches=2)
    kept = [{(r.place, r.op): r.keeps for r in profile(t.model, t.parts, 1, 1).rows} for t in (one, two)]
    assert kept[0] == kept[1] and sum(kept[0].values()) > 1e6


def test_without_gradients_nothing_is_kept():
    training = Training("gpt2")

    def forward():
        with no_grad():
            training.model.loss(training.ids[0], training.ids[0])

    result = profile(training.model, {"forward": forward})
    assert all(row.keeps == row.backward == 0 for row in result.rows)
    assert sum(row.needs > 0 for row in result.rows) > 10


def test_page_faults(monkeypatch):
    """The counter increases by one at every reading, so every event counts one."""
    readings = iter(range(10**9))
    monkeypatch.setattr(module, "_page_faults", lambda: next(readings))
    x = Tensor(np.ones(3, np.float32), requires_grad=True)
    result = profile(nn.LayerNorm(3), {"step": lambda: x.exp().sum().backward()})
    # exp and sum: a result, and a gradient; the rest: before the first gradient, and after the last.
    assert {row.op: row.faults for row in result.rows} == {"exp": 2, "sum": 2, "outside its ops": 2}
    monkeypatch.setattr(module, "_page_faults", lambda: math.nan)
    result = profile(nn.LayerNorm(3), {"step": lambda: x.exp().sum().backward()})
    assert all(math.isnan(row.faults) for row in result.rows)
    assert str(result).splitlines()[4].endswith(" ?")


# ---------------------------------------------------------------------------- side effects


@pytest.mark.parametrize("name", MODELS)
def test_a_profiled_step_computes_bitwise_identical_numbers(name):
    watched, plain = Training(name, micro_batches=2), Training(name, micro_batches=2)
    arrays = [parameter.data for parameter in watched.model.parameters()]
    profile(watched.model, watched.parts, warmup=1, steps=2)
    for _ in range(1 + 2 + 1 + 1):
        for part in plain.parts.values():
            part()
    assert watched.losses == plain.losses and len(plain.losses) == 10
    assert watched.arrays() == plain.arrays()
    assert all(parameter.data is array for parameter, array in zip(watched.model.parameters(), arrays))


@pytest.mark.parametrize("at", range(1, 6))  # warm-up, two timed steps, memory, products
@pytest.mark.parametrize("where", ["a part", "an op", "a gradient"])
def test_an_exception_leaves_no_side_effects(at, where):
    layer, done = nn.Linear(3, 3, rng=np.random.default_rng(0)), []
    x = Tensor(np.ones((2, 3), np.float32))
    weight = layer.weight.data

    def fail(grad=None):
        raise RuntimeError(where)

    def step():
        layer.zero_grad()
        (layer(layer.weight) ** 2).sum().backward()
        done.append(True)
        if len(done) == at:
            if where == "a gradient":
                layer.zero_grad()
                Tensor.from_op(x.data, (layer(x),), fail).backward(x.data)
            elif where == "an op":
                layer(Tensor(np.ones(5, np.float32)))
            fail()

    with pytest.raises(Error if where == "an op" else RuntimeError):
        profile(layer, {"step": step}, warmup=1, steps=2)
    assert len(done) == at
    assert layer.weight.data is weight
    assert all(type(p.grad) is np.ndarray for p in layer.parameters() if p.grad is not None)


def test_tracemalloc_stays_on_if_it_was_on():
    tracemalloc.start()
    try:
        profile(nn.LayerNorm(3), {"step": lambda: None})
        assert tracemalloc.is_tracing()
    finally:
        tracemalloc.stop()


def test_the_warm_up_is_not_recorded():
    seen = []
    profile(nn.LayerNorm(3), {"step": lambda: seen.append(engine.mode.watch)}, warmup=1, steps=1)
    warm_up, *watched = seen
    assert warm_up is None and len(watched) == 3 and None not in watched


# --------------------------------------------------------------------------------- the table


def row(place, op="", seconds=0.001, **more):
    none = dict(calls=1, forward=seconds, backward=0.0, other=0.0, products=0.0, keeps=0, needs=0, faults=0.0)
    return Row(place, op, **none | more)


def test_the_table():
    gelu = dict(calls=12, backward=0.0302, keeps=18_900_000, needs=12_600_000, faults=1234.4)
    rows = [
        row("h.*.mlp.c_fc", "linear", 0.6, calls=12, backward=1.1, products=1.6),
        row("h.*.mlp", "gelu", 0.05, **gelu),
        row("AdamW", forward=0.0, other=0.02),
    ]
    table = str(Profile(rows, 1.8002, 1.6, 99_000_000, steps=3, threads=2)).splitlines()
    assert table[:9] == [
        "A training step takes 1,800 ms (mean of 3, 2 threads):",
        "matrix products 1,600 ms (89%), everything else 200 ms",
        "",
        "module and op          ms  share  fwd   bwd  gemm calls keeps needs faults",
        "h.*.mlp.c_fc linear 1,700  94.4%  600 1,100 1,600    12                  0",
        "h.*.mlp gelu         80.2   4.5% 50.0  30.2          12  18.9  12.6  1,234",
        "AdamW                20.0   1.1%                      1                  0",
        "the whole step      1,800 100.0%  650 1,130 1,600    25  18.9  99.0  1,234",
        "",
    ]
    assert all(len(line) <= 88 for line in table)


def test_names_are_shortened_to_fit_the_line():
    costs = dict(calls=128, backward=25.0, products=11.0, keeps=10**10, needs=10**9, faults=10**4)
    rows = [row("layers.*.post_attention_layernorm", "rms_norm", 12.3, **costs)]
    rows.append(row("h.*.attn", "scaled_dot_product_attention"))
    table = str(Profile(rows, 37.3, 11.0, 10**10, steps=3, threads=2)).splitlines()
    assert table[4].startswith("layers.*.post_at… rms_norm ")
    assert table[5].startswith("h.*.attn attention ")
    assert all(len(line) <= 88 for line in table)


def test_a_table_has_at_most_thirty_rows():
    rows = [row(f"part {n:02}", seconds=0.001 * (40 - n)) for n in range(40)]
    table = str(Profile(rows, 0.82, 0.0, 0, steps=1, threads=1)).split("\n\n")[1].splitlines()
    assert len(table) == 1 + module.MOST_ROWS + 1
    assert table[-2].split()[:4] == ["11", "others", "66.0", "8.0%"]  # 11 + 10 + … + 1 ms
    assert table[-1].split()[:5] == ["the", "whole", "step", "820", "100.0%"]
    table = str(Profile(rows[:30], 0.765, 0.0, 0, steps=1, threads=1)).split("\n\n")[1].splitlines()
    assert len(table) == 1 + 30 + 1 and "others" not in table[-2]


# --------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("warmup, steps", [(0, 3), (2, 0), (-1, 1)])
def test_a_profile_needs_a_warm_up_and_a_step(warmup, steps):
    with pytest.raises(Error) as error:
        profile(nn.LayerNorm(3), {}, warmup, steps)
    assert str(error.value) == (f"warmup is {warmup} and steps is {steps}: both must be at least 1")


def test_a_model_on_a_gpu_is_refused():
    layer = nn.LayerNorm(3)
    layer.weight.replace(DeviceArray(np.ones(3, np.float32)))
    with pytest.raises(Error) as error:
        profile(layer, {})
    assert str(error.value) == "only a model on the CPU can be profiled: move it with model.to('cpu')"
