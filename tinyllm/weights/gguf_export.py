"""A model's config as the keys of a GGUF file, or the reason why llama.cpp would compute something else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinyllm.errors import Error
from tinyllm.weights.gguf_config import LLAMA3, layer_types, llama3_factors, llama3_parameters, query_scalar
from tinyllm.weights.gguf_tables import BY_MODEL_TYPE, Table

# Fields of a config that do not change the logits, or are seen in the tensors or written by ``rope_keys``
INERT = set(
    "architectures model_type dtype vocab_size initializer_range tie_word_embeddings attention_dropout "
    "embd_pdrop attn_pdrop resid_pdrop router_aux_loss_coef output_router_logits router_jitter_noise "
    "attention_bias mlp_bias qkv_bias lm_head_bias max_window_layers rope_parameters rope_theta rope_scaling "
    "rope_local_base_freq sliding_window_pattern query_pre_attn_scalar layer_types".split()
)
# What Hugging Face's classes compute where a field is None
DEFAULTS = {
    "feed_forward_length": lambda config: 4 * config["n_embd"],  # of GPT-2
    "attention.head_count_kv": lambda config: config["num_attention_heads"],
    "attention.key_length": lambda config: config["hidden_size"] // config["num_attention_heads"],
}
TRAINED = "original_max_position_embeddings"
INSTEAD = "export a Hugging Face folder instead"


def table_of_model(model_type: str) -> Table:
    """The table for writing a model. Raises ``Error`` if llama.cpp, or this package, has none."""
    if model_type not in BY_MODEL_TYPE:
        known = ", ".join(BY_MODEL_TYPE)
        raise Error(f"a model of type {model_type!r} cannot be written as GGUF, only {known}: {INSTEAD}")
    return BY_MODEL_TYPE[model_type]


def model_keys(table: Table, config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a model with this ``config.json``: name -> a str, bool, int or float.

    Raises ``Error``, naming the field, if a value is not among those that llama.cpp computes with.
    """
    _check_values(table, config)
    keys = {"vocab_size": config["vocab_size"]}
    for key, name in table.keys.items():
        value = config.get(name)
        if value is None and key in DEFAULTS:
            value = DEFAULTS[key](config)
        if value is None:
            raise Error(f"llama.cpp's {table.architecture} has no model with {name}=None: {INSTEAD}")
        keys[key] = float(value) if key.endswith(("epsilon", "softcapping")) else int(value)
    if "attention.key_length" in keys:
        keys["attention.value_length"] = keys["attention.key_length"]
    if table.rope:
        keys["rope.dimension_count"] = keys.get("attention.key_length", 0)
        keys |= _rope_keys(table, config)
    return {f"{table.architecture}.{key}": value for key, value in keys.items()}


def rope_factors(table: Table, config: Mapping[str, Any]) -> np.ndarray | None:
    """The divisors (D/2,) of RoPE's frequencies that llama.cpp reads from a tensor, if it needs them.

    Raises ``Error`` if ``load_model`` could not recover the config from them.
    """
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") != "llama3":
        return None
    head_dim = model_keys(table, config)[f"{table.architecture}.attention.key_length"]
    factors = llama3_factors(rope, head_dim).astype(np.float32)
    if llama3_parameters(factors, rope["rope_theta"], head_dim, rope[TRAINED]) is None:
        raise Error(f"a GGUF file has no place for all of rope_parameters={dict(rope)}: {INSTEAD}")
    return factors


def _check_values(table: Table, config: Mapping[str, Any]) -> None:
    kind = table.architecture
    for name, values in table.constants.items():
        value = config.get(name, values[0])
        # A window that is not shorter than the context hides nothing.
        whole = name == "sliding_window" and value is not None and value >= config["max_position_embeddings"]
        if value not in values and not whole:
            raise Error(
                f"llama.cpp computes every {kind} with {name}={values[0]!r}, not {value!r}: {INSTEAD}"
            )
    unknown = config.keys() - INERT - set(table.keys.values()) - table.constants.keys()
    unknown = sorted(name for name in unknown if config[name] not in (None, False))
    if unknown:
        named = ", ".join(f"{name}={config[name]!r}" for name in unknown)
        raise Error(f"a GGUF file of a {kind} has no place for {named}: {INSTEAD}")
    if table.window is None:
        return
    expected = {
        "layer_types": layer_types(config["num_hidden_layers"], table.window),
        "query_pre_attn_scalar": query_scalar(table, config),
    }
    for name, value in expected.items():
        if config[name] != value:
            raise Error(
                f"llama.cpp computes this {kind} with {name}={value!r}, not {config[name]!r}: {INSTEAD}"
            )


def _rope_keys(table: Table, config: Mapping[str, Any]) -> dict[str, Any]:
    """θ and the scaling of RoPE's frequencies, and a check of those of the layers with a window."""
    rope = config["rope_parameters"]
    if table.local_rope is not None:
        local, rope = rope["sliding_attention"], rope["full_attention"]
        plain = {"rope_type": "default", "rope_theta": table.local_rope}
        if dict(local) != plain:
            raise Error(
                f"llama.cpp computes the layers with a window of a {table.architecture} with RoPE's {plain}, "
                f"not {dict(local)}: {INSTEAD}"
            )
    keys = {"rope.freq_base": float(rope["rope_theta"])}
    kind = rope["rope_type"]
    if kind == "llama3" and table.permuted:  # its factors are a tensor, which llama.cpp reads in a Llama only
        published = rope[TRAINED] == LLAMA3[TRAINED]
        return keys if published else keys | {"rope.scaling.original_context_length": rope[TRAINED]}
    if kind == "default":
        return keys
    parameters = {"linear": {"factor"}, "yarn": {"factor", TRAINED}}.get(kind)
    if parameters == {name for name in rope if name not in ("rope_type", "rope_theta")}:
        keys |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        return keys | ({"rope.scaling.original_context_length": rope[TRAINED]} if TRAINED in rope else {})
    if parameters is not None:
        raise Error(f"a GGUF file has no place for all of rope_parameters={dict(rope)}: {INSTEAD}")
    raise Error(f"a GGUF file of a {table.architecture} has no place for rope_type={kind!r}: {INSTEAD}")
