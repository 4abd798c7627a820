"""What differs by architecture between a GGUF file and a Hugging Face folder: one table per architecture.

A table is read in both directions, by ``gguf.py`` and by ``gguf_writer.py``. The facts are llama.cpp's: its
``src/models/`` say which keys and tensors a model has and which values are part of the program.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

TENSOR_NAME = re.compile(r"(?:blk\.(0|[1-9]\d*)\.)?(\w+)\.(weight|bias)", re.ASCII)
EXPERT = "{e}"  # in the name of a part: the number of an expert


@dataclass(frozen=True)
class Table:
    """An architecture in both formats.

    ``architecture`` is the value of ``general.architecture``, the first part of the model's keys in the file;
    ``model_type`` and ``hub_class`` are Hugging Face's names. ``keys`` maps the rest of a key to a field of
    ``config.json``. ``constants`` are fields that llama.cpp does not store, with the values it computes with:
    the first is the one that a file is read as.

    ``outside`` and ``inside`` map the parts of tensors' names, outside and inside a block, to modules.
    ``biases`` names the parts whose bias llama.cpp adds, ``needed_biases`` those it cannot do without. The
    rows of ``permuted`` parts are stored in pairs (see ``gguf.py``), ``transposed`` ones as (out, in) instead
    of (in, out), and the weights of norms as 1 + w if ``offset_norms``.

    ``bias_fields`` are fields that are true if a part has a bias. ``window`` tells which layers have a
    window, None for no layer, or n for all but every n-th; ``local_rope`` is their RoPE's θ if it is another.
    ``largest`` is the number of layers of the size that scales attention scores by √(C / H) instead of √D.
    ``tied`` is whether the head must be the embedding.
    """

    architecture: str
    model_type: str
    hub_class: str
    keys: Mapping[str, str]
    outside: Mapping[str, str]
    inside: Mapping[str, str]
    biases: tuple[str, ...] = ()
    needed_biases: tuple[str, ...] = ()
    bias_fields: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, tuple] = field(default_factory=dict)
    permuted: tuple[str, ...] = ()
    transposed: tuple[str, ...] = ()
    offset_norms: bool = False
    prefix: str = "model."
    blocks: str = "layers"
    rope: bool = True
    window: int | None = None
    local_rope: float | None = None
    largest: int | None = None
    tied: bool = False

    def module_of(self, name: str) -> tuple[str, str] | None:
        """The part and Hugging Face's name of a tensor, or None; ``EXPERT`` stands for all experts."""
        found = TENSOR_NAME.fullmatch(name)
        if found is None:
            return None
        block, part, kind = found.groups()
        if block is not None and part in self.inside:
            return part, f"{self.prefix}{self.blocks}.{block}.{self.inside[part]}.{kind}"
        if block is None and part in self.outside:
            return part, f"{self.prefix}{self.outside[part]}.{kind}"
        return (part, f"lm_head.{kind}") if block is None and part == "output" else None

    def tensor_of(self, name: str) -> tuple[str, str, int | None] | None:
        """GGUF's part, name and number of the expert for one of Hugging Face's names; the reverse."""
        module, _, kind = name.removeprefix(self.prefix).rpartition(".")
        if kind not in ("weight", "bias"):
            return None
        if module == "lm_head":
            return "output", f"output.{kind}", None
        for part, path in self.outside.items():
            if module == path:
                return part, f"{part}.{kind}", None
        for part, path in self.inside.items():
            pattern = re.escape(path).replace(re.escape(EXPERT), "(?P<expert>[0-9]+)")
            if found := re.fullmatch(rf"{self.blocks}\.(?P<block>[0-9]+)\.{pattern}", module):
                expert = found.groupdict().get("expert")
                return part, f"blk.{found['block']}.{part}.{kind}", None if expert is None else int(expert)
        return None


def _merged(table: Table, drop: tuple = (), **changes) -> Table:
    """The table with some entries of its mappings added or, if in ``drop``, removed."""
    for name in ("keys", "outside", "inside", "constants"):
        old = {key: value for key, value in getattr(table, name).items() if key not in drop}
        changes[name] = old | dict(changes.get(name, {}))
    return replace(table, **changes)


ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")

LLAMA = Table(
    architecture="llama",
    model_type="llama",
    hub_class="LlamaForCausalLM",
    keys={
        "feed_forward_length": "intermediate_size",
        "embedding_length": "hidden_size",
        "block_count": "num_hidden_layers",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim",
        "context_length": "max_position_embeddings",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    },
    outside={"token_embd": "embed_tokens", "output_norm": "norm"},
    inside={
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    },
    biases=(*ATTENTION, *FEED_FORWARD),
    bias_fields={"attention_bias": "attn_q", "mlp_bias": "ffn_gate"},
    constants={"hidden_act": ("silu",)},
    permuted=("attn_q", "attn_k"),
)

