"""Multiple choice by log-probability, against torch."""

import numpy as np
import pytest
import torch
from support.models import EVERYTHING, NO_DROPOUT, SMALL, random_model

from parity.twins import bridge
from tinyllm import GPT2Config
from tinyllm.errors import Error
from tinyllm.inference.choices import log_prob, most_likely, parse_question

ROW = {"question": "2 + 2?", "choices": ["three", "four", "B"], "answer": 1}


@pytest.mark.parametrize("config", [GPT2Config(**SMALL), EVERYTHING], ids=["gpt2", "llama"])
def test_log_prob_equals_torchs(config):
    model = random_model(config).train()
    twin = bridge.to_torch(model).eval()
    rng = np.random.default_rng(0)
    for prompt, answer in ((1, 1), (3, 2), (1, 8), (8, 1)):
        ids = rng.integers(0, config.vocab_size, prompt + answer)
        log_probs = twin(torch.tensor(ids[None, :-1])).log_softmax(-1)[0]
        expected = sum(log_probs[i - 1, ids[i]].item() for i in range(prompt, len(ids)))
        assert log_prob(model, ids[:prompt], ids[prompt:]) == pytest.approx(expected, rel=1e-10)
    assert model.training


def test_log_prob_refuses_what_does_not_fit():
    model = random_model(GPT2Config(**SMALL, **NO_DROPOUT))
    with pytest.raises(Error, match=r"10 tokens.* 8"):
        log_prob(model, [1] * 4, [1] * 6)
    for prompt, answer in (([], [1]), ([1], [])):
        with pytest.raises(Error, match="both need one"):
            log_prob(model, prompt, answer)


def test_the_most_likely_choice():
    texts = ["a", "aaaa"]
    assert most_likely([-2.0, -4.0], texts) == 0
    assert most_likely([-2.0, -4.0], texts, normalize=True) == 1
    assert most_likely([-2.0, -2.1], ["é", "aa"], normalize=True) == 0  # two bytes each
    assert most_likely([-1.0, -1.0], texts) == 0


@pytest.mark.parametrize(("answer", "position"), [(1, 1), ("B", 2), ("A", 0), ("C", 2), ("four", 1)])
def test_the_answer_is_a_text_a_letter_or_a_position(answer, position):
    """A choice that is a letter itself comes before the letter of a choice."""
    assert parse_question(ROW | {"answer": answer}, "row 1").answer == position


def test_the_choices_are_listed_by_letter():
    assert parse_question(ROW, "row 1").listed == "2 + 2?\nA. three\nB. four\nC. B"


@pytest.mark.parametrize(
    "change",
    [
        *({"answer": wrong} for wrong in (3, -1, "D", "five", None, True, 1.0, "")),
        *({"choices": wrong} for wrong in ([], ["x"], ["x", "x"], ["x", ""], ["x", 3], "xy", ["x"] * 30)),
        {"question": 3},
    ],
)
def test_a_malformed_question_is_refused(change):
    with pytest.raises(Error, match=r"row 7 of q\.json"):
        parse_question(ROW | change, "row 7 of q.json")
    with pytest.raises(Error, match="row 7"):
        parse_question({key: value for key, value in ROW.items() if key not in change}, "row 7")
