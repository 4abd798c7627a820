"""What ``inspect`` sees equals ``transformers`` and the model's own numbers, whatever layers it has."""

import inspect as signatures
import math

import numpy as np
import pytest
import torch
from support.adapters import with_lora
from support.device_array import DeviceArray
from support.models import EVERYTHING, NO_DROPOUT, SMALL, SMALL_LLAMA, Wrapped, assert_close, random_model

from parity.twins import bridge
from tinyllm import Error, GPT2Config, LlamaConfig, Tensor, nn, no_grad
from tinyllm import functional as F
from tinyllm.functional import composed
from tinyllm.models import SequenceClassifier
from tinyllm.tools.inspect import inspect

GPT2_CONFIG = GPT2Config(**SMALL, **NO_DROPOUT)
CONFIGS = {
    "gpt2": GPT2_CONFIG,
    "gpt2 untied": GPT2Config(**SMALL, **NO_DROPOUT, tie_word_embeddings=False, lm_head_bias=True),
    "llama": EVERYTHING,
    "llama tied": LlamaConfig(**SMALL_LLAMA, tie_word_embeddings=True),
}
every_model = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
both_models = pytest.mark.parametrize("config", [GPT2_CONFIG, EVERYTHING], ids=["gpt2", "llama"])
IDS = [3, 1, 4, 1, 5, 9, 2, 6]
L, T, V = 2, len(IDS), 13


def logits_of(model):
    with no_grad():
        return model([IDS]).data[0]


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def put_attention(model, make):
    """Replace the attention of the second block by ``make(attention)``; returns the block's name."""
    (name,) = nn.replace(
        model, "h.1.attn" if model.blocks == "h" else "layers.1.self_attn", lambda _, old: make(old)
    )
    return name.rpartition(".")[0]


# ------------------------------------------------------------------------------ transformers


class ExactSoftmax:
    """``torch.nn.functional`` for their eager attention, without its softmax in float32."""

    def __getattr__(self, name):
        return getattr(torch.nn.functional, name)

    def softmax(self, x, dim, dtype=None):
        return torch.nn.functional.softmax(x, dim=dim)


class ExactNN:
    functional = ExactSoftmax()

    def __getattr__(self, name):
        return getattr(torch.nn, name)


@every_model
def test_attention_and_norms_equal_those_of_transformers(config, monkeypatch):
    """To 1e-10 in float64, with the softmax of their Llama in float64 as in all their other models."""
    from transformers.models.llama import modeling_llama

    model = random_model(config)
    found = inspect(model, IDS)
    theirs = bridge.to_transformers(model)
    theirs.set_attn_implementation("eager")
    kept = []
    blocks = theirs.transformer.h if model.blocks == "h" else theirs.model.layers
    blocks[-1].register_forward_hook(lambda block, args, out: kept.append(out))
    monkeypatch.setattr(modeling_llama, "nn", ExactNN())
    with torch.no_grad():
        out = theirs(torch.tensor([IDS]), output_attentions=True, output_hidden_states=True)
    assert found.heads == [len(weights[0]) for weights in out.attentions]
    for layer, weights in enumerate(out.attentions):
        assert_close(found.attention(layer), weights[0], f"attention of {layer}")
        assert np.array_equal(found.attention(layer, 1), found.attention(layer)[1])
    last = kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0]  # hidden_states[-1] is normalized
    for layer, x in enumerate([*out.hidden_states[:-1], last]):
        assert_close(found.norms[layer], x[0].norm(dim=-1), f"norms of {layer}")


# ---------------------------------------------------------------------- the model's own numbers


@every_model
def test_lens_of_every_layer_is_the_head_of_its_normalized_output(config):
    model = random_model(config)
    found = inspect(model, IDS, top=10**20)  # more than there are
    norm, stream = getattr(model, "ln_f", None) or model.norm, []
    with no_grad(), nn.observe(lambda seen: stream.append(seen), model):
        model([IDS])
    blocks = [seen for seen in stream if seen.name in found.blocks]
    assert [seen.name for seen in blocks] == list(found.blocks)
    for layer, x in enumerate([blocks[0].inputs[0], *(seen.output for seen in blocks)]):
        with no_grad():
            p = softmax(model.lm_head(norm(x)).data[0])
        assert np.array_equal(found.lens.ids[layer], np.argsort(-p, axis=-1, kind="stable"))
        expected = np.take_along_axis(p, found.lens.ids[layer], axis=-1)
        assert_close(found.lens.probabilities[layer], expected, f"lens of {layer}")
        assert_close(found.norms[layer], np.sqrt((x.data[0] ** 2).sum(axis=-1)), f"norms of {layer}")
    p = np.sort(softmax(logits_of(model)))[:, ::-1]
    assert_close(found.lens.probabilities[-1], p, "the model's own prediction")


