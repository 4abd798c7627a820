"""OpenAI's weights from the hub. Runs only with ``pytest -m network``."""

import numpy as np
import pytest

from tinyllm import GPT2, load_model, load_tokenizer
from tinyllm.data.batches import Windows
from tinyllm.data.corpus import load_text, train_validation_split
from tinyllm.inference.chat import find_tokenizer
from tinyllm.training.tasks.pretrain import mean_loss
from tinyllm.weights.pull import find_pulled, pull

pytestmark = pytest.mark.network


@pytest.fixture(scope="module")
def gpt2():
    return GPT2.from_pretrained("gpt2")


def test_logits_equal_those_of_transformers(gpt2):
    import torch
    from transformers import GPT2LMHeadModel

    theirs = GPT2LMHeadModel.from_pretrained("gpt2", dtype=torch.float64, attn_implementation="eager").eval()
    ids = np.array([load_tokenizer("gpt2").encode(load_text("the-verdict").text)[:256]])
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids)).logits.numpy()
    logits = GPT2.from_pretrained("gpt2", dtype=np.float64)(ids).data
    assert np.abs(logits - expected).max() < 1e-10 * np.abs(expected).max()


def test_published_losses_on_the_verdict(gpt2):
    tokenizer = load_tokenizer("gpt2")
    parts = train_validation_split(load_text("the-verdict").text)
    train, validation = (mean_loss(gpt2, Windows(tokenizer.encode(part), 256), 18, 2) for part in parts)
    assert abs(train - 3.7547) < 1e-3
    assert abs(validation - 3.5596) < 1e-3


def test_pulled_gpt2_is_the_same_model_and_tokenizer(gpt2, tmp_path, monkeypatch):
    """Its files at the pinned revision have the pinned checksums, and the name then means them."""
    monkeypatch.setenv("TINYLLM_CACHE", str(tmp_path))
    folder = pull("gpt2")
    assert folder == find_pulled("gpt2") == find_tokenizer("gpt2")
    pulled, state = load_model("gpt2"), gpt2.state_dict()
    assert pulled.num_parameters() == 124_439_808
    for name, array in pulled.state_dict().items():
        np.testing.assert_array_equal(array, state[name], err_msg=name)
    text = load_text("the-verdict").text
    assert load_tokenizer(folder).encode(text) == load_tokenizer("gpt2").encode(text)
