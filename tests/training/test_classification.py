"""Scores of a classifier against their definitions, naive Bayes against a calculation by hand."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.errors import Error
from tinyllm.training import classification
from tinyllm.training.classification import (
    NaiveBayes,
    Scores,
    confusion_matrix,
    draw_confusion,
    majority,
    words,
)

pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40)


@given(pairs=pairs)
def test_scores_equal_their_definitions(pairs):
    targets, predictions = zip(*pairs)
    scores = Scores(confusion_matrix(targets, predictions, 4), tuple("abcd"))
    assert scores.number == len(pairs)
    assert scores.accuracy == pytest.approx(sum(t == p for t, p in pairs) / len(pairs))
    for k in range(4):
        hits = sum(t == p == k for t, p in pairs)
        found, wanted = predictions.count(k), targets.count(k)
        assert scores.precision[k] == pytest.approx(hits / found if found else 0)
        assert scores.recall[k] == pytest.approx(hits / wanted if wanted else 0)
        p, r = scores.precision[k], scores.recall[k]
        assert scores.f1[k] == pytest.approx(2 * p * r / (p + r) if hits else 0)


def test_scores_as_text_and_as_json():
    scores = Scores(np.array([[3, 1], [2, 14]]), ("bad", "good"))
    head, bad, good = scores.describe().splitlines()
    assert head.split() == ["precision", "recall", "F1", "examples", "as", "bad", "as", "good"]
    assert bad.split() == ["bad", "60.0%", "75.0%", "66.7%", "4", "3", "1"]
    assert good.split() == ["good", "93.3%", "87.5%", "90.3%", "16", "2", "14"]
    assert len(head) == len(bad) == len(good)
    found = scores.to_json()
    assert found["accuracy"] == 0.85 and found["confusion"] == [[3, 1], [2, 14]]
    assert found["classes"]["bad"] == pytest.approx(
        {"precision": 0.6, "recall": 0.75, "f1": 2 / 3, "examples": 4}
    )


@pytest.mark.parametrize("labels", [("bad", "good"), (r"$\bad$", "$"), tuple("abcdefghij")], ids=len)
def test_the_picture_is_a_png(tmp_path, monkeypatch, labels):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(classification, "NAMED", 3)
    path = tmp_path / "confusion.png"
    draw_confusion(Scores(np.eye(len(labels), dtype=int), labels), path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and max(struct.unpack(">II", data[16:24])) < 1000


def test_naive_bayes_by_hand():
    texts, targets = ["good good film", "bad film", "bad bad"], [1, 0, 0]
    bayes = NaiveBayes(texts, targets, 2)
    # Words: bad 3 and film 1 in class 0, good 2 and film 1 in class 1; vocabulary 3
    assert bayes.log_likelihood["bad"] == pytest.approx([math.log(4 / 7), math.log(1 / 6)])
    assert bayes.log_likelihood["film"] == pytest.approx([math.log(2 / 7), math.log(2 / 6)])
    assert np.exp(bayes.log_prior) == pytest.approx([2 / 3, 1 / 3])
    assert bayes.predict(["good", "Bad!", "film", "unknown", ""]) == [1, 0, 0, 0, 0]
    assert NaiveBayes(["a"], [1], 3).predict(["a", "b"]) == [1, 1]


def test_baselines_of_nothing_are_refused():
    for texts, targets in (([], []), (["a"], [])):
        with pytest.raises(Error, match="texts"):
            NaiveBayes(texts, targets, 2)


def test_words_and_the_most_frequent_class():
    assert words("Don't STOP — it's 9½ ÄPFEL!") == ["don't", "stop", "it's", "9½", "äpfel"]
    assert majority([2, 0, 2, 1, 1]) == 1