@every_model
def test_probability_and_rank_equal_cross_entropy_and_sorting(config):
    model = random_model(config)
    found, logits = inspect(model, IDS), logits_of(model)
    assert np.isnan(found.probability[0]) and np.isnan(found.expected_probability[0])
    assert (found.rank[0], found.expected[0]) == (0, -1)
    for t in range(1, T):
        loss = F.cross_entropy(Tensor(logits[t - 1 : t]), np.array([IDS[t]])).item()
        assert -math.log(found.probability[t]) == pytest.approx(loss, rel=1e-10)
        order = np.argsort(-logits[t - 1], kind="stable").tolist()
        assert found.rank[t] == 1 + order.index(IDS[t])
        assert found.expected[t] == order[0]
        assert found.expected_probability[t] == pytest.approx(softmax(logits[t - 1]).max(), rel=1e-10)


def test_ranks_of_equal_logits_are_in_order_of_id():
    model = random_model(GPT2_CONFIG)
    model.lm_head = nn.Linear(12, V, rng=0).astype(np.float64)
    model.lm_head.weight.replace(np.zeros((V, 12)))
    found = inspect(model, IDS)
    assert found.rank.tolist() == [0, *(i + 1 for i in IDS[1:])]
    assert found.lens.ids[-1].tolist() == [list(range(10))] * T


def test_many_positions_are_computed_in_parts(monkeypatch):
    model = random_model(EVERYTHING)
    whole = inspect(model, IDS)
    monkeypatch.setattr("tinyllm.tools.inspect.LOGITS", 3 * V)
    parts = inspect(model, IDS)
    assert np.array_equal(parts.rank, whole.rank) and np.array_equal(parts.lens.ids, whole.lens.ids)
    assert_close(parts.probability[1:], whole.probability[1:], "probability")
    assert_close(parts.lens.probabilities, whole.lens.probabilities, "lens")


def test_the_lens_is_computed_at_the_positions_that_are_asked_for():
    model = random_model(EVERYTHING)
    whole, two, none = (inspect(model, IDS, 4, positions) for positions in (None, [6, 2], ()))
    assert two.lens.ids.shape == (L + 1, 2, 4) and none.lens.ids.shape == (L + 1, 0, 4)
    assert np.array_equal(two.lens.ids, whole.lens.ids[:, [6, 2]])
    assert np.array_equal(two.norms, whole.norms) and np.array_equal(two.rank, whole.rank)
    plain = inspect(model, IDS, surprise=False)
    assert plain.probability is None and plain.rank is None


def test_suppressed_ids_have_probability_0():
    found = inspect(random_model(EVERYTHING), IDS, top=V, suppress_ids=[0, 7])
    assert (found.lens.probabilities[:, :, -2:] == 0).all()
    np.testing.assert_allclose(found.lens.probabilities.sum(axis=-1), 1, rtol=1e-12)


@pytest.mark.parametrize("config", [GPT2_CONFIG, EVERYTHING], ids=["gpt2", "llama"])
def test_float32_is_close_to_float64_and_one_token_attends_to_itself(config):
    exact, found = (inspect(random_model(config, dtype=dtype), IDS) for dtype in (np.float64, np.float32))
    for layer in range(L):
        weights = found.attention(layer)
        assert weights.dtype == np.float32
        assert_close(weights.astype(np.float64), exact.attention(layer), f"attention of {layer}", 1e-5)
    one = inspect(random_model(config), IDS[:1])
    assert one.attention(0).tolist() == [[[1.0]]] * one.heads[0] and one.rank.tolist() == [0]


@both_models
def test_a_model_on_a_device_gives_arrays_on_the_host(config):
    model = random_model(config)
    expected = inspect(model, IDS)
    for parameter in model.parameters():
        parameter.replace(DeviceArray(parameter.data))
    found = inspect(model, IDS)
    assert_close(found.attention(1), expected.attention(1), "attention")
    assert_close(found.norms, expected.norms, "norms")
    assert_close(found.lens.probabilities, expected.lens.probabilities, "lens")
    assert np.array_equal(found.rank, expected.rank)


def test_inspection_leaves_the_model_as_it_was():
    model = random_model(GPT2Config(**SMALL, attn_pdrop=0.5)).train()
    before, blocks = {name: p.data for name, p in model.named_parameters()}, list(model.h)
    first, second = inspect(model, IDS), inspect(model, IDS)
    assert np.array_equal(first.attention(1), second.attention(1))  # without dropout
    assert all(module.training for _, module in model.named_modules())
    assert all(p.data is before[name] and p.grad is None for name, p in model.named_parameters())
    assert model.h == blocks and not any("forward" in vars(block) for block in blocks)


# ------------------------------------------------------------------------------ other layers


