"""Faults to plant in tinyllm: each replaces a part of it with a wrong one.

A fault is a function of pytest's ``monkeypatch``. Functions that take options return one.
"""

import math

import numpy as np
import pytest

from tinyllm import GPT2, Tensor, functional, nn, optim, tensor
from tinyllm.data import padded
from tinyllm.data.padded import PaddedExamples
from tinyllm.functional import composed
from tinyllm.inference import sampling
from tinyllm.models import SequenceClassifier, gemma2, gemma3, gpt2, mixture, qwen, rope
from tinyllm.models.windows import SLIDING
from tinyllm.optim import muon
from tinyllm.tensor_einsum import einsum
from tinyllm.tensor_ops import where
from tinyllm.training import preference

FACTOR = 1 + 1e-8  # a gradient wrong in the ninth digit


def scaled_gradient(name, parent):
    """Scale the op's gradient with respect to its input number ``parent`` by 1 + 1e-8."""
    correct, from_op = getattr(functional, name), Tensor.from_op

    def record_wrong(data, parents, vjp, **options):
        def wrong(grad):
            grads = list(vjp(grad))
            given = grads[parent] if parent < len(grads) else None  # a reshape has one input
            if isinstance(given, tensor.At):
                grads[parent] = tensor.At(given.index, given.array * FACTOR)
            elif given is not None:
                grads[parent] = given * FACTOR
            return grads

        return from_op(data, parents, wrong, **options)

    def faulty(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "from_op", staticmethod(record_wrong))
            return correct(*args, **kwargs)

    return lambda patch: patch.setattr(functional, name, faulty)


def attention(options):
    """Attention whose options are changed by ``options(query, key, the caller's options)``."""
    correct = functional.scaled_dot_product_attention

    def faulty(q, k, v, attn_mask=None, dropout_p=0.0, **given):
        given |= {"attn_mask": attn_mask, "dropout_p": dropout_p}
        return correct(q, k, v, **given | options(q, k, given))

    return lambda patch: patch.setattr(functional, "scaled_dot_product_attention", faulty)


def one_key_too_many(q, k, given):
    """Query t also attends to the key at t + 1."""
    if not given.get("is_causal") or given["attn_mask"] is not None:
        return {}
    T, S = q.shape[-2], k.shape[-2]
    return {"is_causal": False, "window": None, "attn_mask": np.tri(T, S, S - T + 1, dtype=bool)}


def softcap_after_the_mask(patch):
    """Masked scores are capped too: they become -softcap instead of -inf."""
    correct = functional.scaled_dot_product_attention

    def faulty(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
               window=None, softcap=None):  # fmt: skip
        if softcap is None or q.ndim == 3:
            options = attn_mask, dropout_p, is_causal, scale, enable_gqa, window, softcap
            return correct(q, k, v, *options)
        k, v = (composed.repeat_heads(x, q.shape[1]) if enable_gqa else x for x in (k, v))
        scores = einsum("...td,...sd->...ts", q, k) * (
            max(q.shape[-1], 1) ** -0.5 if scale is None else scale
        )
        (T, S), mask = scores.shape[-2:], 0.0 if attn_mask is None else attn_mask
        if is_causal:
            hidden = ~np.tri(T, S, S - T, dtype=bool)
            hidden |= False if window is None else np.tri(T, S, S - T - window, dtype=bool)
            scores = where(hidden, -1e30, scores)
        if getattr(mask, "dtype", float) is np.dtype(bool):
            scores, mask = where(mask, scores, -1e30), 0.0
        capped = softcap * ((scores + mask) / softcap).tanh()
        return composed.dropout(composed.softmax(capped), dropout_p) @ v

    patch.setattr(functional, "scaled_dot_product_attention", faulty)


def unscaled(q, k, given):
    return {"scale": given.get("scale") or 1.0}


