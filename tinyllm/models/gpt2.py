"""What is GPT-2, from its config to its loss?

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3: a decoder of
``n_layer`` blocks, each ``x + attention(norm(x))`` then ``x + mlp(norm(x))``, on the sum of token and
position embeddings, with a final norm and the token embedding as the output layer.

Shapes: B batch, T time, C = n_embd channels, H = n_head heads of size D = C/H, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np

from tinyllm import checks, nn
from tinyllm import functional as F
from tinyllm.backend.dtypes import wide
from tinyllm.checks import check_ids, is_integer
from tinyllm.errors import Error
from tinyllm.models.cache import Cache, LayerCache
from tinyllm.tensor import Tensor, split
from tinyllm.weights import hub, safetensors

# Hugging Face's names for activations -> F.gelu's ``approximate``
GELU_FORMS = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}

SIZES = {
    "124M": dict(n_layer=12, n_head=12, n_embd=768),
    "355M": dict(n_layer=24, n_head=16, n_embd=1024),
    "774M": dict(n_layer=36, n_head=20, n_embd=1280),
    "1558M": dict(n_layer=48, n_head=25, n_embd=1600),
}

MASK_BUFFERS = (".attn.bias", ".attn.masked_bias")

# Keys of a config.json that would change the computation, with the one value this model implements
FIXED = {
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "pruned_heads": {},
}

# Keys of a config.json that say nothing about the computation of the logits
BOOKKEEPING = set(
    "_name_or_path _num_labels architectures bos_token_id chunk_size_feed_forward dtype eos_token_id "
    "gradient_checkpointing id2label label2id n_ctx n_special output_attentions output_hidden_states "
    "output_past pad_token_id predict_special_tokens problem_type return_dict summary_activation "
    "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params "
    "torch_dtype transformers_version use_cache".split()
)


@dataclass(frozen=True)
class GPT2Config:
    """Hugging Face's names. ``qkv_bias=False``, ``lm_head_bias=True`` and an untied head are extras."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None: 4 n_embd
    activation_function: str = "gelu_new"
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    qkv_bias: bool = True
    lm_head_bias: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise Error(f"{name} must be a whole number of at least 1, not {value!r}")
        checks.check_fields(self, layers=("n_layer",), widths=("n_embd", "n_inner"))
        if self.n_embd % self.n_head:
            raise Error(
                f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head}): "
                f"every head gets an equal share of the channels"
            )
        if self.n_inner is not None and (not isinstance(self.n_inner, int) or self.n_inner < 1):
            raise Error(f"n_inner must be a whole number of at least 1, or None, not {self.n_inner!r}")
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise Error(f"{name} must be at least 0 and below 1, not {getattr(self, name)!r}")
        if self.activation_function not in GELU_FORMS:
            raise Error(
                f"activation_function {self.activation_function!r} is not supported; use one of "
                f"{', '.join(GELU_FORMS)}"
            )
        if not self.layer_norm_epsilon > 0:
            raise Error(f"layer_norm_epsilon must be positive, not {self.layer_norm_epsilon!r}")

    @classmethod
    def preset(cls, size: str, **changes) -> GPT2Config:
        """A published size, "124M", "355M", "774M" or "1558M", with ``changes`` to single fields."""
        if size not in SIZES:
            raise Error(f"unknown GPT-2 size {size!r}; the published ones are {', '.join(SIZES)}")
        return cls(**SIZES[size] | changes)

    @classmethod
    def from_dict(cls, config: Mapping) -> GPT2Config:
        """From a ``config.json`` as it stands. A key that might change the model is never ignored."""
        ours = {field.name for field in fields(cls)}
        for key, value in FIXED.items():
            if config.get(key, value) != value:
                raise Error(
                    f"this GPT-2 computes with {key}={value!r} only, and the config has {config[key]!r}"
                )
        unknown = set(config) - ours - set(FIXED) - BOOKKEEPING
        if unknown:
            raise Error(
                f"unknown config keys: {', '.join(sorted(unknown))}; remove them if they do not change "
                f"what the model computes"
            )
        return cls(**{key: value for key, value in config.items() if key in ours})

    def to_dict(self) -> dict:
        """A ``config.json`` that ``transformers`` reads too."""
        return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **asdict(self)}


class Conv1D(nn.Linear):
    """A Linear whose checkpoint stores the weight as (in, out): GPT-2 was written with 1 x 1 convolutions."""

    def layout(self, name, array):
        return array.T if name == "weight" else array


