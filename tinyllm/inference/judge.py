"""How good are a model's answers?

A number for an answer comes from

    another model that reads it     0 to 100, or which of two answers is better (``--by score | pair``)
    a reference answer              exact match and token F1 (``--by match``)
    the model itself                the choice with the highest probability (``choices.py``)

A judge that is a language model prefers longer answers, its own, and the one that it reads first (Zheng et
al., arXiv 2306.05685, section 3.3). The last can be measured: every pair is shown in both orders, and an
answer wins only if it is preferred in both.

The mean over a test set is that of a sample. How much it would vary with another sample is estimated by
drawing from the same rows with replacement: the bootstrap (Efron, Annals of Statistics 7, 1979).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import NamedTuple

import numpy as np

from tinyllm.errors import Error

SCORE = """\
Given the input

{prompt}

and the correct output

{reference}

score the response

{answer}

on a scale from 0 to 100, where 100 is the best score. Respond with the integer number only."""

PAIR = """\
Which response to the following input is better, A or B?

Input:
{prompt}

Response A:
{first}

Response B:
{second}

Respond with the letter A or B only, or with the word tie if they are equally good."""

THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
NUMBER = re.compile(r"(?<![\w.,-])\d+(?:\.\d+)?(?!\w|[.,-]\d)")
OF_HUNDRED = re.compile(r"\s*(?:/|out of)\s*100\b|\s*%", re.IGNORECASE)
# Another scale: 10/10
RATIO = re.compile(r"\d[\s*_]*(?:[/:]|(?:out\s+)?of\b|from\b)[\s*_]*\d", re.IGNORECASE)
BETTER = r"(?:the )?(?:better )?(?:response|answer)(?: is)?"
VERDICT = re.compile(rf"\W*(?:{BETTER})?\W*(a|b|tie)\W*", re.IGNORECASE)

RESAMPLES = 10_000


def parse_score(reply: str) -> float | None:
    """The score from 0 to 100 in a judge's reply; None if there is none, more than one, or another scale."""
    text = OF_HUNDRED.sub(" ", THOUGHT.sub("", reply))
    found = set() if RATIO.search(text) else {float(number) for number in NUMBER.findall(text)}
    return found.pop() if len(found) == 1 and max(found) <= 100 else None


def parse_verdict(reply: str) -> str | None:
    """``"A"``, ``"B"`` or ``"tie"``; None if the reply is anything else."""
    found = VERDICT.fullmatch(THOUGHT.sub("", reply).strip())
    return found and (found[1].upper() if len(found[1]) == 1 else "tie")


def win(verdict: str | None, swapped: str | None) -> float | None:
    """1 if the first answer is better, 0 if the second is, else ½; None unless both verdicts are known.

    ``swapped`` is the verdict about the same answers in the other order. If the two disagree, that is ½.
    """
    if verdict is None or swapped is None:
        return None
    value = {"A": 1.0, "B": 0.0, "tie": 0.5}
    return {2.0: 1.0, 0.0: 0.0}.get(value[verdict] + 1 - value[swapped], 0.5)


# ------------------------------------------------------------------- against a reference answer


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and repeated whitespace, as SQuAD's evaluation does it."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, reference: str) -> float:
    """1 if both are the same text, ``normalized``, else 0."""
    return float(normalized(answer) == normalized(reference))


def token_f1(answer: str, reference: str) -> float:
    """2 P R / (P + R), with P the share of the answer's words in common, and R that of the reference's words.

    Words are those of the ``normalized`` texts. Rajpurkar et al., arXiv 1606.05250, section 6.1.
    """
    ours, theirs = normalized(answer).split(), normalized(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))  # P = common/ours, R = common/theirs


# -------------------------------------------------------------------------------------- summary


class Summary(NamedTuple):
    """The mean of the rows that have a value, and the interval that holds 95% of the resampled means."""

    mean: float
    low: float
    high: float
    rows: int
    without: int  # rows without a value, such as a judge's reply that is no score

    def __str__(self) -> str:
        return f"{self.mean:.2f} ({self.low:.2f} to {self.high:.2f})"


def summarize(values: list[float | None]) -> Summary:
    """The mean of the values and its bootstrap interval (percentiles 2.5 and 97.5), without those of None.

    Raises ``Error`` if no row has a value.
    """
    known = np.array([value for value in values if value is not None], np.float64)
    if len(known) == 0:
        raise Error(f"none of the {len(values)} rows has a score: read the replies, or choose another judge")
    rng = np.random.default_rng(0)
    means = [known[rng.integers(0, len(known), len(known))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Summary(known.mean().item(), low.item(), high.item(), len(known), len(values) - len(known))