def query_heads_interleaved(patch):
    """Query head h uses key-value head h % G instead of h // (H/G)."""
    correct = functional.scaled_dot_product_attention

    def faulty(q, k, v, *more, **given):
        H, G = q.shape[1], k.shape[1]
        order = np.arange(H).reshape(H // G, G).T.reshape(-1)
        return correct(q[:, order], k, v, *more, **given)[:, np.argsort(order)]

    patch.setattr(functional, "scaled_dot_product_attention", faulty)


def adjacent_channels_paired(patch):
    """RoPE rotates channels 2i and 2i + 1 together, the layout of Meta's checkpoints."""
    correct = functional.rope

    def faulty(x, cos, sin):
        order = np.arange(x.shape[-1]).reshape(-1, 2).T.reshape(-1)
        return correct(x[..., order], cos, sin)[..., np.argsort(order)]

    patch.setattr(functional, "rope", faulty)


def gate_and_up_swapped(patch):
    correct = functional.swiglu
    patch.setattr(functional, "swiglu", lambda gate, up: correct(up, gate))


def another_rms_eps(patch):
    def forward(layer, x):
        return functional.rms_norm(x, layer.weight.shape, layer.weight, 1e-5)

    patch.setattr(nn.RMSNorm, "forward", forward)


def offset_forgotten(patch):
    patch.setattr(nn.OffsetRMSNorm, "offset", 0.0)


def angles_of_the_other_kind(patch):
    """Gemma 3's sliding layers rotate by the angles of the full ones, and the other way round."""
    correct = gemma3.RopeOfKinds.__call__

    def swapped(rope, positions, like):
        found = correct(rope, positions, like)
        return dict(zip(found, reversed(found.values())))

    patch.setattr(gemma3.RopeOfKinds, "__call__", swapped)


def gemma_windows(of_sliding, of_full):
    """Windows as they should be in one kind of layer only: each is a function of the config."""
    correct = gemma2.GemmaAttention.__init__

    def faulty(layer, config, rng, number=0):
        correct(layer, config, rng, number)
        layer.window = (of_sliding if layer.kind == SLIDING else of_full)(config)

    return lambda patch: patch.setattr(gemma2.GemmaAttention, "__init__", faulty)


def no_window(config):
    return None


def a_window(config):
    return config.sliding_window


def embeddings_scaled_at_the_end(patch):
    """√C multiplies what the head reads, not what the first layer reads."""
    correct = gemma2.Gemma2.hidden_states

    def late(model, ids, cache=None):
        return correct(model, ids, cache) * math.sqrt(model.config.hidden_size)

    patch.setattr(gemma2.ScaledEmbedding, "forward", nn.Embedding.forward)
    patch.setattr(gemma2.Gemma2, "hidden_states", late)


def uncapped_loss(patch):
    """The cap is in the logits, but not in the loss that is fused with the head."""
    correct = functional.linear_cross_entropy

    def uncapped(*args, softcap=None, **options):
        return correct(*args, **options)

    patch.setattr(functional, "linear_cross_entropy", uncapped)


def scaling_ignored(patch):
    """The frequencies of rope_type "default" for every config."""

    def unscaled(config, parameters=None, length=0):
        D = config.head_dim
        return config.rope_parameters["rope_theta"] ** (-np.arange(0, D, 2) / D)

    # Replacing the code instead of the function also reaches tests that imported the function by name.
    patch.setattr(rope.rope_frequencies, "__code__", unscaled.__code__)


def extension_not_sharpened(patch):
    """cos and sin are not multiplied by YaRN's factor."""
    patch.setattr(rope.attention_factor, "__code__", (lambda config, parameters=None: 1.0).__code__)


def heads_normalized_together(patch):
    """The RMS of Qwen3's queries and keys is taken over all heads of a position, not of each."""
    correct = nn.RMSNorm.forward

    def forward(layer, x):
        if x.ndim < 4:
            return correct(layer, x)
        scale = functional.rms_norm(x, x.shape[2:], None, layer.eps)  # (B, T, H, D)
        return scale * layer.weight

    patch.setattr(nn.RMSNorm, "forward", forward)


def window_one_too_wide(q, k, given):
    return {"window": given["window"] + 1} if given.get("window") else {}


def windows_one_layer_late(patch):
    """Qwen's first layer with a window has none."""
    correct = qwen.Qwen2Config.window_of
    patch.setattr(qwen.Qwen2Config, "window_of", lambda config, layer: correct(config, max(layer - 1, 0)))


def erf_for_tanh(patch):
    correct = functional.gelu
    patch.setattr(functional, "gelu", lambda x, approximate="none": correct(x, "none"))


def erf_by_its_name(patch):
    patch.setitem(gpt2.ACTIVATIONS, "gelu_new", functional.gelu)


def another_eps(patch):
    def forward(layer, x):
        return functional.layer_norm(x, layer.weight.shape, layer.weight, layer.bias, 1e-6)

    patch.setattr(nn.LayerNorm, "forward", forward)


def dropped_bias(patch):
    patch.setattr(nn.Linear, "forward", lambda layer, x, **_: functional.linear(x, layer.weight))


def square_conv1d_not_transposed(patch):
    """Only the square matrix of a block is left untransposed: the others would have the wrong shape."""
    correct = gpt2.Conv1D.layout

    def layout(layer, name, array):
        square = array.ndim == 2 and array.shape[0] == array.shape[1]
        return array if square else correct(layer, name, array)

    patch.setattr(gpt2.Conv1D, "layout", layout)


def tying_lost(patch):
    """From the first forward pass on, the head has its own copy of the embedding."""
    correct = GPT2.forward

    def forward(model, *args, **kwargs):
        if model.lm_head.weight is model.wte.weight:
            model.lm_head.weight = Tensor(model.wte.weight.data.copy(), requires_grad=True)
        return correct(model, *args, **kwargs)

    patch.setattr(GPT2, "forward", forward)


def adamw(bias_correction=True, decay_everything=False):
    """A plain AdamW, correct by default."""

    def step(self):
        beta1, beta2 = self.betas
        for name, parameter in self._elementwise():
            if parameter.grad is None:
                continue
            t, m, v = self.state.get(name, (0, 0, 0))
            t += 1
            m = beta1 * m + (1 - beta1) * parameter.grad
            v = beta2 * v + (1 - beta2) * parameter.grad**2
            self.state[name] = [t, m, v]
            if bias_correction:
                m, v = m / (1 - beta1**t), v / (1 - beta2**t)
            if decay_everything or parameter.ndim >= 2:
                parameter.data[...] *= 1 - self.lr * self.weight_decay
            parameter.data[...] -= self.lr * m / (np.sqrt(v) + self.eps)

    return lambda patch: patch.setattr(optim.AdamW, "step", step)


def plain_momentum(patch):
    """Muon's step is the average M itself, not that of the next step if the gradient stays the same."""
    correct = optim.Muon.__init__

    def init(self, *args, **kwargs):
        correct(self, *args, **kwargs)
        self.nesterov = False

    patch.setattr(optim.Muon, "__init__", init)


def scale_of_the_transpose(patch):
    """Muon takes a matrix's rows for its columns, as a layer that stores (in, out) would make one do."""
    correct = muon.SCALES["original"]
    patch.setitem(muon.SCALES, "original", lambda rows, columns: correct(columns, rows))


def plain_means(patch):
    """Each of a step's three micro-batches has weight 1/3, however many targets it has."""
    correct = GPT2.loss

    def loss(model, ids, targets, num_targets=None, weights=None):
        return correct(model, ids, targets) * (1 if num_targets is None else 1 / 3)

    patch.setattr(GPT2, "loss", loss)


def ties_kept(patch):
    """Top-k by a threshold, which also keeps every logit that ties with the k-th largest."""
    correct = sampling._candidates

    def candidates(logits, temperature, top_k, top_p):
        if top_k is not None:
            kth = np.sort(logits, axis=-1)[:, ::-1][:, :top_k][:, -1:]
            logits = np.where(logits < kth, -math.inf, logits)
        return correct(logits, temperature, None, top_p)

    patch.setattr(sampling, "_candidates", candidates)


def examples(change):
    """Instruction examples whose ids and ``learned`` are changed by ``change(ids, learned)``."""
    correct = PaddedExamples.__init__

    def faulty(rows, given):
        correct(rows, [change(*example) for example in given])

    return lambda patch: patch.setattr(PaddedExamples, "__init__", faulty)


def prompt_learned(ids, learned):
    return ids, np.ones_like(learned)


def labels_shifted(patch):
    """Every target is the id after the next one."""
    correct = PaddedExamples.__init__

    def faulty(rows, given):
        correct(rows, given)
        rows.targets = [np.append(targets[1:], padded.IGNORED) for targets in rows.targets]

    patch.setattr(PaddedExamples, "__init__", faulty)


def padding_counted(patch):
    correct = padded.pad
    patch.setattr(padded, "pad", lambda rows, fill: correct(rows, 0 if fill == padded.IGNORED else fill))


def weights_not_renormalized(patch):
    """The weights of a token's experts are their probabilities, as if ``norm_topk_prob`` were false."""
    never = property(lambda layer: False, lambda layer, value: None)
    patch.setattr(mixture.Mixture, "renormalize", never, raising=False)


def router_detached(patch):
    """The weights of the experts are constants: the router gets no gradient."""
    correct, softmax = mixture.Mixture.forward, functional.softmax

    def forward(layer, x):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(functional, "softmax", lambda logits: softmax(logits).detach())
            return correct(layer, x)

    patch.setattr(mixture.Mixture, "forward", forward)


def unscaled_lora(patch):
    """LoRA's product is multiplied by α instead of α / r."""
    patch.setattr(nn.LoRA, "scaling", property(lambda layer: layer.alpha))


def last_padded(patch):
    """A text is classified by the last position of its row, which may be padding."""
    patch.setattr(SequenceClassifier, "pool", lambda model, h, lengths=None: h[:, -1])


def reference_drifting(patch):
    """DPO's reference is the model at every step, not the one before the first step."""
    correct = preference.preferences

    def drifting(log_probs, reference, beta):
        return correct(log_probs, log_probs, beta)

    patch.setattr(preference, "preferences", drifting)