class CausalSelfAttention(nn.Module):
    """Every position gathers from itself and the ones before it."""

    def __init__(self, config: GPT2Config, rng):
        C, std = config.n_embd, config.initializer_range
        self.n_head, self.attn_pdrop = config.n_head, config.attn_pdrop
        self.c_attn = Conv1D(C, 3 * C, bias=config.qkv_bias, rng=rng, std=std)
        self.c_proj = Conv1D(C, C, rng=rng, std=std / math.sqrt(2 * config.n_layer))
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, cache: LayerCache | None = None):  # (B, T, C)
        q, k, v = (
            part.rearrange("b t (h d) -> b h t d", h=self.n_head)  # (B, H, T, D)
            for part in split(self.c_attn(x), 3, axis=-1)
        )
        mask = None
        if cache is not None:
            (k, v), mask = cache.extend(k, v), cache.mask  # (B, H, S, D): those of the text so far, too
        dropout_p = self.attn_pdrop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=True)  # (B, H, T, D)
        return self.resid_dropout(self.c_proj(y.rearrange("b h t d -> b t (h d)")))  # (B, T, C)


class MLP(nn.Module):
    """Every position thinks by itself: out to a wider layer and back."""

    def __init__(self, config: GPT2Config, rng):
        C, std = config.n_embd, config.initializer_range
        inner = 4 * C if config.n_inner is None else config.n_inner
        self.c_fc = Conv1D(C, inner, rng=rng, std=std)
        self.c_proj = Conv1D(inner, C, rng=rng, std=std / math.sqrt(2 * config.n_layer))
        self.dropout = nn.Dropout(config.resid_pdrop)
        self.approximate = GELU_FORMS[config.activation_function]

    def forward(self, x):  # (B, T, C)
        if nn.bias_can_wait(x, self.c_fc):
            y = F.gelu(F.linear(x, self.c_fc.weight), self.approximate, self.c_fc.bias)
        else:
            y = F.gelu(self.c_fc(x), self.approximate)
        return self.dropout(self.c_proj(y))  # (B, T, C)


class Block(nn.Module):
    """Attention, then the MLP; each adds to the residual stream what it computed from its norm."""

    def __init__(self, config: GPT2Config, rng):
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = CausalSelfAttention(config, rng)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config, rng)

    def forward(self, x, cache: LayerCache | None = None):  # (B, T, C)
        x = x + self.attn(self.ln_1(x), cache).astype(x.dtype)
        return x + self.mlp(self.ln_2(x)).astype(x.dtype)


