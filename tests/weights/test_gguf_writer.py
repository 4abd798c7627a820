"""GGUF files that tinyllm writes: every architecture is read back, and what would be lost is refused."""

import errno
import os

import numpy as np
import pytest

from tinyllm.errors import Error
from tinyllm.tokenizers.gguf_writer import tokenizer_keys
from tinyllm.weights import gguf_writer
from tinyllm.weights.gguf import GGUFFile
from tinyllm.weights.gguf_export import DEFAULTS
from tinyllm.weights.gguf_writer import write_gguf

gguf = pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from support import gguf_models  # noqa: E402
from support.gguf_models import MODELS, ROWS, folder_of, random_model  # noqa: E402

# Fields that a file does not hold, because they do not change the logits
TRAINING = {"attn_pdrop", "embd_pdrop", "resid_pdrop", "attention_dropout", "initializer_range"}
TRAINING |= {"router_aux_loss_coef", "output_router_logits", "router_jitter_noise", "max_window_layers"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """name -> config and tensors of a random model."""
    found = {}

    def get(name):
        if name not in found:
            config, weights = folder_of(random_model(name), tmp_path_factory.mktemp(name) / "folder")
            found[name] = config, dict(weights.items())
        return found[name]

    return get


def message_of(*call, **options):
    with pytest.raises(Error) as error:
        write_gguf(*call, **options)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_is_read_back_as_it_was(saved, tmp_path, name):
    config, tensors = saved(name)
    write_gguf(tmp_path / "m.gguf", config, tensors)
    read = GGUFFile(tmp_path / "m.gguf")
    assert set(read) == set(tensors)
    for key, array in tensors.items():
        # Gemma's norms are stored as 1 + w in float32.
        bound = 1.2e-7 if name.startswith("gemma") and key.endswith("norm.weight") else 0
        assert read.shapes[key] == array.shape
        np.testing.assert_allclose(read[key], array, rtol=0, atol=bound, err_msg=key)
    defaults = {table_key(name, field): make for field, make in DEFAULTS.items()}
    for field, value in config.items():
        if value is None and field in defaults:
            value = defaults[field](config)
        if field in TRAINING:
            continue
        if (name, field) == ("mistral", "model_type"):
            value = "llama"  # whose file it is
        if field != "layer_types" or name.startswith("gemma"):
            assert read.config.get(field) == value or value in (None, False), field


def table_key(name, key):
    """The field of a config behind a key of a file."""
    from tinyllm.weights.gguf_tables import BY_MODEL_TYPE

    model_type = {"llama3": "llama", "llama3_128": "llama", "yarn": "qwen2", "gemma3": "gemma3_text"}.get(
        name, name
    )
    return BY_MODEL_TYPE[model_type].keys.get(key)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_are_in_the_order_of_their_numbers(saved, tmp_path, name):
    config, tensors = saved(name)
    write_gguf(tmp_path / "m.gguf", config, dict(reversed(tensors.items())))
    read = GGUFFile(tmp_path / "m.gguf")
    for key, array in tensors.items():
        np.testing.assert_array_equal(read[key], array, err_msg=key)


@pytest.mark.parametrize("name", ["low_freq_factor", "high_freq_factor"])
def test_a_scaling_of_llama3_that_cannot_be_read_back_is_refused(saved, tmp_path, name):
    config, tensors = saved("llama3_128")
    said = message_of(
        tmp_path / "m.gguf", config | {"rope_parameters": config["rope_parameters"] | {name: 2.0}}, tensors
    )
    assert f"'{name}': 2.0" in said and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_transformers_reads_the_same_model(saved, tmp_path, name):
    """Of the others it ignores keys: the size of heads, windows, scaled frequencies, biases, experts."""
    config, tensors = saved(name)
    keys = tokenizer_keys(gguf_models.tokenizer(), ROWS)
    write_gguf(tmp_path / "m.gguf", config, tensors, about=keys)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, random_model(name)(ids).logits)


# -------------------------------------------------------------------------------------- types


