"""What is Llama? GPT-2 with four changes.

Beside ``gpt2.py``, which it follows line by line, there are only these:

1. RMSNorm for LayerNorm: divide by the size, leave the mean alone (arXiv 1910.07467).
2. Rotary position embeddings for learned ones: no ``wpe``; queries and keys are turned by angles that
   grow with the position, so their product sees distances (RoFormer, arXiv 2104.09864).
3. SwiGLU for GELU: two matrices out, one of which opens or shuts the other (arXiv 2002.05202).
4. Grouped-query attention: several query heads share a key and a value head, and the cache of keys and
   values is that much smaller (arXiv 2305.13245).

There are no biases, no dropout but on attention weights, and a head of its own unless it is tied.
Touvron et al., "Llama 2" (arXiv 2307.09288), section 2.2; Llama team, "The Llama 3 Herd of Models"
(arXiv 2407.21783), section 3.2.

Shapes: B batch, T time, C = hidden_size channels, H query heads and G key-value heads of size D, V
vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from tinyllm import checks, nn
from tinyllm import functional as F
from tinyllm.backend.dtypes import wide
from tinyllm.checks import check_ids
from tinyllm.errors import Error
from tinyllm.models.cache import Cache, LayerCache
from tinyllm.tensor import Tensor
from tinyllm.weights import hub, safetensors

# What a rope_type needs beside rope_theta. "default" is RoFormer's; "linear" divides every frequency
# (Chen et al., arXiv 2306.15595); "llama3" only the low ones (Llama 3.1 and later).
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}

LLAMA_3 = dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_parameters=dict(rope_theta=500000.0),
)


def _llama3_rope(factor: float) -> dict:
    return dict(
        rope_type="llama3",
        rope_theta=500000.0,
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )


LLAMA_3_2 = LLAMA_3 | dict(
    intermediate_size=8192,
    max_position_embeddings=131072,
    rope_parameters=_llama3_rope(32.0),
    tie_word_embeddings=True,
)

SIZES = {
    "toy": dict(
        vocab_size=1024,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
    "Llama-2-7B": dict(max_position_embeddings=4096, rms_norm_eps=1e-5),
    "Llama-3-8B": LLAMA_3,
    "Llama-3.1-8B": LLAMA_3 | dict(max_position_embeddings=131072, rope_parameters=_llama3_rope(8.0)),
    "Llama-3.2-1B": LLAMA_3_2 | dict(hidden_size=2048, num_hidden_layers=16),
    "Llama-3.2-3B": LLAMA_3_2 | dict(hidden_size=3072, num_hidden_layers=28, num_attention_heads=24),
}

# Keys of a config.json that would change the computation, with the one value this model implements
FIXED = {
    "model_type": "llama",
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
}

# Keys of a config.json that say nothing about the computation of the logits
BOOKKEEPING = set(
    "_name_or_path architectures bos_token_id chunk_size_feed_forward dtype eos_token_id id2label "
    "is_llama_config label2id max_sequence_length output_attentions output_hidden_states pad_token_id "
    "pretraining_tp problem_type return_dict task_specific_params torch_dtype transformers.js_config "
    "transformers_version use_cache".split()
)


@dataclass(frozen=True)
class LlamaConfig:
    """Hugging Face's names, and its defaults: the size of Llama 2 7B.

    ``rope_parameters`` holds ``rope_theta`` (10,000 unless given), ``rope_type`` ("default" unless given)
    and what that type needs (see ``ROPE_TYPES``).
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as query heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_parameters: dict = field(default_factory=dict)
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "max_position_embeddings"):  # fmt: skip
            self._check_size(name)
        widths = ("hidden_size", "intermediate_size", "head_dim")
        checks.check_fields(self, layers=("num_hidden_layers",), widths=widths)
        if self.hidden_size % self.num_attention_heads:
            raise Error(
                f"hidden_size ({self.hidden_size}) must be divisible by num_attention_heads "
                f"({self.num_attention_heads}), as transformers has it, whatever head_dim is"
            )
        # Frozen for everybody else: here the fields that were left open get their values.
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        object.__setattr__(self, "rope_parameters", _checked_rope(self.rope_parameters))
        self._check_size("num_key_value_heads")
        self._check_size("head_dim")
        if self.num_attention_heads % self.num_key_value_heads:
            raise Error(
                f"num_attention_heads ({self.num_attention_heads}) must be divisible by num_key_value_heads "
                f"({self.num_key_value_heads}): every key-value head serves as many query heads"
            )
        if self.head_dim % 2:
            raise Error(f"head_dim must be even, not {self.head_dim}: RoPE turns pairs of channels")
        if self.hidden_act != "silu":
            raise Error(f"hidden_act {self.hidden_act!r} is not supported; use 'silu'")
        if not 0 <= self.attention_dropout < 1:
            raise Error(f"attention_dropout must be at least 0 and below 1, not {self.attention_dropout!r}")
        if not self.rms_norm_eps > 0:
            raise Error(f"rms_norm_eps must be positive, not {self.rms_norm_eps!r}")

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or value < 1:
            raise Error(f"{name} must be a whole number of at least 1, not {value!r}")

    @classmethod
    def preset(cls, size: str, **changes) -> LlamaConfig:
        """A published size, such as "Llama-3.2-1B", or "toy", with ``changes`` to single fields."""
        if size not in SIZES:
            raise Error(f"unknown Llama size {size!r}; there are {', '.join(SIZES)}")
        return cls(**SIZES[size] | changes)

    @classmethod
    def from_dict(cls, config: Mapping) -> LlamaConfig:
        """From a ``config.json`` as it stands. A key that might change the model is never ignored.

        Files from before transformers 5 have ``rope_theta`` and ``rope_scaling`` for ``rope_parameters``,
        the oldest of them ``type`` for ``rope_type``.
        """
        ours = {field.name for field in fields(cls)}
        for key, value in FIXED.items():
            if config.get(key, value) != value:
                raise Error(
                    f"this Llama computes with {key}={value!r} only, and the config has {config[key]!r}"
                )
        unknown = set(config) - ours - set(FIXED) - BOOKKEEPING - {"rope_theta", "rope_scaling"}
        if unknown:
            raise Error(
                f"unknown config keys: {', '.join(sorted(unknown))}; remove them if they do not change "
                f"what the model computes"
            )
        given = {key: value for key, value in config.items() if key in ours}
        return cls(**given | {"rope_parameters": _rope_of(config)})

    def to_dict(self) -> dict:
        """A ``config.json`` that ``transformers`` reads too."""
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **asdict(self)}


