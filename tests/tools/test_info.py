"""The costs predicted by ``tinyllm.tools.info`` equal those counted and measured on real steps."""

import tracemalloc
from collections import Counter
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.ops import keeping

from tinyllm import GPT2, Error, GPT2Config, LlamaConfig, manual_seed, nn, no_grad
from tinyllm.models import ARCHITECTURES, Mixtral, MixtralConfig
from tinyllm.models.cache import SLACK
from tinyllm.nn import evaluating
from tinyllm.optim import AdamW, Muon, clip_grad_norm
from tinyllm.tools import info


def config(vocab_size, n_embd, n_layer, n_head, n_positions, dropout=0.0, **more) -> GPT2Config:
    return GPT2Config(
        vocab_size=vocab_size,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=n_head,
        n_positions=n_positions,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        **more,
    )


def llama(vocab_size, hidden_size, layers, heads, kv_heads, inner, context, **more) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        max_position_embeddings=context,
        **more,
    )


def mixtral(context, **more) -> MixtralConfig:
    sizes = vars(llama(50, 16, 2, 8, 2, 20, context)) | more
    kept = {field.name: sizes[field.name] for field in fields(MixtralConfig) if field.name in sizes}
    return MixtralConfig(**kept, num_local_experts=5)


def model_of(config, rng=None):
    return ARCHITECTURES[config.model_type](config, rng)


UNTIED = dict(tie_word_embeddings=False, lm_head_bias=True, qkv_bias=False)


