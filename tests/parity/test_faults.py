"""Planted faults: the suite's own tests must catch each of them, and the report must locate it.

A fault replaces a function of tinyllm while those tests run. What is recorded here (fault, caught by, located
at) becomes a table of ``python -m parity proof``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from support import faults
from support.mixtures import MIXTRAL
from support.models import EVERYTHING, GEMMA2, GEMMA3, NO_DROPOUT, random_model
from support.suite import collected, failures

from parity import tables
from parity.compare import compare, report
from parity.twins import bridge
from parity.twins.mistral import TorchMistral
from parity.twins.qwen import TorchQwen2, TorchQwen3
from tinyllm import GPT2Config, LlamaConfig

CONFIG = GPT2Config(vocab_size=17, n_positions=8, n_embd=12, n_layer=2, n_head=3, **NO_DROPOUT)
RANDOM = dict(n_layer=2, n_head=6, n_embd=24, vocab_size=17, n_positions=16)
QWEN2, QWEN3, MISTRAL = (twin.random_config(**RANDOM) for twin in (TorchQwen2, TorchQwen3, TorchMistral))

# ---------------------------------------------------------------------- the suite's checks

MODEL, LLAMA = "GPT-2 against transformers", "Llama against transformers"
GEMMA_2, GEMMA_3 = "Gemma 2 against transformers", "Gemma 3 against transformers"
WINDOW = "attention in a window against torch"
RELATIVES, RELATIVE_FOLDER = "Llama's relatives against transformers", "their folders"
FOLDER, FREQUENCIES = "a checkpoint of transformers", "RoPE frequencies against transformers"
ADAMW, TRAINING, SAMPLING = "AdamW against torch", "50 training steps", "sampling against torch"
MUON, MUON_TRAINING = "Muon against torch", "50 training steps with Muon"
INSTRUCT = "masked conversations against torch"
LORA_TRAINING, ADAPTER = "50 training steps of LoRA", "an adapter of peft"
CLASSIFIER, CLASSES = "a classifier of transformers", "50 training steps of a classifier"
DPO = "50 DPO steps"

MIXTURE_FOLDER, ROUTER = "a mixture in transformers", "a router that learns"

# The checks of an op or a layer are found by their subject, the others by the name of their test
TESTS = {
    MODEL: "test_gpt2::test_several_query_blocks_and_row_chunks_equal_transformers",
    RELATIVES: "test_relatives::test_several_query_blocks_and_row_chunks_equal_transformers",
    WINDOW: "test_window_over_several_blocks_of_queries",
    RELATIVE_FOLDER: "test_relatives::test_folder_of_transformers_loads",
    LLAMA: "test_llama::test_several_query_blocks_and_row_chunks_equal_transformers",
    GEMMA_2: "test_several_query_blocks_of_gemma2_equal_transformers",
    GEMMA_3: "test_several_query_blocks_of_gemma3_equal_transformers",
    FOLDER: "test_gpt2::test_folder_of_transformers_loads",
    FREQUENCIES: "test_frequencies_of_every_rope_type_equal_transformers",
    ADAMW: "test_adamw_equals_torch_for_20_steps",
    TRAINING: "test_fifty_training_steps_equal_torchs",
    MUON: "test_muon_equals_torch_for_50_steps",
    MUON_TRAINING: "test_fifty_training_steps_with_muon_equal_torchs",
    LORA_TRAINING: "test_fifty_steps_of_lora_equal_torchs",
    ADAPTER: "test_an_adapter_of_peft_loads_here_and_back",
    CLASSIFIER: "test_classifier::test_a_folder_of_transformers_loads",
    CLASSES: "test_fifty_steps_of_classification_equal_torchs",
    DPO: "test_fifty_dpo_steps_equal_torchs",
    MIXTURE_FOLDER: "test_folders_are_exchanged_with_transformers",
    ROUTER: "test_a_router_learns_to_choose_the_better_expert",
    SAMPLING: "test_sampled_tokens_equal_those_of_plain_torch",
    INSTRUCT: "test_the_masked_loss_and_all_gradients_equal_torchs",
}


def failing(checks) -> dict[str, BaseException]:
    """The checks that fail, in this order, with the exception of each."""
    tests = collected().tests
    return failures({check: tests[TESTS.get(check, check)] for check in checks})


# ------------------------------------------------------------------------------ the faults


@dataclass(frozen=True)
class Fault:
    """A fault, the checks that must catch it, and where the report must locate it."""

    plant: Callable[[pytest.MonkeyPatch], None]
    caught_by: tuple[str, ...]
    located: tuple[str, str] | None  # the last row that agrees, the first that differs; None: in no layer
    config: GPT2Config | LlamaConfig = CONFIG  # of the model in the report


FAULTS = {
    "linear: dW × (1 + 1e-8)": Fault(
        faults.scaled_gradient("linear", 1),
        ("linear", "Linear", MODEL),
        ("gradient of the output of h.1.mlp.c_proj", "gradient of h.1.mlp.c_proj.weight"),
    ),
    "layer_norm: dx × (1 + 1e-8)": Fault(
        faults.scaled_gradient("layer_norm", 0),
        ("layer_norm", "LayerNorm", MODEL),
        ("gradient of ln_f.bias", "gradient of the output of h.1"),
    ),
    "gelu: slope × (1 + 1e-8)": Fault(
        faults.scaled_gradient("gelu", 0),
        ("gelu", "MLP", MODEL),
        ("gradient of h.1.mlp.c_proj.bias", "gradient of the output of h.1.mlp.c_fc"),
    ),
    "attention: dv × (1 + 1e-8)": Fault(
        faults.scaled_gradient("scaled_dot_product_attention", 2),
        ("scaled_dot_product_attention", "CausalSelfAttention", MODEL),
        ("gradient of h.1.attn.c_proj.bias", "gradient of the output of h.1.attn.c_attn"),
    ),
    "cross_entropy: dx × (1 + 1e-8)": Fault(
        faults.scaled_gradient("cross_entropy", 0), ("cross_entropy",), None
    ),
    "linear_cross_entropy: dx × (1 + 1e-8)": Fault(
        faults.scaled_gradient("linear_cross_entropy", 0),
        ("linear_cross_entropy", "GPT2", MODEL),
        ("output of loss", "gradient of the output of ln_f"),
    ),
    "embedding: dW × (1 + 1e-8)": Fault(
        faults.scaled_gradient("embedding", 0),
        ("embedding", "Embedding", MODEL),
        ("gradient of the output of wpe", "gradient of wpe.weight"),
    ),
    "LayerNorm: eps 1e-6 instead of 1e-5": Fault(
        faults.another_eps, ("LayerNorm", "GPT2", MODEL), ("output of drop", "output of h.0.ln_1")
    ),
    "GELU: erf instead of tanh": Fault(
        faults.erf_for_tanh,
        ("gelu", "MLP", MODEL),
        ("output of h.0.mlp.c_fc", "output of h.0.mlp.c_proj"),
    ),
    "GELU: gelu_new read as the erf form": Fault(
        faults.erf_by_its_name, ("MLP", MODEL), ("output of h.0.mlp.c_fc", "output of h.0.mlp.c_proj")
    ),
    "Conv1D: not transposed": Fault(
        faults.square_conv1d_not_transposed,
        ("Conv1D", MODEL, FOLDER),
        ("output of h.0.attn.c_attn", "output of h.0.attn.c_proj"),
    ),
    "attention: mask off by one": Fault(
        faults.attention(faults.one_key_too_many),
        ("scaled_dot_product_attention", "CausalSelfAttention", MODEL),
        ("output of h.0.attn.c_attn", "output of h.0.attn.c_proj"),
    ),
    "attention: 1/sqrt(D) missing": Fault(
        faults.attention(faults.unscaled),
        ("scaled_dot_product_attention", "CausalSelfAttention", MODEL),
        ("output of h.0.attn.c_attn", "output of h.0.attn.c_proj"),
    ),
    "Linear: bias dropped": Fault(
        faults.dropped_bias,
        ("Linear", "Conv1D", MODEL),
        ("output of h.0.ln_1", "output of h.0.attn.c_attn"),
    ),
    "GPT-2: weights no longer tied": Fault(
        faults.tying_lost,
        ("GPT2", MODEL, TRAINING),
        ("gradient of the output of wte", "gradient of wte.weight"),
    ),
    "rms_norm: dx × (1 + 1e-8)": Fault(
        faults.scaled_gradient("rms_norm", 0),
        ("rms_norm", "RMSNorm", LLAMA),
        ("gradient of norm.weight", "gradient of the output of layers.1"),
        EVERYTHING,
    ),
    "swiglu: da × (1 + 1e-8)": Fault(
        faults.scaled_gradient("swiglu", 0),
        ("swiglu", "SwiGLU", LLAMA),
        ("gradient of layers.1.mlp.up_proj.bias", "gradient of the output of layers.1.mlp.gate_proj"),
        EVERYTHING,
    ),
    "rope: dx × (1 + 1e-8)": Fault(
        faults.scaled_gradient("rope", 0),
        ("rope", "GroupedQueryAttention", LLAMA),
        ("gradient of layers.1.self_attn.v_proj.bias", "gradient of the output of layers.1.self_attn.k_proj"),
        EVERYTHING,
    ),
    "RMSNorm: eps 1e-5 instead of 1e-6": Fault(
        faults.another_rms_eps,
        ("RMSNorm", "Llama", LLAMA),
        ("output of embed_tokens", "output of layers.0.input_layernorm"),
        EVERYTHING,
    ),
    "RoPE: adjacent channels paired": Fault(
        faults.adjacent_channels_paired,
        ("rope", "GroupedQueryAttention", LLAMA),
        ("output of layers.0.self_attn.v_proj", "output of layers.0.self_attn.o_proj"),
        EVERYTHING,
    ),
    "RoPE: frequency scaling ignored": Fault(
        faults.scaling_ignored,
        (FREQUENCIES, "Llama", LLAMA),
        ("output of layers.0.self_attn.v_proj", "output of layers.0.self_attn.o_proj"),
        EVERYTHING,
    ),
    "SwiGLU: gate and up swapped": Fault(
        faults.gate_and_up_swapped,
        ("swiglu", "SwiGLU", LLAMA),
        ("output of layers.0.mlp.up_proj", "output of layers.0.mlp.down_proj"),
        EVERYTHING,
    ),
    "GQA: query heads interleaved, not grouped": Fault(
        faults.query_heads_interleaved,
        ("scaled_dot_product_attention", "GroupedQueryAttention", LLAMA),
        ("output of layers.0.self_attn.v_proj", "output of layers.0.self_attn.o_proj"),
        EVERYTHING,
    ),
    "Qwen3: heads normalized together, not each": Fault(
        faults.heads_normalized_together,
        ("Qwen3Attention", "Qwen3", RELATIVES),
        ("output of layers.0.self_attn.v_proj", "output of layers.0.self_attn.q_norm"),
        QWEN3,
    ),
    "RoPE: YaRN's factor of cos and sin ignored": Fault(
        faults.extension_not_sharpened,
        (FREQUENCIES, "Qwen2", RELATIVE_FOLDER),
        ("output of layers.0.self_attn.v_proj", "output of layers.0.self_attn.o_proj"),
        QWEN2,
    ),
    "attention: window off by one": Fault(
        faults.attention(faults.window_one_too_wide),
        (WINDOW, "MistralBlock", "Mistral", RELATIVES),
        ("output of layers.0.self_attn.v_proj", "output of layers.0.self_attn.o_proj"),
        MISTRAL,
    ),
    "Qwen2: windows one layer late": Fault(
        faults.windows_one_layer_late,
        (RELATIVES,),
        ("output of layers.1.self_attn.v_proj", "output of layers.1.self_attn.o_proj"),
        QWEN2,
    ),
    "geglu: da × (1 + 1e-8)": Fault(
        faults.scaled_gradient("geglu", 0),
        ("geglu", "GeGLU", GEMMA_2),
        ("gradient of layers.1.mlp.up_proj.weight", "gradient of the output of layers.1.mlp.gate_proj"),
        GEMMA2,
    ),
    "OffsetRMSNorm: w instead of 1 + w": Fault(
        faults.offset_forgotten,
        ("OffsetRMSNorm", GEMMA_2, GEMMA_3),
        ("output of embed_tokens", "output of layers.0.input_layernorm"),
        GEMMA2,
    ),
    "Gemma 3: angles of the two kinds of layers swapped": Fault(
        faults.angles_of_the_other_kind,
        (GEMMA_3,),
        ("output of layers.0.self_attn.k_norm", "output of layers.0.self_attn.o_proj"),
        GEMMA3,
    ),
    "Gemma: no window in sliding layers": Fault(
        faults.gemma_windows(faults.no_window, faults.no_window),
        ("GemmaAttention", GEMMA_2, GEMMA_3),
        ("output of layers.0.self_attn.v_proj", "output of layers.0.self_attn.o_proj"),
        GEMMA2,
    ),
    "Gemma: a window in full layers, too": Fault(
        faults.gemma_windows(faults.a_window, faults.a_window),
        ("GemmaAttention", GEMMA_2, GEMMA_3),
        ("output of layers.1.self_attn.v_proj", "output of layers.1.self_attn.o_proj"),
        GEMMA2,
    ),
    "Gemma: embeddings scaled at the end": Fault(
        faults.embeddings_scaled_at_the_end,
        ("ScaledEmbedding", GEMMA_2, GEMMA_3),
        ("nothing", "output of embed_tokens"),
        GEMMA3,
    ),
    "Gemma 2: logits not capped in the loss": Fault(
        faults.uncapped_loss,
        ("linear_cross_entropy", GEMMA_2),
        ("output of lm_head", "output of loss"),
        GEMMA2,
    ),
    "attention: softcap after the mask": Fault(
        faults.softcap_after_the_mask,
        ("scaled_dot_product_attention", "GemmaAttention", GEMMA_2),
        ("output of layers.0.self_attn.v_proj", "output of layers.0.self_attn.o_proj"),
        GEMMA2,
    ),
    "mixture: expert weights not renormalized": Fault(
        faults.weights_not_renormalized,
        ("Mixture", "Mixtral", MIXTURE_FOLDER),
        ("output of layers.0.block_sparse_moe.experts.4", "output of layers.0.block_sparse_moe"),
        MIXTRAL,
    ),
    "mixture: router's gradient dropped": Fault(
        faults.router_detached,
        ("Mixture", "Mixtral", ROUTER),
        (
            "gradient of layers.1.block_sparse_moe.experts.0.w1.weight",
            "gradient of the output of layers.1.post_attention_layernorm",
        ),
        MIXTRAL,
    ),
    "AdamW: no bias correction": Fault(faults.adamw(bias_correction=False), (ADAMW, TRAINING), None),
    "AdamW: norms and biases decayed": Fault(faults.adamw(decay_everything=True), (ADAMW, TRAINING), None),
    "Muon: momentum is not Nesterov's": Fault(faults.plain_momentum, (MUON, MUON_TRAINING), None),
    "Muon: scaled as the transposed matrix": Fault(faults.scale_of_the_transpose, (MUON,), None),
    "gradient accumulation: unweighted mean": Fault(faults.plain_means, (TRAINING,), None),
    "LoRA: α instead of α / r": Fault(faults.unscaled_lora, ("LoRA", LORA_TRAINING, ADAPTER), None),
    "classification: last padded instead of last real token": Fault(
        faults.last_padded, ("SequenceClassifier", CLASSIFIER, CLASSES), None
    ),
    "top-k: ties kept": Fault(faults.ties_kept, (SAMPLING,), None),
    "instructions: prompt not masked": Fault(faults.examples(faults.prompt_learned), (INSTRUCT,), None),
    "instructions: labels shifted by one": Fault(faults.labels_shifted, (INSTRUCT,), None),
    "instructions: padding counted": Fault(faults.padding_counted, (INSTRUCT,), None),
    "DPO: reference drifting": Fault(faults.reference_drifting, (DPO,), None),
}

# -------------------------------------------------------------------------------- the tests


def located(config) -> tuple[str, str] | None:
    """The last row of the report that agrees and the first that differs, or None if all agree."""
    model = random_model(config)
    batch = report.random_batch(model, 2, 8, 0)
    findings = report.examine(model, bridge.to_torch(model), bridge.to_transformers(model), *batch)
    if findings.first is None:
        return None
    first, side = findings.first
    rows = (findings.twin if side == "the twin" else findings.theirs).rows
    number = rows.index(first)
    return str(rows[number - 1]) if number else "nothing", str(first)


def test_correct_replacements_are_not_reported_as_faults(monkeypatch):
    """With correct options every check of their faults passes, and every row agrees."""
    faults.adamw()(monkeypatch)
    faults.attention(lambda q, k, given: {})(monkeypatch)
    checks = {
        c
        for name, fault in FAULTS.items()
        if name.startswith(("attention:", "AdamW:"))
        for c in fault.caught_by
    }
    assert failing(sorted(checks)) == {}
    every = CONFIG, EVERYTHING, GEMMA2, GEMMA3, QWEN2, QWEN3, MISTRAL, MIXTRAL
    assert [located(config) for config in every] == [None] * 8


@pytest.mark.fault
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_and_located(name, monkeypatch, record_property):
    fault = FAULTS[name]
    fault.plant(monkeypatch)
    caught, where = failing(fault.caught_by), located(fault.config)
    if where:
        place = f"{where[1]} (last to agree: {where[0]})"
    elif recipes := [check for check in caught if check in (TRAINING, LORA_TRAINING, CLASSES)]:
        place = str(caught[recipes[0]]).partition(":")[0]
    else:
        place = "outside the model's layers"
    for column in ("fault", name), ("caught by", ", ".join(caught)), ("located at", place):
        record_property(*column)
    assert tuple(caught) == fault.caught_by
    assert where == fault.located


UNTIED = replace(CONFIG, tie_word_embeddings=False, lm_head_bias=True)


def test_the_written_table_lists_exactly_the_planted_faults():
    _, written = tables.first_cells(tables.read(tables.PAGE, "proof"))
    assert written == list(FAULTS), "run: python -m parity proof --write"


@pytest.mark.parametrize("config", [UNTIED, EVERYTHING], ids=["gpt2", "llama"])
def test_the_first_differing_row_is_the_layer_with_the_wrong_parameter(config):
    """Scale one parameter at a time by 1 + 1e-8: the first row that differs is its layer's output."""
    model = random_model(config)
    twin = bridge.to_torch(model)
    ids, _ = report.random_batch(model, 2, 8, 0)
    for name, parameter in model.named_parameters():
        right = parameter.data.copy()
        parameter.data[...] *= faults.FACTOR
        first = compare(model, twin, ids).first
        assert str(first) == f"output of {name.rpartition('.')[0]}"
        parameter.data[...] = right
    assert compare(model, twin, ids).first is None