def test_plain_weights_take_every_argument_of_the_op():
    op = signatures.signature(F.scaled_dot_product_attention).parameters
    plain = signatures.signature(composed.attention_weights).parameters
    assert set(op) - set(plain) == {"value", "dropout_p"}


class ALiBi(nn.Module):
    def __init__(self, heads):
        self.slopes = 0.5 ** np.arange(1, heads + 1).reshape(-1, 1, 1)

    def forward(self, distances):
        return -self.slopes * distances


@both_models
def test_a_position_bias_is_part_of_the_weights(config):
    """The weights, multiplied by the values, are what the layer's projection gets."""
    model = random_model(config)
    heads = inspect(model, IDS).heads[1]
    attention = model.h[1].attn if model.blocks == "h" else model.layers[1].self_attn
    attention.score_bias = ALiBi(heads)
    projected, arguments = [], []

    def op(name, given, out):
        if name == "scaled_dot_product_attention":
            arguments.append(given["value"].data[0])
            projected.append(out.data[0])

    with no_grad(), nn.observe(lambda seen: None, on_op=op):
        model([IDS])
    weights = inspect(model, IDS).attention(1)
    values = np.repeat(arguments[1], heads // len(arguments[1]), axis=0)
    assert_close(weights @ values, projected[1], "output of the op")
    attention.score_bias = None
    assert np.abs(inspect(model, IDS).attention(1) - weights).max() > 0.01


class Given(nn.Module):
    """Attention with given queries, keys and values, and with options of the op; keeps its output."""

    def __init__(self, heads, options):
        rng = np.random.default_rng(0)
        shapes = [(1, n, T, 4) for n in (3, heads, heads)]
        self.arrays, self.options = [3 * rng.standard_normal(shape) for shape in shapes], options

    def forward(self, x, *_):
        out = F.scaled_dot_product_attention(*map(Tensor, self.arrays), is_causal=True, **self.options)
        self.kept = [out.data[0]]
        return out.rearrange("b h t d -> b t (h d)")


OPTIONS = {
    "plain": (3, {}),
    "shared heads": (1, dict(enable_gqa=True)),
    "window": (3, dict(window=3)),
    "softcap": (3, dict(softcap=2.0)),
    "both, scaled": (1, dict(window=4, softcap=5.0, scale=0.3, enable_gqa=True)),
    "mask": (3, dict(attn_mask=np.tri(T, dtype=bool) & (np.arange(T) % 3 != 1))),
    "bias": (3, dict(attn_mask=np.random.default_rng(1).standard_normal((3, T, T)))),
    "one mask for all": (3, dict(attn_mask=np.random.default_rng(1).standard_normal((1, 1, 1, T)))),
}


@pytest.mark.parametrize(("heads", "options"), OPTIONS.values(), ids=OPTIONS)
def test_the_weights_multiplied_by_the_values_are_the_ops_output(heads, options):
    model, given = random_model(GPT2_CONFIG), Given(heads, options)
    put_attention(model, lambda old: given)
    weights = inspect(model, IDS).attention(1)
    values = np.repeat(given.arrays[2][0], 3 // heads, axis=0)
    assert_close(weights @ values, given.kept[0], "output of the op")
    if "window" in options:
        assert (np.tril(weights, -options["window"]) == 0).all()


@both_models
def test_wrapped_layers_and_blocks_are_seen(config):
    model = random_model(config)
    plain = inspect(model, IDS)
    nn.replace(model, f"{model.blocks}.*.mlp", lambda _, layer: Wrapped(layer))
    nn.replace(model, f"{model.blocks}.0", lambda _, layer: Wrapped(layer))
    nn.replace(model, "lm_head", lambda _, layer: Wrapped(layer))
    found = inspect(model, IDS)
    assert np.array_equal(found.attention(0), plain.attention(0))
    assert np.array_equal(found.lens.ids, plain.lens.ids) and np.array_equal(found.norms, plain.norms)


@both_models
def test_one_block_in_two_places_is_seen_twice(config):
    model = random_model(config)
    blocks = getattr(model, model.blocks)
    blocks[1] = blocks[0]
    found = inspect(model, IDS)
    assert found.norms.shape == (3, T) and not np.array_equal(found.attention(0), found.attention(1))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_lora_is_part_of_what_is_seen(kind):
    config = GPT2_CONFIG if kind == "gpt2" else EVERYTHING
    model = with_lora(config)
    found, base = inspect(model, IDS), inspect(random_model(config), IDS)
    assert np.abs(found.attention(0) - base.attention(0)).max() > 0.01
    nn.merge_lora(model)
    merged = inspect(model, IDS)
    assert_close(found.attention(1), merged.attention(1), "attention")
    assert_close(found.probability[1:], merged.probability[1:], "probability")


@both_models
def test_a_classifier_has_a_lens_of_its_classes(config):
    model = SequenceClassifier(random_model(config), ["bad", "good", "so so"], rng=0)
    found = inspect(model, IDS)
    assert found.probability is None and found.rank is None
    assert found.lens.ids.shape == (L + 1, T, 3)
    expected = np.sort(softmax(model([IDS]).data[0]))[::-1]
    assert_close(found.lens.probabilities[-1, -1], expected, "classes")
    body = inspect(model.language_model, IDS)  # a language model with that head
    assert body.rank is None and np.array_equal(body.lens.ids, found.lens.ids)


def test_a_classifier_with_as_many_classes_as_ids_predicts_no_token():
    labels = [str(i) for i in range(V)]
    assert inspect(SequenceClassifier(random_model(EVERYTHING), labels, rng=0), IDS).rank is None


# ------------------------------------------------------------------------------------ errors


class Mean(nn.Module):
    """Attention that does not call the op."""

    def __init__(self, old):
        self.head_dim = 4

    def forward(self, x, *_):
        return x


class Own(nn.Module):
    """Attention of one head that calls the op in its own way."""

    def __init__(self, call):
        self.call = call

    def forward(self, x, *_):
        q = x.rearrange("b t (h d) -> b h t d", h=1)
        return self.call(q).rearrange("b h t d -> b t (h d)")


@both_models
def test_a_layer_that_cannot_be_looked_into_is_named(config):
    model = random_model(config)
    name = put_attention(model, Mean)
    found = inspect(model, IDS)
    assert found.heads[1] == 0 and found.heads[0] > 0 and found.attention(0).shape[1:] == (T, T)
    assert found.norms.shape == (L + 1, T)
    with pytest.raises(Error, match=f"{name} cannot be seen: it calls .* 0 times"):
        found.attention(1)


def test_wrong_weights_are_an_error():
    attend = F.scaled_dot_product_attention
    hidden = np.ones((T, T), bool)
    hidden[3] = False
    cases = {
        "head 0 is not causal: token 0 attends to the later token 1": lambda q: attend(q, q, q),
        "head 0 do not sum to 1: those of token 3": lambda q: attend(q, q, q, hidden, is_causal=True),
        "calls .* 2 times": lambda q: attend(q, q, attend(q, q, q, is_causal=True), is_causal=True),
        "has 7 keys for 8 tokens": lambda q: attend(q, q[:, :, :7], q[:, :, :7], np.tri(T, 7, dtype=bool)),
    }
    for message, call in cases.items():
        model = random_model(EVERYTHING)
        name = put_attention(model, lambda old, call=call: Own(call))
        with pytest.raises(Error, match=f"{name}.*{message}"), np.errstate(invalid="ignore"):
            inspect(model, IDS).attention(1)


def test_heads_in_the_batch_are_heads():
    def attend(q):
        heads = q.rearrange("b h t (n d) -> (b h n) t d", n=3)
        y = F.scaled_dot_product_attention(heads, heads, heads, np.tri(T, dtype=bool))
        return y.rearrange("(b h n) t d -> b h t (n d)", b=1, h=1)

    model = random_model(EVERYTHING)
    put_attention(model, lambda old: Own(attend))
    found = inspect(model, IDS)
    assert found.heads[1] == 3 and found.attention(1).shape == (3, T, T)


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        ([], {}, "empty"),
        ([3, 13], {}, r"ids\[1\] is 13"),
        ([IDS], {}, r"shape \(1, 8\)"),
        ([1] * 9, {}, "has 9 tokens, but the model's context is 8"),
        (IDS, dict(top=0), "top is 0"),
        (IDS, dict(positions=[8]), "positions"),
        (IDS, dict(positions=[-1]), "positions"),
    ],
)
def test_wrong_arguments(ids, options, message):
    with pytest.raises(Error, match=message):
        inspect(random_model(EVERYTHING), ids, **options)


def test_wrong_layers_heads_and_models():
    found = inspect(random_model(EVERYTHING), IDS)
    for layer, head, message in ((2, None, "layers 0 to 1"), (-1, 0, "layer"), (0, 6, "heads 0 to 5")):
        with pytest.raises(Error, match=message):
            found.attention(layer, head)
    with pytest.raises(Error, match="model is a Linear"):
        inspect(nn.Linear(2, 2, rng=0), IDS)
    broken = random_model(EVERYTHING)
    broken.norm.weight.replace(np.full(12, np.nan))
    with pytest.raises(Error, match="not finite"):
        inspect(broken, IDS)
    short = random_model(EVERYTHING)
    short.hidden_states = lambda ids, cache=None: short.norm(short.embed_tokens(ids))
    with pytest.raises(Error, match=r"layers\.0 to layers\.1 one after the other"):
        inspect(short, IDS)
