"""Gemma 3 270M from its GGUF file, in tinyllm and in transformers, which reads the same file."""

import os
from pathlib import Path

import numpy as np
import pytest

from tinyllm import load_model, load_tokenizer, no_grad
from tinyllm.inference.generate import generate
from tinyllm.models import Gemma3, Gemma3Config

GEMMA3 = os.environ.get("TINYLLM_GEMMA3")
if not GEMMA3:
    pytest.skip("TINYLLM_GEMMA3 names no gemma-3-270m-q4_k_m.gguf", allow_module_level=True)

pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPT = "The three primary colors are"
TEXT = """Rowing home, the old man counted the lights on the far shore: seven, as on every night since 1908.
He had never asked who lit them. "They are there," he used to say, "and so am I." When the wind turned, he
drew in the oars, let the boat drift for a while, and listened. Die Straße war leer, nur ein Hund lief über
die Brücke. L'été dernier, il faisait plus chaud qu'aujourd'hui. The capital of Norway is Oslo."""


@pytest.fixture(scope="module")
def ours():
    return load_model(GEMMA3)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GEMMA3)


@pytest.fixture(scope="module")
def theirs():
    path = Path(GEMMA3)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@pytest.fixture(scope="module")
def prompt(tokenizer):
    return [tokenizer.bos_id, *tokenizer.encode(PROMPT)]


@pytest.fixture(scope="module")
def greedy(ours, prompt):
    """24 greedy tokens with the cache."""
    return [int(step[0]) for step in generate(ours, [prompt], max_new_tokens=24, temperature=0)]


def test_config_and_size_are_as_published(ours, theirs):
    assert type(ours) is Gemma3 and type(theirs).__name__ == "Gemma3ForCausalLM"
    assert ours.num_parameters() == theirs.num_parameters() == 268_098_176
    eps = float(np.float32(1e-6))  # as a GGUF file stores it
    assert ours.config == Gemma3Config.preset("Gemma-3-270M", rms_norm_eps=eps)


def test_weights_are_those_that_transformers_reads(ours, theirs):
    """The norms' too, which the file stores as 1 + w."""
    parameters = {name.removeprefix("model."): p for name, p in theirs.named_parameters()}
    assert parameters.keys() == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        np.testing.assert_allclose(p.data, parameters[name].detach().numpy(), rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("repeats", [1, 6], ids=["within the window", "past the window"])
def test_logits_equal_transformers(ours, theirs, tokenizer, repeats):
    ids = [tokenizer.bos_id, *tokenizer.encode(TEXT) * repeats]
    assert (len(ids) > 600) == (repeats > 1)  # the window is 512
    with no_grad(), torch.no_grad():
        h = ours.hidden_states([ids])
        logits = ours.lm_head(h[:, -80:]).data
        expected = theirs(torch.tensor([ids]), logits_to_keep=80).logits.numpy()
    assert logits.dtype == expected.dtype == np.float32
    assert np.abs(expected).max() > 10  # the scale of the bound below
    assert np.abs(logits - expected).max() < 1e-3


def test_greedy_tokens_equal_transformers(theirs, prompt, greedy):
    ids = torch.tensor([prompt])
    options = dict(max_new_tokens=24, do_sample=False, pad_token_id=0)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert len(greedy) == 24 and greedy == expected[0, len(prompt) :].tolist()


def test_the_continuation_is_english(tokenizer, greedy):
    text = tokenizer.decode(greedy).lower()
    assert "red" in text and "blue" in text and "yellow" in text


def test_tokens_are_equal_without_the_cache(ours, prompt, greedy):
    uncached = generate(ours, [prompt], max_new_tokens=6, temperature=0, use_cache=False)
    assert [int(step[0]) for step in uncached] == greedy[:6]
