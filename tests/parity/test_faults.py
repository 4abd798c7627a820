"""Can the proof fail? Faults are planted one at a time; the suite must see each, and the report say where.

A fault replaces a function of tinyllm while one test runs. The checks are the suite's own. What is
recorded here (fault, caught by, located at) is the table that ``python -m parity proof`` prints.
"""

import functools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from functional import test_functional
from inference import test_generate
from models import test_gpt2, test_llama
from nn import test_layers, test_nn
from support.models import random_model
from training import test_training_parity as training

from parity.compare import compare, report
from parity.twins import bridge
from tinyllm import GPT2, Error, GPT2Config, LlamaConfig, Tensor, functional, nn, optim, tensor
from tinyllm.models import gpt2, llama

FACTOR = 1 + 1e-8  # a gradient wrong in the ninth digit

# ---------------------------------------------------------------------- the suite's checks

MODEL, LLAMA, FOLDER = "GPT-2 beside transformers", "Llama beside transformers", "a folder of transformers"
FREQUENCIES = "RoPE frequencies beside transformers"
ADAMW, TRAINING, SAMPLING = "AdamW beside torch", "50 training steps", "sampling beside torch"


def failure(check, *args):
    """What ``check`` raises, or None if it passes."""
    try:
        check(*args)
    except (AssertionError, Error) as error:
        return error
    return None


def op(name):
    test_functional.test_value_and_gradients_are_torchs(op=name)


def layer(name):
    test_layers.test_outputs_and_gradients_are_torchs(layer=name)


def gpt2_beside_transformers():
    test_gpt2.test_longer_than_one_block_of_queries_and_one_chunk_of_rows()


def llama_beside_transformers():
    test_llama.test_longer_than_one_block_of_queries_and_one_chunk_of_rows()


def a_folder_of_transformers():
    with tempfile.TemporaryDirectory() as folder:
        test_gpt2.test_a_folder_of_theirs_loads_here(Path(folder), GPT2.from_pretrained, tied=True)


def adamw_beside_torch():
    test_nn.test_adamw_against_torch_for_20_steps((0.9, 0.999), 1e-8, 0.01)


def fifty_training_steps():
    training.test_fifty_training_steps_are_torchs(training.CONFIG)


CHECKS = {
    **{f"op {name}": functools.partial(op, name) for name in test_functional.CASES},
    **{f"layer {name}": functools.partial(layer, name) for name in test_layers.CASES},
    MODEL: gpt2_beside_transformers,
    LLAMA: llama_beside_transformers,
    FREQUENCIES: test_llama.test_frequencies_of_every_rope_type_are_those_of_transformers,
    FOLDER: a_folder_of_transformers,
    ADAMW: adamw_beside_torch,
    TRAINING: fifty_training_steps,
    SAMPLING: test_generate.test_chosen_tokens_are_those_of_plain_torch,
}

# ------------------------------------------------------------------------------ the faults


def scaled_gradient(name, parent):
    """The op's gradient of its input ``parent`` comes out 1 + 1e-8 times as large."""
    honest, from_op = getattr(functional, name), Tensor.from_op

    def record_wrong(data, parents, vjp):
        def wrong(grad):
            grads = list(vjp(grad))
            given = grads[parent]
            if isinstance(given, tensor.At):
                grads[parent] = tensor.At(given.index, given.array * FACTOR)
            elif given is not None:
                grads[parent] = given * FACTOR
            return grads

        return from_op(data, parents, wrong)

    def sabotaged(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "from_op", staticmethod(record_wrong))
            return honest(*args, **kwargs)

    return lambda patch: patch.setattr(functional, name, sabotaged)


def attention(options):
    """Attention that computes with ``options(query, key, what it was given)``."""
    honest = functional.scaled_dot_product_attention

    def sabotaged(q, k, v, attn_mask=None, dropout_p=0.0, **given):
        given |= {"attn_mask": attn_mask, "dropout_p": dropout_p}
        return honest(q, k, v, **given | options(q, k, given))

    return lambda patch: patch.setattr(functional, "scaled_dot_product_attention", sabotaged)


def one_key_too_many(q, k, given):
    """Query t sees the key at t + 1."""
    if not given.get("is_causal"):
        return {}
    T, S = q.shape[2], k.shape[2]
    return {"is_causal": False, "attn_mask": np.tri(T, S, S - T + 1, dtype=bool)}


def unscaled(q, k, given):
    return {"scale": given.get("scale") or 1.0}


