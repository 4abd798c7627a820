"""Gemma 2 in PyTorch: tinyllm/models/gemma2.py again, part by part, with torch's own ops.

Like it, this file has Llama's twin (``llama.py``) and the changes to it.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from parity.twins.llama import GroupedQueryAttention, LlamaBlock, SwiGLU, TorchLlama
from parity.twins.rope import in_float64
from tinyllm.models.gemma2 import Gemma2, Gemma2Config


class OffsetRMSNorm(nn.RMSNorm):
    """RMSNorm with the scale 1 + weight."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, 1 + self.weight, self.eps)


class GemmaAttention(GroupedQueryAttention):
    """Llama's, with another scale, with a window in a sliding layer, and with a cap if the config has one."""

    def __init__(self, config: Gemma2Config, layer: int = 0):
        super().__init__(config, layer)
        self.kind, self.scale = config.layer_types[layer], 1 / math.sqrt(config.query_pre_attn_scalar)
        self.softcap = config.attn_logit_softcapping


class GeGLU(SwiGLU):
    """The gated position-wise feed-forward network: down(gelu(gate(x)) * up(x))."""

    def forward(self, x):  # (B, T, C)
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class GemmaBlock(LlamaBlock):
    """Attention, then the MLP, each between two norms."""

    norm_class, attention_class, mlp_class = OffsetRMSNorm, GemmaAttention, GeGLU

    def __init__(self, config: Gemma2Config, layer: int = 0):
        super().__init__(config, layer)
        self.pre_feedforward_layernorm = self.norm_class(config.hidden_size, config.rms_norm_eps)
        self.post_feedforward_layernorm = self.norm_class(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotation):  # (B, T, C)
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), rotation))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class ScaledEmbedding(nn.Embedding):
    """Row i of W (V, C), multiplied by √C, for every id i."""

    def forward(self, ids):
        return super().forward(ids) * math.sqrt(self.embedding_dim)


class TorchGemma2(TorchLlama):
    """Gemma 2 with its language-model head: the twin of ``tinyllm.models.Gemma2``."""

    ours, config_class = Gemma2, Gemma2Config
    embedding_class, block_class = ScaledEmbedding, GemmaBlock
    published, attention = "Gemma2ForCausalLM", "eager"
    note = (
        "The Gemma of transformers uses torch's RMSNorm here, and RoPE angles, softmax and the factor of the "
        "embeddings in float64, because its own are float32 even in a float64 model: an error of about 1e-7."
    )

    def forward(self, ids):
        logits, cap = super().forward(ids), self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    # ---- The counterpart in transformers ----

    @classmethod
    def random_config(cls, n_layer: int, n_head: int, n_embd: int, vocab_size: int, n_positions: int):
        """Grouped heads, biases, a short window, a scale of its own and caps that have an effect."""
        return cls.config_class(
            vocab_size=vocab_size,
            hidden_size=n_embd,
            intermediate_size=3 * n_embd,
            num_hidden_layers=n_layer,
            num_attention_heads=n_head,
            num_key_value_heads=n_head // 2 if n_head % 2 == 0 else 1,
            head_dim=2 * math.ceil(n_embd / n_head / 2),
            max_position_embeddings=n_positions,
            attention_bias=True,
            query_pre_attn_scalar=7,
            sliding_window=max(1, n_positions // 3),
            layer_types=cls.config_class.kinds_of(n_layer, 2),
            final_logit_softcapping=2.0,
            **cls.own_options(),
        )

    @staticmethod
    def own_options() -> dict:
        return dict(attn_logit_softcapping=1.5, rope_parameters=dict(rope_type="linear", factor=3.0))

    @classmethod
    def in_transformers(cls, config: Gemma2Config):
        import transformers

        kind = getattr(transformers, cls.published)
        theirs = kind.config_class(**asdict(config), bos_token_id=0, eos_token_id=0)
        theirs._attn_implementation = cls.attention
        return kind(theirs)

    @classmethod
    def exact(cls, theirs):
        """A ``Gemma2ForCausalLM`` with eager attention that computes everything in the dtype of its weights.

        See ``TorchLlama.exact``. In attention, ``torch.float32`` is patched to float64 during the call, so
        that the softmax, which names that type, is computed in it. The embedding of ``pad_token_id`` gets no
        gradient there; here it does.
        """
        cls.with_exact_angles(theirs.model.rotary_emb)
        embedding = theirs.model.embed_tokens
        embedding.embed_scale = torch.tensor(math.sqrt(theirs.config.hidden_size), dtype=torch.float64)
        embedding.padding_idx = None

        def rms_norm(norm, x):
            return F.rms_norm(x, norm.weight.shape, 1 + norm.weight, norm.eps)

        def attend(forward, *args, **kwargs):
            with mock.patch.object(torch, "float32", torch.float64):
                return forward(*args, **kwargs)

        for name, module in theirs.named_modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = partial(rms_norm, module)
            elif name.endswith("self_attn"):
                module.forward = partial(attend, module.forward)
        return theirs

    @staticmethod
    def with_exact_angles(rotary):
        rotary.forward = exact_angles(rotary, rotary.rope_type)


def exact_angles(rotary, rope_type: str, **of_layer):
    """The function of positions that ``rotary`` is, in float64, with the frequencies that it computes."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    compute = ROPE_INIT_FUNCTIONS.get(rope_type, rotary.compute_default_rope_parameters)

    def cos_and_sin(x, position_ids):
        with in_float64():
            length = int(position_ids.max()) + 1
            frequencies, scaling = compute(rotary.config, seq_len=length, **of_layer)
        angles = (position_ids[..., None] * frequencies).repeat(1, 1, 2)
        return (angles.cos() * scaling).to(x), (angles.sin() * scaling).to(x)

    return cos_and_sin