@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16", "q8_0"])
def test_types_of_matrices_and_vectors(saved, tmp_path, type_name, monkeypatch):
    monkeypatch.setattr(gguf_writer, "BLOCK", 1000)  # rows are converted a few at a time
    config, tensors = saved("mixtral")
    written = write_gguf(tmp_path / "m.gguf", config, tensors, type_name)
    assert (written.tensors, written.not_quantized) == (3 + 3 * 10, 0)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    type_ = gguf.GGMLQuantizationType[type_name.upper()]
    for name, tensor in stored.items():
        single = tensor.data.ndim == 1 or "ffn_gate_inp" in name
        assert tensor.tensor_type.name == ("F32" if single else type_name.upper()), name
    experts = np.stack([tensors[f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight"] for e in range(4)])
    expected = gguf.dequantize(gguf.quantize(experts, type_), type_)
    found = stored["blk.1.ffn_gate_exps.weight"]
    np.testing.assert_array_equal(gguf.dequantize(found.data, type_).reshape(expected.shape), expected)
    router = stored["blk.1.ffn_gate_inp.weight"].data
    np.testing.assert_array_equal(router, tensors["model.layers.1.block_sparse_moe.gate.weight"])


def test_rows_that_do_not_divide_by_32_are_float16_and_counted(saved, tmp_path):
    config, tensors = saved("gpt2")
    sizes = {"n_embd": 16, "n_inner": 64}
    rng = np.random.default_rng(0)
    small = {}
    for name, array in tensors.items():
        shape = [{64: 16, 192: 48, 256: 64}.get(n, n) for n in array.shape]
        small[name] = rng.standard_normal(shape, dtype=np.float32)
    written = write_gguf(tmp_path / "m.gguf", config | sizes, small, "q8_0")
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert stored["blk.0.ffn_down.weight"] == "Q8_0" and stored["blk.0.ffn_up.weight"] == "F16"
    assert stored["position_embd.weight"] == "F32" == stored["blk.0.ffn_up.bias"]
    assert written.not_quantized == sum(kind == "F16" for kind in stored.values()) == 1 + 3 * 3


@pytest.mark.parametrize("type_name", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_weight_that_is_not_finite_is_refused(saved, tmp_path, type_name, value):
    config, tensors = saved("llama3")
    damaged = tensors | {"model.norm.weight": np.full_like(tensors["model.norm.weight"], value)}
    said = message_of(tmp_path / "m.gguf", config, damaged, type_name)
    assert "output_norm.weight has a weight that is not finite" in said and list(tmp_path.iterdir()) == []


def test_the_file_says_which_layers_have_a_window(saved, tmp_path):
    config, tensors = saved("gemma3")
    write_gguf(tmp_path / "m.gguf", config, tensors, about={"gemma3.attention.sliding_window_pattern": 2})
    kinds = GGUFFile(tmp_path / "m.gguf").config["layer_types"]
    assert kinds == [["sliding_attention", "full_attention"][i % 2] for i in range(len(kinds))]


@pytest.mark.parametrize("alignment", ["32", 48])
def test_an_alignment_that_is_no_power_of_two_is_refused(saved, tmp_path, alignment):
    write_gguf(tmp_path / "m.gguf", *saved("llama3"), about={"general.alignment": alignment})
    with pytest.raises(Error, match=f"general.alignment is {alignment!r}, not a power of two"):
        GGUFFile(tmp_path / "m.gguf")


@pytest.mark.parametrize("type_name", ["f16", "q8_0"])
def test_a_weight_too_large_for_float16_is_refused(saved, tmp_path, type_name):
    config, tensors = saved("llama3")
    large = dict(tensors)
    name = "model.layers.1.mlp.up_proj.weight"
    large[name] = tensors[name] * np.float32(1e9)
    said = message_of(tmp_path / "m.gguf", config, large, type_name)
    assert "blk.1.ffn_up.weight" in said and "bf16" in said
    assert list(tmp_path.iterdir()) == []
    write_gguf(tmp_path / "m.gguf", config, large, "bf16")


def test_a_missing_bias_of_gpt2_is_written_as_zeros(saved, tmp_path):
    config, tensors = saved("gpt2")
    without = {name: array for name, array in tensors.items() if not name.endswith("c_attn.bias")}
    write_gguf(tmp_path / "m.gguf", config, without)
    read = GGUFFile(tmp_path / "m.gguf")
    assert set(read) == set(tensors)
    assert not read["transformer.h.2.attn.c_attn.bias"].any()


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("mistral", {"sliding_window": 64}, "sliding_window=None, not 64"),
        ("mixtral", {"sliding_window": 64}, "sliding_window"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window=False, not True"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob=True, not False"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("gpt2", {"activation_function": "relu"}, "activation_function='gelu_new', not 'relu'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("llama", {"new_field": 2}, "new_field=2"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "'dynamic'",
        ),
        (
            "yarn",
            {"rope_parameters": gguf_models.YARN | {"beta_fast": 16.0}},
            "'beta_fast': 16.0",
        ),
        ("qwen3", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "'llama3'"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping=None"),
        ("gemma2", {"query_pre_attn_scalar": 32}, "query_pre_attn_scalar=16, not 32"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "layer_types"),
        ("gemma3", {"model_type": "gemma"}, "only llama, mistral"),
    ],
)
def test_what_llamacpp_computes_otherwise_is_refused_by_name(saved, tmp_path, name, changes, said):
    config, tensors = saved(name)
    assert said in message_of(tmp_path / "m.gguf", config | changes, tensors)
    assert list(tmp_path.iterdir()) == []


def test_another_base_of_the_layers_with_a_window_is_refused(saved, tmp_path):
    config, tensors = saved("gemma3")
    rope = config["rope_parameters"] | {"sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
    assert "500.0" in message_of(tmp_path / "m.gguf", config | {"rope_parameters": rope}, tensors)


def test_a_window_as_long_as_the_context_hides_nothing(saved, tmp_path):
    config, tensors = saved("mistral")
    write_gguf(tmp_path / "m.gguf", config | {"sliding_window": 128}, tensors)
    assert "llama.attention.sliding_window" not in GGUFFile(tmp_path / "m.gguf").metadata


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("gpt2", "lm_head.bias"),
        ("qwen3", "model.layers.0.self_attn.q_proj.bias"),
        ("mistral", "model.layers.0.mlp.up_proj.bias"),
        ("gemma2", "lm_head.weight"),
        ("llama", "model.layers.0.self_attn.lora_A.weight"),
        ("llama", "model.layers.0.mlp.up_proj.scale"),
    ],
)
def test_a_tensor_without_a_place_is_refused_by_name(saved, tmp_path, name, extra):
    config, tensors = saved(name)
    assert extra in message_of(tmp_path / "m.gguf", config, tensors | {extra: np.ones(ROWS, np.float32)})


def test_an_unknown_type_and_a_file_that_exists_are_refused(saved, tmp_path):
    config, tensors = saved("llama")
    assert "q4_0" in message_of(tmp_path / "m.gguf", config, tensors, "q4_0")
    (tmp_path / "m.gguf").write_text("mine")
    assert "m.gguf exists" in message_of(tmp_path / "m.gguf", config, tensors)
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_a_file_that_another_program_wrote_meanwhile_is_kept(saved, tmp_path, monkeypatch):
    write = gguf_writer._write

    def race(*arguments):
        write(*arguments)
        (tmp_path / "m.gguf").write_text("theirs")

    monkeypatch.setattr(gguf_writer, "_write", race)
    assert "m.gguf exists" in message_of(tmp_path / "m.gguf", *saved("llama"))
    assert os.listdir(tmp_path) == ["m.gguf"] and (tmp_path / "m.gguf").read_text() == "theirs"


def test_without_the_package_gguf_the_message_says_what_to_install(saved, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'tinyllm-numpy[models]'" in message_of(tmp_path / "m.gguf", *saved("llama"))


# -------------------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_full_disk_or_an_interrupt_leaves_nothing(saved, tmp_path, monkeypatch, stop):
    config, tensors = saved("llama")
    encoded, calls = gguf_writer._encoded, []

    def fail(gguf, each):
        calls.append(each.name)
        if len(calls) == 9:
            raise stop
        return encoded(gguf, each)

    monkeypatch.setattr(gguf_writer, "_encoded", fail)
    with pytest.raises(type(stop)) as raised:
        write_gguf(tmp_path / "m.gguf", config, tensors)
    assert isinstance(stop, KeyboardInterrupt) or "No space left" in str(raised.value)
    assert os.listdir(tmp_path) == []
