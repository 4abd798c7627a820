"""OpenAI's weights from the hub. Runs only with ``pytest -m network``."""

import numpy as np
import pytest

from tinyllm import GPT2, load_tokenizer
from tinyllm.data.batches import Windows
from tinyllm.data.corpus import load_text, train_validation_split
from tinyllm.training.tasks.pretrain import mean_loss

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
