"""What is asked of a judge and read from its reply, scores against a reference, and the bootstrap."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinyllm.errors import Error
from tinyllm.inference.judge import exact_match, parse_score, parse_verdict, summarize, token_f1, win

SCORES = {
    "85": 85,
    " 85\n": 85,
    "0": 0,
    "100": 100,
    "Score: 85": 85,
    "**85**": 85,
    "85/100": 85,
    "100/100": 100,
    "85 out of 100": 85,
    "**90**/100": 90,
    "100 out of 100 of them": 100,
    "90%": 90,
    "85.5": 85.5,
    "I give it 85, because it is concise.": 85,
    "85. The answer is short; hence 85.": 85,
    "<think>Perhaps 30? No.</think>\n\n60": 60,
}

NO_SCORES = [
    *("", "good", "101", "1000", "1,000", "-5", "7 out of 10", "between 80 and 90", "A1", "½", "8e1"),
    *("<think>85", "eighty-five", "85-90"),
    *(
        "10/10",
        "10 out of 10",
        "5/5",
        "8/10",
        "10 of 10",
        "I'd say 10 / 10.",
        "**10**/10",
        "10 from 10",
        "1:1",
    ),
    *("0/0", "10/10, or 10", "Score: 5 Out Of 5"),
]


@pytest.mark.parametrize("reply", SCORES)
def test_a_score_is_read(reply):
    assert parse_score(reply) == SCORES[reply]


@pytest.mark.parametrize("reply", NO_SCORES)
def test_what_is_no_score_is_none(reply):
    assert parse_score(reply) is None


@given(st.text(st.sampled_from("0123456789 .,-%/<think>outof10A\n"), max_size=30))
def test_a_score_is_from_0_to_100_or_none(reply):
    score = parse_score(reply)
    assert score is None or 0 <= score <= 100


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("A", "A"), ("b", "B"), ("tie", "tie"), ("Tie.", "tie"), ("**B**", "B"), ("Response A.", "A"),
        ("The better response is B.", "B"), ("Answer: A", "A"), ("<think>A or B</think>B", "B"),
        ("", None), ("C", None), ("both", None), ("A good question", None), ("A and B", None),
        ("A\n\nB", None),
    ],
)  # fmt: skip
def test_a_verdict_is_read(reply, verdict):
    assert parse_verdict(reply) == verdict


def test_an_answer_wins_only_if_it_is_preferred_in_both_orders():
    assert win("A", "B") == 1.0  # the first answer, at either place
    assert win("B", "A") == 0.0
    for first_place in ("A", "B"):  # a judge that prefers a place
        assert win(first_place, first_place) == 0.5
    assert win("tie", "tie") == win("tie", "A") == win("B", "tie") == 0.5
    assert win(None, "A") is None and win("A", None) is None


def test_exact_match_and_f1_by_hand():
    assert exact_match("The  Eiffel Tower!", "eiffel tower") == 1
    assert exact_match("Eiffel", "Eiffel Tower") == 0
    assert token_f1("Paris is big", "it is Paris") == pytest.approx(2 / 3)
    assert token_f1("is is is", "is") == pytest.approx(
        2 * (1 / 3) * 1 / (1 / 3 + 1)
    )  # not counted three times
    assert token_f1("", "x") == token_f1("x", "") == token_f1("x", "y") == 0
    assert token_f1("the", "a") == 1  # both have no words


@given(st.text(max_size=20), st.text(max_size=20))
def test_f1_is_symmetric_and_1_for_equal_texts(a, b):
    assert token_f1(a, b) == token_f1(b, a)
    assert 0 <= token_f1(a, b) <= 1
    assert token_f1(a, a) == exact_match(a, a) == 1


def test_the_interval_is_the_means_standard_error():
    """For many rows the bootstrap interval approaches mean ± 1.96 s/√n."""
    values = np.random.default_rng(0).normal(50, 10, 400)
    found = summarize([*values, None, None])
    error = 1.96 * values.std() / np.sqrt(len(values))
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - error, values.mean() + error), rel=2e-3)
    assert (found.rows, found.without) == (400, 2)
    assert summarize([*values, None, None]) == found


def test_one_row_and_no_row():
    assert summarize([70.0])[:3] == (70.0, 70.0, 70.0)
    for values in ([], [None, None]):
        with pytest.raises(Error, match=f"none of the {len(values)} rows"):
            summarize(values)