def heads_dealt_out(patch):
    """Query head h shares key-value head h % G: as cards are dealt, not as torch groups them."""
    honest = functional.scaled_dot_product_attention

    def sabotaged(q, k, v, *more, **given):
        H, G = q.shape[1], k.shape[1]
        order = np.arange(H).reshape(H // G, G).T.reshape(-1)
        return honest(q[:, order], k, v, *more, **given)[:, np.argsort(order)]

    patch.setattr(functional, "scaled_dot_product_attention", sabotaged)


def neighbours_paired(patch):
    """RoPE turns channels 2i and 2i + 1 together, as Meta's own files want it."""
    honest = functional.rope

    def sabotaged(x, cos, sin):
        order = np.arange(x.shape[-1]).reshape(-1, 2).T.reshape(-1)
        return honest(x[..., order], cos, sin)[..., np.argsort(order)]

    patch.setattr(functional, "rope", sabotaged)


def gate_and_up_swapped(patch):
    honest = functional.swiglu
    patch.setattr(functional, "swiglu", lambda gate, up: honest(up, gate))


def another_rms_eps(patch):
    def forward(layer, x):
        return functional.rms_norm(x, layer.weight.shape, layer.weight, 1e-5)

    patch.setattr(nn.RMSNorm, "forward", forward)


def scaling_ignored(patch):
    """The frequencies of rope_type "default", whatever the config says."""
    honest = llama.rope_frequencies

    def sabotaged(config):
        return honest(replace(config, rope_parameters={"rope_theta": config.rope_parameters["rope_theta"]}))

    patch.setattr(llama, "rope_frequencies", sabotaged)
    patch.setattr(test_llama, "rope_frequencies", sabotaged)


def erf_for_tanh(patch):
    honest = functional.gelu
    patch.setattr(functional, "gelu", lambda x, approximate="none": honest(x, "none"))


def erf_by_its_name(patch):
    """The table of names is read by the twin, too: only ``transformers`` can tell."""
    patch.setitem(gpt2.GELU_FORMS, "gelu_new", "none")


def another_eps(patch):
    def forward(layer, x):
        return functional.layer_norm(x, layer.weight.shape, layer.weight, layer.bias, 1e-6)

    patch.setattr(nn.LayerNorm, "forward", forward)


def dropped_bias(patch):
    patch.setattr(nn.Linear, "forward", lambda layer, x, dtype=None: functional.linear(x, layer.weight))


def square_conv1d_not_transposed(patch):
    """Of the four matrices of a block only the square one: the shapes of the others would tell."""
    honest = gpt2.Conv1D.layout

    def layout(layer, name, array):
        square = array.ndim == 2 and array.shape[0] == array.shape[1]
        return array if square else honest(layer, name, array)

    patch.setattr(gpt2.Conv1D, "layout", layout)


def tying_lost(patch):
    """From its first pass on, the head has an embedding of its own."""
    honest = GPT2.forward

    def forward(model, *args, **kwargs):
        if model.lm_head.weight is model.wte.weight:
            model.lm_head.weight = Tensor(model.wte.weight.data.copy(), requires_grad=True)
        return honest(model, *args, **kwargs)

    patch.setattr(GPT2, "forward", forward)


def adamw(bias_correction=True, decay_everything=False):
    """AdamW written plainly, right or wrong."""

    def step(self):
        beta1, beta2 = self.betas
        for name, parameter in self.parameters:
            if parameter.grad is None:
                continue
            t, m, v = self.state.get(name, (0, 0, 0))
            t += 1
            m = beta1 * m + (1 - beta1) * parameter.grad
            v = beta2 * v + (1 - beta2) * parameter.grad**2
            self.state[name] = t, m, v
            if bias_correction:
                m, v = m / (1 - beta1**t), v / (1 - beta2**t)
            if decay_everything or parameter.ndim >= 2:
                parameter.data[...] *= 1 - self.lr * self.weight_decay
            parameter.data[...] -= self.lr * m / (np.sqrt(v) + self.eps)

    return lambda patch: patch.setattr(optim.AdamW, "step", step)


def plain_means(patch):
    """Each of the three micro-batches of a step counts a third, however many targets it counts."""
    honest = GPT2.loss

    def loss(model, ids, targets, num_targets=None):
        return honest(model, ids, targets) * (1 if num_targets is None else 1 / 3)

    patch.setattr(GPT2, "loss", loss)


def ties_kept(patch):
    """Top-k by a threshold: what equals the k-th largest logit stays, too."""
    honest = test_generate.choose_tokens

    def choose_tokens(logits, uniforms, temperature=1.0, top_k=None, top_p=None):
        if top_k is not None:
            kth = np.sort(logits, axis=-1)[:, ::-1][:, :top_k][:, -1:]
            logits = np.where(logits < kth, -math.inf, logits)
        return honest(logits, uniforms, temperature, None, top_p)

    patch.setattr(test_generate, "choose_tokens", choose_tokens)


@dataclass(frozen=True)
class Fault:
    """What is planted, the checks that must see it, and between which rows the report must find it."""

    plant: Callable[[pytest.MonkeyPatch], None]
    caught_by: tuple[str, ...]
    located: tuple[str, str] | None  # the last that agrees, the first that differs; None: not in a layer
    config: GPT2Config | LlamaConfig = training.CONFIG  # of the model that the report is about


FAULTS = {
    "linear: dW × (1 + 1e-8)": Fault(
        scaled_gradient("linear", 1),
        ("op linear", "layer Linear", MODEL),
        ("gradient of the output of h.1.mlp.c_proj", "gradient of h.1.mlp.c_proj.weight"),
    ),
    "layer_norm: dx × (1 + 1e-8)": Fault(
        scaled_gradient("layer_norm", 0),
        ("op layer_norm", "layer LayerNorm", MODEL),
        ("gradient of ln_f.bias", "gradient of the output of h.1"),
    ),
    "gelu: slope × (1 + 1e-8)": Fault(
        scaled_gradient("gelu", 0),
        ("op gelu", "layer MLP", MODEL),
        ("gradient of h.1.mlp.c_proj.bias", "gradient of the output of h.1.mlp.c_fc"),
    ),
    "attention: dv × (1 + 1e-8)": Fault(
        scaled_gradient("scaled_dot_product_attention", 2),
        ("op scaled_dot_product_attention", "layer CausalSelfAttention", MODEL),
        ("gradient of h.1.attn.c_proj.bias", "gradient of the output of h.1.attn.c_attn"),
    ),
    "cross_entropy: dx × (1 + 1e-8)": Fault(scaled_gradient("cross_entropy", 0), ("op cross_entropy",), None),
    "linear_cross_entropy: dx × (1 + 1e-8)": Fault(
        scaled_gradient("linear_cross_entropy", 0),
        ("op linear_cross_entropy", "layer GPT2", MODEL),
        ("output of loss", "gradient of the output of ln_f"),
    ),
    "embedding: dW × (1 + 1e-8)": Fault(
        scaled_gradient("embedding", 0),
        ("op embedding", "layer Embedding", MODEL),
        ("gradient of the output of wpe", "gradient of wpe.weight"),
    ),
    "LayerNorm: eps 1e-6 for 1e-5": Fault(
        another_eps, ("layer LayerNorm", "layer GPT2", MODEL), ("output of drop", "output of h.0.ln_1")
    ),
    "GELU: erf for tanh": Fault(
        erf_for_tanh,
        ("op gelu", "layer MLP", MODEL),
        ("output of h.0.mlp.c_fc", "output of h.0.mlp.c_proj"),
    ),
    "GELU: gelu_new read as the erf form": Fault(
        erf_by_its_name, (MODEL,), ("output of h.0.mlp.c_fc", "output of h.0.mlp.c_proj")
    ),
    "Conv1D: not transposed": Fault(
        square_conv1d_not_transposed,
        ("layer Conv1D", MODEL, FOLDER),
        ("output of h.0.attn.c_attn", "output of h.0.attn.c_proj"),
    ),
    "attention: mask off by one": Fault(
        attention(one_key_too_many),
        ("op scaled_dot_product_attention", "layer CausalSelfAttention", MODEL),
        ("output of h.0.attn.c_attn", "output of h.0.attn.c_proj"),
    ),
    "attention: 1/sqrt(D) missing": Fault(
        attention(unscaled),
        ("op scaled_dot_product_attention", "layer CausalSelfAttention", MODEL),
        ("output of h.0.attn.c_attn", "output of h.0.attn.c_proj"),
    ),
    "Linear: bias dropped": Fault(
        dropped_bias,
        ("layer Linear", "layer Conv1D", MODEL),
        ("output of h.0.ln_1", "output of h.0.attn.c_attn"),
    ),
    "GPT-2: tying lost": Fault(
        tying_lost,
        ("layer GPT2", MODEL, TRAINING),
        ("gradient of the output of wte", "gradient of wte.weight"),
    ),
    "rms_norm: dx × (1 + 1e-8)": Fault(
        scaled_gradient("rms_norm", 0),
        ("op rms_norm", "layer RMSNorm", LLAMA),
        ("gradient of norm.weight", "gradient of the output of layers.1"),
        test_llama.EVERYTHING,
    ),
    "swiglu: da × (1 + 1e-8)": Fault(
        scaled_gradient("swiglu", 0),
        ("op swiglu", "layer SwiGLU", LLAMA),
        ("gradient of layers.1.mlp.up_proj.bias", "gradient of the output of layers.1.mlp.gate_proj"),
        test_llama.EVERYTHING,
    ),
    "rope: dx × (1 + 1e-8)": Fault(
        scaled_gradient("rope", 0),
        ("op rope", "layer GroupedQueryAttention", LLAMA),
        ("gradient of layers.1.self_attn.v_proj.bias", "gradient of the output of layers.1.self_attn.k_proj"),
        test_llama.EVERYTHING,
    ),
    "RMSNorm: eps 1e-5 for 1e-6": Fault(
        another_rms_eps,
        ("layer RMSNorm", "layer Llama", LLAMA),
        ("output of embed_tokens", "output of layers.0.input_layernorm"),
        test_llama.EVERYTHING,
    ),
    "RoPE: neighbours paired": Fault(
        neighbours_paired,
        ("op rope", "layer GroupedQueryAttention", LLAMA),
        ("output of layers.0.self_attn.v_proj", "output of layers.0.self_attn.o_proj"),
        test_llama.EVERYTHING,
    ),
    "RoPE: scaling of the frequencies ignored": Fault(
        scaling_ignored,
        (FREQUENCIES, "layer Llama", LLAMA),
        ("output of layers.0.self_attn.v_proj", "output of layers.0.self_attn.o_proj"),
        test_llama.EVERYTHING,
    ),
    "SwiGLU: gate and up swapped": Fault(
        gate_and_up_swapped,
        ("op swiglu", "layer SwiGLU", LLAMA),
        ("output of layers.0.mlp.up_proj", "output of layers.0.mlp.down_proj"),
        test_llama.EVERYTHING,
    ),
    "GQA: heads dealt out, not grouped": Fault(
        heads_dealt_out,
        ("op scaled_dot_product_attention", "layer GroupedQueryAttention", LLAMA),
        ("output of layers.0.self_attn.v_proj", "output of layers.0.self_attn.o_proj"),
        test_llama.EVERYTHING,
    ),
    "AdamW: no bias correction": Fault(adamw(bias_correction=False), (ADAMW, TRAINING), None),
    "AdamW: decay of norms and biases": Fault(adamw(decay_everything=True), (ADAMW, TRAINING), None),
    "accumulation: plain means": Fault(plain_means, (TRAINING,), None),
    "top-k: ties kept": Fault(ties_kept, (SAMPLING,), None),
}

# -------------------------------------------------------------------------------- the tests


def located(config) -> tuple[str, str] | None:
    """The last row of the report that agrees and the first that differs; None if all agree."""
    model = random_model(config)
    batch = report.random_batch(model, 2, 8, 0)
    findings = report.examine(model, bridge.to_torch(model), bridge.to_transformers(model), *batch)
    if findings.first is None:
        return None
    first, side = findings.first
    rows = (findings.twin if side == "the twin" else findings.theirs).rows
    return str(rows[rows.index(first) - 1]), str(first)


def test_nothing_is_seen_where_nothing_is_wrong(monkeypatch):
    """With everything replaced as the faults replace it, but by what is right."""
    adamw()(monkeypatch)
    attention(lambda q, k, given: {})(monkeypatch)
    for name in sorted({name for fault in FAULTS.values() for name in fault.caught_by}):
        CHECKS[name]()
    assert located(training.CONFIG) is None and located(test_llama.EVERYTHING) is None


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_and_located(name, monkeypatch, record_property):
    fault = FAULTS[name]
    training.reference(training.CONFIG)  # torch's run begins with weights copied before the fault
    fault.plant(monkeypatch)
    caught_by = [check for check in fault.caught_by if failure(CHECKS[check])]
    where = located(fault.config)
    if where:
        place = f"{where[1]} (the {where[0]} agrees)"
    elif TRAINING in caught_by:
        place = str(failure(CHECKS[TRAINING])).partition(":")[0]
    else:
        place = "no layer of GPT-2 has it"
    for column in ("fault", name), ("caught by", ", ".join(caught_by)), ("located at", place):
        record_property(*column)
    assert tuple(caught_by) == fault.caught_by
    assert where == fault.located


UNTIED = replace(training.CONFIG, tie_word_embeddings=False, lm_head_bias=True)


@pytest.mark.parametrize("config", [UNTIED, test_llama.EVERYTHING], ids=["gpt2", "llama"])
def test_the_layer_that_is_wrong_is_the_one_that_is_named(config):
    """Each parameter of ours in turn is scaled by 1 + 1e-8: the first to differ is its layer's output."""
    model = random_model(config)
    twin = bridge.to_torch(model)
    ids, _ = report.random_batch(model, 2, 8, 0)
    for name, parameter in model.named_parameters():
        right = parameter.data.copy()
        parameter.data[...] *= FACTOR
        first = compare(model, twin, ids).first
        assert str(first) == f"output of {name.rpartition('.')[0]}"
        parameter.data[...] = right
    assert compare(model, twin, ids).first is None