# ------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    "config, number",
    [
        (GPT2Config.preset("124M"), 124_439_808),
        (GPT2Config.preset("355M"), 354_823_168),
        (GPT2Config.preset("774M"), 774_030_080),
        (GPT2Config.preset("1558M"), 1_557_611_200),
        (LlamaConfig.preset("Llama-2-7B"), 6_738_415_616),
        (LlamaConfig.preset("Llama-3-8B"), 8_030_261_248),
        (LlamaConfig.preset("Llama-3.2-1B"), 1_235_814_400),
    ],
)
def test_published_models_are_described_without_allocating_weights(config, number):
    tracemalloc.start()
    try:
        rows = info.parameter_table(model_of(config))
        needed = info.memory(model_of(config), 1, 64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(row.number for row in rows) == number
    assert needed.weights == needed.gradients == 4 * number
    assert peak < 40e6 < needed.weights


def test_parameter_table():
    """A tied head has no row, since its matrix counts for the embedding."""
    assert info.parameter_table(model_of(config(100, 8, 3, 2, 16))) == [
        ("wte", "100 x 8", 1, 800),
        ("wpe", "16 x 8", 1, 128),
        ("h.*.ln_1", "8 + 8", 3, 3 * 16),
        ("h.*.attn.c_attn", "24 x 8 + 24", 3, 3 * 216),
        ("h.*.attn.c_proj", "8 x 8 + 8", 3, 3 * 72),
        ("h.*.ln_2", "8 + 8", 3, 3 * 16),
        ("h.*.mlp.c_fc", "32 x 8 + 32", 3, 3 * 288),
        ("h.*.mlp.c_proj", "8 x 32 + 8", 3, 3 * 264),
        ("ln_f", "8 + 8", 1, 16),
    ]


def test_parameter_table_of_a_llama():
    assert info.parameter_table(model_of(llama(100, 8, 3, 4, 2, 20, 16))) == [
        ("embed_tokens", "100 x 8", 1, 800),
        ("layers.*.input_layernorm", "8", 3, 3 * 8),
        ("layers.*.self_attn.q_proj", "8 x 8", 3, 3 * 64),
        ("layers.*.self_attn.k_proj", "4 x 8", 3, 3 * 32),
        ("layers.*.self_attn.v_proj", "4 x 8", 3, 3 * 32),
        ("layers.*.self_attn.o_proj", "8 x 8", 3, 3 * 64),
        ("layers.*.post_attention_layernorm", "8", 3, 3 * 8),
        ("layers.*.mlp.gate_proj", "20 x 8", 3, 3 * 160),
        ("layers.*.mlp.up_proj", "20 x 8", 3, 3 * 160),
        ("layers.*.mlp.down_proj", "8 x 20", 3, 3 * 160),
        ("norm", "8", 1, 8),
        ("lm_head", "100 x 8", 1, 800),
    ]


gpt2_configs = st.builds(
    lambda heads, size, **more: GPT2Config(n_head=heads, n_embd=heads * size, **more),
    heads=st.integers(1, 4),
    size=st.integers(1, 8),
    n_layer=st.integers(1, 4),
    vocab_size=st.integers(1, 300),
    n_positions=st.integers(1, 300),
    n_inner=st.none() | st.integers(1, 50),
    tie_word_embeddings=st.booleans(),
    lm_head_bias=st.booleans(),
    qkv_bias=st.booleans(),
    attn_pdrop=st.sampled_from([0.0, 0.1]),
    resid_pdrop=st.sampled_from([0.0, 0.1]),
    embd_pdrop=st.sampled_from([0.0, 0.1]),
)
llama_configs = st.builds(
    lambda groups, shared, size, **more: LlamaConfig(
        num_attention_heads=groups * shared,
        num_key_value_heads=groups,
        hidden_size=groups * shared * size,
        **more,
    ),
    groups=st.integers(1, 3),
    shared=st.integers(1, 4),
    size=st.integers(1, 6),
    head_dim=st.sampled_from([2, 4, 8]),
    num_hidden_layers=st.integers(1, 4),
    vocab_size=st.integers(1, 300),
    max_position_embeddings=st.integers(1, 300),
    intermediate_size=st.integers(1, 50),
    tie_word_embeddings=st.booleans(),
    attention_bias=st.booleans(),
    mlp_bias=st.booleans(),
    attention_dropout=st.sampled_from([0.0, 0.1]),
)


@given(gpt2_configs | llama_configs, st.integers(1, 5), st.integers(0, 300))
@example(GPT2Config(1, 1, 1, 1, 1, tie_word_embeddings=False), 1, 0)
@example(llama(10, 8, 1, 4, 2, 5, 9, head_dim=6, attention_bias=True, mlp_bias=True), 2, 9)
def test_parts_sum_to_the_totals(config, batch, context):
    model = model_of(config)
    number, context = model.num_parameters(), 1 + context % model.context
    assert sum(row.number for row in info.parameter_table(model)) == number
    costs = info.memory(model, batch, context)
    assert costs.weights == costs.gradients == costs.optimizer // 2 == 4 * number
    cache = model.new_cache(batch, context)
    assert costs.cache == sum(array.nbytes for array in (*cache.keys, *cache.values))  # one per layer
    assert costs.peak >= costs.weights + costs.optimizer + costs.activations
    assert costs.inference > costs.weights


# ----------------------------------------------------------------------------------- memory


def traced_step(config, batch, context, dtype) -> dict[str, int]:
    """Bytes measured by tracemalloc in the second training step, and in a forward pass for one token."""

    def peak_since_last() -> int:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        return peak

    rng, seen = np.random.default_rng(0), {}
    tracemalloc.start()
    try:
        model = model_of(config, rng).astype(np.dtype(dtype)).train()
        optimizer = AdamW(model, lr=1e-3)
        ids = rng.integers(0, config.vocab_size, (batch, context))
        for step in range(2):
            manual_seed(0, step)
            before, _ = tracemalloc.get_traced_memory(), peak_since_last()
            loss = model.loss(ids, ids)
            seen["kept"] = tracemalloc.get_traced_memory()[0] - before[0]
            seen["forward"] = peak_since_last()
            loss.backward()
            clip_grad_norm(model, 1.0)
            seen["backward"] = peak_since_last()
            optimizer.step()
            seen["update"] = peak_since_last()
            optimizer.zero_grad()
        del loss, optimizer
        peak_since_last()
        with evaluating(model), no_grad():
            model(ids, last_only=True)
        seen["inference"] = peak_since_last()
    finally:
        tracemalloc.stop()
    return seen


@pytest.fixture
def one_thread(monkeypatch):
    """With several threads, how much of their scratch memory coincides is random."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


STEPS = {
    "small": (config(512, 128, 4, 4, 256), 4, 256, "float32"),
    "small, dropout": (config(512, 128, 4, 4, 256, dropout=0.1), 4, 250, "float32"),
    "small, float64": (config(512, 128, 4, 4, 256, dropout=0.1), 2, 256, "float64"),
    "wide MLP": (config(256, 96, 1, 2, 64, dropout=0.1, n_inner=1536), 32, 64, "float32"),
    "narrow MLP": (config(256, 192, 2, 2, 64, dropout=0.2, n_inner=64), 64, 64, "float32"),
    "deep": (config(256, 64, 12, 2, 128), 8, 128, "float32"),
    "logits": (config(20_000, 32, 1, 2, 128, **UNTIED), 12, 100, "float32"),
    "logits, one chunk": (config(8192, 256, 1, 2, 128), 4, 128, "float32"),
    "logits, one position": (config(20_000, 32, 1, 2, 128, **UNTIED), 200, 1, "float32"),
    "weights": (config(1000, 512, 2, 8, 64, dropout=0.1), 1, 32, "float32"),
    "weights, untied": (config(3000, 256, 3, 8, 64, **UNTIED), 2, 64, "float64"),
    "attention": (config(256, 64, 1, 8, 4096), 1, 4096, "float32"),
    "attention, dropout": (config(64, 32, 1, 4, 4096, dropout=0.1), 1, 4096, "float32"),
    "llama": (llama(512, 192, 4, 6, 2, 512, 256), 4, 256, "float32"),
    "llama, float64": (llama(512, 128, 2, 4, 4, 344, 256, tie_word_embeddings=True), 3, 200, "float64"),
    "llama, wide": (llama(256, 96, 1, 4, 1, 1536, 64, attention_bias=True, mlp_bias=True), 32, 64, "float32"),
    "llama, narrow": (llama(256, 192, 2, 4, 2, 64, 64), 64, 64, "float32"),
    "llama, large heads": (llama(256, 64, 2, 4, 2, 64, 64, head_dim=64), 64, 64, "float32"),
    "llama, weights": (llama(2000, 512, 2, 8, 2, 1376, 64), 1, 32, "float32"),
    "llama, attention": (llama(3000, 32, 1, 4, 2, 64, 4096, attention_dropout=0.1), 1, 4096, "float32"),
}


@pytest.mark.parametrize("step", STEPS)
def test_memory_equals_that_of_a_real_step(step, one_thread):
    """All arrays are counted; the tolerance of 5% is for the objects of Python and NumPy."""
    config, batch, context, dtype = STEPS[step]
    predicted, measured = info.memory(model_of(config), batch, context, dtype), traced_step(*STEPS[step])
    for phase in ("forward", "backward", "update", "inference"):
        assert getattr(predicted, phase) == pytest.approx(measured[phase], rel=0.05), phase
    assert predicted.activations == pytest.approx(measured["kept"], rel=0.02)


def test_the_steps_have_their_peaks_in_all_phases(one_thread):
    """So that an error in any phase would be found."""
    costs = {step: info.memory(model_of(config), *sizes) for step, (config, *sizes) in STEPS.items()}
    assert costs["wide MLP"].peak == costs["wide MLP"].backward
    assert costs["logits"].peak == costs["logits"].forward
    assert costs["weights"].peak == costs["weights"].update


class Adapter(nn.Module):
    """A custom layer around another."""

    def __init__(self, layer, rank):
        self.layer = layer
        self.down = nn.Linear(layer.weight.shape[1], rank, rng=None)
        self.up = nn.Linear(rank, layer.weight.shape[0], rng=None)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x).exp())


def test_replaced_layers_are_counted():
    model = model_of(config(512, 128, 2, 4, 64))
    plain = info.memory(model, 4, 64)
    for block in model.h:
        block.attn.c_attn = Adapter(block.attn.c_attn, 48)
    adapted, size = info.memory(model, 4, 64), 4 * 4 * 64  # bytes per channel
    # In two layers the input of `up` and the result of exp are kept, which are one array.
    assert adapted.activations - plain.activations == 2 * 48 * size
    more = 2 * (128 * 48 + 48 + 48 * 384 + 384)
    assert adapted.weights - plain.weights == 4 * more
    flops = (
        info.flops_per_token(model, 64).linears
        - info.flops_per_token(model_of(config(512, 128, 2, 4, 64)), 64).linears
    )
    assert flops == 2 * 2 * (128 * 48 + 48 * 384)


def test_a_long_context_is_extrapolated_linearly(monkeypatch):
    model = model_of(llama(300, 32, 2, 2, 1, 64, 4096))
    with keeping(everything=False):  # at 4,096 tokens all that may be kept depends on the channels alone
        counted = info.memory(model, 1, 1500)
        monkeypatch.setattr("tinyllm.tools.memory.LONG", 1000)
        assert info.memory(model, 1, 1500)[3:] == pytest.approx(counted[3:], rel=0.03)


def test_memory_depends_on_optimizer_dtype_and_batch():
    small = model_of(config(512, 128, 4, 4, 256))
    with_adamw, without = info.memory(small, 4, 256), info.memory(small, 4, 256, optimizer=None)
    assert without.optimizer == 0
    assert with_adamw.peak - without.peak == with_adamw.optimizer == 2 * with_adamw.weights
    with_muon, heads = info.memory(small, 4, 256, optimizer=Muon), ("wte.weight", "wpe.weight")
    matrices = sum(p.size for name, p in small.named_parameters() if p.ndim == 2 and name not in heads)
    assert with_adamw.optimizer - with_muon.optimizer == 4 * matrices > 0
    # N and its polynomial, and three squares of 128 while one replaces another
    assert with_muon.update - with_muon.optimizer == 2 * with_muon.weights + 4 * (2 * 128 * 512 + 3 * 128**2)
    assert info.memory(small, 4, 256, np.float64).activations == 2 * with_adamw.activations
    assert info.memory(small, 8, 128).activations < 2.01 * info.memory(small, 4, 128).activations
    assert info.memory(model_of(small.config, np.random.default_rng(0)), 4, 256) == with_adamw


# ------------------------------------------------------------------------------- arithmetic


class Counted(np.ndarray):
    """An array that records 2 m n k for every matrix product with it, as do its results."""

    products: list  # shared, set by the test

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        plain = [x.view(np.ndarray) if isinstance(x, Counted) else x for x in inputs]
        if out is not None:
            kwargs["out"] = tuple(x.view(np.ndarray) if isinstance(x, Counted) else x for x in out)
        result = getattr(ufunc, method)(*plain, **kwargs)
        if ufunc is np.matmul and min(x.ndim for x in inputs) > 1:  # not a sum
            Counted.products.append(2 * result.size * plain[0].shape[-1])
        return out[0] if out is not None else _counted(result)

    def __array_function__(self, func, types, args, kwargs):
        return _counted(super().__array_function__(func, types, args, kwargs))


def _counted(result):
    return result.view(Counted) if type(result) is np.ndarray else result


def count_products(work) -> int:
    Counted.products = []
    work()
    return sum(Counted.products)


@pytest.mark.parametrize(
    "config, batch, context",
    [
        (config(50, 16, 2, 2, 300, dropout=0.1), 2, 300),  # three blocks of queries, the last one short
        (config(50, 16, 2, 2, 300), 3, 128),  # one block: nothing is skipped
        (config(9000, 8, 1, 4, 300, n_inner=20, **UNTIED), 2, 290),  # chunks of logits, and columns of dW
        (config(7, 6, 3, 3, 5), 1, 1),
        (llama(50, 16, 2, 8, 2, 20, 300), 2, 300),  # four heads in one product: blocks of 32 queries
        (llama(9000, 8, 1, 2, 2, 20, 300, tie_word_embeddings=True), 2, 290),
        (llama(7, 6, 3, 1, 1, 5, 5, head_dim=4, mlp_bias=True), 1, 1),
        (mixtral(300, sliding_window=40), 2, 300),  # of keys before a window, no block is read
        (mixtral(5), 1, 1),
    ],
)
def test_flops_are_those_of_the_products_computed(config, batch, context):
    """Exactly: all products of the forward and backward passes are counted, and nothing else."""
    model = model_of(config, np.random.default_rng(0))
    for parameter in model.parameters():
        parameter.replace(parameter.data.view(Counted))
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (batch, context))

    def forward():
        with no_grad():
            model.loss(ids, ids)

    flops, tokens = info.flops_per_token(model_of(config), context), batch * context
    assert count_products(forward) == pytest.approx(flops.forward * tokens, rel=1e-12)
    with keeping(everything=False):
        trained = count_products(lambda: model.loss(ids, ids).backward())
    assert trained == pytest.approx(flops.training * tokens, rel=1e-12)


def test_flops_of_gpt2_by_hand():
    model = model_of(GPT2Config.preset("124M"))
    flops = info.flops_per_token(model, 1024)
    assert flops.linears == 2 * 12 * 12 * 768**2
    assert flops.head == 2 * 50257 * 768
    # PaLM, appendix B: 6 N + 12 L H Q T, N being the matrices here
    assert flops.textbook == 6 * (12 * 12 * 768**2 + 50257 * 768) + 12 * 12 * 768 * 1024
    # Of 8 x 8 blocks of 128 x 128 scores, 36 are computed.
    assert flops.attention == flops.attention_textbook * 36 / 64
    assert flops.backward == 2 * (flops.linears + flops.head) + 2.5 * flops.attention
    assert flops.training == flops.forward + flops.backward
    assert info.flops_per_token(model, 128).attention == 4 * 12 * 768 * 128


# ----------------------------------------------------------- speed of this machine, and the report


def test_product_shapes_are_those_of_a_training_step():
    model = model_of(llama(300, 16, 2, 2, 1, 40, 64))
    shapes = info.product_shapes(model, 6)
    assert shapes[6, 16, 40] == 2 * 2 + 2 * 1  # gate and up forward, and dX of down
    assert shapes[40, 6, 16] == 2 * 2  # dW of gate and up
    assert shapes[16, 6, 40] == 2  # dW of down
    flops = info.flops_per_token(model, 6)
    assert sum(count * 2 * m * k * n for (m, k, n), count in shapes.items()) == 6 * 3 * (
        flops.linears + flops.head
    )


def test_large_products_are_measured_in_part():
    shapes = info.product_shapes(model_of(LlamaConfig.preset("Llama-3-8B")), 10**6)
    assert max(max(shape) for shape in shapes) == info.LARGE


def test_rates_are_work_over_the_shortest_time(monkeypatch):
    ticks, now = iter([4.0, 2.0, 3.0, 8.0]), [0.0]

    def work(*args, **kwargs):
        now[0] += next(ticks)

    monkeypatch.setattr(info.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(info, "matmul", work)
    rate = info.gemm_rate(Counter({(3, 5, 7): 4}), seconds=0.5)  # the first run is a warm-up
    assert rate == 2 * 3 * 5 * 7 / 2.0
    ticks = iter([1.0, 5.0, 5.0, 2.5, 9.0, 9.0])
    monkeypatch.setattr(info, "MATRIX", (10, 20))
    assert info.memory_rate(np.float64, seconds=13) == 10 * 20 * 8 / 2.5


def test_rates_of_this_machine_are_plausible():
    """A wrong unit would be off by a factor of 1000."""
    assert 1e7 < info.gemm_rate(Counter({(512, 512, 512): 1}), seconds=0.01) < 1e16
    assert 1e7 < info.memory_rate(seconds=0.01) < 1e15


def test_describe(monkeypatch):
    monkeypatch.setattr(info, "gemm_rate", lambda shapes, dtype: 100e9)
    monkeypatch.setattr(info, "memory_rate", lambda dtype: 20e9)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    model = model_of(GPT2Config.preset("124M"))
    lines = info.describe(model, 4, 256).splitlines()
    assert len(lines) <= 45 and max(map(len, lines)) <= 88
    assert lines[0] == "GPT2: 124,439,808 parameters"
    words = [line.split() for line in lines]
    assert ["wte", "50257", "x", "768", "38,597,376", "31.0%"] in words
    assert ["h.*.ln_1", "12", "of", "768", "+", "768", "18,432", "0.0%"] in words
    starts = {tuple(line[:3]) for line in words}
    assert {("weights", "498", "MB"), ("AdamW", "996", "MB"), ("KV", "cache", "75.5")} <= starts
    assert {("head", "77.2", "MFLOP"), ("training", "766", "MFLOP")} <= starts
    assert {("products", "100", "GFLOP/s"), ("memory", "20.0", "GB/s")} <= starts
    flops = info.flops_per_token(model, 256)
    assert ("training", f"{100e9 / flops.training:.0f}", "tokens/s") in starts
    assert ("prefill", f"{100e9 / (flops.linears + flops.attention):.0f}", "tokens/s") in starts
    assert ("decoding", f"{20e9 / (4 * (12 * 12 * 768**2 + 50257 * 768)):.1f}", "tokens/s") in starts
    assert any("measured now with 2 threads" in line for line in lines)
    llama = info.describe(model_of(LlamaConfig.preset("Llama-3-8B")), 16, 8192)
    assert max(map(len, llama.splitlines())) <= 88


@pytest.mark.parametrize(
    "number, text",
    [
        (0, "0.00 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9994, "9.99 kB"),
        (9995, "10.0 kB"),
        (99_950, "100 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (497_759_232, "498 MB"),
        (2.47e9, "2.47 GB"),
        (1.5e12, "1.50 TB"),
        (3.2e16, "32,000 TB"),
    ],
)
def test_amounts_have_three_digits_and_a_prefix(number, text):
    assert info._amount(number, "B") == text


# ------------------------------------------------------------------------------- bad input

TINY = GPT2(GPT2Config(10, 16, 8, 1, 2), rng=None)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: info.memory(TINY, 1, 17), "context is 17: this model takes 1 to 16 tokens"),
        (lambda: info.memory(TINY, 1, 0), "context is 0: this model takes 1 to 16 tokens"),
        (lambda: info.flops_per_token(TINY, 17), "context is 17: this model takes 1 to 16 tokens"),
        (lambda: info.flops_per_token(TINY, 2.0), "context is 2.0: this model takes 1 to 16 tokens"),
        (lambda: info.describe(TINY, 1, 17), "context is 17: this model takes 1 to 16 tokens"),
        (lambda: info.memory(TINY, 0, 4), "batch is 0: it must be a whole number of at least 1"),
        (lambda: info.memory(TINY, 1.5, 4), "batch is 1.5: it must be a whole number of at least 1"),
        (
            lambda: info.memory(TINY, 1, 4, "float23"),
            "dtype 'float23' is not one that models compute in: choose float32 or float64",
        ),
        (
            lambda: info.gemm_rate(Counter(), np.float16),
            "dtype 'float16' is not one that models compute in: choose float32 or float64",
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(Error) as error:
        call()
    assert str(error.value) == message


# --------------------------------------------------------------------- mixtures and windows


def test_a_token_uses_two_of_eight_experts():
    """The head, attention and norms of Mixtral 8x7B, and two experts of each block."""
    model = Mixtral(MixtralConfig.preset("Mixtral-8x7B"), rng=None)
    flops = info.flops_per_token(model, 128)
    expert = 3 * 4096 * 14336
    assert flops.head == 2 * 4096 * 32000
    assert flops.linears == 2 * 32 * (2 * expert + 8 * 4096 + 2 * 4096 * (4096 + 1024))
    first = info.describe(model, 1, 16).splitlines()[0]
    active = 46_702_792_704 - 32 * 6 * expert
    assert first == f"Mixtral: 46,702,792,704 parameters, of which a token uses {active:,}"


def test_a_window_bounds_the_cache_and_the_attention_of_long_contexts():
    whole, windowed = (model_of(mixtral(20_000, sliding_window=window)) for window in (None, 100))
    costs = [info.memory(model, 2, 20_000).cache for model in (whole, windowed)]
    heads, size, layers = 2, 2, 2
    numbers = [2 * layers * 2 * heads * size * positions for positions in (20_000, 100 + 2 * SLACK)]
    assert costs == [4 * number for number in numbers]
    attention = [info.flops_per_token(model, 20_000).attention for model in (whole, windowed)]
    assert attention[1] == pytest.approx(attention[0] * 131 / 10_000, rel=0.01)  # 32 queries see 131 keys


def test_memory_of_a_mixture_is_that_of_experts_used_alike():
    """Within a tenth of the memory that a random mixture takes, of which some experts have more tokens."""
    config = mixtral(64)
    model = model_of(config, np.random.default_rng(0))
    ids = np.random.default_rng(1).integers(0, 50, (8, 64))
    model.loss(ids, ids).backward()
    tracemalloc.start()
    loss = model.loss(ids, ids)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del loss
    assert info.memory(model, 8, 64, "float32").activations == pytest.approx(held, rel=0.1)