class GPT2(nn.Module):
    """GPT-2 with its language-model head. Attribute names are the checkpoint's keys.

    ``rng`` draws the initial weights: N(0, 0.02²), the two projections into the residual stream of
    each block divided by sqrt(2 n_layer) so that the stream does not grow with depth. With
    ``rng=None`` the parameters are stand-ins that take no memory until ``load_state_dict``.
    """

    learned_positions = True  # a cache whose oldest entries are dropped would be wrong: positions change

    def __init__(self, config: GPT2Config, rng: np.random.Generator | None):
        self.config = config
        C, std = config.n_embd, config.initializer_range
        self.wte = nn.Embedding(config.vocab_size, C, rng=rng, std=std)
        self.wpe = nn.Embedding(config.n_positions, C, rng=rng, std=std)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = [Block(config, rng) for _ in range(config.n_layer)]
        self.ln_f = nn.LayerNorm(C, config.layer_norm_epsilon)
        head_rng = None if config.tie_word_embeddings else rng
        self.lm_head = nn.Linear(C, config.vocab_size, bias=config.lm_head_bias, rng=head_rng, std=std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.wte.weight  # one matrix, read both ways

    @property
    def context(self) -> int:
        """The longest sequence the model takes."""
        return self.config.n_positions

    def new_cache(self, batch: int, room: int | None = None, padding=None) -> Cache:
        """An empty ``Cache`` for ``batch`` rows of at most ``room`` tokens (None: the context)."""
        room, like = self.context if room is None else min(room, self.context), self.wte.weight.data
        H, D = self.config.n_head, self.config.n_embd // self.config.n_head
        return Cache(self.config.n_layer, batch, H, room, D, like, padding, self.product_dtype)

    def forward(self, ids, targets=None, num_targets=None, last_only=False, cache=None) -> Tensor:
        """Logits (B, T, V) of ids (B, T), or (B, 1, V) with ``last_only``; with ``targets``, their loss.

        With a ``cache`` the ids continue the text it holds, and are added to it.
        """
        ids = check_ids(ids, self.config.vocab_size)
        if ids.ndim != 2 or ids.shape[1] > self.context:
            raise Error(
                f"token ids must have shape (batch, time) with at most {self.context} positions, "
                f"not {ids.shape}"
            )
        positions = np.arange(ids.shape[1]) if cache is None else cache.positions(ids.shape[1])
        x = self.drop(self.wte(ids) + self.wpe(positions))  # (B, T, C)
        layers = [None] * len(self.h) if cache is None else cache.layers(*ids.shape)
        for block, layer in zip(self.h, layers):
            x = block(x, layer)
        if cache is not None:
            cache.length += ids.shape[1]
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:] if last_only else x, dtype=wide(x.dtype))
        return F.linear_cross_entropy(
            x, self.lm_head.weight, targets, linear_bias=self.lm_head.bias, num_targets=num_targets
        )

    def loss(self, ids, targets, num_targets=None) -> Tensor:
        """Σ cross-entropy over targets that are not -100, divided by ``num_targets`` (default: their number)."""
        return self(ids, targets, num_targets)

    def resize_token_embeddings(self, vocab_size: int, rng: np.random.Generator) -> None:
        """Make room for ids up to ``vocab_size`` - 1, in place; the old ids keep their weights bit for bit.

        The new rows of the embedding, and of a head that is not tied to it, are drawn from
        N(0, initializer_range²); the new biases of the head are 0. Gradients are dropped. Make the
        optimiser afterwards: its averages have the shape of the parameters it was made for. The old
        ids' logits are the same sums of products, though a BLAS may add up a matrix of another size in
        another order, and then the last bits differ. Raises ``Error`` if the model has more ids already.
        """
        if not is_integer(vocab_size) or vocab_size < self.config.vocab_size:
            raise Error(
                f"vocab_size {vocab_size!r} does not hold the model's {self.config.vocab_size} ids: choose a "
                "whole number of at least as many"
            )
        new = int(vocab_size) - self.config.vocab_size
        self.zero_grad()
        matrices = [self.wte.weight]
        if not self.config.tie_word_embeddings:
            matrices.append(self.lm_head.weight)
        for weight in matrices:
            drawn = nn.normal(rng, (new, self.config.n_embd), self.config.initializer_range).data
            rows = np.asarray(drawn, dtype=weight.dtype, like=weight.data)
            weight.replace(np.concatenate([weight.data, rows]))
        if self.lm_head.bias is not None:
            bias = self.lm_head.bias
            bias.replace(np.concatenate([bias.data, np.zeros(new, bias.dtype, like=bias.data)]))
        self.config = replace(self.config, vocab_size=int(vocab_size))

    def checkpoint_keys(self, arrays: Mapping) -> dict[str, str]:
        """Parameter name -> key, for any of the layouts GPT-2 is published in.

        Names may begin with ``transformer.``; the causal masks some files hold are not parameters; a
        tied head may be stored a second time, if it equals the embedding.
        """
        keys = {}
        for key in arrays:
            name = key.removeprefix("transformer.")
            if name in keys:
                raise Error(f"{key} and {keys[name]} are both given: keep one of them")
            if not name.endswith(MASK_BUFFERS):
                keys[name] = key
        if self.config.tie_word_embeddings and {"lm_head.weight", "wte.weight"} <= keys.keys():
            head = keys.pop("lm_head.weight")
            if not np.array_equal(arrays[head], arrays[keys["wte.weight"]]):
                raise Error(
                    f"{head} differs from the embedding, but tie_word_embeddings is true in the config"
                )
        return keys

    @classmethod
    def from_pretrained(cls, name: str | Path, dtype=np.float32) -> GPT2:
        """From a Hugging Face folder or hub id, in ``dtype``, in eval mode."""
        folder = hub.find_folder(name)
        model = cls(GPT2Config.from_dict(safetensors.read_config(folder)), rng=None).astype(dtype)
        model.load_state_dict(safetensors.Weights(folder), source=str(folder))
        return model.eval()

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` as ``transformers`` does.

        ``transformers`` has no bias in the head, and always one for Q, K and V: a model with
        ``lm_head_bias`` or without ``qkv_bias`` is read back exactly by tinyllm only.
        """
        tensors = {
            name if name.startswith("lm_head.") else f"transformer.{name}": array
            for name, array in self.state_dict().items()
        }
        safetensors.save_folder(folder, self.config.to_dict(), tensors, overwrite=overwrite)