def _rope_of(config: Mapping) -> dict:
    """``rope_parameters`` of a ``config.json``, from either spelling, or both where they agree."""
    given = []
    for key in ("rope_scaling", "rope_parameters"):
        parameters = config.get(key) or {}
        if not isinstance(parameters, Mapping):
            raise Error(f"{key} must be an object of parameters, not {parameters!r}")
        given += parameters.items()
    if config.get("rope_theta") is not None:
        given.append(("rope_theta", config["rope_theta"]))
    rope = {}
    for name, value in given:
        name = "rope_type" if name == "type" else name
        if rope.setdefault(name, value) != value:
            raise Error(f"the config gives {name} as {rope[name]!r} and as {value!r}: keep one of them")
    return rope


def _checked_rope(given: Mapping) -> dict:
    """``rope_parameters``, complete. Raises Error if one is missing, unknown, or no positive number."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, **given}
    kind = rope["rope_type"]
    if not isinstance(kind, str) or kind not in ROPE_TYPES:
        raise Error(f"rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    needed = {"rope_type", "rope_theta", *ROPE_TYPES[kind]}
    if rope.keys() != needed:
        raise Error(
            f"rope_parameters of rope_type {kind!r} are {', '.join(sorted(needed))}, "
            f"not {', '.join(sorted(rope))}"
        )
    for name in ("rope_theta", *ROPE_TYPES[kind]):
        number = isinstance(rope[name], (int, float)) and not isinstance(rope[name], bool)
        if not number or not 0 < rope[name] <= sys.float_info.max:
            raise Error(f"{name} in rope_parameters must be a positive number, not {rope[name]!r}")
    if kind == "llama3" and not rope["low_freq_factor"] < rope["high_freq_factor"]:
        raise Error(
            f"low_freq_factor ({rope['low_freq_factor']}) in rope_parameters must be below "
            f"high_freq_factor ({rope['high_freq_factor']})"
        )
    return rope


def rope_frequencies(config: LlamaConfig) -> np.ndarray:
    """By how much the angle of each pair of channels grows from position to position: (D/2,) in float64.

    Pair i turns by θ^(-2i/D): the first by 1 radian per position, the last by hardly more than 1/θ, so
    that one sees neighbours and the other the whole context. To read contexts longer than it was
    trained on, "linear" divides every frequency by ``factor``. "llama3" divides those whose wave
    is longer than the trained context / ``low_freq_factor``, leaves those whose wave is
    shorter than the trained context / ``high_freq_factor``, and goes over from one to the other between.
    """
    rope, D = config.rope_parameters, config.head_dim
    frequencies = rope["rope_theta"] ** (-np.arange(0, D, 2) / D)
    if rope["rope_type"] == "linear":
        return frequencies / rope["factor"]
    if rope["rope_type"] == "llama3":
        waves = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # in that context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((waves - low) / (high - low), 0, 1)
        return kept * frequencies + (1 - kept) * frequencies / rope["factor"]
    return frequencies


class GroupedQueryAttention(nn.Module):
    """Every position gathers from itself and the ones before it; H query heads share G keys and values."""

    def __init__(self, config: LlamaConfig, rng):
        C, D, std = config.hidden_size, config.head_dim, config.initializer_range
        H, G, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        self.head_dim, self.attention_dropout = D, config.attention_dropout
        self.q_proj, self.k_proj, self.v_proj = nn.fused_linears(
            C, (H * D, G * D, G * D), bias, rng=rng, std=std
        )
        self.o_proj = nn.Linear(H * D, C, bias, rng=rng, std=std)

    def fuse(self):
        nn.fuse_rows(self.q_proj, self.k_proj, self.v_proj)

    def forward(self, x, rotation, cache: LayerCache | None = None):
        """x (B, T, C), and cos and sin (T, D/2), or (B, 1, T, D/2), of its positions -> (B, T, C)."""
        q, k, v = (
            y.rearrange("b t (h d) -> b h t d", d=self.head_dim)  # (B, H or G, T, D)
            for y in nn.fused(x, self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = F.rope(q, *rotation), F.rope(k, *rotation)
        mask = None
        if cache is not None:  # keys are kept as they were turned
            (k, v), mask = cache.extend(k, v), cache.mask  # (B, G, S, D): those of the text so far, too
        dropout_p = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal=True, enable_gqa=True
        )  # (B, H, T, D)
        return self.o_proj(y.rearrange("b h t d -> b t (h d)"))  # (B, T, C)


class SwiGLU(nn.Module):
    """Every position thinks by itself: out to a wider layer, gated, and back."""

    def __init__(self, config: LlamaConfig, rng):
        C, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        std = config.initializer_range
        self.gate_proj, self.up_proj = nn.fused_linears(C, (inner, inner), bias, rng=rng, std=std)
        self.down_proj = nn.Linear(inner, C, bias, rng=rng, std=std)

    def fuse(self):
        nn.fuse_rows(self.gate_proj, self.up_proj)

    def forward(self, x):  # (B, T, C)
        gate, up = self.gate_proj, self.up_proj
        if nn.bias_can_wait(x, gate, up):
            y = F.swiglu(F.linear(x, gate.weight), F.linear(x, up.weight), gate.bias, up.bias)
        else:
            y = F.swiglu(*nn.fused(x, gate, up))
        return self.down_proj(y)  # (B, T, C)


class LlamaBlock(nn.Module):
    """Attention, then the MLP; each adds to the residual stream what it computed from its norm."""

    def __init__(self, config: LlamaConfig, rng):
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = GroupedQueryAttention(config, rng)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config, rng)

    def forward(self, x, rotation, cache: LayerCache | None = None):  # (B, T, C)
        x = x + self.self_attn(self.input_layernorm(x), rotation, cache).astype(x.dtype)
        return x + self.mlp(self.post_attention_layernorm(x)).astype(x.dtype)


class Llama(nn.Module):
    """Llama with its language-model head. Attribute names are the checkpoint's keys, less ``model.``.

    ``rng`` draws the initial weights from N(0, initializer_range²), as ``transformers`` does. With
    ``rng=None`` the parameters are stand-ins that take no memory until ``load_state_dict``.
    """

    learned_positions = False  # keys and queries know their distance only

    def __init__(self, config: LlamaConfig, rng: np.random.Generator | None):
        self.config = config
        C, std = config.hidden_size, config.initializer_range
        self.frequencies = rope_frequencies(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, C, rng=rng, std=std)
        self.layers = [LlamaBlock(config, rng) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(C, config.rms_norm_eps)
        head_rng = None if config.tie_word_embeddings else rng
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False, rng=head_rng, std=std)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight  # one matrix, read both ways

    @property
    def context(self) -> int:
        """The longest sequence the model takes."""
        return self.config.max_position_embeddings

    def rotation(self, positions: np.ndarray) -> tuple:
        """cos and sin of every angle, position · frequency, for all layers: (..., D/2) for positions (...).

        Both are computed here in float64 and then given the model's dtype and device: in float32 the
        angles near position 100,000 would be off by up to 0.005. Only the positions at hand are: a table of
        Llama 3.1's 131,072 would take longer to make, and 67 MB.
        """
        like = self.embed_tokens.weight.data
        angles = positions[..., None] * self.frequencies
        return tuple(np.asarray(f(angles).astype(wide(like.dtype)), like=like) for f in (np.cos, np.sin))

    def new_cache(self, batch: int, room: int | None = None, padding=None) -> Cache:
        """An empty ``Cache`` for ``batch`` rows of at most ``room`` tokens (None: the context)."""
        config, like = self.config, self.embed_tokens.weight.data
        room = self.context if room is None else min(room, self.context)
        layers, G = config.num_hidden_layers, config.num_key_value_heads
        return Cache(layers, batch, G, room, config.head_dim, like, padding, self.product_dtype)

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
        rotation = self.rotation(positions if positions.ndim == 1 else positions[:, None])
        x = self.embed_tokens(ids)  # (B, T, C)
        kept = [None] * len(self.layers) if cache is None else cache.layers(*ids.shape)
        for layer, place in zip(self.layers, kept):
            x = layer(x, rotation, place)
        if cache is not None:
            cache.length += ids.shape[1]
        x = self.norm(x)
        if targets is None:
            return self.lm_head(x[:, -1:] if last_only else x, dtype=wide(x.dtype))
        return F.linear_cross_entropy(x, self.lm_head.weight, targets, num_targets=num_targets)

    def loss(self, ids, targets, num_targets=None) -> Tensor:
        """Σ cross-entropy over targets that are not -100, divided by ``num_targets`` (default: their number)."""
        return self(ids, targets, num_targets)

    def checkpoint_keys(self, arrays: Mapping) -> dict[str, str]:
        """Parameter name -> key, for any of the layouts Llama is published in.

        Names may begin with ``model.``; the frequencies that old files hold are not parameters; a tied
        head may be stored a second time, if it equals the embedding.
        """
        keys = {}
        for key in arrays:
            name = key.removeprefix("model.")
            if name in keys:
                raise Error(f"{key} and {keys[name]} are both given: keep one of them")
            if not name.endswith("rotary_emb.inv_freq"):
                keys[name] = key
        if self.config.tie_word_embeddings and {"lm_head.weight", "embed_tokens.weight"} <= keys.keys():
            head = keys.pop("lm_head.weight")
            if not np.array_equal(arrays[head], arrays[keys["embed_tokens.weight"]]):
                raise Error(
                    f"{head} differs from the embedding, but tie_word_embeddings is true in the config"
                )
        return keys

    @classmethod
    def from_pretrained(cls, name: str | Path, dtype=np.float32) -> Llama:
        """From what ``load_model`` takes, in ``dtype``, in eval mode."""
        path = hub.find_model(name)
        model = cls(LlamaConfig.from_dict(hub.model_config(path)), rng=None).astype(dtype)
        model.load_state_dict(hub.open_weights(path), source=str(path))
        return model.eval()

    def save_pretrained(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors`` as ``transformers`` does."""
        tensors = {
            name if name.startswith("lm_head.") else f"model.{name}": array
            for name, array in self.state_dict().items()
        }
        safetensors.save_folder(folder, self.config.to_dict(), tensors, overwrite=overwrite)