# llama.cpp has no other architecture for it, and no window in this one.
MISTRAL = _merged(
    LLAMA,
    model_type="mistral",
    hub_class="MistralForCausalLM",
    constants={"sliding_window": (None,)},
    biases=(),
    bias_fields={},
)

MIXTRAL = _merged(
    MISTRAL,
    drop=FEED_FORWARD,
    model_type="mixtral",
    hub_class="MixtralForCausalLM",
    keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    inside={
        "ffn_gate_inp": "block_sparse_moe.gate",
        "ffn_gate_exps": "block_sparse_moe.experts.{e}.w1",
        "ffn_up_exps": "block_sparse_moe.experts.{e}.w3",
        "ffn_down_exps": "block_sparse_moe.experts.{e}.w2",
    },
)

QWEN2 = _merged(
    LLAMA,
    architecture="qwen2",
    model_type="qwen2",
    hub_class="Qwen2ForCausalLM",
    constants={"use_sliding_window": (False,)},
    biases=ATTENTION[:3],
    bias_fields={},
    permuted=(),
)

HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}

QWEN3 = _merged(
    QWEN2,
    architecture="qwen3",
    model_type="qwen3",
    hub_class="Qwen3ForCausalLM",
    constants={"attention_bias": (False,)},
    inside=HEAD_NORMS,
    biases=(),
)

QWEN3_MOE = _merged(
    QWEN3,
    drop=FEED_FORWARD,
    architecture="qwen3moe",
    model_type="qwen3_moe",
    hub_class="Qwen3MoeForCausalLM",
    keys={
        "expert_count": "num_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    },
    inside={
        "ffn_gate_inp": "mlp.gate",
        "ffn_gate_exps": "mlp.experts.{e}.gate_proj",
        "ffn_up_exps": "mlp.experts.{e}.up_proj",
        "ffn_down_exps": "mlp.experts.{e}.down_proj",
    },
    # The chosen experts' weights sum to 1, and every layer has experts.
    constants={"norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
)

GEMMA2 = _merged(
    LLAMA,
    drop=("hidden_act",),
    architecture="gemma2",
    model_type="gemma2",
    hub_class="Gemma2ForCausalLM",
    keys={
        "attention.sliding_window": "sliding_window",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    inside={
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
    constants={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "use_bidirectional_attention": (None, False),
    },
    biases=(),
    bias_fields={},
    permuted=(),
    offset_norms=True,
    window=2,
    largest=46,
    tied=True,
)

GEMMA3 = _merged(
    GEMMA2,
    drop=("attn_logit_softcapping", "final_logit_softcapping"),
    architecture="gemma3",
    model_type="gemma3_text",
    hub_class="Gemma3ForCausalLM",
    inside=HEAD_NORMS,
    constants={"attn_logit_softcapping": (None,), "final_logit_softcapping": (None,)},
    local_rope=10000.0,
    window=6,
    largest=62,
    tied=False,
)

GPT2 = Table(
    architecture="gpt2",
    model_type="gpt2",
    hub_class="GPT2LMHeadModel",
    keys={
        "context_length": "n_positions",
        "embedding_length": "n_embd",
        "block_count": "n_layer",
        "attention.head_count": "n_head",
        "feed_forward_length": "n_inner",
        "attention.layer_norm_epsilon": "layer_norm_epsilon",
    },
    outside={"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f"},
    inside={
        "attn_norm": "ln_1",
        "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj",
        "ffn_norm": "ln_2",
        "ffn_up": "mlp.c_fc",
        "ffn_down": "mlp.c_proj",
    },
    biases=("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down", "output_norm"),
    needed_biases=("attn_qkv",),
    constants={
        # one function, with rounding of its own in each of transformers' forms
        "activation_function": (
            *("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"),
        ),
    },
    transposed=("attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    prefix="transformer.",
    blocks="h",
    rope=False,
)

TABLES = (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE, GEMMA2, GEMMA3, GPT2)
BY_MODEL_TYPE = {table.model_type: table for table in TABLES}
ARCHITECTURES = tuple(dict.fromkeys(table.architecture for table in TABLES))


def table_of_file(architecture: str, experts: int) -> Table:
    """The table for reading a file of this architecture with this number of experts."""
    if architecture == LLAMA.architecture:  # Mistral's files are those of a Llama
        return MIXTRAL if experts else LLAMA
    return next(table for table in TABLES if table.architecture == architecture)
